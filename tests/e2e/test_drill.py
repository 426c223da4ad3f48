"""Drills as a person runs them: real ranks, real faults, the table, and nothing left of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.drill import network
from launcher.drill.catalogue import CATALOGUE
from launcher.drill.needs import missing
from launcher.store import RunStore
from strategies.plan import ParallelPlan
from tests.support import cli

pytestmark = pytest.mark.timeout(600)
PP2 = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=1", "strategy.pp=2")
DP2 = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=1", "strategy.dp=2", "strategy.zero_stage=1")
TP2_PP2 = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2", *cli.TP2_PP2)


def drill(folder: Path, *words: str, plan: tuple[str, ...] = PP2) -> cli.Result:
    process = cli.start("drill", *plan, f"run.dir={folder / 'runs'}", *words, cwd=folder)
    done = cli.end(process, timeout_s=3000)
    assert "Traceback" not in done.err
    (made,) = (folder / "runs").glob("drill-*")
    cli.assert_nothing_left(made)
    return done


def of(done: cli.Result, name: str) -> dict[str, Any]:
    (found,) = [one for one in done.document["faults"] if one["name"] == name]
    assert isinstance(found, dict)
    return found


def test_three_faults(tmp_path: Path) -> None:
    done = drill(tmp_path, "--faults", "rank_sigkill,flipped_bit,controller_kill_run", "--json")
    assert done.code == 0, done.err
    assert done.document["summary"] == {"ok": 3, "failed": 0, "skipped": 0}
    assert all(one["comparison"]["identical"] for one in done.document["faults"])
    killed, flipped, adopted = (
        of(done, name)["evidence"] for name in ("rank_sigkill", "flipped_bit", "controller_kill_run")
    )
    assert "was ended by signal 9" in killed["proof"]
    assert killed["steps_lost"] <= 1
    assert (killed["resumes"], killed["smaller"]) == (0, False)
    assert "does not match its digest" in flipped["proof"]
    assert 1 <= flipped["steps_lost"] <= 4  # the older checkpoint, or what the nodes still have in memory
    assert "adopted True" in adopted["proof"]
    assert (adopted["steps_lost"], adopted["resumes"]) == (0, 1)
    folder = Path(done.document["folder"])
    assert json.loads((folder / "report.json").read_text()) == done.document
    assert "3 faults of 3 passed, 3 bit-identical." in (folder / "report.txt").read_text()
    changed = {one["key"] for one in done.document["shrunk"]}
    assert {key for key in changed if key.startswith("strategy.")} <= {"strategy.grad_accum"}, "the batch is smaller"
    assert len(RunStore.names(folder)) == 4  # and the undisturbed one


@pytest.mark.full
def test_replicas(tmp_path: Path) -> None:
    """What a rank has lost is a part of the optimizer that no other has: ZeRO-1 over two replicas."""
    done = drill(tmp_path, "--faults", "rank_sigkill,node_kill", "--json", plan=DP2)
    assert done.code == 0, done.err
    assert done.document["plan"].startswith("DP2")
    assert done.document["summary"] == {"ok": 2, "failed": 0, "skipped": 0}
    for one in done.document["faults"]:
        assert one["comparison"]["identical"], one["name"]
        assert one["evidence"]["detected_s"] <= one["evidence"]["within_s"], one["name"]
        assert (one["evidence"]["steps_lost"], one["evidence"]["smaller"]) in ((0, False), (1, False)), one["name"]


@pytest.mark.full
def test_interrupted_in_the_middle(tmp_path: Path) -> None:
    process = cli.start("drill", *PP2, f"run.dir={tmp_path / 'runs'}", "--faults", "rank_sigkill", cwd=tmp_path)
    cli.wait_for(lambda: bool(list(tmp_path.rglob("attempts/1/ranks.json"))), "ranks of the undisturbed run")
    os.kill(process.pid, signal.SIGINT)
    done = cli.end(process)
    assert done.code == 130, done.err
    (made,) = (tmp_path / "runs").glob("drill-*")
    cli.assert_nothing_left(made)
    assert RunStore.open(made / "undisturbed").run().state.value == "cancelled"


@pytest.mark.full
def test_a_run_that_does_not_come_back_fails_the_drill(tmp_path: Path) -> None:
    done = drill(tmp_path, "--faults", "rank_sigkill", "recovery.max_restarts=0", "--json")
    assert done.code == 104
    found = of(done, "rank_sigkill")
    assert found["verdict"] == "failed"
    assert "recovery.max_restarts" in found["why"]
    assert found["evidence"]["fired"]


@pytest.mark.full
@pytest.mark.skipif(not network.available(), reason="needs root and ip netns")
def test_interrupted_while_a_link_is_cut(tmp_path: Path) -> None:
    words = (f"run.dir={tmp_path / 'runs'}", "--faults", "partition")
    process = cli.start("drill", *PP2, *words, cwd=tmp_path)
    cli.wait_for(lambda: bool(list(tmp_path.rglob("partition/faults/drill.1.json"))), "the cut")
    os.kill(process.pid, signal.SIGTERM)
    done = cli.end(process)
    assert done.code == 130, done.err
    (made,) = (tmp_path / "runs").glob("drill-*")
    cli.assert_nothing_left(made)
    assert not [line for line in network.listing() if f"phxt{process.pid}" in line]


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_whole_catalogue(tmp_path: Path) -> None:
    done = drill(tmp_path, "--faults", "all", "--json", plan=TP2_PP2)
    failed = [(one["name"], one["why"]) for one in done.document["faults"] if one["verdict"] == "failed"]
    assert failed == []
    assert len(done.document["faults"]) == len(CATALOGUE)
    skipped = [one["name"] for one in done.document["faults"] if one["verdict"] == "skipped"]
    plan = ParallelPlan(tp=2, pp=2, zero_stage=1, stages=(1, 1), micro_batch=1, grad_accum=2)
    assert skipped == [one.name for one in CATALOGUE if missing(one.needs, plan)]  # no other reason is one
    assert done.code == (105 if skipped else 0), done.err


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sixty_random_faults(seed: int, tmp_path: Path) -> None:
    done = drill(tmp_path, "--faults", "random", "--seed", str(seed), "--count", "20", "--json", plan=TP2_PP2)
    assert done.code == 0, done.err
    assert done.document["summary"] == {"ok": 20, "failed": 0, "skipped": 0}
