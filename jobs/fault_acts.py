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
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from jobs.checkpoint.layout import sync_dir

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn

SLOWDOWN = 1.3  # a step of a slow rank takes this many times as long as before
SPIKE = 100.0  # the output of the rank's layers becomes this many times larger
WRECKING_RATE = 1.0  # with this learning rate Adam moves every weight by about 1, many times what it was


class Removable(Protocol):
    """What torch returns for a hook."""

    def remove(self) -> None:
        """Take the hook away."""


def spoil(kind: str, module: nn.Module) -> Removable:
    """Spoil the steps of this rank from now on.

    Args:
        kind: ``nan_grad``: the gradient of the rank's first parameter is NaN. ``loss_spike``: what the rank's layers
            put out (logits, or the loss itself) is :data:`SPIKE` times as large. ``bad_update``: weights are updated
            with a learning rate of :data:`WRECKING_RATE`.
        module: This rank's part of the model.

    Returns:
        What ends it.
    """
    if kind == "loss_spike":
        return module.register_forward_hook(lambda _module, _inputs, output: output * SPIKE)
    if kind == "bad_update":
        return _Wreck()
    first = next(parameter for parameter in module.parameters() if parameter.requires_grad)
    hook: Removable = first.register_hook(_not_a_number)  # type: ignore[no-untyped-call]
    return hook


def _not_a_number(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * float("nan")


class _Wreck:
    """Every update that this process makes is far too large, until it is taken away. Gradients are as they were."""

    def __init__(self) -> None:
        from torch.optim import optimizer

        self._rates: list[Any] = []
        self._hooks: list[Removable] = [
            optimizer.register_optimizer_step_pre_hook(self._raise),
            optimizer.register_optimizer_step_post_hook(self._lower),
        ]

    def remove(self) -> None:
        """See :class:`Removable`."""
        for hook in self._hooks:
            hook.remove()

    def _raise(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = WRECKING_RATE

    def _lower(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


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


def go_astray() -> None:
    """Let this process enter its next ``all_reduce`` with another group than its own, once.

    Nobody else comes there, and those who wait for this rank in its own group wait for ever: what a branch that depends
    on the rank does to real gangs.
    """
    import torch.distributed as dist

    right = dist.all_reduce

    def wrong(*arguments: Any, **options: Any) -> Any:
        given = arguments[2] if len(arguments) > 2 else options.get("group")
        other = _another_group(given)
        if other is None:
            return right(*arguments, **options)
        dist.all_reduce = right
        options["group"] = other
        return right(*arguments[:2], **options)

    dist.all_reduce = wrong


def _another_group(given: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A group of this rank that is not ``given``; None where it has no other, or where ``given`` is of one rank."""
    import torch.distributed as dist

    given = given or dist.group.WORLD
    if given is None or dist.get_world_size(given) < 2:
        return None
    groups = dist.distributed_c10d._world.pg_map
    others = [group for group in groups if group is not given and dist.get_world_size(group) > 1]
    return max(others, key=dist.get_world_size, default=None)


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
