"""A Hugging Face folder as it lies on disk: which tensor is where, and everything that is wrong with it, at once.

Only config.json and the headers of the safetensors files are read. Folders that have nothing but pickles
(``pytorch_model.bin``) are refused: loading one runs code. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.hf.config import Flaw, read_config, window_of
from jobs.hf.names import Part, Shape, parts_of
from strategies.errors import ConfigError, StorageError, did_you_mean
from strategies.specs import ModelSpec, MoeSpec, RotaryStretch

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
_NAMED = 8  # of the tensors that share a flaw, the others are counted
_PREFIX = "transformer."  # GPT-2 folders without the output projection leave it out
# Not parameters: masks and frequencies that older versions of transformers stored.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: The file.
        dtype: Its type, as safetensors calls it.
        shape: Its shape.
        offset: Where its data begin in the file, in bytes.
    """

    file: Path
    dtype: str
    shape: Shape
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A folder that can be read.

    Attributes:
        path: The folder.
        config: What config.json says.
        tensors: Every stored tensor by its name, buffers left out.
        files: The weight files, ascending.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    files: tuple[Path, ...]


def is_folder(path: Path) -> bool:
    """Whether there is a Hugging Face model, judged by its config.json."""
    return (path / CONFIG).is_file()


def look(path: Path) -> tuple[dict[str, Any], list[Flaw]]:
    """The model of a folder by the field names of :class:`ModelSpec`, or all problems; reads config.json alone."""
    config, flaws = _read_config_file(path)
    return ({}, flaws) if flaws else read_config(config, path.name)


def model_of(path: Path) -> ModelSpec:
    """The model of a folder.

    Raises:
        ConfigError: It is no model that phalanx can be; every problem is listed.
    """
    values, flaws = look(path)
    raise_flaws(path, flaws)
    return _spec(values)


def _spec(values: Mapping[str, Any]) -> ModelSpec:
    moe, stretch = values.get("moe"), values.get("rope_stretch")
    parts = {"moe": MoeSpec(**moe) if moe else None, "rope_stretch": RotaryStretch(**stretch) if stretch else None}
    return ModelSpec(**dict(values) | parts)


def open_folder(path: Path, model: ModelSpec) -> Folder:
    """Look at a folder and check that it holds exactly the tensors of ``model``.

    Raises:
        ConfigError: It does not; every problem is listed.
    """
    folder, flaws = inspect(path, model)
    raise_flaws(path, flaws)
    return folder


def inspect(path: Path, model: ModelSpec | None = None) -> tuple[Folder, list[Flaw]]:
    """The folder as far as it can be read, and everything that is wrong with it.

    Args:
        path: The folder.
        model: What it must hold; None: what its config.json says.
    """
    config, flaws = _read_config_file(path)
    if not flaws:
        values, flaws = read_config(config, path.name)
        if not flaws:
            own = _spec(values)
            flaws = _other_model(own, model) + _beyond(window_of(config), model.seq) if model is not None else []
            model = model or own
    files, wrong = _weight_files(path)
    tensors: dict[str, Stored] = {}
    for file in files:
        found, broken = _read_header(file)
        wrong += broken
        wrong += [Flaw(message=f"{name} is in two files") for name in found if name in tensors]
        tensors |= found
    tensors = {name: one for name, one in tensors.items() if not name.endswith(_BUFFERS)}
    if model is not None and model.flavour == "gpt3" and not any(name.startswith(_PREFIX) for name in tensors):
        tensors = {name if name == "lm_head.weight" else _PREFIX + name: one for name, one in tensors.items()}
    folder = Folder(path=path, config=config, tensors=tensors, files=tuple(files))
    if model is not None and not wrong:
        try:
            wrong = compare(folder, parts_of(model), tied=model.tied)
        except ConfigError as error:
            wrong = [Flaw(message=error.what.rstrip("."), hint=error.why)]
    return folder, [*flaws, *wrong]


def compare(folder: Folder, parts: Iterable[Part], *, tied: bool) -> list[Flaw]:
    """What the folder lacks, has too much of, or has in another shape or type."""
    wanted = {part.name: part.shape for part in parts}
    have = dict(folder.tensors)
    if tied:
        have.pop("lm_head.weight", None)  # a copy of the embedding
    missing = [name for name in wanted if name not in have]
    extra = [name for name in have if name not in wanted]
    shapes = [
        f"{name} is {list(one.shape)}, {list(wanted[name])} is needed"
        for name, one in have.items()
        if name in wanted and one.shape != wanted[name]
    ]
    types = [f"{name} is {one.dtype}" for name, one in have.items() if name in wanted and one.dtype not in WIDTHS]
    groups = (
        ("missing", missing, did_you_mean_pairs(missing, extra)),
        ("not in the model", extra, ""),
        ("of another shape", shapes, ""),
        ("of a type that is not read", types, f"Known: {', '.join(WIDTHS)}."),
    )
    return [
        Flaw(message=f"{_tensors(len(names))} {what}: {_some(names)}", hint=hint)
        for what, names, hint in groups
        if names
    ]


def did_you_mean_pairs(missing: list[str], extra: list[str]) -> str:
    """For the first missing tensor, the extra one that looks like it."""
    if not missing or not extra:
        return ""
    suggestion = did_you_mean(missing[0], extra).partition(" Known:")[0]
    return suggestion if suggestion.startswith("Did") else ""


def raise_flaws(path: Path, flaws: list[Flaw]) -> None:
    """Raise one ConfigError that lists every flaw, if there is any."""
    if len(flaws) == 1:
        raise ConfigError(f"The Hugging Face folder {path} cannot be used: {flaws[0].message}.", hint=flaws[0].hint)
    if flaws:
        lines = "\n".join(f"  - {flaw}" for flaw in flaws)
        raise ConfigError(f"The Hugging Face folder {path} has {len(flaws)} problems:\n{lines}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"Cannot read {path}.", why=error.strerror or str(error)) from error


def _other_model(own: ModelSpec, model: ModelSpec) -> list[Flaw]:
    """Fields in which the folder's model is not the one asked for; where positions turn, sequences may be longer."""
    fields = ["flavour", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "tied", "norm_eps", "head_dim", "moe"]
    fields += ["rope_stretch"] if model.flavour == "llama" else ["learned_positions"]
    if own.moe is not None and model.moe is not None:
        fields[fields.index("moe")] = "top_k"
    different = [name for name in fields if _value(own, name) != _value(model, name)]
    if not different:
        return []
    told = ", ".join(f"{name} {_value(own, name)} in the folder, {_value(model, name)} here" for name in different)
    hint = "model.from_hf=FOLDER takes the model from there."
    if different == ["learned_positions"] and model.seq < own.learned_positions:
        hint = f"model.position_rows={own.learned_positions} keeps the positions that shorter sequences do not use."
    return [Flaw(message=f"it holds another model: {told}", hint=hint)]


def _beyond(window: int | None, seq: int) -> list[Flaw]:
    """What is wrong with sequences that are longer than the window of attention."""
    if window is None or seq <= window:
        return []
    message = f"{CONFIG}: sliding_window: attention sees {window} tokens there, and whole sequences here"
    return [Flaw(message=message, hint=f"model.seq={window} or less is the same model.")]


def _value(model: ModelSpec, name: str) -> Any:
    if name == "top_k":
        return None if model.moe is None else (model.moe.experts, model.moe.top_k, model.moe.ffn)
    if name == "moe":
        return "none" if model.moe is None else f"{model.moe.experts} experts"
    return getattr(model, name)


def _read_config_file(path: Path) -> tuple[Mapping[str, Any], list[Flaw]]:
    if not path.is_dir():
        return {}, [Flaw(message="it is not a folder")]
    try:
        document = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [Flaw(message=f"{CONFIG} is missing")]
    except (OSError, ValueError) as error:
        return {}, [Flaw(message=f"{CONFIG} cannot be read: {error}")]
    return (document, []) if isinstance(document, dict) else ({}, [Flaw(message=f"{CONFIG} is not a mapping")])


def _weight_files(path: Path) -> tuple[list[Path], list[Flaw]]:
    """The files of weights: those of the index, or the single one."""
    index = path / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if not all(isinstance(name, str) for name in weight_map.values()):
                raise TypeError("a file name is not text")
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [], [Flaw(message=f"{_INDEX} cannot be used: {type(error).__name__}: {error}")]
        odd = [name for name in names if Path(name).name != name]
        missing = [name for name in names if name not in odd and not (path / name).is_file()]
        flaws = [Flaw(message=f"{_INDEX} names files outside the folder: {_some(odd)}")] if odd else []
        flaws += [Flaw(message=f"files of {_INDEX} are missing: {_some(missing)}")] if missing else []
        return [path / name for name in names if name not in odd + missing], flaws
    if (path / _SINGLE).is_file():
        return [path / _SINGLE], []
    pickles = sorted(file.name for file in path.glob("*.bin")) + sorted(file.name for file in path.glob("*.pt*"))
    if pickles:
        message = f"its weights are pickles ({_some(pickles)}), and phalanx loads no pickle: loading one runs code"
        return [], [Flaw(message=message, hint="Save the model again with safe_serialization=True.")]
    return [], [Flaw(message=f"it has neither {_SINGLE} nor {_INDEX}")]


def _read_header(file: Path) -> tuple[dict[str, Stored], list[Flaw]]:
    """The tensors of one safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        tensors, end = {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            shape = tuple(int(extent) for extent in entry["shape"])
            width = WIDTHS.get(entry["dtype"])
            if width is not None and stop - start != width * math.prod(shape):
                raise ValueError(f"{name} has {stop - start} bytes, its shape and type need {width * math.prod(shape)}")
            tensors[name] = Stored(file=file, dtype=entry["dtype"], shape=shape, offset=8 + length + start)
            end = max(end, stop)
        if size != 8 + length + end:
            raise ValueError(f"it has {size} bytes, its header says {8 + length + end}: it is cut off or damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [Flaw(message=f"{file.name} cannot be used: {error}")]
    return tensors, []


def _tensors(count: int) -> str:
    return f"{count} tensor is" if count == 1 else f"{count} tensors are"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
