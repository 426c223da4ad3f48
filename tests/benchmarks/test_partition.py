"""A cable is pulled -> the survivors have decided: from the cut to the decision in the event log.

Three Ray nodes in network namespaces, two of them with ranks, one in spare. The link of a node with ranks goes down:
nothing is closed, packets just vanish. Timed from the cut, by the benchmark's clock, to the ``decision`` event of the
controller, and to the first new step. Asserted: the cut node held ranks and no controller, and training went on
elsewhere.

``python -m pytest tests/benchmarks/test_partition.py -m full -s``; needs root and ``ip netns``.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest

from launcher.run import EventKind
from launcher.store import RunStore
from tests.benchmarks.clusters import Cluster, cluster, phalanx_on
from tests.benchmarks.contenders import RANKS, job_of, running, words
from tests.benchmarks.stats import Musts, repeats, show
from tests.support import netns

STEPS, EVERY, CUT_AT = 4000, 10, 13
NODES, BOUND_S = 3, 5.0


def measure(where: Cluster, job: tuple[str, ...], folder: Path, run_dir: Path) -> tuple[float, float]:
    """Seconds from the cut to the decision, and to the first new step."""
    with running(phalanx_on(where, job, folder, spares=1), run_dir, {}) as run:
        run.wait_for_step(CUT_AT)
        victim = where.holder({run.pid_of(rank, 1) for rank in range(RANKS)})
        controller = json.loads((run.paths.controllers / "1.json").read_bytes())
        assert controller["pid"] not in where.net.pids(victim), "the cut would take the controller along"
        cut = time.time()
        where.net.cut(victim)
        first = run.wait_for_step(0, attempt=2)
        print(f"  first new step after {first['time'] - cut:.2f} s{run.timeline(cut)}", flush=True)
        events = RunStore(run_dir).events()
        decided = next(event.time for event in events if event.kind is EventKind.DECISION)
        run.steps_lost(EVERY)
        assert not {run.pid_of(rank, 2) for rank in range(RANKS)} & set(where.net.pids(victim))
    return decided - cut, first["time"] - cut


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not netns.available(), reason="needs root and ip netns")
def test_cut(tmp_path: Path, musts: Musts) -> None:
    job = words(tmp_path, steps=STEPS, every=EVERY)
    job_of(job, tmp_path)
    decided, stepped = [], []
    for number in range(repeats(5)):
        with cluster(NODES) as where:
            to_decision, to_step = measure(where, job, tmp_path, tmp_path / str(number) / "run")
            decided.append(to_decision)
            stepped.append(to_step)
    show("the link of a node is cut", {"-> survivors decide": decided, "-> first new step": stepped})
    musts.hold("the median decision, in s", statistics.median(decided), "<=", BOUND_S)
    musts.hold("the slowest decision, in s", max(decided), "<=", BOUND_S)
