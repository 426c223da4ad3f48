"""The table of what runs is what DeepSpeed does: rows of it trained again."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

import pytest

from strategies.capabilities import Key, Outcome, parse_table
from strategies.capability_table import TABLE
from tests.e2e.probe_capabilities import DISKS, Machine, plan_of, probe_all, this_machine, unbuilt

SEED = os.environ.get("CAPABILITY_SEED", "0")


def check_rows(rows: Mapping[Key, Outcome], jobs: int = 1) -> None:
    found: dict[Key, Outcome] = {}
    probe_all(list(rows), found.__setitem__, jobs=jobs)
    assert found == rows, f"CAPABILITY_SEED={SEED}"


def rows(machine: Machine, *, ranks: int) -> dict[Key, Outcome]:
    """What is tried with gangs of at most so many ranks, in a fixed order."""
    table = sorted(parse_table(TABLE).items())
    built = {key: found for key, found in table if found.tried and not unbuilt(key)}
    return {key: found for key, found in built.items() if plan_of(key).world_size <= ranks and not machine.lacks(key)}


def drawn(table: Mapping[Key, Outcome], number: int) -> dict[Key, Outcome]:
    """Some rows, by ``CAPABILITY_SEED``."""
    return {key: table[key] for key in random.Random(SEED).sample(list(table), number)}


@pytest.mark.timeout(120)
def test_a_row_that_runs_and_one_that_deepspeed_refuses_are_still_true() -> None:
    """Of two ranks and in memory; others with ``-m full``."""
    table = {key: found for key, found in rows(Machine(no_fp16="any"), ranks=2).items() if DISKS not in key.offload}
    runs = {key: found for key, found in table.items() if found.runs}
    refused = {key: found for key, found in table.items() if not found.runs}
    check_rows(drawn(runs, 1) | drawn(refused, 1))


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_sample_of_the_table_is_what_deepspeed_does() -> None:
    check_rows(drawn(rows(this_machine(), ranks=8), 5))


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_the_table_is_what_the_probe_sees() -> None:
    check_rows(rows(this_machine(), ranks=8), jobs=2)
