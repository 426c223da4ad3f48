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
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.support.ranks import batches


def _seconds(act: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def _pairs(size: int, times: int, act: Callable[[], Any]) -> tuple[float, float]:
    """Medians of the C library's own memcpy, between two buffers that exist, and of ``act``, in turns."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    memcpy, ours = [], []
    for _ in range(times):
        memcpy.append(_seconds(lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, size)))
        ours.append(_seconds(act))
    return statistics.median(memcpy), statistics.median(ours)


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
        engine.train_step(step, batches(spec, step, engine.grid))
    step_s = (time.perf_counter() - begin) / steps
    at = iter(range(steps + 1, 10**6))
    for _ in range(4):  # every buffer once
        saver.keep(next(at), {})
    size = saver.image_bytes
    memcpy_s, copy_s = _pairs(size, tries, lambda: saver.keep(next(at), {}))

    def to_disk() -> None:
        saver.save(next(at), {}, wait=False)

    paths = RunPaths(env.run_dir).checkpoint_dir
    memcpys, disks = [], []
    for number in range(1, 4):
        memcpy, disk = _pairs(size, 1, to_disk)
        memcpys.append(memcpy)
        disks.append(disk)
        while len(list(paths.glob("*/*.manifest.json"))) < number:  # as training would go on
            time.sleep(0.05)
    begin = time.perf_counter()
    engine.ds.save_checkpoint(str(Path(env.run_dir) / "deepspeed"), tag="x")
    deepspeed_s = time.perf_counter() - begin
    engine.close()
    return {
        "bytes": float(size),
        "step_s": step_s,
        "memcpy_s": memcpy_s,
        "disk_memcpy_s": statistics.median(memcpys),
        "copy_s": copy_s,
        "disk_s": statistics.median(disks),
        "deepspeed_s": deepspeed_s,
    }
