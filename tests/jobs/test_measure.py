"""The figures of one device are finite and positive; how much is written to a disk is bounded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from jobs import measure, probe
from jobs.measure import Effort

CPU = torch.device("cpu")
EFFORT = Effort(seconds=0.001, shapes=((8, 8, 8), (4, 8, 16)), copy_bytes=4096, messages=(8,))


def test_a_cpu_is_measured_in_two_arithmetics() -> None:
    assert measure.dtypes_of(CPU) == ("fp32", "bf16")
    assert measure.backend_of(CPU) == "gloo"
    for dtype in measure.dtypes_of(CPU):
        rates = list(measure.matmuls(CPU, dtype, EFFORT))
        assert [(rate.dtype, rate.shape) for rate in rates] == [(dtype, shape) for shape in EFFORT.shapes]
        assert all(math.isfinite(rate.flops) and rate.flops > 0 for rate in rates)
    assert measure.memory_bandwidth(CPU, EFFORT) > 0
    assert measure.host_bandwidth(CPU, EFFORT) is None


def test_the_accelerator_is_the_one_that_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert measure.device_of(0) == CPU
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(RuntimeError, match="slot 1 has no device"):
        measure.device_of(1)
    assert measure.backend_of(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_quick_probe_measures_less(kind: str) -> None:
    quick, whole = (measure.effort_for(torch.device(kind), quick=quick) for quick in (True, False))
    assert quick.seconds < whole.seconds
    assert set(quick.shapes) < set(whole.shapes)
    assert len(quick.messages) < len(whole.messages)
    assert list(whole.messages) == sorted(whole.messages)


def test_a_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"
    assert probe._disk_size(path, 1000, seconds=100.0) == 1000, "less than the smallest file is free"
    monkeypatch.setattr(probe, "_DISK_BYTES", (64, 1024))
    assert probe._disk_size(path, 1024, seconds=100.0) == 1024
    assert probe._disk_size(path, 1024, seconds=0.0) == 64
    assert path.stat().st_size == 64
