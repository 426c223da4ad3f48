"""Seconds of one kernel on one device: matrix multiplications, attention, memory-bound work. Plain arithmetic.

The forms are physics, the four numbers of a :class:`Device` that say how close to the data sheet programs come are
fitted (:mod:`strategies.calibration`).
"""

from __future__ import annotations

from typing import NamedTuple

_TILES = (
    (256, 128, 256 * 128 * 1.0),
    (128, 256, 128 * 256 * 1.0),
    (128, 128, 128 * 128 * 1.05),
    (64, 64, 64 * 64 * 1.6),
)
"""Tiles that libraries cut products into: rows, columns, and their cost. Smaller tiles read their operands more often,
so an element costs more in them (NVIDIA's matrix multiplication guide, "tile quantization"); cuBLAS takes the best."""

_ALIGNED = 6
"""Factors of 2 that tensor cores want in the rows of their operands: 64 elements of 16 bit are the 128 bytes of
NVIDIA's guide ("tensor core requirements"). The penalty grows with every factor that is missing."""

_HEAD_HALF = 20.0
_SEQ_HALF = 256.0
"""Flash attention loses to short rows of heads and short sequences: figures 4 to 7 of FlashAttention-2
(arXiv 2307.08691) show about 0.88 of the head width 128 at 64, and half of the peak at a few hundred tokens."""


class Device(NamedTuple):
    """What kernels see of a device.

    Attributes:
        linear: Operations per second of large, aligned products of activations with weights.
        half: The same of products that stay in 16 bit when the others are in fp8 (the output projection).
        batched: Operations per second of large, aligned products of attention, which stay in 16 bit.
        flash: Operations per second of fused attention on long sequences with heads of 128, counted causal.
        bandwidth: Bytes per second of kernels that only move memory.
        processors: Units that the tiles of a product are dealt to.
        depth: Steps along the inner dimension that a tile loses to its start and end (fill, drain, epilogue).
        wave: Share of the last, partly filled wave of tiles that is lost.
        itemsize: Bytes of one operand of the linear products.
    """

    linear: float
    half: float
    batched: float
    flash: float
    bandwidth: float
    processors: int
    depth: float = 128.0
    wave: float = 0.5
    itemsize: float = 2.0


def gemm_s(device: Device, m: float, n: float, k: float, count: float = 1.0, *, batched: bool = False) -> float:
    """Seconds of ``count`` products of an ``m`` x ``k`` with a ``k`` x ``n`` matrix, launched as one kernel.

    The largest of two times: the operations, dealt to the processors in tiles (the last wave is often not full), and
    the bytes of operands and result. Source of the form: NVIDIA's guide on tile and wave quantization.
    """
    rate = device.batched if batched else device.linear
    processors, lost = device.processors, device.wave
    best = 1e300
    for rows, columns, cost in _TILES:
        waves = count * -(-m // rows) * -(-n // columns) / processors
        time = (waves + lost * (-(-waves // 1) - waves)) * cost
        if time < best:
            best = time
    seconds = 2.0 * best * processors * (k + device.depth) / rate
    seconds *= misaligned(n) if n % 64 else misaligned(k)
    moved = count * (m * k + k * n + m * n) * (2.0 if batched else device.itemsize)
    return max(seconds, moved / device.bandwidth)


def misaligned(size: float) -> float:
    """How much slower products get when rows of ``size`` elements are not aligned: 1 (multiples of 64) to 2 (odd).

    BLOOM's hidden 14400 (rows of 1800 and 5400 elements after tensor parallelism) against 13824 shows about 1.3.
    """
    whole = int(size)
    if whole < 1 or whole != size:
        return 2.0
    factors = min(_ALIGNED, (whole & -whole).bit_length() - 1)
    return 2.0 - factors / _ALIGNED


def flash_s(device: Device, flops: float, head_width: float, seq: float) -> float:
    """Seconds of fused causal attention of ``flops`` operations (already halved for causality), forward or backward."""
    share = head_width / (head_width + _HEAD_HALF) * (128.0 + _HEAD_HALF) / 128.0
    share *= seq / (seq + _SEQ_HALF)
    return flops / (device.flash * min(share, 1.1))


def moved_s(device: Device, moved_bytes: float) -> float:
    """Seconds of memory-bound kernels that read and write ``moved_bytes``."""
    return moved_bytes / device.bandwidth
