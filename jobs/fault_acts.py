"""What a rank does to itself when a fault fires, beyond a signal or an exit code.

The faults that spoil one step's numbers act inside the step, through the arithmetic of autograd, so that what the
detector sees has gone through the same reductions as an accident would have.
"""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from jobs.checkpoint.layout import sync_dir
from jobs.spec import RankEnv

if TYPE_CHECKING:
    import torch
    from torch import nn

SLOWDOWN = 1.3  # a step of a slow rank takes this many times as long as before
SPIKE = 100.0  # the output of the rank's layers becomes this many times larger
_UNUSED_TAG = 7919


class Removable(Protocol):
    """What torch returns for a hook."""

    def remove(self) -> None:
        """Take the hook away."""


def spoil(kind: str, module: nn.Module) -> Removable:
    """Spoil the steps of this rank from now on.

    Args:
        kind: ``nan_grad``: the gradient of the rank's first parameter is NaN. ``loss_spike``: what the rank's layers
            put out (logits, or the loss itself) is :data:`SPIKE` times as large.
        module: This rank's part of the model.

    Returns:
        What ends it.
    """
    if kind == "loss_spike":
        return module.register_forward_hook(lambda _module, _inputs, output: output * SPIKE)
    first = next(parameter for parameter in module.parameters() if parameter.requires_grad)
    hook: Removable = first.register_hook(_not_a_number)  # type: ignore[no-untyped-call]
    return hook


def _not_a_number(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * float("nan")


class Drag:
    """Makes the steps of this rank longer, by sleeping in the first forward pass of each."""

    def __init__(self) -> None:
        self._began = 0.0
        self._steps: deque[float] = deque(maxlen=50)
        self._sleep_s = 0.0
        self._due = False

    def step_begin(self) -> None:
        """A step begins."""
        self._began, self._due = time.perf_counter(), True

    def step_end(self) -> None:
        """A step has ended; how long it took is remembered until the fault begins."""
        if not self._sleep_s:
            self._steps.append(time.perf_counter() - self._began)

    def begin(self, module: nn.Module) -> None:
        """From the next forward pass on.

        Args:
            module: This rank's part of the model.
        """
        self._sleep_s = (SLOWDOWN - 1) * (statistics.median(self._steps) if self._steps else 1.0)
        module.register_forward_pre_hook(lambda _module, _inputs: self._pause())

    def _pause(self) -> None:
        if self._due:
            self._due = False
            time.sleep(self._sleep_s)


def hold_the_interpreter() -> NoReturn:
    """Sleep in C without giving the lock back: no Python code of this process runs any more."""
    library = ctypes.PyDLL(None)
    while True:
        library.sleep(3600)


def wait_for_nobody(env: RankEnv) -> None:
    """Wait for a message that no rank sends."""
    import torch
    import torch.distributed as dist

    dist.recv(torch.zeros(1), src=(env.rank + 1) % env.world_size, tag=_UNUSED_TAG)


def wait_for_death() -> NoReturn:
    """Do nothing until a signal that is on its way has arrived."""
    while True:
        signal.pause()


def name_exclusively(aside: Path, path: Path) -> bool:
    """Give a finished file its name; False where that exists."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    sync_dir(path.parent)
    return True
