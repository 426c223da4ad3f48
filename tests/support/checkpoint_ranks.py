"""What ranks of the checkpoint tests run: train and save, restore and train, each with fingerprints of all state."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import resource
import threading
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from jobs.checkpoint.copying import Array, Copier, Copy, copy_all
from jobs.checkpoint.errors import CorruptCheckpoint
from jobs.checkpoint.fragments import OptimizerAccess, access
from jobs.checkpoint.gang import gang_weights_digest
from jobs.checkpoint.image import Image
from jobs.checkpoint.restore import restore
from jobs.checkpoint.save import Saved, copies_of, image_of_state, runs_of, save
from jobs.engine import Engine
from jobs.paths import RunPaths
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from strategies.errors import StorageError
from tests.support.ranks import batches

Times = tuple[float, float]


def fingerprint(engine: Engine) -> dict[str, str]:
    """SHA-256 of everything that decides how training goes on: masters, moments and weights, padding included.

    Left out is the end of the last part of ZeRO-3, which DeepSpeed never initialises.
    """
    optimizer = access(engine.ds)
    prints = {}
    indices = {id(owner): index for index, owner in enumerate(optimizer.owners())}
    for owner in itertools.chain.from_iterable(optimizer.resident(write=False)):
        index = indices[id(owner)]
        prints[f"master {index}"] = _hash(_live_master(engine, index, owner))
        state = optimizer.inner.state.get(owner, {})
        prints |= {f"{kind} {index}": _hash(torch.as_tensor(value)) for kind, value in state.items()}
    if engine.plan.offload_path:  # partitions may be on disks
        return prints | {f"weight {meta.name}": _hash(values) for meta, values in engine.weights()}
    for name, parameter in engine.named_parameters():
        prints[f"weight {name}"] = _hash(_live(engine, parameter))
    return prints


def _live(engine: Engine, parameter: Any) -> torch.Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return torch.as_tensor(parameter)
    return torch.as_tensor(parameter.ds_tensor).view(-1)[: _live_count(engine, parameter)]


def _live_master(engine: Engine, index: int, owner: torch.Tensor) -> torch.Tensor:
    positions = getattr(engine.ds.optimizer, "grad_position", None)
    if engine.ds.zero_optimization_stage() < 3 or positions is None:
        return owner
    parts = []
    for _, parameter in engine.named_parameters():
        group, offset, _ = positions[engine.ds.optimizer.get_param_id(parameter)]
        if group == index:
            parts.append(owner.detach()[offset : offset + _live_count(engine, parameter)])
    return torch.cat(parts)


def _live_count(engine: Engine, parameter: Any) -> int:
    place = engine.grid.data * engine.grid.sp + engine.grid.seq
    return max(0, int(parameter.ds_numel) - place * int(parameter.ds_tensor.numel()))


def _hash(tensor: torch.Tensor) -> str:
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _train(engine: Engine, job: JobSpec, first: int, last: int) -> list[list[str]]:
    results = [engine.train_step(step, batches(job, step, engine.grid)) for step in range(first, last + 1)]
    return [[result.loss.hex(), result.grad_norm.hex(), result.lr.hex()] for result in results]


def save_then_train(env: RankEnv, job: dict[str, Any], steps: int, more: int) -> dict[str, Any]:
    """Train ``steps``, save, train ``more``; the state is copied beside the first of those, as slowly as can be."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    _train(engine, spec, 1, steps)
    before = fingerprint(engine)
    saved = save(
        engine,
        run_paths=RunPaths(env.run_dir),
        job=spec,
        step=steps,
        token=(env.epoch, env.attempt),
        extra={"sample_index": steps * spec.batch.global_batch, "why": "test"},
    )
    unchanged = before == fingerprint(engine)
    at_save = gang_weights_digest(saved.path)
    noise = torch.rand(4).tolist()
    results, times, beside = _train_beside_a_copy(engine, spec, steps + 1, steps + more)
    out = {
        "path": str(saved.path),
        "bytes": saved.bytes,
        "unchanged": unchanged,
        "beside": beside,
        "times": times,
        "digest": at_save,
        "noise": noise,
        "results": results,
        "end": fingerprint(engine),
    }
    engine.close()
    return out


def _train_in_turns(engine: Engine, job: JobSpec, first: int, last: int) -> tuple[list[list[str]], list[Times]]:
    """Train; in every step another rank comes late to the update. Tells when each was there, and when it had ended."""
    acted: list[float] = []

    def late() -> None:
        if dist.get_rank() == (len(acted) * (dist.get_world_size() - 1)) % dist.get_world_size():
            time.sleep(0.1)
        acted.append(time.monotonic())

    engine.before_update(late)
    results, ended = [], []
    for step in range(first, last + 1):
        results += _train(engine, job, step, step)
        ended.append(time.monotonic())
    return results, list(zip(acted, ended, strict=True))


def _train_beside_a_copy(
    engine: Engine, job: JobSpec, first: int, last: int
) -> tuple[list[list[str]], list[Times], dict[str, Any]]:
    """Train while the state of before is copied. The copy begins when forward and backward have ended."""
    optimizer = access(engine.ds)
    image = image_of_state(optimizer)
    before, copied, after = (np.empty(image.bytes // 4, np.float32) for _ in range(3))
    _copy_now(optimizer, image, before)
    reached, beside = threading.Event(), list[int]()
    hook = optimizer.inner.register_step_pre_hook(lambda *_: reached.set())  # comes before the copier's own

    def late(copies: Sequence[Copy]) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert reached.wait(60)
            beside.append(len(copies))
        copy_all(copies)

    with patch("jobs.checkpoint.copying.copy_all", late):
        copier = Copier(optimizer, beside_bytes=0)
        copier.start(copies_of(optimizer, runs_of(optimizer, image), image, copied))
        results, times = _train_in_turns(engine, job, first, last)
    hook.remove()
    _copy_now(optimizer, image, after)
    return (
        results,
        times,
        {
            "waited": optimizer.on_disks or bool(beside),
            "equal": bool(np.array_equal(before, copied)),
            "changed": not image.bytes or not np.array_equal(before, after),
        },
    )


def _copy_now(optimizer: OptimizerAccess, image: Image, buffer: Array) -> None:
    for copies in copies_of(optimizer, runs_of(optimizer, image), image, buffer):
        copy_all(copies)


def restore_then_train(env: RankEnv, job: dict[str, Any], manifest: str, more: int) -> dict[str, Any]:
    """Restore into a fresh engine, train ``more``."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    restored = restore(engine, manifest)
    noise = torch.rand(4).tolist()
    at_restore = fingerprint(engine)
    results = _train(engine, spec, restored.step + 1, restored.step + more)
    out = {
        "step": restored.step,
        "extra": dict(restored.extra),
        "read": restored.traffic.read_bytes,
        "received": restored.traffic.received_bytes,
        "noise": noise,
        "at_restore": at_restore,
        "results": results,
        "end": fingerprint(engine),
    }
    engine.close()
    return out


def save_initial(env: RankEnv, job: dict[str, Any]) -> str:
    """Save the initial weights; returns their digest."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    saved = save(engine, run_paths=RunPaths(env.run_dir), job=spec, step=0, token=(env.epoch, env.attempt), extra={})
    digest = gang_weights_digest(saved.path)
    engine.close()
    return digest


def reshape(env: RankEnv, job: dict[str, Any], manifest: str) -> dict[str, Any]:
    """Restore what another plan has written, save it at once; returns the manifest and what the restore has moved."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    restored = restore(engine, manifest)
    token = (env.epoch, env.attempt)
    saved = save(engine, run_paths=RunPaths(env.run_dir), job=spec, step=restored.step, token=token, extra={})
    engine.close()
    return {"path": str(saved.path), "read": restored.traffic.read_bytes, "received": restored.traffic.received_bytes}


def restore_damaged(env: RankEnv, job: dict[str, Any], damaged: str, good: str) -> dict[str, Any]:
    """Fail to restore ``damaged``, then restore ``good`` in the same processes."""
    engine = Engine.build(from_json(JobSpec, job), env)
    try:
        restore(engine, damaged)
        raise AssertionError("restored a damaged checkpoint")
    except CorruptCheckpoint as error:
        failure = {"path": error.path, "reason": error.reason}
    step = restore(engine, good).step
    engine.close()
    return failure | {"step": step}


def save_without_room(env: RankEnv, job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Save while rank ``rank`` may write only small files; then save again with room."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)

    def attempt() -> Saved:
        token = (env.epoch, env.attempt)
        return save(engine, run_paths=RunPaths(env.run_dir), job=spec, step=1, token=token, extra={})

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if env.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    message = ""
    try:
        attempt()
    except StorageError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    saved = attempt()
    engine.close()
    return {"message": message, "path": str(saved.path)}


def load_universal_then_train(env: RankEnv, job: dict[str, Any], folder: str, first: int, last: int) -> dict[str, Any]:
    """DeepSpeed itself loads its universal layout into a fresh engine, which then trains ``first`` to ``last``."""
    spec = from_json(JobSpec, job)
    config = dict(spec.deepspeed) | {"checkpoint": {"load_universal": True}}
    engine = Engine.build(dataclasses.replace(spec, deepspeed=config), env)
    loaded, _ = engine.ds.load_checkpoint(folder)
    steps, rate = engine.ds.global_steps, engine.ds.get_lr()[0]
    out = {"loaded": bool(loaded), "steps": steps, "lr": rate.hex(), "results": _train(engine, spec, first, last)}
    engine.close()
    return out
