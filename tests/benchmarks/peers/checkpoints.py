"""What ranks of the restore benchmark run: save and restore in our format, and in DeepSpeed's with its conversion.

Every function returns seconds of this rank between two barriers, so the largest is that of the gang.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from jobs.checkpoint.restore import restore
from jobs.checkpoint.save import save
from jobs.engine import Engine
from jobs.paths import RunPaths
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.benchmarks.peers import TAG
from tests.support.ranks import batches


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    dist.barrier()
    begin = time.perf_counter()
    value = call()
    dist.barrier()
    return time.perf_counter() - begin, value


def _build(env: RankEnv, job: dict[str, Any], **deepspeed: Any) -> tuple[JobSpec, Engine]:
    spec = from_json(JobSpec, job)
    spec = dataclasses.replace(spec, deepspeed={**spec.deepspeed, **deepspeed})
    return spec, Engine.build(spec, env)


def save_both(env: RankEnv, job: dict[str, Any], theirs: str) -> dict[str, Any]:
    """Train one step, then save twice: as we do, and with DeepSpeed's ``save_checkpoint``."""
    spec, engine = _build(env, job)
    engine.train_step(1, batches(spec, 1, engine.grid))
    paths = RunPaths(env.run_dir)
    ours_s, saved = _timed(
        lambda: save(engine, run_paths=paths, job=spec, step=1, token=(env.epoch, env.attempt), extra={})
    )
    theirs_s = 0.0
    if theirs:
        theirs_s, _ = _timed(lambda: engine.ds.save_checkpoint(theirs, tag=TAG))
    engine.close()
    return {"path": str(saved.path), "bytes": saved.bytes, "ours_s": ours_s, "theirs_s": theirs_s}


def restore_ours(env: RankEnv, job: dict[str, Any], manifest: str) -> dict[str, Any]:
    """Restore a checkpoint of ours, and train the second step as proof."""
    spec, engine = _build(env, job)
    seconds, _ = _timed(lambda: restore(engine, Path(manifest)))
    loss = engine.train_step(2, batches(spec, 2, engine.grid)).loss
    engine.close()
    return {"seconds": seconds, "loss": loss}


def load_universal(env: RankEnv, job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Load what ``ds_to_universal`` made, and train the second step as proof."""
    spec, engine = _build(env, job, checkpoint={"load_universal": True})
    seconds, _ = _timed(lambda: engine.ds.load_checkpoint(folder, tag=TAG))
    loss = engine.train_step(2, batches(spec, 2, engine.grid)).loss
    engine.close()
    return {"seconds": seconds, "loss": loss}
