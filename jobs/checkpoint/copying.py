"""The copy of the state out of the engine, on a thread of its own, beside the next step's forward and backward.

Neither changes what a checkpoint holds, only the optimizer does: it waits for the copy. So a step stands still for what
of a copy its own forward and backward do not hide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from jobs.checkpoint.fragments import OptimizerAccess

Array = npt.NDArray[np.float32]

BESIDE_BYTES = 32 << 20
"""From here on a copy is worth a thread: 3 ms at 10 GB/s, as long as a thread waits for the interpreter at worst."""


class Copy(NamedTuple):
    """What is copied at once, and where to, in the same number of elements. ``source`` is None for zeros."""

    source: torch.Tensor | None
    target: Array


class Copier:
    """Copies while training goes on. Made once per optimizer, which it then makes wait.

    Args:
        optimizer: Whose state is copied.
        beside_bytes: Smaller copies are made at once.
    """

    def __init__(self, optimizer: OptimizerAccess, *, beside_bytes: int = BESIDE_BYTES) -> None:
        self._optimizer = optimizer
        self._beside_bytes = beside_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-copy")
        self._running: Future[None] | None = None
        optimizer.inner.register_step_pre_hook(lambda *_: self.wait())

    def start(self, turns: Iterable[Sequence[Copy]]) -> None:
        """Copy; what was started before must be over.

        A small state has been copied when this returns, and so has one on disks, which is in memory by turns only.
        """
        for copies in turns:
            small = sum(copy.target.nbytes for copy in copies) < self._beside_bytes
            if small or self._optimizer.on_disks:
                copy_all(copies)
            else:
                self._running = self._thread.submit(_copy_beside, copies, _side_stream(copies))

    def then(self, act: Callable[[], None]) -> None:
        """Do something after the copy: on its thread, or at once where there is nothing to wait for."""
        if self._running is None:
            act()
        else:
            self._running = self._thread.submit(_after, self._running, act)

    def wait(self) -> None:
        """Until all is done.

        Raises:
            StorageError: What the thread has raised; once.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _after(running: Future[None], act: Callable[[], None]) -> None:
    running.result()
    act()


def copy_all(copies: Sequence[Copy]) -> None:
    """Copy, in the calling thread."""
    with torch.no_grad():
        for source, target in copies:
            if source is None:
                target.fill(0.0)
            elif source.device.type == "cpu":
                np.copyto(target, source.numpy())  # one memcpy; torch's own copy is slower on one thread
            else:
                torch.from_numpy(target).copy_(source, non_blocking=True)
    for device in {source.device for source, _ in copies if source is not None and source.device.type != "cpu"}:
        torch.accelerator.current_stream(device).synchronize()


def pin(buffer: Array, device: torch.device) -> str:
    """Let a device write to host memory by itself; it would go through a small buffer of the driver's otherwise.

    Only CUDA and HIP have it, under one name, and it lasts as long as the process.

    Returns:
        Why it cannot; copies are slower then. Empty where it can, and where there is no such device.
    """
    if device.type != "cuda" or not buffer.nbytes:
        return ""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0))
    if not code:
        return ""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)  # the runtime keeps the error for whoever launches a kernel next
    return f"memory for copies cannot be pinned, so they are slower: {torch.cuda.CudaError(code)}"


def _side_stream(copies: Sequence[Copy]) -> torch.Stream | None:
    """On an accelerator: a stream that begins when the update has been computed, and does not wait for what follows."""
    device = next((copy.source.device for copy in copies if copy.source is not None), torch.device("cpu"))
    if device.type == "cpu":
        return None
    stream = torch.Stream(device=device)
    stream.wait_stream(torch.accelerator.current_stream(device))
    return stream


def _copy_beside(copies: Sequence[Copy], stream: torch.Stream | None) -> None:
    with contextlib.nullcontext() if stream is None else stream:
        copy_all(copies)
