"""What ranks of the test of replicas run: real engine, real persisters, one for each rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch.distributed as dist

from jobs.checkpoint.persister import PersisterLink
from jobs.checkpoint.saver import BehindSaver
from jobs.engine import Engine
from jobs.frames import FrameError
from jobs.hooks import NoHooks
from jobs.report import Reporter
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.support.ranks import batches


def replicas_in_time(
    env: RankEnv, job: dict[str, Any], persisters: list[str], steps: int, slow: int = 0
) -> dict[str, list[Any]]:
    """Train, and look after every step for the other rank's state of the step before.

    Args:
        env: This rank.
        job: The job.
        persisters: Socket of each rank's persister.
        steps: How many steps.
        slow: Process of a persister that stands still for a second when every state has been handed in; 0 for none.

    Returns:
        For every step but the first: ``held``: the replica is in the memory of this rank's node; ``waited_s``: what the
        step waited for the copy before and its replica; ``step_s``: what it took; ``stalled_s``: what the ledger is
        told of it.
    """
    spec = from_json(JobSpec, job)
    link = PersisterLink(persisters[env.rank])
    engine = Engine.build(spec, env)
    saver = BehindSaver(engine, spec, env, NoHooks(), Reporter(-1), link)
    saver.open()
    found: dict[str, list[Any]] = {"held": [], "waited_s": [], "step_s": [], "stalled_s": []}
    for step in range(1, steps + 1):
        data = batches(spec, step, engine.grid)
        began = time.perf_counter()
        engine.own_time.begin()
        engine.train_step(step, data)
        engine.own_time.end()
        stalled_s = saver.stalled_s()
        if step > 1:
            found["step_s"].append(time.perf_counter() - began)
            found["waited_s"].append(engine.own_time.stalled_s)
            found["stalled_s"].append(stalled_s)
            found["held"].append(_holds(link, step - 1, env))
        saver.keep(step, {})
        if slow:
            dist.barrier()
            if env.rank == 0:
                _pause(slow)
    engine.close()
    return found


def _pause(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()


def _holds(link: PersisterLink, step: int, env: RankEnv) -> bool:
    own = link.ask("hello")[0]["address"]
    token = [env.epoch, env.attempt]
    try:
        answer, _, _ = link.ask("part", step=step, token=token, rank=1 - env.rank, where=own)
    except FrameError:
        return False
    return bool(answer["local"])
