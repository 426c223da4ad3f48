"""What a run is told about its checkpoints where the configuration leaves it to the planner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher import build
from launcher.config import compose
from launcher.request import START_TIMEOUT_S, RecoverySpec
from launcher.saving import checkpoint_spec, disk_steps, patient
from launcher.schema import Config
from strategies.estimate import Estimator, best_disk_steps
from strategies.failures import STORAGE_SHARE
from strategies.plan import ParallelPlan
from strategies.reliability import restart_from_disk_s
from strategies.workload import Workload


def planned(*words: str) -> tuple[Config, Workload | None, ParallelPlan]:
    config = compose(list(words))
    sketch = build.outline(config)
    return config, build.workload(config, sketch), sketch.plan


@pytest.mark.parametrize("name", ["gpt3_175b", "gpt4_1800b", "llama3_405b"])
def test_large_experiments_save_as_often_as_the_planner_finds_best(name: str) -> None:
    config, work, plan = planned(f"experiment={name}")
    assert work is not None
    found = checkpoint_spec(config, work, plan, Path("/runs/one"))
    assert config.checkpoint.every is None
    assert found.every == best_disk_steps(work, plan) == Estimator(work).estimate(plan).outlook.best_disk_steps
    assert found.memory_every == 1
    assert disk_steps(config, failing(work, 0.01), plan) > found.every
    estimate = Estimator(work).estimate(plan)
    busy = estimate.outlook.write_s / estimate.step_s / STORAGE_SHARE  # steps
    apart = estimate.outlook.memory_interval_steps  # what is saved to disk is a copy in memory, too
    worse = disk_steps(config, failing(work, 100), plan)
    assert worse >= busy - 1
    assert worse < found.every or found.every == pytest.approx(busy, abs=apart), "as often as the storage can follow"


def failing(work: Workload, times: float) -> Workload:
    """The same machine, which fails so many times as often."""
    hardware = replace(work.hardware, failures_per_node_day=times * work.hardware.failures_per_node_day)
    return replace(work, cluster=replace(work.cluster, hardware=hardware))


def test_what_the_user_says_holds() -> None:
    config, work, plan = planned("experiment=gpt3_175b", "checkpoint.every=77", "recovery.start_timeout_s=50")
    assert disk_steps(config, work, plan) == 77
    assert patient(config.recovery, work, plan).start_timeout_s == 50


def test_where_nothing_is_known_of_the_machine_the_usual_numbers_hold() -> None:
    config, _, plan = planned("experiment=quickstart", "checkpoint.every=null")
    assert disk_steps(config, None, plan) == 10
    assert patient(RecoverySpec(), None, plan).first_step_s == START_TIMEOUT_S == RecoverySpec().first_step_s


def test_a_start_may_take_what_reading_the_checkpoint_takes() -> None:
    config, work, plan = planned("experiment=gpt4_1800b")
    assert work is not None
    expected = restart_from_disk_s(work, plan)
    assert expected > START_TIMEOUT_S, "the usual patience would end every restart from disk"
    assert patient(config.recovery, work, plan).first_step_s == pytest.approx(3 * expected, abs=1)
    small, few, tiny = planned("experiment=quickstart")
    assert patient(small.recovery, few, tiny).first_step_s == START_TIMEOUT_S
