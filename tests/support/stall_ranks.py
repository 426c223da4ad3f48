"""What ranks of the stall benchmarks run: real engine, real persisters; numbers are seconds."""

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
        begun_s, before_s = _seconds(lambda: saver.keep(next(at), {})), engine.own_time.stalled_s
        beside.append(train())
        kept.append(begun_s + engine.own_time.stalled_s - before_s)
    paths = RunPaths(env.run_dir).checkpoint_dir
    for number in range(1, steps + 1):
        begun_s, before_s = _seconds(lambda: saver.save(next(at), {})), engine.own_time.stalled_s
        train()
        saved.append(begun_s + engine.own_time.stalled_s - before_s)
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


def beside(env: RankEnv, job: dict[str, Any], persisters: list[str], pairs: int, block: int) -> dict[str, list[float]]:
    """Steps beside a copy and its replica, and steps alone, in turns; who comes first changes from pair to pair.

    Args:
        env: This rank.
        job: The job.
        persisters: Socket of each rank's persister.
        pairs: Pairs of blocks.
        block: Steps of a block.

    Returns:
        Seconds of every block: ``alone``, ``beside``; of the latter, those in which this rank stood still: ``stalled``.
        What this rank computed in each, which other load of the machine hardly changes: ``alone_cpu``, ``beside_cpu``.
    """
    os.environ[PERSISTER] = persisters[env.rank]
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    saver = BehindSaver(engine, spec, env, NoHooks(), Reporter(-1), PersisterLink(persisters[env.rank]))
    saver.open()
    at = itertools.count(1)
    found: dict[str, list[float]] = {name: [] for name in ("alone", "beside", "stalled", "alone_cpu", "beside_cpu")}
    found["bytes"] = [float(saver.image_bytes)]

    def train(*, copies: bool) -> None:
        name = "beside" if copies else "alone"
        stalled_s, begin, cpu = 0.0, time.perf_counter(), time.process_time()
        for step in itertools.islice(at, block):
            if copies:
                saver.keep(step, {})
            engine.own_time.begin()
            engine.train_step(step, batches(spec, step, engine.grid))
            engine.own_time.end()
            stalled_s += saver.stalled_s()
        found[name].append(time.perf_counter() - begin)
        found[f"{name}_cpu"].append(time.process_time() - cpu)
        if copies:
            found["stalled"].append(stalled_s)

    for _ in range(4):  # every buffer once
        train(copies=True)
    for values in (found["stalled"], found["beside"], found["beside_cpu"]):
        values.clear()
    for pair in range(pairs):
        for copies in (False, True) if pair % 2 else (True, False):
            train(copies=copies)
    engine.close()
    return found
