"""The whole dictionary as golden text, and the learning rate against DeepSpeed's own scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from strategies.deepspeed_config import deepspeed_config, learning_rate
from tests.strategies.support import plan
from tests.support.golden import assert_golden

RECIPE: dict[str, Any] = {
    "clip": 1.0,
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "warmup_steps": 10,
    "steps": 100,
    "min_lr": 3e-5,
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp32, one rank": ("fp32", {}),
    "fp32, TP2 x PP2 x DP2 ZeRO-1": ("fp32", {"tp": 2, "pp": 2, "dp": 2}),
    "bf16, DP4 ZeRO-2": ("bf16", {"dp": 4, "zero_stage": 2}),
    "bf16, DP4 ZeRO-3": ("bf16", {"dp": 4, "zero_stage": 3, "micro_batch": 2}),
    "bf16, PP2 ZeRO-0": ("bf16", {"pp": 2, "zero_stage": 0}),
    "fp16, DP2 ZeRO-1": ("fp16", {"dp": 2}),
}


def test_the_whole_config_is_the_golden_text() -> None:
    found = {
        name: deepspeed_config(plan=plan(precision=precision, **degrees), precision=precision, **RECIPE)
        for name, (precision, degrees) in CASES.items()
    }
    assert_golden("deepspeed_config.json", json.dumps(found, indent=2))


def test_state_beside_the_device() -> None:
    def zero(**degrees: Any) -> dict[str, Any]:
        config = deepspeed_config(plan=plan(precision="bf16", dp=2, **degrees), precision="bf16", **RECIPE)
        assert config.get("zero_force_ds_cpu_optimizer") is (False if "offload" in degrees else None)
        return dict(config["zero_optimization"])

    assert not [key for key in zero(zero_stage=3) if key.startswith("offload")]
    assert zero(zero_stage=1, offload="optimizer")["offload_optimizer"]["device"] == "cpu"
    both = zero(zero_stage=3, offload="optimizer+params", offload_path="/disks")
    disks = {"device": "nvme", "nvme_path": "/disks", "pin_memory": False}
    assert both["offload_optimizer"] == disks
    assert both["offload_param"] == disks | {"max_in_cpu": 0}, "none of them stays in memory"
    assert both["sub_group_size"] <= 1e8, "four fp32 buffers of this size do"


def test_clipping_is_always_written_out() -> None:
    assert deepspeed_config(plan=plan(), precision="fp32", **(RECIPE | {"clip": 0.0}))["gradient_clipping"] == 0.0


def test_two_configs_share_nothing() -> None:
    first, second = (deepspeed_config(plan=plan(precision="bf16"), precision="bf16", **RECIPE) for _ in range(2))
    first["bf16"]["enabled"] = False
    first["scheduler"]["params"].clear()
    assert second["bf16"] == {"enabled": True}
    assert second["scheduler"]["params"]


SCHEDULES: list[dict[str, Any]] = [
    {"lr": 3e-4, "min_lr": 3e-5, "warmup_steps": warmup_steps, "steps": steps}
    for warmup_steps in (0, 1, 2, 3, 10, 50)
    for steps in (1, 2, 20, 50)
] + [
    {"lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0, "steps": 20},
    {"lr": 1e-3, "min_lr": 0.0, "warmup_steps": 5, "steps": 20},
    {"lr": 0.0, "min_lr": 0.0, "warmup_steps": 5, "steps": 20},
]

_ASK_DEEPSPEED = """
import json, logging, sys
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR
logging.disable()
for line in sys.stdin:
    lr, params, steps = json.loads(line)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = WarmupCosineLR(optimizer, **params)
    rates = []
    for step in range(1, steps + 1):
        scheduler.step(step)
        rates.append(optimizer.param_groups[0]["lr"].hex())
    print("RATES " + json.dumps(rates))
"""


def test_the_learning_rate_is_deepspeeds_to_the_last_bit() -> None:
    horizon = 60
    lines = []
    for schedule in SCHEDULES:
        config = deepspeed_config(plan=plan(), precision="fp32", **(RECIPE | schedule))
        assert config["scheduler"]["type"] == "WarmupCosineLR"
        lines.append(json.dumps([schedule["lr"], config["scheduler"]["params"], horizon]))
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ASK_DEEPSPEED],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    found = [json.loads(line[6:]) for line in answer.stdout.splitlines() if line.startswith("RATES ")]
    assert len(found) == len(SCHEDULES)
    for schedule, rates in zip(SCHEDULES, found, strict=True):
        assert [learning_rate(step, **schedule).hex() for step in range(1, horizon + 1)] == rates, schedule


def test_without_warm_up_the_first_step_has_the_peak_and_the_last_the_floor() -> None:
    schedule: dict[str, Any] = {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 0, "steps": 20}
    rates = [learning_rate(step, **schedule) for step in range(1, 31)]
    assert rates[0] == 1e-3
    assert rates[19] == pytest.approx(1e-4, rel=1e-12)
    assert rates[:20] == sorted(rates[:20], reverse=True)
    assert set(rates[19:]) == {rates[19]}


def test_the_warm_up_is_linear_and_begins_above_zero() -> None:
    schedule: dict[str, Any] = {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4, "steps": 100}
    rates = [learning_rate(step, **schedule) for step in range(1, 6)]
    assert rates[:3] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3], rel=1e-12)
    assert rates[3] == pytest.approx(1e-3, rel=1e-3)
    assert rates[4] < rates[3]
