"""What is on its way between ranks, and the copies of gradients, per family of training code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies.activations import cut
from strategies.buffers import gathered, gradient_copies, in_transit
from strategies.counts import Count, block, embedding, head
from strategies.specs import BatchSpec, MoeSpec
from strategies.workload import Framework, Workload
from tests.strategies.support import LLAMA2_7B, plan
from tests.strategies.test_memory import A100

N = LLAMA2_7B.parameters
BLOCK = block(LLAMA2_7B).total
ALL = Count(N, 0)
HALF = Count(16 * BLOCK + embedding(LLAMA2_7B), 0)
ROOT = embedding(LLAMA2_7B) + head(LLAMA2_7B)


def work(framework: Framework, precision: Any = "bf16", **more: Any) -> Workload:
    """Llama-2-7B on A100."""
    batch = BatchSpec(global_batch=64, seq=4096)
    model = more.get("model", LLAMA2_7B)
    return Workload(model=model, batch=batch, cluster=A100, precision=precision, framework=framework)


def _plan(**degrees: Any) -> Any:
    return plan(model=LLAMA2_7B, batch=BatchSpec(global_batch=64, seq=4096), precision="bf16", **degrees)


@pytest.mark.parametrize(
    ("framework", "precision", "degrees", "copies"),
    [
        ("megatron", "fp32", {"dp": 4, "zero_stage": 1}, (0, 0)),
        ("megatron", "fp16", {"dp": 4, "zero_stage": 0, "grad_dtype": "fp16"}, (0, 4 * N)),
        ("megatron", "bf16", {"dp": 4, "zero_stage": 0, "grad_dtype": "fp32"}, (2 * N, 0)),
        ("megatron", "fp16", {"dp": 4, "zero_stage": 1, "grad_dtype": "fp16"}, (4 * N / 4 + 4 * 2.5e9, 0)),
        ("megatron", "bf16", {"dp": 4, "zero_stage": 1}, (2 * N + 4 * N / 4 + 4 * 2.5e9, 0)),
        ("megatron", "bf16", {"dp": 4, "zero_stage": 1, "offload": "optimizer"}, (2 * N + 4 * 2.5e9, 0)),
        ("megatron", "bf16", {"dp": 4, "zero_stage": 3}, (0, 0)),
        ("mcore", "bf16", {"dp": 4, "zero_stage": 1}, (2 * N, 0)),
        ("mcore", "bf16", {"dp": 1, "zero_stage": 1}, (0, 0)),
        ("mcore", "fp8", {"dp": 4, "zero_stage": 1}, (0, 0)),
        ("fsdp", "bf16", {"dp": 4, "zero_stage": 3}, (0, 0)),
    ],
)
def test_copies_of_gradients(
    framework: Framework, precision: Any, degrees: dict[str, Any], copies: tuple[float, float]
) -> None:
    assert gradient_copies(work(framework, precision), _plan(**degrees), Count(N, 0)) == pytest.approx(copies)


def test_experts_come_with_fused_accumulation() -> None:
    model = replace(LLAMA2_7B, moe=MoeSpec(experts=8, top_k=2, ffn=1024))
    assert gradient_copies(work("mcore", model=model), _plan(dp=4, zero_stage=1), Count(N, N)) == (0, 0)


def test_weights_that_zero_3_gathers() -> None:
    assert gathered(work("megatron"), _plan(dp=4, zero_stage=2), ALL, 32) == 0
    assert gathered(work("megatron"), _plan(dp=4, zero_stage=3), ALL, 32) == 2e9  # stage3_max_live_parameters
    # the ends whole, two blocks, and of one block the gathering buffer, the gradients and their fp32 copy
    assert gathered(work("fsdp"), _plan(dp=4, zero_stage=3), ALL, 32) == 4 * (ROOT + BLOCK) + 8 * BLOCK
    assert gathered(work("fsdp", "fp8"), _plan(dp=4, zero_stage=3), ALL, 32) == 4 * (ROOT + BLOCK) + 10 * BLOCK
    piped = gathered(work("fsdp"), _plan(dp=4, pp=2, zero_stage=3), HALF, 16)
    assert piped == 6 * HALF.dense + 8 * BLOCK


@pytest.mark.parametrize(
    ("degrees", "streams"),
    [({}, 0), ({"pp": 2}, 2), ({"tp": 2}, 0), ({"tp": 2, "sequence_parallel": True}, 2), ({"cp": 2}, 2)],
)
def test_tensors_between_ranks(degrees: dict[str, Any], streams: float) -> None:
    """In units of a micro-batch's activation; keys and values are as wide as the stream in this model."""
    parallel = degrees.get("sequence_parallel", False)
    the_plan = replace(
        _plan(**{k: v for k, v in degrees.items() if k != "sequence_parallel"}), sequence_parallel=parallel
    )
    stream = 2 * 4096 * 4096
    assert in_transit(work("megatron"), the_plan, cut(the_plan, 4096, "bf16")) == streams * stream
    if the_plan.pp > 1:
        many = in_transit(work("fsdp"), the_plan, cut(the_plan, 4096, "bf16"))
        assert many == streams * stream * the_plan.grad_accum


@pytest.mark.parametrize(("ep", "tp", "streams"), [(1, 2, 0), (2, 1, 0), (2, 2, 4.4)])
def test_shards_of_experts_hand_on_what_visits_them(ep: int, tp: int, streams: float) -> None:
    """A rank's own visits once for every shard, and those of all: two visits of a token, and 1.1 times as many."""
    model = replace(LLAMA2_7B, moe=MoeSpec(experts=4, top_k=2, ffn=1024))
    the_plan = replace(_plan(tp=tp), ep=ep, dp=2)
    found = in_transit(work("megatron", model=model), the_plan, cut(the_plan, 4096, "bf16"))
    assert found == pytest.approx(streams * 2 * 4096 * 4096)
