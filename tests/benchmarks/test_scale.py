"""25,000 GPUs: what failures cost a run of 100 days.

``make bench`` prints the tables. ``PHALANX_SCALE_DAYS`` sets how many days are played on all nodes (a day is some 22
recoveries, of some four seconds each on one core, and 580 commits to disk, of a third of a second), the rest is played
on a folded cluster, 100 days in some four minutes: the same failures on fewer nodes, which changes no decision and no
time (tests/launcher/test_scale.py).
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace

import pytest

from strategies.failures import DAY_S, shares
from strategies.reliability import RESTARTS_S
from tests.benchmarks.planned import FOLDED, GANG, Planned, folder, pace
from tests.benchmarks.stats import QUICK, Musts
from tests.support.scale.anchors import PUBLISHED
from tests.support.scale.faults import Rates
from tests.support.scale.play import Outcome, Scenario, play, predicted

DAYS = 100.0
FULL_DAYS = float(os.environ.get("PHALANX_SCALE_DAYS", "1"))
SPARES = 24  # enough for racks of four
SAVINGS = ((1, 4), (2, 4), (0, 4), (0, 50))  # steps between copies in memory (0: none), and between saves to disk
BESIDE_S = 0.03


def scenario(planned: Planned, restart_s: float, *, spares: int = SPARES, **saving: int) -> Scenario:
    """A hundred days on the folded cluster."""
    return Scenario(
        gang_nodes=GANG,
        nodes=FOLDED,
        spares=spares,
        days=DAYS,
        pace=pace(planned, restart_s, **saving),
        rates=Rates(),
        seed=1,
    )


def run(planned: Planned, what: Scenario) -> Outcome:
    with folder() as root:
        plan = planned.on(what.nodes)
        return play(root / "run", what, model=planned.model, plan=plan, batch=planned.batch)


def policies(planned: Planned, restart_s: float) -> list[tuple[str, Scenario]]:
    """Ours, and what others do, on the same failures."""
    half_hour = round(1800 / planned.step_s)
    return [
        ("memory every step, disk as planned", scenario(planned, restart_s)),
        ("... replicas in the next node", replace(scenario(planned, restart_s), rates=Rates(apart=False))),
        ("no memory tier, disk as planned", scenario(planned, restart_s, memory_every=0)),
        ("no memory tier, every 30 min", scenario(planned, restart_s, memory_every=0, disk_every=half_hour)),
        (
            "no memory tier, every 30 min, no spares",
            scenario(planned, restart_s, spares=0, memory_every=0, disk_every=half_hour),
        ),
    ]


def line(name: str, what: Scenario, out: Outcome) -> str:
    """One row of a table."""
    foreseen = predicted(what)
    return (
        f"  {name:42} {what.pace.restart_s:5.0f} s {out.goodput:7.2%} {foreseen:9.2%} {out.goodput - foreseen:+8.2%} "
        f"{len(out.struck):6,} {out.in_recovery:5,} {out.lost_steps:8,} {len(out.events):8,} {out.commits:8,} "
        f"{out.read_s:5.2f} s {out.real_s:6.0f} s"
    )


HEAD = (
    f"  {'goodput is simulated':42} restart simul. predicted differ. failures  in rec. steps lost   log lines  commits"
    "  to read   real"
)


@pytest.mark.full
@pytest.mark.timeout(14400)
def test_goodput_of_a_hundred_days(planned: Planned, musts: Musts) -> None:
    print(f"\nsimulated: gpt4_1800b on {GANG:,} nodes x 8, step {planned.step_s:.1f} s, {DAYS:g} days, folded")
    print("  the log has lines for decisions and for commits to disk; to read: until it is folded and accounted for")
    print(HEAD)
    off = 0.0
    for restart_s in RESTARTS_S:
        for name, what in policies(planned, restart_s):
            out = run(planned, what)
            off = max(off, abs(out.goodput - predicted(what)))
            assert out.ledger["wall"] == pytest.approx(out.wall_s, rel=1e-6)
            print(line(name, what, out), flush=True)
    for name, share, source in PUBLISHED:
        print(f"  {name:42} {'':7} {share:>7}   published, of a real cluster, {source}")
    musts.hold("goodput, simulated, the farthest from the planner's prediction", off, "<=", 0.01, ".2%")


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_what_phalanx_plan_prints(planned: Planned) -> None:
    """Its own failures, restarts and intervals, with enough spares: with few it shrinks, which is not played here."""
    what, standby = planned.what.rounded(planned.step_s), planned.standby._replace(spares=SPARES)
    per_node_day = what.rate * DAY_S / GANG * (1 - what.correlated)
    rates = Rates(per_node_day=per_node_day, correlated=what.correlated, silent=1.0, repair_s=what.repair_s)
    restart_s = what.recover_memory_s - what.detect_s - what.replica_s / 10
    played = replace(scenario(planned, restart_s), rates=rates)
    prints = shares(what, standby).goodput
    print(f"\n`phalanx plan` prints a goodput of {prints:.2%} with {SPARES} spares, restarts of {restart_s:.0f} s")
    for name, apart in (("replicas half a gang away, as they are", True), ("in the next node, as it reckons", False)):
        out = run(planned, replace(played, rates=replace(rates, apart=apart)))
        off = out.goodput - prints
        print(f"  simulated, {name}: {out.goodput:.2%}, {off:+.2%}; {len(out.struck):,} failures")


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_spares_and_intervals_that_reach_99_percent(planned: Planned, musts: Musts) -> None:
    """Restarts of 1 s. A copy stands still for what the planner reckons, or for 0.03 s: it is made beside the step."""
    days, spares = (1.0, (8, 24)) if os.environ.get(QUICK) else (10.0, (8, 12, 16, 20, 24))
    print(
        f"\nsimulated goodput, {GANG:,} nodes, {days:g} days, restart 1 s, step {planned.step_s:.1f} s; * reaches 99 %"
    )
    print(f"  {'memory':13} {'disk':16} {'a copy':>8}" + "".join(f"{one:4} spares " for one in spares))
    best = dict.fromkeys(spares, 0.0)
    for (memory, disk), copy_s in itertools.product(SAVINGS, (planned.what.copy_s, BESIDE_S)):
        if not memory and copy_s == BESIDE_S:
            continue  # it saves too seldom for that to matter
        cells = []
        for count in spares:
            what = scenario(planned, 1.0, spares=count, memory_every=memory, disk_every=disk)
            what = replace(what, days=days, pace=replace(what.pace, copy_s=copy_s))
            cells.append(run(planned, what).goodput)
            best[count] = max(best[count], cells[-1])
        row = "".join(f"{cell:10.2%}{'*' if cell >= 0.99 else ' '}" for cell in cells)
        where = f"{f'every {memory} steps' if memory else 'no':13} {f'every {disk} steps':16}"
        print(f"  {where} {copy_s:6.3f} s{row}", flush=True)
    musts.hold("simulated goodput of the best cell", max(best.values()), ">=", 0.99, ".2%")
    print(f"  simulated goodput with {spares[0]} spares, the best: {best[spares[0]]:.2%}")


@pytest.mark.full
def test_what_reaches_99_percent(planned: Planned) -> None:
    restarts = (1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
    print(f"\nby the planner's formula, not simulated: {SPARES} spares, a save to disk every 4 steps; * reaches 99 %")
    print("  nodes  replicas    stall  memory every  " + "".join(f"  restart {one:3.0f} s" for one in restarts))
    reached = 0
    for nodes, apart, copy_s, every in itertools.product(
        (GANG, 2048, 1200), (False, True), (planned.what.copy_s, 0.1, 0.03), (1, 2, 4)
    ):
        base = scenario(planned, 1.0, memory_every=every, disk_every=4)
        cells = []
        for restart_s in restarts:
            tuned = replace(base.pace, copy_s=copy_s, restart_s=restart_s)
            cells.append(predicted(replace(base, gang_nodes=nodes, pace=tuned, rates=Rates(apart=apart))))
        reached += sum(cell >= 0.99 for cell in cells)
        where = "elsewhere" if apart else "same rack"
        row = "".join(f"{cell:13.2%}{'*' if cell >= 0.99 else ' '}" for cell in cells)
        print(f"  {nodes:5} {where:>9} {copy_s:6.3f} s  {every:5} steps  {row}")
    assert reached


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_all_nodes_and_the_folded_cluster_decide_alike(planned: Planned) -> None:
    folded = replace(scenario(planned, 30.0), days=FULL_DAYS)
    whole = replace(folded, nodes=GANG)
    outs = [run(planned, what) for what in (whole, folded)]
    shapes = [[(event.kind, round(event.time, 3)) for event in out.events[1:]] for out in outs]
    assert shapes[0] == shapes[1]
    assert (outs[0].steps, outs[0].lost_steps, outs[0].struck) == (outs[1].steps, outs[1].lost_steps, outs[1].struck)
    print(f"\nsimulated: {FULL_DAYS:g} days on all {GANG:,} nodes, {SPARES} spares, real sockets; folded: the same log")
    print(HEAD)
    for name, what, out in zip(("all nodes", "folded"), (whole, folded), outs, strict=True):
        print(line(name, what, out))
    first = max(len(json.dumps(dict(event.data))) for event in outs[0].events)
    rest = (outs[0].log_bytes - first) / len(outs[0].events)
    print(f"  log of all nodes: {first:,} bytes for the first gang, {rest:,.0f} bytes for every other line")
