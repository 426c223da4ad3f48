"""Figures of one device and of the links between two: how fast it multiplies, copies, and talks. Imports torch.

Every figure is a median over repetitions that fill a given time, so that a slow device takes no longer than a fast one.
A link is measured as a stream of messages in one direction that the receiver confirms at the end, and its latency as
half of a round trip of eight bytes. The transport is that of training: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

MIB = 1 << 20
_REPEATS = 5
_MAX_STREAM = 400  # messages in one stream
_PINGS = (20, 200)  # round trips, warm-up and measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        seconds: Time for one figure.
        shapes: Matmuls as (m, n, k): an m x k matrix times a k x n matrix.
        copy_bytes: Size of the buffer whose copy shows the memory's bandwidth.
        messages: Message sizes of the links, in bytes, ascending.
    """

    seconds: float
    shapes: tuple[tuple[int, int, int], ...]
    copy_bytes: int
    messages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matmul:
    """Rate of one shape.

    Attributes:
        dtype: ``fp32`` (on tensor cores: TF32), ``bf16``, ``fp16`` or ``fp8``.
        shape: (m, n, k).
        flops: Operations per second, 2 m n k per product.
    """

    dtype: str
    shape: tuple[int, int, int]
    flops: float


def device_of(local_rank: int) -> torch.device:
    """The device that a rank computes on, made current.

    Raises:
        RuntimeError: The node has fewer devices than ranks.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():  # as DeepSpeed decides
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(f"slot {local_rank} has no device: torch sees {torch.cuda.device_count()} on this node")
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")  # TF32, as training uses it
    return torch.device("cuda", local_rank)


def backend_of(device: torch.device) -> str:
    """Communication backend: the device's own, and gloo for what the ranks tell each other beside it."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def effort_for(device: torch.device, *, quick: bool) -> Effort:
    """What a probe of this device measures: about a minute, or about ten seconds."""
    thin: tuple[tuple[int, int, int], ...]  # as the shards of wide layers, and of few tokens
    if device.type == "cuda":
        sides = [1024, 4096, 8192] if quick else [512, 1024, 2048, 4096, 8192, 16384]
        thin = ((8192, 8192, 1024), (128, 8192, 8192))
        sizes = [4 << 10, MIB, 64 * MIB] if quick else [4 << 10, 64 << 10, MIB, 8 * MIB, 64 * MIB, 256 * MIB]
        seconds, copy_bytes = 0.2 if quick else 1.0, 1024 * MIB
    else:
        sides = [256, 512] if quick else [128, 256, 512, 1024]
        thin = ((64, 1024, 1024),)
        sizes = [4 << 10, MIB, 8 * MIB] if quick else [4 << 10, 64 << 10, MIB, 8 * MIB, 32 * MIB]
        seconds, copy_bytes = 0.2 if quick else 1.5, (32 if quick else 128) * MIB
    shapes = _squares(sides) + (() if quick else thin)
    return Effort(seconds=seconds, shapes=shapes, copy_bytes=copy_bytes, messages=tuple(sizes))


def _squares(sides: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple((side, side, side) for side in sides)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 by itself (Ampere or newer; ROCm; every CPU does it somehow)."""
    return device.type == "cpu" or torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8


def dtypes_of(device: torch.device) -> tuple[str, ...]:
    """Arithmetics worth measuring; fp8 needs Ada or Hopper (capability 8.9)."""
    half = "bf16" if has_bf16(device) else "fp16"
    fp8 = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)
    return ("fp32", half, "fp8") if fp8 else ("fp32", half)


def matmuls(device: torch.device, dtype: str, effort: Effort) -> Iterator[Matmul]:
    """Rate of every shape in one arithmetic; shapes that this torch cannot multiply are left out."""
    for shape in effort.shapes:
        m, n, k = shape
        try:
            multiply = _product(device, dtype, m, n, k)
            spent = _median_s(multiply, device, effort.seconds)
        except (RuntimeError, AttributeError, NotImplementedError):
            if dtype != "fp8":  # its interface is torch's private one and differs by version
                raise
            continue
        yield Matmul(dtype=dtype, shape=shape, flops=2.0 * m * n * k / spent)


def _product(device: torch.device, dtype: str, m: int, n: int, k: int) -> Callable[[], object]:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}[dtype]
    left, right = torch.randn(m, k, device=device).to(kind), torch.randn(n, k, device=device).to(kind)
    if dtype == "fp8":
        a, b, one = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn), torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    out = torch.empty(m, n, device=device, dtype=kind)
    return lambda: torch.matmul(left, right.t(), out=out)  # the layout of a linear layer


def memory_bandwidth(device: torch.device, effort: Effort) -> float:
    """Bytes per second that a large copy inside the device's memory reads and writes, both counted."""
    source = torch.ones(effort.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * effort.copy_bytes / _median_s(lambda: target.copy_(source), device, effort.seconds)


def host_bandwidth(device: torch.device, effort: Effort) -> float | None:
    """Bytes per second from pinned host memory to the device; None where the device's memory is the host's."""
    if device.type == "cpu":
        return None
    size = effort.copy_bytes // 4
    source = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _median_s(lambda: target.copy_(source, non_blocking=True), device, effort.seconds)


def _median_s(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one call, the median of a few batches that together take about ``seconds``."""
    _batch_s(work, device, 1)  # kernels are chosen and memory is touched on first use
    once = _batch_s(work, device, 1)
    calls = max(1, int(seconds / _REPEATS / max(once, 1e-7)))
    repeats = _REPEATS if once * _REPEATS < 2 * seconds else 1
    return statistics.median(_batch_s(work, device, calls) / calls for _ in range(repeats))


def _batch_s(work: Callable[[], object], device: torch.device, calls: int) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- links ------------------------------------------------------------------------------------------------------


def stream(device: torch.device, peer: int, *, sends: bool, size: int, seconds: float) -> float:
    """Bytes per second of a stream of messages to a peer, who calls this with ``sends`` turned round.

    Args:
        device: Where the messages live.
        peer: The other rank.
        sends: This rank sends.
        size: Bytes of a message.
        seconds: Time that the stream should take.

    Returns:
        The rate on the sender; 0 on the receiver.
    """
    message = torch.ones(size, dtype=torch.uint8, device=device)
    _stream_s(device, peer, message, 2, sends=sends)  # connections are made on first use
    once = _stream_s(device, peer, message, 2, sends=sends) / 2
    count = _agreed(device, peer, min(_MAX_STREAM, max(2, int(seconds / 2 / max(once, 1e-6)))), sends=sends)
    rounds = [_stream_s(device, peer, message, count, sends=sends) for _ in range(3)]
    return count * size / statistics.median(rounds) if sends else 0.0


def _stream_s(device: torch.device, peer: int, message: torch.Tensor, count: int, *, sends: bool) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        _transfer(message, peer, sends=sends)
    _transfer(torch.zeros(1, dtype=torch.int64, device=device), peer, sends=not sends)
    synchronize(device)
    return time.perf_counter() - began


def _agreed(device: torch.device, peer: int, count: int, *, sends: bool) -> int:
    """The sender's number, on both sides."""
    number = torch.tensor([count], dtype=torch.int64, device=device)
    _transfer(number, peer, sends=sends)
    return int(number.item())


def latency(device: torch.device, peer: int, *, sends: bool) -> float:
    """Seconds of half a round trip of eight bytes; 0 on the rank that answers."""
    ping = torch.zeros(1, dtype=torch.int64, device=device)
    trips = []
    for _ in range(sum(_PINGS)):
        began = time.perf_counter()
        _transfer(ping, peer, sends=sends)
        _transfer(ping, peer, sends=not sends)
        synchronize(device)
        trips.append(time.perf_counter() - began)
    return statistics.median(trips[_PINGS[0] :]) / 2 if sends else 0.0


def _transfer(data: torch.Tensor, peer: int, *, sends: bool) -> None:
    if sends:
        dist.send(data, peer)
    else:
        dist.recv(data, peer)


def wait_for_all() -> None:
    """Go on when every rank is here; on the CPU, so that no device spins meanwhile."""
    dist.all_reduce(torch.zeros(1))


def least_of_all(number: int) -> int:
    """The smallest of what all ranks say. Collective."""
    word = torch.tensor([number], dtype=torch.int64)
    dist.all_reduce(word, op=dist.ReduceOp.MIN)
    return int(word.item())
