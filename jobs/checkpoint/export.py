"""A checkpoint in the layout that Hugging Face's transformers loads: config.json and safetensors. Reads any plan's.

GPT-3 flavour becomes ``GPT2LMHeadModel`` (its q, k and v are one matrix, and its matrices are stored transposed), Llama
flavour ``LlamaForCausalLM``. Weights are the fp32 masters, rounded when a narrower type is asked for. The folder
appears at once and whole, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.errors import storage_error
from jobs.checkpoint.layout import sync_dir
from jobs.checkpoint.reader import Reader
from jobs.location import Location
from strategies.errors import ConfigError
from strategies.specs import ModelSpec

Array = npt.NDArray[Any]
Dtype = Literal["fp32", "bf16", "fp16"]
_NAMES: dict[Dtype, tuple[str, str]] = {
    "fp32": ("F32", "float32"),
    "bf16": ("BF16", "bfloat16"),
    "fp16": ("F16", "float16"),
}  # as safetensors calls it, as transformers does
_FILE_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One tensor of the exported model.

    Attributes:
        name: Its name there.
        sources: Our tensors that it is made of, one below the other.
        transposed: It is stored with inputs first.
    """

    name: str
    sources: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder.
        files: Number of weight files.
        tensors: Number of tensors.
        bytes: Size of the weights.
    """

    path: Path
    files: int
    tensors: int
    bytes: int


def export(
    manifest: str | Location,
    target: Path,
    *,
    dtype: Dtype = "fp32",
    file_bytes: int = _FILE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        manifest: The manifest.
        target: The folder to make; must not exist.
        dtype: Type of the weights.
        file_bytes: Largest weight file; a single tensor may be larger.
        progress: Told (bytes done, bytes in all) after every tensor.

    Raises:
        ConfigError: ``target`` exists, or transformers has no such model.
        CorruptCheckpoint: The checkpoint is damaged.
        StorageError: It cannot be read, or the folder cannot be written.
    """
    reader = Reader(manifest)
    config, parts = layout(reader.manifest.model)
    with appearing(target) as folder:
        written = _write(reader, parts, folder, dtype, file_bytes, progress)
        config |= {"torch_dtype": _NAMES[dtype][1]}
        _write_json(folder / "config.json", config)
    return Exported(path=target, files=written[0], tensors=len(parts), bytes=written[1])


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` at once and whole, or not at all.

    Raises:
        ConfigError: ``target`` exists.
        StorageError: It cannot be written.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already.", hint="Give --to the name of a folder that does not exist yet.")
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        os.rename(aside, target)
        sync_dir(target.parent)
    except OSError as error:
        raise storage_error("write the export", target, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def layout(model: ModelSpec) -> tuple[dict[str, Any], list[Part]]:
    """The config and the tensors of the model in transformers' names.

    Raises:
        ConfigError: transformers has no such model.
    """
    if model.moe is not None or model.latent is not None:
        raise ConfigError(f"Models like '{model.name}' cannot be exported yet: it has experts or latent attention.")
    if model.flavour == "llama":
        return _llama_config(model), list(_llama_parts(model))
    if model.kv_heads != model.heads or model.has_gate:
        raise ConfigError(
            "transformers' GPT-2 has neither grouped key/value heads nor gates, so this model has no layout there.",
            hint="The Llama flavour (model.flavour=llama) has both.",
        )
    return _gpt2_config(model), list(_gpt2_parts(model))


def _gpt2_config(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab,
        "n_positions": model.learned_positions,
        "n_embd": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _gpt2_parts(model: ModelSpec) -> Iterator[Part]:
    yield Part(name="transformer.wte.weight", sources=("embed.tokens.weight",))
    yield Part(name="transformer.wpe.weight", sources=("embed.positions.weight",))
    for index in range(model.layers):
        ours, theirs = f"blocks.{index}", f"transformer.h.{index}"
        for kind in ("weight", "bias"):
            turned = kind == "weight"
            qkv = tuple(f"{ours}.attn.{letter}.{kind}" for letter in "qkv")
            yield Part(name=f"{theirs}.ln_1.{kind}", sources=(f"{ours}.attn_norm.{kind}",))
            yield Part(name=f"{theirs}.attn.c_attn.{kind}", sources=qkv, transposed=turned)
            yield Part(name=f"{theirs}.attn.c_proj.{kind}", sources=(f"{ours}.attn.o.{kind}",), transposed=turned)
            yield Part(name=f"{theirs}.ln_2.{kind}", sources=(f"{ours}.mlp_norm.{kind}",))
            yield Part(name=f"{theirs}.mlp.c_fc.{kind}", sources=(f"{ours}.mlp.up.{kind}",), transposed=turned)
            yield Part(name=f"{theirs}.mlp.c_proj.{kind}", sources=(f"{ours}.mlp.down.{kind}",), transposed=turned)
    for kind in ("weight", "bias"):
        yield Part(name=f"transformer.ln_f.{kind}", sources=(f"head.norm.{kind}",))
    if not model.tied:
        yield Part(name="lm_head.weight", sources=("head.output.weight",))


def _llama_config(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.seq,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _llama_parts(model: ModelSpec) -> Iterator[Part]:
    yield Part(name="model.embed_tokens.weight", sources=("embed.tokens.weight",))
    for index in range(model.layers):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        pairs = {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.o_proj": "attn.o",
            "post_attention_layernorm": "mlp_norm",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
        }
        for name, source in pairs.items():
            yield Part(name=f"{theirs}.{name}.weight", sources=(f"{ours}.{source}.weight",))
    yield Part(name="model.norm.weight", sources=("head.norm.weight",))
    if not model.tied:
        yield Part(name="lm_head.weight", sources=("head.output.weight",))


def _write(
    reader: Reader,
    parts: list[Part],
    folder: Path,
    dtype: Dtype,
    file_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, int]:
    """The weight files and, if there are several, their index; returns their number and the bytes of all tensors."""
    files = _deal(reader, parts, dtype, file_bytes)
    total = sum(_bytes(reader, part, dtype) for part in parts)
    done, index = 0, {}
    for number, members in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for part in members:
            tensors[part.name] = _tensor(reader, part, dtype)
            index[part.name] = name
            done += _bytes(reader, part, dtype)
            if progress is not None:
                progress(done, total)
        _save(folder / name, tensors, dtype)
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return len(files), total


def _deal(reader: Reader, parts: list[Part], dtype: Dtype, file_bytes: int) -> list[list[Part]]:
    """Consecutive tensors to files of at most ``file_bytes``."""
    files: list[list[Part]] = [[]]
    held = 0
    for part in parts:
        size = _bytes(reader, part, dtype)
        if files[-1] and held + size > file_bytes:
            files.append([])
            held = 0
        files[-1].append(part)
        held += size
    return files


def _bytes(reader: Reader, part: Part, dtype: Dtype) -> int:
    elements = sum(int(np.prod(reader.shape(source))) for source in part.sources)
    return elements * (4 if dtype == "fp32" else 2)


def _tensor(reader: Reader, part: Part, dtype: Dtype) -> Array:
    pieces = []
    for source in part.sources:
        shape = reader.shape(source)
        pieces.append(reader.read_flat(source, "master", 0, int(np.prod(shape))).reshape(shape))
    array: Array = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    array = np.ascontiguousarray(array.T) if part.transposed else array
    if dtype == "bf16":
        return _to_bf16(array)
    return array.astype(np.float16) if dtype == "fp16" else array


def _to_bf16(array: Array) -> Array:
    """Bit patterns of the nearest bf16, ties to even, as torch rounds; NaN stays NaN."""
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _save(path: Path, tensors: dict[str, Array], dtype: Dtype) -> None:
    """One safetensors file. (The library's own writer has no bf16 for numpy, and its low-level call changes.)"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[dtype][0], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
