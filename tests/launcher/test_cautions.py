"""What is said to those who start a run that is legal and most likely not what they meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from launcher.cautions import crowding
from launcher.request import LaunchRequest
from tests.support.fakes import tiny_request


def on(root: Path, *, kind: Literal["local", "existing", "process"] = "process", device: str = "CPU") -> LaunchRequest:
    """Four ranks."""
    request = tiny_request(root)
    return dataclasses.replace(request, cluster=dataclasses.replace(request.cluster, kind=kind, device=device))


@pytest.mark.parametrize(
    ("cores", "text"),
    [
        (1, "4 ranks share the only core of this machine: a step takes 4 times as long as predicted, or more"),
        (3, "4 ranks share the 3 cores of this machine: a step takes 1.3 times as long as predicted, or more"),
    ],
)
def test_ranks_that_take_turns(cores: int, text: str, tmp_path: Path) -> None:
    assert crowding(on(tmp_path), cores) == (text,)
    assert crowding(on(tmp_path, kind="local"), cores) == (text,)


def test_ranks_that_have_a_processor_each(tmp_path: Path) -> None:
    assert crowding(on(tmp_path), 4) == ()
    assert crowding(on(tmp_path, kind="existing"), 1) == ()  # its machines are not this one
    assert crowding(on(tmp_path, device="A100-80GB"), 1) == ()
    script = on(tmp_path)
    assert crowding(dataclasses.replace(script, job=dataclasses.replace(script.job, kind="script")), 1) == ()
