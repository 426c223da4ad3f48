"""What the rank of the stall benchmark runs: real engine, real persister; every number is a median of seconds."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.checkpoint.persister import PERSISTER, PersisterLink
from jobs.checkpoint.saver import BehindSaver
from jobs.engine import Engine
from jobs.hooks import NoHooks
from jobs.report import Reporter
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.support.ranks import batches


def _median_s(act: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _memcpy_s(size: int, times: int) -> float:
    """The C library's own, between two buffers that exist."""
    source, target = (np.ones(size, np.uint8) for _ in range(2))
    return _median_s(lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, size), times)


def stalls(env: RankEnv, job: dict[str, Any], persister: str, steps: int, tries: int) -> dict[str, float]:
    """Train, copy every step, save to disk, then let DeepSpeed save."""
    os.environ[PERSISTER] = persister
    torch.set_num_threads(int(os.environ.get("STALL_THREADS", "1")))
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    saver = BehindSaver(engine, spec, env, NoHooks(), Reporter(-1), PersisterLink(persister))
    saver.open()
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        engine.train_step(step, batches(spec, step, engine.grid.data))
    step_s = (time.perf_counter() - begin) / steps
    at = iter(range(steps + 1, 10**6))
    for _ in range(4):  # every buffer once
        saver.keep(next(at), {})
    size = saver.image_bytes
    memcpy_s = _memcpy_s(size, tries)
    copy_s = _median_s(lambda: saver.keep(next(at), {}), tries)
    disk_s = []
    for _ in range(2):
        begin = time.perf_counter()
        path = saver.save(next(at), {}, wait=False)
        disk_s.append(time.perf_counter() - begin)
        while not path.exists():  # as training would go on
            time.sleep(0.05)
    begin = time.perf_counter()
    engine.ds.save_checkpoint(str(Path(env.run_dir) / "deepspeed"), tag="x")
    deepspeed_s = time.perf_counter() - begin
    engine.close()
    return {
        "bytes": float(size),
        "step_s": step_s,
        "memcpy_s": memcpy_s,
        "copy_s": copy_s,
        "disk_s": statistics.median(disk_s),
        "deepspeed_s": deepspeed_s,
    }
