"""The copy beside the next step: who waits for what. That every optimizer waits: tests/e2e/test_checkpoint.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from jobs.checkpoint.copying import Copier, Copy, pin
from jobs.checkpoint.fragments import OptimizerAccess


def copier_of(
    parameter: torch.Tensor, *, beside_bytes: int, on_disks: bool = False
) -> tuple[Copier, torch.optim.Optimizer]:
    inner = torch.optim.SGD([parameter], lr=1.0)
    optimizer = cast(OptimizerAccess, SimpleNamespace(inner=inner, on_disks=on_disks))
    return Copier(optimizer, beside_bytes=beside_bytes), inner


def test_small_state_is_copied_at_once() -> None:
    weight, target = torch.ones(4), np.zeros(4, np.float32)
    copier, _ = copier_of(weight, beside_bytes=17)
    copier.start([[Copy(weight, target)]])
    told: list[bool] = []
    copier.then(lambda: told.append(bool((target == 1).all())))
    assert told == [True]


def test_what_is_in_memory_by_turns_is_copied_in_its_turn() -> None:
    weight, target = torch.ones(4), np.zeros(4, np.float32)
    copier, _ = copier_of(weight, beside_bytes=0, on_disks=True)

    def turns() -> Iterator[list[Copy]]:
        for half in (slice(0, 2), slice(2, 4)):
            yield [Copy(weight[half], target[half])]
            assert (target[half] == 1).all()

    copier.start(turns())
    assert target.tolist() == [1.0] * 4


def test_an_update_waits_for_the_copy_and_what_follows_it() -> None:
    weight, target = torch.ones(4), np.zeros(4, np.float32)
    weight.grad = torch.ones(4)
    copier, inner = copier_of(weight, beside_bytes=16)
    go = threading.Event()
    order: list[tuple[str, Any]] = []
    copier.start([[]])  # nothing to copy, and small
    copier.start([[Copy(weight, target), Copy(None, target[:1])]])
    copier.then(lambda: order.append(("first", go.wait(60))))
    copier.then(lambda: order.append(("second", target.tolist())))
    threading.Timer(0.05, go.set).start()
    inner.step()
    assert order == [("first", True), ("second", [0.0, 1.0, 1.0, 1.0])]
    assert weight.tolist() == [0.0] * 4


def test_what_goes_wrong_on_the_thread_is_raised_once_by_who_waits() -> None:
    weight, target = torch.ones(4), np.zeros(4, np.float32)
    copier, inner = copier_of(weight, beside_bytes=0)
    done: list[Any] = []

    def fail() -> None:
        raise OSError("gone")

    copier.start([[Copy(weight, target)]])
    copier.then(fail)
    copier.then(lambda: done.append(1))
    with pytest.raises(OSError, match="gone"):
        inner.step()
    inner.step()
    assert not done


class Runtime:
    """Stands for the runtime of CUDA, which no machine of the tests has."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.asked: list[tuple[int, int, int]] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked.append((address, size, flags))
        return self.code


@pytest.mark.parametrize(("code", "told"), [(0, ""), (2, "cannot be pinned, so they are slower: code 2")])
def test_a_device_is_given_the_memory_that_it_copies_to(code: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, buffer = Runtime(code), np.zeros(8, np.float32)
    launched: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda code: f"code {code}")
    monkeypatch.setattr(torch, "ones", lambda count, *, device: launched.append(device))
    assert pin(buffer, torch.device("cuda", 0)).endswith(told)
    assert bool(pin(buffer, torch.device("cuda", 0))) is bool(told)
    assert runtime.asked == [(buffer.ctypes.data, 32, 0)] * 2
    assert launched == [torch.device("cuda", 0)] * (2 if code else 0), "the error must not be that of the next kernel"


def test_nothing_is_pinned_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("there is no CUDA here"))
    assert pin(np.zeros(8, np.float32), torch.device("cpu")) == ""
    assert pin(np.zeros(0, np.float32), torch.device("cuda", 0)) == ""
