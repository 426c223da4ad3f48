"""``phalanx submit`` on a running Ray cluster -> first step, beside torchrun from a cold start.

Four ranks, PP2 x TP2, two nodes of two slots. From the start of the command to the ``time`` of the first line of
``metrics.jsonl``; the data is prepared before for both, and both commands are given on a node. Nothing of phalanx runs
on the cluster beforehand: controller, agents and warm pools are started within the time. Asserted: the runs end well
with equal losses.

``python -m pytest tests/benchmarks/test_start_peers.py -m full -s``; needs root and ``ip netns``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.clusters import cluster, phalanx_on
from tests.benchmarks.contenders import Contender, job_of, running, torchrun, words
from tests.benchmarks.stats import Musts, repeats, show
from tests.support import netns

STEPS = 5


def measure(contender: Contender, run_dir: Path, job: dict[str, object]) -> tuple[float, dict[int, float]]:
    """Seconds from the command to the first step, and the losses; prints the time line of phalanx."""
    with running(contender, run_dir, job) as run:
        took = run.wait_for_step(1)["time"] - run.started
        agents = [path.stat().st_mtime - run.started for path in sorted(run.paths.agents.glob("*.json"))]
        warming = "".join(f", pool of an agent begins {at:.2f}" for at in agents)
        print(f"  {contender.name}: {took:.2f} s{warming}{run.timeline(run.started)}", flush=True)
        return took, run.finish()


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not netns.available(), reason="needs root and ip netns")
def test_submit(tmp_path: Path, musts: Musts) -> None:
    job = words(tmp_path, steps=STEPS, every=0)
    document = job_of(job, tmp_path)
    seconds: dict[str, list[float]] = {}
    curves: list[dict[int, float]] = []
    with cluster(2) as running_cluster:
        contenders = [torchrun(), phalanx_on(running_cluster, job, tmp_path)]
        for number in range(repeats(5)):
            for index, contender in enumerate(contenders):
                took, losses = measure(contender, tmp_path / f"{number}-{index}" / "run", document)
                seconds.setdefault(contender.name, []).append(took)
                curves.append(losses)
    assert len(curves[0]) == STEPS
    assert all(curve == curves[0] for curve in curves), "not everybody computed the same"
    show("start of the command -> first step, 4 ranks, PP2 x TP2", seconds)
    musts.ratio(seconds["phalanx"], seconds["torchrun"], what="phalanx on a running cluster / torchrun, cold", must=1.0)
