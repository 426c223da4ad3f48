"""Bytes of what is on its way: gathered weights, copies of gradients, tensors between ranks."""

from __future__ import annotations

from strategies import counts
from strategies.activations import Cut, fused
from strategies.counts import Count
from strategies.model_state import DTYPE_BYTES, replicas
from strategies.plan import ParallelPlan
from strategies.workload import Workload

_BUCKETS = 2_500_000_000
"""Parameters whose gradients DeepSpeed has in fp32 buckets at once: five buckets of its default size of 5e8. The number
of buckets is fitted on published runs of Megatron-DeepSpeed: all parameters of GPT 1.3B, a part of those of 180B; of
what fits best (four to five) it is what leaves no run more than 5 % above its prediction."""

_LIVE = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_live_parameters``."""


def gathered(work: Workload, plan: ParallelPlan, count: Count, blocks: int) -> float:
    """Bytes of weights and gradients that a rank of a stage has whole for a moment under ZeRO-3.

    DeepSpeed: up to ``stage3_max_live_parameters``. FSDP2: a block's weights, the next one's, the buffer that they are
    gathered into, the gradients of a block and their copy on the way to their owners (in fp8 two casts of the weights
    as well); what belongs to no block stays from the forward to the backward pass. With a pipeline FSDP2 keeps all
    weights gathered and adds up whole gradients until the last micro-batch (torchtitan's ``apply_fsdp`` switches
    ``reshard_after_forward`` off).

    Args:
        work: What is trained.
        plan: The plan.
        count: Parameters of the rank.
        blocks: Blocks of the stage.
    """
    if plan.zero_stage < 3:
        return 0.0
    model, width = work.model, DTYPE_BYTES[work.precision]
    ep = counts.expert_parallel(plan)
    block = max(counts.block(model, plan.tp, ep, dense=dense).total for dense in {True, model.moe is None})
    if work.framework != "fsdp":
        return float(width * min(count.total, max(_LIVE, 2 * block)))
    reduced = DTYPE_BYTES[plan.grad_dtype]
    passing = (2 * width + reduced + 2 * (work.precision == "fp8")) * block
    if plan.pp > 1:
        return float((width + reduced) * count.total + passing)
    root = max(0, count.total - blocks * block)
    return float(2 * width * (root + block) + passing)


def gradient_copies(work: Workload, plan: ParallelPlan, count: Count) -> tuple[float, float]:
    """Bytes of gradients beside those that wait for the optimizer: own ones, and ones where activations were.

    - Megatron-LM without ZeRO copies 16-bit gradients to fp32 for the step, after the activations are gone: the 20 and
      4 + 16 / d bytes for fp16 in the table of Megatron-Core's guide, "Distributed Optimizer".
    - DeepSpeed's ZeRO-1 and 2 reduce in fp32 buckets and copy their share to fp32 for the step; its bf16 optimizer also
      has the 16-bit gradients of a micro-batch before it adds them to the fp32 ones.
    - Of Megatron-Core's kind, those have these too that do not accumulate inside the products' kernels, as Transformer
      Engine's do.

    Args:
        work: What is trained.
        plan: The plan.
        count: Parameters of the rank.
    """
    precision, framework = work.precision, work.framework
    if precision == "fp32" or framework == "fsdp" or plan.zero_stage == 3:
        return 0.0, 0.0
    low = 2.0 * count.total if plan.grad_dtype == "fp32" and precision == "bf16" else 0.0
    if framework == "mcore":
        return (0.0 if plan.dp == 1 or fused(work.model, precision, framework) else low), 0.0
    if plan.zero_stage == 0:
        return low, 0.0 if plan.grad_dtype == "fp32" else 4.0 * count.total
    if plan.offload != "none" and plan.zero_stage == 2:
        low = 0.0  # a micro-batch's gradients leave for the host bucket by bucket
    share = sum(4.0 * number / over for number, over in zip(count, replicas(plan), strict=True))
    return low + share * (plan.offload == "none") + 4.0 * min(count.total, _BUCKETS), 0.0


def in_transit(work: Workload, plan: ParallelPlan, at: Cut) -> float:
    """Bytes of tensors that come from or go to other ranks while a block works.

    Between stages an activation and its gradient, for which torch's pipelines have buffers per micro-batch; with
    sequence parallelism a gathered input and a sum that is not scattered yet; in a ring two pairs of keys and values;
    of tokens that shards of experts gather, a rank's own, once for each of the others, and all.
    """
    model = work.model
    stream = at.width * at.tokens * model.hidden
    buffers = 0.0
    if plan.pp > 1:
        buffers += 2.0 * stream / at.whole * (plan.grad_accum if work.framework == "fsdp" else 1)
    if plan.sequence_parallel and plan.tp > 1:
        buffers += 2.0 * stream
    if plan.cp > 1:
        buffers += 4.0 * at.width * at.tokens * max(model.kv_heads / plan.tp, 1.0) * model.head_dim
    if model.moe is not None and at.dealt > 1 and work.framework == "megatron":
        buffers += 2.0 * stream * model.moe.top_k * model.moe.imbalance
    return buffers
