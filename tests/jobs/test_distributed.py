"""The rank's view of the gang: stage ends, rendezvous, threads, and the interface that gloo must announce."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from jobs.distributed import Grid, interface_towards, set_threads


@pytest.mark.parametrize(("pipe", "first", "last"), [(0, True, False), (1, False, False), (2, False, True)])
def test_ends_of_the_pipeline(pipe: int, first: bool, last: bool) -> None:
    grid = Grid(pipe=pipe, pp=3)
    assert (grid.first_stage, grid.last_stage) == (first, last)


def test_a_single_rank_is_both_ends_and_has_no_groups() -> None:
    grid = Grid()
    assert grid.first_stage
    assert grid.last_stage
    assert (grid.model_group, grid.data_group, grid.pipe_group) == (None, None, None)


def test_loopback_is_reached_through_the_loopback_interface() -> None:
    name = interface_towards("127.0.0.1", 1)
    assert any(item.address == "127.0.0.1" for item in psutil.net_if_addrs()[name])


def test_every_own_address_is_reached_through_its_own_interface() -> None:
    for name, items in psutil.net_if_addrs().items():
        for item in items:
            if item.family == socket.AF_INET and psutil.net_if_stats()[name].isup:
                found = interface_towards(item.address, 1)
                assert item.address in {other.address for other in psutil.net_if_addrs()[found]}


GANG = """
import json, socket, sys
from datetime import timedelta
import torch.distributed as dist
from jobs.distributed import init_process_group, shutdown
from jobs.spec import RankEnv

bound = socket.create_server(("127.0.0.1", 0))
port, where = bound.getsockname()[1], dict(master_addr="127.0.0.1", run_id="run", run_dir=".", epoch=2, attempt=3)
alone = dict(rank=0, local_rank=0, world_size=1, local_world_size=1, node_rank=0)
init_process_group(RankEnv(**alone, **where, master_port=port, store_fd=bound.detach()), "gloo")
dist.new_group([0])
print(json.dumps(dist.TCPStore("127.0.0.1", port, 1, False, timedelta(seconds=20), False).list_keys()))
shutdown()
"""


def test_every_key_of_the_rendezvous_has_run_epoch_and_attempt() -> None:
    """A rank of an older attempt that reaches the store, finds nothing of this one's there."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", GANG], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    keys = json.loads(done.stdout.splitlines()[-1])
    assert len(keys) >= 2
    assert [key for key in keys if not key.startswith("run/2/3/")] == []


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("1", 1)])
def test_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    set_threads()
    assert torch.get_num_threads() == threads
