"""What ranks of the tests of state on disks run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed

from jobs.checkpoint.fragments import access
from jobs.engine import Engine, async_io
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from strategies.errors import PhalanxError
from tests.support.ranks import batches


def where_state_lives(env: RankEnv, job: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train, then look: bytes of state in files of this rank by kind, elements of masters and weights in memory."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    results = [engine.train_step(step, batches(spec, step, engine.grid)) for step in range(1, steps + 1)]
    root = Path(spec.plan.offload_path)
    mine = [path for path in root.rglob("*.swp") if f"-rank{env.rank:05d}" in str(path)]
    sizes = {kind: sum(path.stat().st_size for path in mine if kind in path.name) for kind in ("exp_avg-", "param")}
    away = [p for _, p in engine.named_parameters() if p.ds_tensor.status.name == "NOT_AVAILABLE"]  # type: ignore[attr-defined]
    masters = sum(owner.numel() for owner in access(engine.ds).owners())
    (folder,) = {path.relative_to(root).parts[:2] for path in mine}
    engine.close()
    return {
        "losses": [result.loss.hex() for result in results],
        "norms": [result.grad_norm.hex() for result in results],
        "moment_bytes": sizes["exp_avg-"],
        "parameter_bytes": sizes["param"],
        "parameters_away": len(away),
        "masters": masters,
        "left": root.joinpath(*folder).exists(),
    }


def what_moves(env: RankEnv, job: dict[str, Any], offload: dict[str, Any]) -> dict[str, Any]:
    """Train a step under what DeepSpeed is told of offload past our rules, and look what of it is done.

    Args:
        env: This rank.
        job: The job; its plan offloads nothing.
        offload: What is added to DeepSpeed's section of ZeRO.

    Returns:
        Whether DeepSpeed has read of parameters and disks, whether the optimizer works in host memory, and the
        parameters that are not whole on the device.
    """
    spec, initialize = from_json(JobSpec, job), deepspeed.initialize

    def told(*, config: dict[str, Any], **others: Any) -> Any:
        section = config["zero_optimization"] | offload
        return initialize(
            config=config | {"zero_optimization": section, "zero_force_ds_cpu_optimizer": False}, **others
        )

    with patch("deepspeed.initialize", told):
        engine = Engine.build(spec, env)
    engine.train_step(1, batches(spec, 1, engine.grid))
    moved = [name for name, one in engine.named_parameters() if hasattr(one, "ds_tensor") or not one.numel()]
    read = [str(one.nvme_path) for one in (engine.ds.zero_offload_param(), engine.ds.zero_offload_optimizer())]
    host = bool(engine.ds.optimizer.cpu_offload)
    engine.close()
    return {"read": read, "host": host, "moved": moved}


def refusals(env: RankEnv, folder: str) -> dict[str, str]:
    """What a node without the op, and without a compiler, says; ``folder`` is empty. Of the tools only those of pip."""
    os.environ |= {"TORCH_EXTENSIONS_DIR": folder, "CC": "false", "PATH": folder}
    said = {}
    for name, act in (("load", async_io.load), ("build", async_io.build)):
        try:
            act()
        except PhalanxError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said
