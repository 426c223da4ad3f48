"""The table of what runs: its format, what it says of the promised combinations, and whether it is still true."""

from __future__ import annotations

import argparse
import os
import random
from itertools import product
from pathlib import Path

import pytest
import torch

from jobs.disks import is_compiled
from strategies.capabilities import AXES, Key, Outcome, format_table, key_of, outcome, parse_table, runnable
from strategies.capability_table import TABLE
from strategies.plan import Recompute, Schedule
from strategies.rules import check
from strategies.specs import BatchSpec
from tests.e2e import probe_capabilities
from tests.e2e.probe_capabilities import BATCH, DISKS, State, combinations, model_of, plan_of, probe_all, unbuilt
from tests.strategies.support import TINY, plan


def test_the_table_is_what_the_writer_writes() -> None:
    assert format_table(parse_table(TABLE)) == TABLE.lstrip("\n")


def test_the_format_keeps_everything() -> None:
    recomputes: tuple[Recompute, ...] = ("none", "full")
    others: tuple[tuple[Schedule, str], ...] = (("1f1b", "none"), ("dualpipev", "optimizer@nvme"))
    keys = [
        Key(
            **degrees,
            zero_stage=1,
            precision="fp32",
            grad_dtype="fp32",
            recompute=recompute,
            sequence_parallel=split,
            schedule=schedule,
            offload=offload,
        )
        for degrees in (dict(zip(AXES, values, strict=True)) for values in product((False, True), repeat=len(AXES)))
        for recompute, split in product(recomputes, (False, True))
        for schedule, offload in others
    ]
    table = {
        key: Outcome(runs=True, engine="E", optimizer="O") if i % 3 else Outcome(runs=False, reason="a reason: so")
        for i, key in enumerate(keys)
    }
    assert parse_table(format_table(table)) == table


def test_everything_that_the_issue_asks_for_runs() -> None:
    for tp, dp, recompute in product((1, 2), (1, 2), ("none", "selective", "full")):
        for pp, zero_stage in [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]:
            for precision in ("fp32", "bf16"):
                the_plan = plan(precision=precision, tp=tp, pp=pp, dp=dp, zero_stage=zero_stage, recompute=recompute)
                assert runnable(the_plan, precision, TINY) is None, the_plan
                found = outcome(the_plan, precision)
                assert found is not None
                assert found.engine == ("PipelineEngine" if pp > 1 else "DeepSpeedEngine")


def test_rules_and_table_agree_on_every_probed_combination() -> None:
    """What the rules allow has run; what DeepSpeed refused, a rule refuses first."""
    for key, found in parse_table(TABLE).items():
        the_plan, model = plan_of(key), model_of(key)
        assert key_of(the_plan, key.precision) == key
        batch = BatchSpec(global_batch=BATCH, seq=model.seq)
        broken = check(model=model, plan=the_plan, batch=batch, cluster=None, precision=key.precision, modelled=True)
        if found.reason.startswith("phalanx: "):
            assert unbuilt(key), key
        else:
            assert (not broken) == found.runs, (key, broken)


def test_dualpipev_runs_with_every_state_that_1f1b_runs_with() -> None:
    """The search takes it for granted."""
    table = parse_table(TABLE)
    for key in (key for key in table if key.schedule == "dualpipev"):
        assert table[key].runs == table[key._replace(schedule="1f1b")].runs, key


def test_the_rows_of_the_table_are_those_of_the_probe() -> None:
    keys = list(combinations())
    assert len(keys) == len(set(keys))
    assert all(set(key.rows) <= set(keys) for key in keys)
    assert set(parse_table(TABLE)) <= set(keys)


def test_the_probe_goes_on_where_it_was_and_starts_anew_for_another_deepspeed(tmp_path: Path) -> None:
    path, key = tmp_path / "state.jsonl", next(combinations())
    State(path).add(key, Outcome(runs=True, engine="E", optimizer="O"))
    assert State(path).table == {key: Outcome(runs=True, engine="E", optimizer="O")}
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first.replace('"deepspeed": "', '"deepspeed": "9'), *rest]) + "\n")
    assert State(path).table == {}


def test_some_rows_can_be_tried_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = list(combinations())
    state = dict.fromkeys(wanted, Outcome(runs=True, engine="E", optimizer="O"))
    monkeypatch.setattr(probe_capabilities, "is_compiled", lambda: True)
    assert probe_capabilities.choose(argparse.Namespace(only="", share="1/1"), state, wanted) == []
    asked = argparse.Namespace(only=r"optimizer@nvme 1f1b \| none \| T\.{4}", share="1/1")
    found = probe_capabilities.choose(asked, state, wanted)
    assert {(key.tp, key.sp, key.zero_stage, key.offload) for key in found} == {(True, False, 3, "optimizer@nvme")}
    assert {key.precision for key in found} == {"fp32", "bf16", "fp16"}
    monkeypatch.setattr(probe_capabilities, "is_compiled", lambda: False)
    assert probe_capabilities.choose(asked, state, wanted) == []
    assert "python -m jobs.engine first" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_sample_of_the_table_is_what_deepspeed_does() -> None:
    """Rows drawn with ``CAPABILITY_SEED``; the whole table is compared with ``-m full``."""
    seed = os.environ.get("CAPABILITY_SEED", "0")
    table = {key: found for key, found in parse_table(TABLE).items() if can_try(key)}
    drawn = random.Random(seed).sample(sorted(table), 5)
    found: dict[Key, Outcome] = {}
    probe_all(drawn, found.__setitem__, jobs=1)
    assert found == {key: table[key] for key in drawn}, f"CAPABILITY_SEED={seed}"


@pytest.mark.full
def test_every_combination_has_been_tried() -> None:
    """Else ``make capabilities``: until then, what has not been tried does not run."""
    assert set(parse_table(TABLE)) == set(combinations())


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_the_table_is_what_the_probe_sees() -> None:
    table = {key: found for key, found in parse_table(TABLE).items() if can_try(key)}
    found: dict[Key, Outcome] = {}
    probe_all(list(table), found.__setitem__, jobs=2)
    assert found == table


def can_try(key: Key) -> bool:
    """Our engine builds it, and this machine has the arithmetic, and the op for disks."""
    arithmetic = key.precision != "fp16" or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return not unbuilt(key) and arithmetic and (DISKS not in key.offload or is_compiled())
