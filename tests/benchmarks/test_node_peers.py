"""A node dies and a spare is there -> first new step: phalanx beside Ray Train, at its defaults and tuned.

Three Ray nodes of two slots in network namespaces, four ranks, PP2 x TP2. Every process of a node that holds ranks is
killed at once (its connections are closed by the kernel, which is what Ray notices fastest). phalanx runs with a copy
in memory at every step and at its defaults, which copy less often where steps are so short. "Tuned" sets
``RAY_health_check_*`` to about the detection time that phalanx has by default. Asserted: ranks lived there, training
went on right after a checkpoint on other processes, the runs end well with equal losses.

``python -m pytest tests/benchmarks/test_node_peers.py -m full -s``; needs root and ``ip netns``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.benchmarks.clusters import TUNED, Cluster, cluster, phalanx_on, ray_train_on
from tests.benchmarks.contenders import AT_DEFAULTS, EVERY_STEP, OURS, RANKS, Contender, job_of, running, words
from tests.benchmarks.stats import Musts, repeats, show
from tests.support import netns

STEPS, EVERY, KILL_AT = 40, 10, 13
NODES = 3


def measure(
    where: Cluster, contender: Contender, run_dir: Path, job: dict[str, object]
) -> tuple[float, int, dict[int, float]]:
    """Seconds from the power cut to the first new step, the steps lost, and the losses of the run."""
    with running(contender, run_dir, job) as run:
        run.wait_for_step(KILL_AT)
        run.wait_for_checkpoint(EVERY)
        victim = where.holder({run.pid_of(rank, 1) for rank in range(RANKS)})
        killed = time.time()
        where.net.kill(victim)
        first = run.wait_for_step(0, attempt=2)
        assert not {run.pid_of(rank, 2) for rank in range(RANKS)} & set(where.net.pids(victim))
        took, lost = first["time"] - killed, run.steps_lost(EVERY)
        print(f"  {contender.name}: {took:.2f} s, {lost} steps lost{run.timeline(killed)}", flush=True)
        losses = run.finish()
    where.start_node(victim)
    return took, lost, losses


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not netns.available(), reason="needs root and ip netns")
def test_node_killed(tmp_path: Path, musts: Musts) -> None:
    job = words(tmp_path, steps=STEPS, every=EVERY)
    document = job_of(job, tmp_path)
    seconds: dict[str, list[float]] = {}
    curves: list[dict[int, float]] = []
    most_lost = [0]  # by phalanx with a copy at every step

    def take(where: Cluster, contender: Contender, number: int) -> None:
        name = f"{number}-{contender.name.replace(' ', '-').replace(',', '')}"
        took, lost, losses = measure(where, contender, tmp_path / name / "run", document)
        seconds.setdefault(contender.name, []).append(took)
        curves.append(losses)
        most_lost.append(lost if contender.name == OURS else 0)

    def round_on(extra: Mapping[str, str], name: str, number: int, *, ours: bool) -> None:
        with cluster(NODES, extra) as where:
            take(where, ray_train_on(where, name), number)
            if ours:
                take(where, phalanx_on(where, job, tmp_path, EVERY_STEP, spares=1), number)
                take(where, phalanx_on(where, job, tmp_path, spares=1, name=AT_DEFAULTS), number)

    for number in range(repeats(5)):
        round_on({}, "Ray Train", number, ours=True)
        round_on(TUNED, "Ray Train, tuned", number, ours=False)
    assert len(curves[0]) == STEPS
    assert all(curve == curves[0] for curve in curves), "not everybody computed the same"
    show("kill of a node, with a spare -> first new step, 4 ranks, PP2 x TP2", seconds)
    for ours in (OURS, AT_DEFAULTS):
        for theirs in ("Ray Train", "Ray Train, tuned"):
            musts.ratio(seconds[ours], seconds[theirs], what=f"{ours} / {theirs}", must=1 / 5)
    musts.hold("steps that phalanx lost at most with a copy at every step", max(most_lost), "<=", 1, ".0f")
