"""What ranks of the memory test run: train a step and weigh what DeepSpeed keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from jobs.engine import Engine
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.support.ranks import batches


def weigh(env: RankEnv, job: dict[str, Any]) -> dict[str, Any]:
    """Bytes of weights, gradients (where DeepSpeed keeps a buffer for them) and optimizer state after one step."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    engine.train_step(1, batches(spec, 1, engine.grid))
    optimizer = engine.ds.optimizer
    parameters: list[Any] = [parameter for _, parameter in engine.named_parameters()]
    weights: list[torch.Tensor] = list(parameters)
    if spec.plan.zero_stage == 3:
        weights += [parameter.ds_tensor for parameter in parameters]
    out = {
        "pipe": engine.grid.pipe,
        "optimizer_class": type(optimizer).__name__,
        "weights": _bytes(weights),
        "gradients": _bytes(_gradient_buffers(optimizer)),
        "optimizer": _bytes(_states(engine)),
    }
    engine.close()
    return out


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Size of the storages behind the tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _gradient_buffers(optimizer: Any) -> list[torch.Tensor]:
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        return [optimizer.grad_partitions_flat_buffer]
    return list(getattr(optimizer, "fp32_groups_gradients_flat", []))


def _states(engine: Engine) -> list[torch.Tensor]:
    """The tensors that the inner optimizer steps, where they are not the weights themselves, and their moments."""
    inner = getattr(engine.ds.optimizer, "optimizer", engine.ds.optimizer)
    weights = {parameter.data_ptr() for _, parameter in engine.named_parameters()}
    out = [owner for owner in inner.state if owner.data_ptr() not in weights]
    return out + [state[kind] for state in inner.state.values() for kind in ("exp_avg", "exp_avg_sq")]
