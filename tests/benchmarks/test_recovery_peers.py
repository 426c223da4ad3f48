"""SIGKILL of one rank -> first new step: phalanx beside torchrun, Ray Train and a bare warm fork of the same ranks.

Four ranks, PP2 x TP2, ZeRO-1, a four-layer GPT. Everybody runs the same loop on the same engine, with digests and
fsync, from the newest checkpoint; one rank is killed a few steps after one. phalanx runs at its defaults, which copy
the state into memory as often as half a percent of the time allows, and with a copy at every step, whatever that costs
where steps are so short: then no step but one may be lost. Contenders take turns, so that whatever else the machine
does meets all of them alike. Asserted besides the ratios is that every measurement is one: the kill hit a living rank,
training went on right after the checkpoint, the run ended well, and all losses are equal.

``make bench``, or ``python -m pytest tests/benchmarks/test_recovery_peers.py -m full -s``; PHALANX_BENCH_QUICK=1 for
one round instead of five.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.contenders import (
    AT_DEFAULTS,
    EVERY_STEP,
    Contender,
    job_of,
    module,
    phalanx,
    running,
    torchrun,
    words,
)
from tests.benchmarks.stats import Musts, repeats, show

STEPS, EVERY, KILL_AT, VICTIM = 40, 10, 13, 3
DEFAULTS = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2")
PROCESS = (*DEFAULTS, EVERY_STEP)
RAY = ("cluster=local", "cluster.nodes=2", "cluster.slots_per_node=2", EVERY_STEP)


def measure(contender: Contender, run_dir: Path, job: dict[str, object]) -> tuple[float, int, dict[int, float]]:
    """Seconds from the kill to the first new step, the steps lost, and the losses of the run."""
    with running(contender, run_dir, job) as run:
        run.wait_for_step(KILL_AT)
        run.wait_for_checkpoint(EVERY)
        killed = run.kill_rank(VICTIM, attempt=1)
        first = run.wait_for_step(0, attempt=2)
        took, lost = first["time"] - killed, run.steps_lost(EVERY)
        print(f"  {contender.name}: {took:.2f} s, {lost} steps lost{run.timeline(killed)}", flush=True)
        return took, lost, run.finish()


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_rank_killed(tmp_path: Path, musts: Musts) -> None:
    job = words(tmp_path, steps=STEPS, every=EVERY)
    contenders = [
        phalanx(job, *PROCESS),
        phalanx(job, *DEFAULTS, name=AT_DEFAULTS),
        module("bare fork", "bare_fork"),
        phalanx(job, *RAY),
        torchrun(),
        module("Ray Train", "ray_train"),
    ]
    document = job_of(job, tmp_path)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    curves: list[dict[int, float]] = []
    most_lost = [0]  # by phalanx with a copy at every step
    for number in range(repeats(5)):
        for index, contender in enumerate(contenders):
            took, lost, losses = measure(contender, tmp_path / f"{number}-{index}" / "run", document)
            seconds[contender.name].append(took)
            curves.append(losses)
            if contender.ours and contender.name != AT_DEFAULTS:
                most_lost.append(lost)
    assert len(curves[0]) == STEPS
    assert all(curve == curves[0] for curve in curves), "not everybody computed the same"
    show("SIGKILL of a rank -> first new step, 4 ranks, PP2 x TP2", seconds)
    for ours in (name for name in seconds if name.startswith("phalanx")):
        musts.ratio(seconds[ours], seconds["torchrun"], what=f"{ours} / torchrun", must=1 / 5)
        musts.ratio(seconds[ours], seconds["Ray Train"], what=f"{ours} / Ray Train", must=1 / 10)
        musts.ratio(seconds[ours], seconds["bare fork"], what=f"{ours} / bare fork", must=1.5)
    musts.hold("steps that phalanx lost at most with a copy at every step", max(most_lost), "<=", 1, ".0f")
