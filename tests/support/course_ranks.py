"""What ranks do in the tests of what they have entered."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.course import progress_of
from jobs.distributed import init_process_group, shutdown
from jobs.own_time import OwnTime
from jobs.spec import RankEnv


def communicate(env: RankEnv) -> dict[str, Any]:
    """One of each way, over all ranks, over half of them, and around a ring."""
    init_process_group(env, "gloo")
    OwnTime().install()
    halves = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    half, alone = halves[env.rank % 2], dist.new_group([env.rank], use_local_synchronization=True)
    one, four = torch.ones(1), torch.ones(4)
    dist.all_reduce(one)
    dist.all_reduce(one, dist.ReduceOp.MAX, half)
    dist.all_reduce(one, group=half, async_op=True).wait()
    dist.all_reduce(one, group=alone)
    dist.all_gather([torch.empty(1) for _ in range(4)], one)
    dist.broadcast(one, src=2)
    dist.reduce(one, 1)
    dist.all_to_all_single(torch.empty(4), four)
    dist.barrier()
    dist.all_reduce(one, async_op=True).wait()
    _around(env, one)
    found = progress_of(os.getpid())
    assert found is not None
    shutdown()
    return found.to_json()


def _around(env: RankEnv, value: torch.Tensor) -> None:
    """To the next rank, once as it comes and once in a batch."""
    after, before = (env.rank + 1) % env.world_size, (env.rank - 1) % env.world_size
    if env.rank:
        dist.recv(torch.empty(1), before)
    dist.send(value, dst=after)
    if not env.rank:
        dist.recv(torch.empty(1), src=before)
    both = [dist.P2POp(dist.isend, value, after), dist.P2POp(dist.irecv, torch.empty(1), before)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def look(env: RankEnv) -> dict[str, Any] | None:
    """Rank 0 goes into its second collective; rank 1 reads that in its memory, and comes after it."""
    init_process_group(env, "gloo")
    OwnTime().install()
    told = Path(env.run_dir) / "pid"
    seen = None
    if env.rank == 0:
        told.with_suffix(".new").write_text(str(os.getpid()))
        told.with_suffix(".new").rename(told)
    dist.barrier()
    if env.rank == 1:
        while seen is None or not seen.waits:
            time.sleep(0.01)
            seen = progress_of(int(told.read_text()))
    dist.all_reduce(torch.ones(1))
    shutdown()
    return None if seen is None else seen.to_json()
