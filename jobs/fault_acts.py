"""What a rank does to itself when a fault fires, beyond a signal or an exit code.

The faults that spoil one step's numbers act inside the step, through the arithmetic of autograd, so that what the
detector sees has gone through the same reductions as an accident would have.
"""

from __future__ import annotations

import ctypes
import signal
from typing import TYPE_CHECKING, NoReturn, Protocol

from jobs.spec import RankEnv

if TYPE_CHECKING:
    import torch
    from torch import nn

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
