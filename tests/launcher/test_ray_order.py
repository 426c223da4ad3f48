"""Client and controller agree on what became of an order, whoever comes first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher import ray_order
from strategies.errors import StorageError


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def test_an_order_says_what_is_wished(paths: RunPaths) -> None:
    name, told = ray_order.place(paths, "10.0.0.1:6379", resume={"overrides": []}, adopt=False)
    assert json.loads(told) == {
        "address": "10.0.0.1:6379",
        "nonce": name,
        "resume": {"id": name, "overrides": []},
        "adopt": False,
    }
    assert json.loads(ray_order.place(paths, "a:1", resume=None, adopt=True)[1])["resume"] is None
    assert (paths.control / ray_order.FOLDER / name).read_text() == name
    assert ray_order.fate(paths, name) is ray_order.Fate.OPEN


def test_what_is_taken_cannot_be_withdrawn(paths: RunPaths) -> None:
    name, _ = ray_order.place(paths, "a:1", resume=None, adopt=True)
    assert ray_order.take(paths, name)
    assert not ray_order.withdraw(paths, name)
    assert ray_order.take(paths, name), "a restarted controller goes on with it"
    assert ray_order.fate(paths, name) is ray_order.Fate.TAKEN


def test_what_is_withdrawn_cannot_be_taken(paths: RunPaths) -> None:
    name, _ = ray_order.place(paths, "a:1", resume=None, adopt=True)
    assert ray_order.withdraw(paths, name)
    assert ray_order.withdraw(paths, name)
    assert not ray_order.take(paths, name)


def test_a_damaged_fate_is_an_error_of_the_storage(paths: RunPaths) -> None:
    name, _ = ray_order.place(paths, "a:1", resume=None, adopt=True)
    (paths.control / ray_order.FOLDER / f"{name}.fate").write_text("?")
    with pytest.raises(StorageError):
        ray_order.take(paths, name)
