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
        (1, "4 ranks share the only core of this machine: a step takes about 4.0 times as long as predicted"),
        (3, "4 ranks share the 3 cores of this machine: a step takes about 1.3 times as long as predicted"),
    ],
)
def test_ranks_that_take_turns(cores: int, text: str, tmp_path: Path) -> None:
    assert crowding(on(tmp_path), cores, devices=False) == (text,)
    assert crowding(on(tmp_path, kind="local"), cores, devices=False) == (text,)


def test_ranks_that_have_a_processor_each(tmp_path: Path) -> None:
    assert crowding(on(tmp_path), 4, devices=False) == ()
    assert crowding(on(tmp_path, kind="existing"), 1, devices=False) == ()  # its machines are not this one
    assert crowding(on(tmp_path, device="A100-80GB"), 1, devices=False) == ()
    assert crowding(on(tmp_path), 1, devices=True) == ()  # in a container with few cores
    script = on(tmp_path)
    assert (
        crowding(dataclasses.replace(script, job=dataclasses.replace(script.job, kind="script")), 1, devices=False)
        == ()
    )
