"""From the cells of one run to its workload and plan: where every ambiguous column is decided."""

from __future__ import annotations

import re
from dataclasses import replace

from launcher.calibration import facts
from launcher.calibration.cells import Cells
from launcher.calibration.devices import DEVICES, Device, find_device, shared_network
from strategies import rules
from strategies.errors import did_you_mean
from strategies.plan import GradDtype, ParallelPlan, Recompute, accumulation, split_layers
from strategies.specs import BatchSpec, ClusterSpec, LatentAttention, ModelSpec, MoeSpec, Precision
from strategies.workload import Framework, Workload


class Unmodelled(Exception):
    """The planner has no model for the row; the text says why."""


def assemble(cells: Cells) -> tuple[Workload, ParallelPlan] | None:
    """Workload and plan of one run, or None when its cells have problems.

    Raises:
        Unmodelled: The row reads well and cannot be predicted.
    """
    _read_all(cells)
    if cells.problems:
        return None
    precision, device = _precision(cells.text("precision")), _device(cells)
    model = _model(cells)
    plan = _plan(cells, precision, model)
    global_batch = cells.whole("global_batch")
    if global_batch is None:
        cells.assume("global batch: one micro-batch per replica")
        global_batch = plan.micro_batch * plan.dp
    work = Workload(
        model=model,
        batch=BatchSpec(global_batch=global_batch, seq=model.seq),
        cluster=_cluster(cells, device, plan),
        precision=precision,
        framework=_framework(plan, cells.text("precision")),
        deepspeed=plan.zero_stage > 0,  # Megatron-LM by itself has no ZeRO
    )
    _check_possible(work, plan)
    return work, plan


IMPOSSIBLE = frozenset(
    {
        *("hidden_divisible_by_heads", "heads_divisible_by_kv_heads", "heads_divisible_by_tp", "ffn_divisible_by_tp"),
        *("hidden_divisible_by_tp", "experts_consistent", "experts_need_moe", "experts_divisible_by_ep"),
        "precision_supported",
    }
)
"""Rules that no framework can break. The others are DeepSpeed's, and published runs of other frameworks break them."""


def _check_possible(work: Workload, plan: ParallelPlan) -> None:
    found = rules.check(
        model=work.model,
        plan=plan,
        batch=work.batch,
        cluster=work.cluster,
        precision=work.precision,
        modelled=True,
    )
    broken = [f"{one.message}; {one.hint}" for one in found if one.rule in IMPOSSIBLE]
    if broken:
        raise Unmodelled(". ".join(broken))


_WHOLE = (
    *("layers", "hidden", "ffn", "heads", "vocab", "seq", "moe_experts", "moe_topk", "moe_ffn", "gpus"),
    *("gpus_per_node", "tp", "pp", "dp", "ep", "cp", "vpp", "micro_batch", "global_batch"),
)


def _read_all(cells: Cells) -> None:
    """Look at every cell once, so that all problems of a line are found even if its first already spoils it."""
    for column in _WHOLE:
        cells.whole(column)
    if not cells.text("kv_heads").upper().startswith("MLA"):
        cells.whole("kv_heads")
    if (cells.whole("zero_stage", least=0) or 0) > 3:
        cells.choice("zero_stage", ("0", "1", "2", "3"))
    for column in ("gated_mlp", "seq_parallel", "flash_attn"):
        cells.flag(column)


def _given(cells: Cells, column: str) -> int:
    value = cells.whole(column)
    if value is None:
        raise Unmodelled(f"{column} is empty")
    return value


def _or_one(cells: Cells, column: str) -> int:
    value = cells.whole(column)
    if value is None:
        cells.assume(f"{column} 1")
    return value or 1


# ---- the model --------------------------------------------------------------------------------------------------


def _model(cells: Cells) -> ModelSpec:
    """Gated: of the Llama kind, with an output projection of its own. Else: of the GPT-3 kind, with tied weights."""
    notes, gated = cells.text("notes"), cells.flag("gated_mlp")
    hidden, heads = _given(cells, "hidden"), _given(cells, "heads")
    width = facts.head_width(notes)
    latent, kv_heads = _attention(cells, heads)
    if not width and not latent and hidden % heads:
        raise Unmodelled(f"hidden {hidden} is not divisible by heads {heads}, and no head_dim is stated")
    ffn = cells.whole("ffn")
    if ffn is None:
        cells.assume("ffn 4 x hidden")
    if "sliding window" in notes:
        cells.assume("full attention instead of a sliding window")
    return ModelSpec(
        name=cells.text("model") or cells.text("id"),
        flavour="llama" if gated else "gpt3",
        layers=_given(cells, "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn or 4 * hidden,
        vocab=_given(cells, "vocab"),
        seq=_given(cells, "seq"),
        tied=not gated,
        head_width=width if width * heads != hidden else 0,
        position_rows=0 if re.search(r"\bALiBi\b", notes, re.I) and not gated else None,
        embed_norm=bool(re.search(r"embedding layer ?norm", notes, re.I)),
        moe=_moe(cells, ffn or 4 * hidden),
        latent=latent,
    )


def _attention(cells: Cells, heads: int) -> tuple[LatentAttention | None, int]:
    if cells.text("kv_heads").upper().startswith("MLA"):
        latent, assumed = facts.latent_attention(cells.text("notes"), _given(cells, "hidden"))
        if assumed:
            cells.assume(assumed)
        return latent, heads
    kv_heads = cells.whole("kv_heads")
    if kv_heads is None:
        cells.assume("as many key/value heads as heads")
    return None, kv_heads or heads


def _moe(cells: Cells, ffn: int) -> MoeSpec | None:
    experts = cells.whole("moe_experts")
    if experts is None:
        return None
    notes, width = cells.text("notes"), cells.whole("moe_ffn")
    if width is None:
        cells.assume("experts as wide as ffn")
    return MoeSpec(
        experts=experts,
        top_k=_given(cells, "moe_topk"),
        ffn=width or ffn,
        dense_layers=facts.dense_layers(notes, _given(cells, "layers")),
        shared_ffn=facts.shared_experts(notes) * (width or ffn),
        imbalance=1.0 if re.search(r"(?:forced|perfect)\w* (?:expert )?balance", notes, re.I) else 1.1,
    )


# ---- the machine ------------------------------------------------------------------------------------------------


def _device(cells: Cells) -> Device:
    device = find_device(cells.text("gpu"))
    if device is None:
        raise Unmodelled(f"no figures for the device '{cells.text('gpu')}'. {did_you_mean(cells.text('gpu'), DEVICES)}")
    bandwidth = network(cells) or shared_network(device.key, cells.whole("gpus_per_node") or 8)
    if bandwidth is None:
        return device
    return replace(device, hardware=replace(device.hardware, inter_bandwidth=bandwidth))


def network(cells: Cells) -> float | None:
    """Bytes per second that one device has to other nodes, where the row states it."""
    stated = cells.number("nic_gbps_per_gpu")
    if stated:
        return stated / 8 * 1e9
    return facts.network(f"{cells.text('gpu')}; {cells.text('notes')}", cells.whole("gpus_per_node") or 8)


def _cluster(cells: Cells, device: Device, plan: ParallelPlan) -> ClusterSpec:
    per_node = cells.whole("gpus_per_node")
    if per_node is None:
        per_node = 8
        cells.assume("8 devices per node")
    return ClusterSpec(
        name=device.key,
        kind="existing",
        nodes=-(-plan.world_size // per_node),
        slots_per_node=per_node,
        device=device.key,
        device_memory_bytes=device.memory_bytes,
        hardware=device.hardware,
    )


def _precision(text: str) -> Precision:
    word = text.lower()
    if "fp4" in word:
        raise Unmodelled(f"no figures for 4-bit arithmetic ('{text}'); the nearest is fp8")
    for sign, precision in _SIGNS:
        if sign in word:
            return precision
    raise Unmodelled(f"precision '{text}' is not known. {did_you_mean(word, ('fp32', 'bf16', 'fp16', 'fp8'))}")


_SIGNS: tuple[tuple[str, Precision], ...] = (
    ("fp8", "fp8"),
    ("float8", "fp8"),
    ("bf16", "bf16"),
    ("bfloat16", "bf16"),
    ("fp16", "fp16"),
    ("half", "fp16"),
    ("tf32", "fp32"),
    ("fp32", "fp32"),
)


_RECIPE = re.compile(r"mxfp8|fp8-\w+", re.I)


def _framework(plan: ParallelPlan, precision: str) -> Framework:
    """By what the code does, never by who wrote it.

    Fully sharded: FSDP, unless the precision is called as Transformer Engine calls its recipes (``FP8-CS``, ``MXFP8``),
    which is what Megatron-Core multiplies with. Else fused attention: Megatron-Core. Else: Megatron-LM.
    """
    if plan.zero_stage == 3 and not _RECIPE.search(precision):
        return "fsdp"
    return "mcore" if plan.flash else "megatron"


# ---- the plan ---------------------------------------------------------------------------------------------------


def _plan(cells: Cells, precision: Precision, model: ModelSpec) -> ParallelPlan:
    tp, pp, dp = (_given(cells, axis) for axis in ("tp", "pp", "dp"))
    cp, ep, vpp = _or_one(cells, "cp"), _or_one(cells, "ep"), _virtual_stages(cells)
    _check_ranks(cells, tp, pp, dp, cp)
    if pp > model.layers:
        raise Unmodelled(f"pp {pp} stages for {model.layers} layers; nearest legal pp: {model.layers}")
    zero_stage, flash = cells.whole("zero_stage", least=0), cells.flag("flash_attn")
    if zero_stage is None:
        cells.assume("ZeRO-0")
    micro_batch = _micro_batch(cells, pp * vpp, dp)
    rows = cells.whole("global_batch") or micro_batch * dp
    if rows < micro_batch * dp:
        legal = f"nearest legal micro_batch: {max(1, rows // dp)}"
        raise Unmodelled(f"dp {dp} x micro_batch {micro_batch} exceeds the global batch of {rows}; {legal}")
    return ParallelPlan(
        tp=tp,
        pp=pp,
        dp=dp,
        ep=ep,
        cp=cp,
        vpp=vpp,
        zero_stage=zero_stage or 0,
        schedule="interleaved" if vpp > 1 else "1f1b",
        stages=split_layers(model.layers, pp),
        micro_batch=micro_batch,
        grad_accum=accumulation(rows, micro_batch, dp),
        grad_dtype=_grad_dtype(precision, cells.text("notes")),
        recompute=_recompute(cells),
        flash=flash,
        sequence_parallel=cells.flag("seq_parallel") and tp > 1,
    )


def _check_ranks(cells: Cells, tp: int, pp: int, dp: int, cp: int) -> None:
    devices, ranks = _given(cells, "gpus"), tp * pp * dp * cp
    if ranks == devices:
        return
    near = f"; nearest legal dp: {max(1, devices // (tp * pp * cp))}"
    raise Unmodelled(f"tp {tp} x pp {pp} x dp {dp} x cp {cp} = {ranks} ranks on gpus {devices}{near}")


def _virtual_stages(cells: Cells) -> int:
    """Not stated: 2 where the row calls itself interleaved (the least that is), else 1."""
    stated = cells.whole("vpp")
    if stated is not None:
        return stated
    vpp = 2 if "interleaved" in f"{cells.text('id')} {cells.text('notes')}".lower() else 1
    cells.assume(f"vpp {vpp}")
    return vpp


def _micro_batch(cells: Cells, stages: int, dp: int) -> int:
    """Not stated: as many micro-batches as stages, torchtitan's default; without a pipeline, micro-batches of 1."""
    stated = cells.whole("micro_batch")
    if stated is not None:
        return stated
    rows = (cells.whole("global_batch") or dp) // dp
    micro_batch = max(1, rows // stages) if stages > 1 else 1
    cells.assume(f"micro_batch {micro_batch}")
    return micro_batch


def _recompute(cells: Cells) -> Recompute:
    """Not stated: none, which is what Megatron-Core does unless it is told otherwise."""
    word = cells.text("recompute").lower()
    if not word:
        cells.assume("no recomputation; for the verdict, the least that fits")
        return "none"
    for known in ("none", "selective", "full"):
        if word == known:
            return known
    raise Unmodelled(f"recompute '{word}' is not modelled. {did_you_mean(word, ('none', 'selective', 'full'))}")


def _grad_dtype(precision: Precision, notes: str) -> GradDtype:
    """fp32 but for fp16, where Megatron adds up in fp16 unless told otherwise, and for FSDP's ``PURE`` mode."""
    if precision == "fp16":
        return "fp16"
    return "bf16" if re.search(r"\bMP mode PURE\b", notes) and precision != "fp32" else "fp32"
