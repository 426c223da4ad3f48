"""A Hugging Face folder as it lies on disk: which tensor is where, and everything that is wrong with it, at once.

Only config.json and the headers of the safetensors files are read. Folders that have nothing but pickles
(``pytorch_model.bin``) are refused: loading one runs code. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
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
    tensors, unknown, files, wrong = _all_tensors(path)
    known = [*tensors, *(unknown or ())]
    if model is not None and model.flavour == "gpt3" and not any(name.startswith(_PREFIX) for name in known):
        tensors = {_prefixed(name): one for name, one in tensors.items()}
        unknown = unknown and {_prefixed(name) for name in unknown}
    folder = Folder(path=path, config=config, tensors=tensors, files=tuple(files))
    if model is not None and unknown is not None:
        try:
            wrong += compare(folder, parts_of(model), tied=model.tied, unknown=unknown)
        except ConfigError as error:
            wrong += [Flaw(message=error.what.rstrip("."), hint=error.why)]
    return folder, [*flaws, *wrong]


def _all_tensors(path: Path) -> tuple[dict[str, Stored], set[str] | None, list[Path], list[Flaw]]:
    """The tensors that can be seen, buffers left out; those that files which cannot be read have; the files; flaws.

    Nobody knows what such files have (None) where there is no index that says it.
    """
    files, places, wrong = _weight_files(path)
    tensors: dict[str, Stored] = {}
    unread = set(places.values()) - {file.name for file in files}
    for file in files:
        found, broken, whole = _read_header(file)
        wrong += broken
        wrong += [Flaw(message=f"{name} is in two files") for name in found if name in tensors]
        tensors |= found
        unread |= set() if whole else {file.name}
    lost = {name for name, file in places.items() if file in unread and name not in tensors}
    unknown = lost if places or (files and not unread) else None
    return {name: one for name, one in tensors.items() if not name.endswith(_BUFFERS)}, unknown, files, wrong


def _prefixed(name: str) -> str:
    return name if name == "lm_head.weight" else _PREFIX + name


def compare(folder: Folder, parts: Iterable[Part], *, tied: bool, unknown: Collection[str] = frozenset()) -> list[Flaw]:
    """What the folder lacks, has too much of, or has in another shape or type.

    Args:
        folder: The folder.
        parts: What is needed.
        tied: The output projection may be there or not.
        unknown: Tensors in files that cannot be read: whether they are right is not known.
    """
    wanted = {part.name: part.shape for part in parts}
    have = dict(folder.tensors)
    if tied:
        have.pop("lm_head.weight", None)  # a copy of the embedding
    missing = [name for name in wanted if name not in have and name not in unknown]
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


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str], list[Flaw]]:
    """The files of weights: those of the index, with which tensor it says is in which file, or the single one."""
    index = path / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if not all(isinstance(name, str) for name in weight_map.values()):
                raise TypeError("a file name is not text")
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [], {}, [Flaw(message=f"{_INDEX} cannot be used: {type(error).__name__}: {error}")]
        odd = [name for name in names if Path(name).name != name]
        missing = [name for name in names if name not in odd and not (path / name).is_file()]
        flaws = [Flaw(message=f"{_INDEX} names files outside the folder: {_some(odd)}")] if odd else []
        flaws += [Flaw(message=f"files of {_INDEX} are missing: {_some(missing)}")] if missing else []
        return [path / name for name in names if name not in odd + missing], weight_map, flaws
    if (path / _SINGLE).is_file():
        return [path / _SINGLE], {}, []
    pickles = sorted(file.name for file in path.glob("*.bin")) + sorted(file.name for file in path.glob("*.pt*"))
    if pickles:
        message = f"its weights are pickles ({_some(pickles)}), and phalanx loads no pickle: loading one runs code"
        return [], {}, [Flaw(message=message, hint="Save the model again with safe_serialization=True.")]
    return [], {}, [Flaw(message=f"it has neither {_SINGLE} nor {_INDEX}")]


def _read_header(file: Path) -> tuple[dict[str, Stored], list[Flaw], bool]:
    """The tensors of one safetensors file, what is wrong with it, and whether its header names all that is in it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        found = {name: _entry(file, 8 + length, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [_unusable(file, str(error))], False
    flaws = []
    for name, (stored, count) in found.items():
        needed = WIDTHS.get(stored.dtype, 0) * math.prod(stored.shape)
        if stored.dtype in WIDTHS and count != needed:
            flaws.append(_unusable(file, f"{name} has {count} bytes, its shape and type need {needed}"))
    end = max((stored.offset + count for stored, count in found.values()), default=8 + length)
    if size != end:
        flaws.append(_unusable(file, f"it has {size} bytes, its header says {end}: it is cut off or damaged"))
    return {name: stored for name, (stored, _) in found.items()}, flaws, True


def _entry(file: Path, begin: int, entry: Mapping[str, Any]) -> tuple[Stored, int]:
    """A tensor, and how many bytes it has."""
    start, stop = (int(one) for one in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"])
    return Stored(file=file, dtype=str(entry["dtype"]), shape=shape, offset=begin + start), stop - start


def _unusable(file: Path, why: str) -> Flaw:
    return Flaw(message=f"{file.name} cannot be used: {why}")


def _tensors(count: int) -> str:
    return f"{count} tensor is" if count == 1 else f"{count} tensors are"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
