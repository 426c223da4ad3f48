"""Facts that tables of published runs state in prose: network speeds, widths of heads, kinds of layers, units."""

from __future__ import annotations

import re
from collections.abc import Callable

from strategies.specs import LatentAttention

_BITS = r"(\d+(?:\.\d+)?) ?Gb(?:it)?(?:ps|/s)"
_BYTES = r"(\d+(?:\.\d+)?) ?GB(?:ps|/s)"
_GENERATIONS = {"EDR": 100, "HDR": 200, "NDR": 400, "XDR": 800}

_DEEPSEEK = LatentAttention(q_rank=1536, kv_rank=512, nope_width=128, rope_width=64, value_width=128)
"""Widths of DeepSeek-V3 (arXiv 2412.19437), which the models with latent attention share but for the query latent."""


def network(text: str, devices_per_node: int) -> float | None:
    """Bytes per second that one device has to other nodes, or None where ``text`` says nothing.

    Reads ``~12.5 GB/s per 2 GPUs``, ``6.25 GB/s per GPU``, ``400 Gb/s NIC per GPU``, ``4x100 Gb/s per node``,
    ``8 HDR-200 NICs per node``, ``1600 Gbps node-node``. A figure per device wins over one per node.
    """
    shares: tuple[tuple[str, Callable[[re.Match[str]], float]], ...] = (
        (rf"{_BYTES}(?: \w+)* per (\d+) GPUs", lambda m: float(m[1]) * 1e9 / int(m[2])),
        (rf"{_BYTES}(?: \w+)*(?: per |/)GPU", lambda m: float(m[1]) * 1e9),
        (rf"{_BITS}(?: \w+)*(?: per |/)GPU", lambda m: float(m[1]) / 8 * 1e9),
        (rf"(\d+) (?:\w+ )?NICs? (?:x|of|at) {_BITS}", lambda m: int(m[1]) * float(m[2]) / 8 * 1e9 / devices_per_node),
        (rf"(\d+) ?x ?{_BITS}", lambda m: int(m[1]) * float(m[2]) / 8 * 1e9 / devices_per_node),
        (
            r"(\d+) ?x? ?(EDR|HDR|NDR|XDR)-?(\d+)?\b(?!\d)",
            lambda m: int(m[1]) * int(m[3] or _GENERATIONS[m[2].upper()]) / 8 * 1e9 / devices_per_node,
        ),
        (
            rf"{_BITS}(?:/node| (?:\w+ )*(?:node-node|per node|inter-node))",
            lambda m: float(m[1]) / 8 * 1e9 / devices_per_node,
        ),
        (rf"{_BYTES}(?:/node| (?:\w+ )*per node)", lambda m: float(m[1]) * 1e9 / devices_per_node),
    )
    for pattern, share in shares:
        # bits and bytes differ in one letter's case only, so the units keep theirs
        found = re.search(pattern, text)
        if found:
            return share(found)
    return None


def head_width(text: str) -> int:
    """Width of a head where the notes state it, else 0."""
    found = re.search(r"head_dim:? (\d+)", text)
    return int(found[1]) if found else 0


def dense_layers(text: str, layers: int) -> int:
    """Blocks with a dense feed-forward part in a model with experts."""
    if re.search(r"(?:every|each) (?:other|2nd|second) layer|alternat\w+ (?:dense|MoE)", text, re.I):
        return layers // 2
    found = re.search(r"first (?:(\d+) )?layers?(?: \w+)? dense", text, re.I)
    return int(found[1] or 1) if found else 0


def shared_experts(text: str) -> int:
    """Experts that every token visits."""
    found = re.search(r"(\d+) shared experts?", text, re.I)
    return int(found[1]) if found else 0


def latent_attention(text: str, hidden: int) -> tuple[LatentAttention, str]:
    """Widths of latent attention, and what had to be assumed.

    Without figures they are DeepSeek's; models narrower than 5,120 (DeepSeek-V2-Lite, Moonlight) have no query latent.
    """
    found = re.search(r"q_lora (\d+) kv_lora (\d+) qk (\d+)\+(\d+) v (\d+)", text)
    if found:
        q_rank, kv_rank, nope, rope, value = (int(group) for group in found.groups())
        return LatentAttention(q_rank=q_rank, kv_rank=kv_rank, nope_width=nope, rope_width=rope, value_width=value), ""
    if hidden >= 5120:
        return _DEEPSEEK, "latent attention with DeepSeek-V3's widths"
    narrow = LatentAttention(q_rank=0, kv_rank=512, nope_width=128, rope_width=64, value_width=128)
    return narrow, "latent attention with DeepSeek-V2-Lite's widths"


def memory_unit(text: str) -> float:
    """Bytes of one unit of the memory column.

    CUDA's tools count in binary units and people write GB for them, so it is GiB unless the notes say decimal.
    """
    return 1e9 if re.search(r"memory (?:column )?(?:is |in )?(?:decimal GB|GB = 1e9|1e9)", text, re.I) else 2.0**30


def memory_is_allocated(text: str) -> bool:
    """The memory is what tensors took, not what the process or the allocator held."""
    return bool(re.search(r"peak allocated|max_memory_allocated|allocated memory", text, re.I))


def memory_is_doubtful(text: str) -> bool:
    """The source itself says that its figure cannot be right."""
    return "memory implausible" in text.lower()
