"""A checkpoint in DeepSpeed's universal layout, which a DeepSpeed engine with ``checkpoint.load_universal`` loads.

::

    TARGET/
        latest_universal                    the tag
        global_step10/
            mp_rank_00_model_states.pt      counters and the schedule of the learning rate
            zero_pp_rank_0_mp_rank_00_model_states.pt   the same, under the name that ZeRO-3 looks for
            zero/optimizer_state.pt         parameter groups
            zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt       whole tensors, one folder per parameter

NAME is that of the parameter in our model on one pipeline stage (``layers.3.attn.q.weight``), and a link beside it that
of a pipeline (``3.attn.q.weight``). Any data- and tensor-parallel degree and ZeRO 1 to 3 can load it.

By DeepSpeed's definition these files are pickles. They are written here, for others; nothing of ours loads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.checkpoint.export import Exported, appearing
from jobs.checkpoint.manifest import Manifest
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.shardfile import KINDS
from jobs.distributed import Grid
from jobs.location import Location
from jobs.models.gpt import TIED_KEY, Decoder, Recipe
from strategies.errors import ConfigError
from strategies.specs import ModelSpec
from strategies.topology import Topology

_FILES = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_DEEPSPEED = "0.19.0"  # whose layout this is
_VOCABULARY = ("embed.tokens.weight", "head.output.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A parameter of the model as DeepSpeed sees it.

    Attributes:
        name: Global name.
        shape: Global shape, without vocabulary padding.
        plain: Its name without a pipeline.
        piped: Its name in a pipeline.
        split: The dimension that tensor-parallel ranks split; 0 where they do not.
    """

    name: str
    shape: tuple[int, ...]
    plain: str
    piped: str
    split: int


def export_universal(
    manifest: str | Location,
    target: Path,
    *,
    learning: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a checkpoint in the universal layout.

    Args:
        manifest: The manifest.
        target: The folder to make; must not exist.
        learning: The optimizer's settings as DeepSpeed has them in its parameter groups: ``lr``, ``betas``, ``eps``,
            ``weight_decay``.
        progress: Told (bytes done, bytes in all) after every parameter.

    Raises:
        ConfigError: ``target`` exists, or the model has no such layout.
        CorruptCheckpoint: The checkpoint is damaged.
        StorageError: It cannot be read, or the folder cannot be written.
    """
    reader = Reader(manifest)
    found = parameters(reader.manifest.model)
    total, done = sum(math.prod(one.shape) for one in found) * 4 * len(KINDS), 0
    with appearing(target) as folder:
        tag = folder / f"global_step{reader.manifest.step}"
        (tag / "zero").mkdir(parents=True)
        for one in found:
            done += _write_parameter(reader, one, tag / "zero")
            if progress is not None:
                progress(done, total)
        _write(tag / "zero" / "optimizer_state.pt", _optimizer_state(reader.manifest, learning))
        _write(tag / "mp_rank_00_model_states.pt", _model_state(reader.manifest))
        os.link(tag / "mp_rank_00_model_states.pt", tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        (folder / "latest_universal").write_text(tag.name)
    return Exported(path=target, files=len(found) * (len(KINDS) + 1) + 3, tensors=len(found) * len(KINDS), bytes=total)


def parameters(model: ModelSpec) -> list[Parameter]:
    """Every parameter of a model; raises ConfigError if the model is none that we train."""
    if model.moe is not None or model.latent is not None:
        raise ConfigError(f"Models like '{model.name}' cannot be exported yet: it has experts or latent attention.")
    with torch.device("meta"):
        whole = Decoder(Recipe.of(model, Grid(), seed=0))
        half = Decoder(Recipe.of(model, Grid(tp=2), seed=0)) if _splits(model) else whole
    return list(_parameters(model, whole, half))


def _splits(model: ModelSpec) -> bool:
    return model.heads % 2 == 0 and model.kv_heads % 2 == 0 and model.ffn % 2 == 0


def _parameters(model: ModelSpec, whole: Decoder, half: Decoder) -> Iterator[Parameter]:
    for (plain, ours), (_, split) in zip(whole.named_parameters(), half.named_parameters(), strict=True):
        meta, box = ours.phalanx, split.phalanx.box  # type: ignore[attr-defined]
        cut = [dim for dim, (low, high) in enumerate(box) if high - low != meta.shape[dim]]
        piped = plain.removeprefix("layers.")
        if model.tied and meta.name == "embed.tokens.weight":
            piped = f"tied_modules.{TIED_KEY}.{piped.partition('.')[2]}"
        yield Parameter(name=meta.name, shape=meta.shape, plain=plain, piped=piped, split=cut[0] if cut else 0)


def _write_parameter(reader: Reader, one: Parameter, folder: Path) -> int:
    """All of a parameter; returns the bytes of its tensors."""
    count = math.prod(one.shape)
    (folder / one.plain).mkdir()
    for kind in KINDS:
        values = torch.from_numpy(reader.read_flat(one.name, kind, 0, count)).view(one.shape)
        document: dict[str, Any] = {"param": values, "cat_dim": one.split}
        if one.name in _VOCABULARY:
            document["vocab_tensor"] = True  # padded anew for the tensor-parallel degree that loads it
        _write(folder / one.plain / f"{_FILES[kind]}.pt", document)
    _write(folder / one.plain / "step.pt", _steps(reader.manifest))
    (folder / one.piped).symlink_to(one.plain)
    return count * 4 * len(KINDS)


def _steps(manifest: Manifest) -> torch.Tensor:
    return torch.tensor(float(manifest.trainer.optimizer_steps), dtype=torch.float32)


def _optimizer_state(manifest: Manifest, learning: dict[str, Any]) -> dict[str, Any]:
    """What ZeRO 1 and 2 look for at the top, and ZeRO-3 one level below."""
    groups = [{**learning, "params": [0]}]
    return {
        "ds_version": _DEEPSPEED,
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": _steps(manifest)}}, "param_groups": groups},
    }


def _model_state(manifest: Manifest) -> dict[str, Any]:
    return {
        "ds_version": _DEEPSPEED,
        "module": {},  # the weights are made of the fp32 masters
        "dp_world_size": Topology(manifest.plan).data_size,
        "mp_world_size": 1,
        "global_steps": manifest.step,
        "global_samples": manifest.trainer.counters.get("global_samples", 0),
        "skipped_steps": manifest.trainer.counters.get("skipped_steps", 0),
        "lr_scheduler": {"last_batch_iteration": manifest.step + 1},  # that of the step to come
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }


def _write(path: Path, document: Any) -> None:
    with path.open("xb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())
