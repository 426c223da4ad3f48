"""A plan document with an estimate whose numbers are made up: texts and figures do not change with the calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from strategies.codec import to_json
from strategies.plan import ParallelPlan
from strategies.specs import ClusterSpec

GB = 1e9
PLAN = ParallelPlan(
    tp=2, pp=4, dp=2, zero_stage=1, stages=(3, 3, 3, 3), micro_batch=1, grad_accum=16, recompute="selective"
)
CLUSTER = ClusterSpec(
    name="a100_80", kind="existing", nodes=2, slots_per_node=8, device="A100-80GB", device_memory_bytes=80 * 10**9
)


def plan_document(plan: ParallelPlan = PLAN, cluster: ClusterSpec = CLUSTER, **estimate: Any) -> dict[str, Any]:
    """What ``plan --json`` prints, as far as texts and figures read it; ``estimate`` replaces parts of the estimate."""
    return {
        "job": "pretrain",
        "plan": to_json(plan),
        "violations": [],
        "model": {"name": "gpt_test", "flavour": "gpt3", "layers": 12, "hidden": 64, "heads": 4, "kv_heads": 4},
        "parameters": 1_234_567_890,
        "memory": None,
        "precision": "bf16",
        "batch": {"global_batch": 32, "seq": 2048, "ramp": None},
        "cluster": to_json(cluster),
        "estimate": estimate_document(plan) | estimate,
    }


def estimate_document(plan: ParallelPlan = PLAN) -> dict[str, Any]:
    """An estimate of ``plan`` that fits."""
    stages = [_stage(plan, stage) for stage in range(plan.pp)]
    kinds = {"gemm": 2.0, "attention": 0.3, "memory_bound": 0.2, "tp": 0.4, "cp": 0.0, "ep": 0.0, "launch": 0.02}
    kinds |= {"bubble": 0.5, "p2p": 0.03, "dp": 0.15, "optimizer": 0.05, "offload": 0.0}
    step_s = sum(kinds.values())
    smaller = replace(plan, dp=1, grad_accum=32)
    return {
        "plan_text": plan.describe(),
        "framework": "megatron",
        "runnable": True,
        "modelled_reason": "",
        "fits": True,
        "tokens": 2e10,
        "time": {
            "step_s": step_s,
            "low_s": 3.4,
            "high_s": 3.9,
            "kinds_s": kinds,
            "tokens_per_s": 32 * 2048 / step_s,
            "surviving_tokens_per_s": 17500.0,
            "mfu": 0.452,
            "hfu": 0.471,
        },
        "memory": {"budget_bytes": 80 * GB, "peak_bytes": 52 * GB, "peak_stage": 0, "stages": stages},
        "bottleneck": {"kind": "gemm", "share": 0.55, "sentence": "Matrix multiplications take 55 % of the step."},
        "failures": {
            "nodes": 2,
            "failures_per_day": 0.5,
            "failures_expected": 6.2,
            "mtbf_s": 172800.0,
            "checkpoint_bytes": 14.8 * GB,
            "memory_tier": True,
            "save_disk_s": 0.5,
            "save_memory_s": 0.2,
            "write_s": 4.0,
            "replica_s": 1.0,
            "disk_interval_steps": 300,
            "disk_interval_s": 1095.0,
            "memory_interval_steps": 60,
            "memory_interval_s": 219.0,
            "best_disk_steps": 300,
            "best_goodput": 0.972,
            "spares": 0,
            "spares_wanted": 1,
            "shrinks": False,
            "goodput": 0.972,
            "lost": {"checkpoint": 0.003, "replay": 0.006, "detect": 0.001, "restart": 0.008, "wait": 0.01},
            "days_fault_free": 12.9,
            "never": "",
            "days_low": 12.4,
            "days_50": 13.3,
            "days_90": 14.1,
            "cost_low_usd": 11_500.0,
            "cost_50_usd": 12_300.0,
            "cost_90_usd": 13_000.0,
            "sweep": [
                {"restart_s": seconds, "goodput": share}
                for seconds, share in ((1.0, 0.98), (30.0, 0.979), (120.0, 0.972), (600.0, 0.95))
            ],
        },
        "ladder": [
            {
                "nodes_lost": 1,
                "nodes_lost_most": 1,
                "nodes": 1,
                "plan": to_json(smaller),
                "plan_text": smaller.describe(),
                "step_s": 7.0,
                "tokens_per_s": 9362.0,
                "throughput": 0.52,
                "idle_nodes": 0,
                "idle_nodes_least": 0,
                "changes": ["dp 2 -> 1", "grad_accum 16 -> 32"],
                "moved_bytes": 7.4 * GB,
                "move_s": 0.037,
                "grow_s": 300.0,
                "wait_until_s": 580.0,
                "shrinks": True,
                "verdict": "shrink to 52.0% of the throughput",
                "advice": "shrink, unless it is back in 9.67 min",
            }
        ],
        "advice": {
            "plan": [_change("micro_batch 1 -> 2", "strategy.micro_batch=2", 0.071)],
            "hardware": [_change("matrix units 2x", "", 0.38), _change("network cards 2x", "", 0.02)],
        },
        "warnings": ["hidden 64 is outside of the calibrated range (1024 to 25600)"],
        "best": None,
        "search": None,
    }


def search_document() -> dict[str, Any]:
    """A search that found a better plan."""
    best = replace(PLAN, micro_batch=2, grad_accum=8)
    return {
        "objective": "goodput",
        "space": 100_000,
        "evaluated": 1_000,
        "pruned": 90_000,
        "rejected": 9_000,
        "fixed": {"grad_dtype": "fp32"},
        "among_runnable": True,
        "best": {
            "plan": to_json(best),
            "plan_text": best.describe(),
            "runnable": True,
            "step_s": 3.4,
            "peak_bytes": 55 * GB,
        },
        "best_runnable": None,
        "points": [(3.4 + 0.3 * i, (30 + 2 * i) * GB) for i in range(40)],
    }


def _stage(plan: ParallelPlan, stage: int) -> dict[str, Any]:
    kinds = {"weights": 4.0, "gradients": 8.0, "optimizer": 6.0, "activations": 8.0 * (plan.pp - stage) / plan.pp * 3}
    kinds |= {"logits": 3.0 * (stage == plan.pp - 1), "gathered": 0.0, "buffers": 4.0, "context": 3.0}
    kinds["fragmentation"] = 3.0
    sizes = {f"{kind}_bytes": value * GB for kind, value in kinds.items()}
    return {"stage": stage, "blocks": plan.stages[stage], **sizes, "total_bytes": sum(sizes.values())}


def _change(words: str, overrides: str, gain: float) -> dict[str, Any]:
    return {
        "change": words,
        "overrides": overrides,
        "gain": gain,
        "step_s": 3.65 / (1 + gain),
        "peak_bytes": 60 * GB,
        "runnable": True,
        "plan": to_json(PLAN),
    }
