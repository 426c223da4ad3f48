"""The table of what runs: its format, what it says of the promised combinations, and whether it is still true."""

from __future__ import annotations

from itertools import product

import pytest

from strategies.capabilities import Key, Outcome, format_table, key_of, outcome, parse_table, runnable
from strategies.capability_table import TABLE
from strategies.rules import check
from tests.strategies.support import BATCH, TINY, plan


def test_the_table_is_what_the_writer_writes() -> None:
    assert format_table(parse_table(TABLE)) == TABLE.lstrip("\n")


def test_the_format_keeps_everything() -> None:
    keys = [
        Key(tp=tp, pp=pp, dp=dp, zero_stage=1, precision="fp32", grad_dtype="fp32", recompute=recompute)
        for tp, pp, dp in product((False, True), repeat=3)
        for recompute in ("none", "full")
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
        the_plan = plan(
            precision=key.precision,
            tp=1 + key.tp,
            pp=1 + key.pp,
            dp=1 + key.dp,
            zero_stage=key.zero_stage,
            grad_dtype=key.grad_dtype,
            recompute=key.recompute,
        )
        assert key_of(the_plan, key.precision) == key
        broken = check(model=TINY, plan=the_plan, batch=BATCH, cluster=None, precision=key.precision, modelled=True)
        assert (not broken) == found.runs, (key, broken)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_table_is_what_the_probe_sees() -> None:
    from tests.e2e.probe_capabilities import combinations, probe
    from tests.support.gang import WarmPool

    table = parse_table(TABLE)
    assert set(table) == set(combinations())
    with WarmPool() as pool:
        found = {key: probe(pool, key) for key in table}
    assert found == table
