"""State beside the tensors: engine counters, loss scale and random number generators, as plain JSON values."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from jobs.checkpoint.fragments import OptimizerAccess
from jobs.checkpoint.manifest import TrainerState

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def trainer_state(optimizer: OptimizerAccess) -> TrainerState:
    """What the engine knows beside the tensors; the same on every rank."""
    scaler = _scaler(optimizer)
    return TrainerState(
        optimizer_steps=optimizer.steps,
        learning_rates=tuple(float(group["lr"]) for group in optimizer.inner.param_groups),
        counters={name: int(getattr(optimizer.ds, name)) for name in _COUNTERS},
        loss_scaler={name: value for name in _SCALE if (value := getattr(scaler, name, None)) is not None},
    )


def set_trainer_state(optimizer: OptimizerAccess, state: TrainerState) -> None:
    """Put it back. The optimizer must have its moments (:meth:`OptimizerAccess.create_moments`)."""
    optimizer.steps = state.optimizer_steps
    groups = optimizer.inner.param_groups
    rates = state.learning_rates
    for index, group in enumerate(groups):  # another plan may have other groups, but there is one rate for all
        group["lr"] = rates[index if len(rates) == len(groups) else 0]
    for name, value in state.counters.items():
        setattr(optimizer.ds, name, value)
    scaler = _scaler(optimizer)
    for name, value in state.loss_scaler.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _scaler(optimizer: OptimizerAccess) -> Any:
    """What holds the loss scale: a scaler, or (ZeRO-0 in 16 bits) a record of the optimizer."""
    outer = optimizer.outer
    return getattr(outer, "loss_scaler", None) or getattr(outer, "loss_scale_config", None)


def rng_state() -> dict[str, Any]:
    """The random number generators of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _text(torch.get_rng_state()),
        "numpy": [kind, base64.b64encode(np.asarray(keys, dtype="<u4").tobytes()).decode(), *rest],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the random number generators of this process back."""
    torch.set_rng_state(_tensor(state["torch"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), dtype="<u4").astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
