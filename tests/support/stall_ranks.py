"""What the rank of the stall benchmark runs: real engine, real persister; every number is a median of seconds."""

from __future__ import annotations

import ctypes
import itertools
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
    """Copy and save between steps, as training does it, and then let DeepSpeed save.

    A stall is the time until the saver lets go, and what the next update then waits for the copy.
    """
    os.environ[PERSISTER] = persister
    torch.set_num_threads(int(os.environ.get("STALL_THREADS", "1")))
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    saver = BehindSaver(engine, spec, env, NoHooks(), Reporter(-1), PersisterLink(persister))
    saver.open()
    at = itertools.count(1)

    def train() -> float:
        step = next(at)
        return _seconds(lambda: engine.train_step(step, batches(spec, step, engine.grid)))

    def keep() -> None:
        saver.keep(next(at), {})
        saver.land()

    train()
    for _ in range(4):  # every buffer once
        keep()
    size = saver.image_bytes
    memcpy_s, copy_s = _pairs(size, tries, keep)
    alone, beside, kept, saved = [], [], [], []
    for _ in range(steps):
        alone.append(train())
        begun_s = _seconds(lambda: saver.keep(next(at), {}))
        beside.append(train())
        kept.append(begun_s + saver.waited_s)
    paths = RunPaths(env.run_dir).checkpoint_dir
    for number in range(1, steps + 1):
        begun_s = _seconds(lambda: saver.save(next(at), {}, wait=False))
        train()
        saved.append(begun_s + saver.waited_s)
        while len(list(paths.glob("*/*.manifest.json"))) < number:  # as more training would go on
            time.sleep(0.05)
    folder = str(Path(env.run_dir) / "deepspeed")
    tags = iter(map(str, range(steps)))
    theirs = [_seconds(lambda: engine.ds.save_checkpoint(folder, tag=next(tags))) for _ in range(steps)]
    engine.close()
    median = statistics.median
    return {
        "bytes": float(size),
        "memcpy_s": memcpy_s,
        "copy_s": copy_s,
        "step_s": median(alone),
        "beside_s": median(beside),
        "kept_s": median(kept),
        "saved_s": median(saved),
        "deepspeed_s": median(theirs),
    }
