"""Recovery from the memory of the nodes, and from the disk where memory is gone, on real ranks.

tests/e2e/test_recovery.py and test_shrink.py restore from memory, too: it is the default.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from jobs.checkpoint.memory import generation_of
from launcher.run import RunState
from launcher.store import RunStore
from tests.support import cli

pytestmark = pytest.mark.timeout(420)
ON_DISK_AT_THE_END = "checkpoint.every=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


def run(folder: Path, name: str, *words: str) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, name, *words), cwd=folder)
    assert done.code == 0, done.err
    cli.assert_nothing_left(folder / "runs" / name)
    return cli.store(folder, name)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunStore:
    return run(folder, "undisturbed")


def assert_same(one: RunStore, undisturbed: RunStore) -> None:
    assert cli.curve(one) == cli.curve(undisturbed)
    ours, theirs = one.run(), undisturbed.run()
    assert ours.state is RunState.SUCCEEDED
    assert ours.weights_digest == theirs.weights_digest is not None


FAULTS = {
    "rank": 'faults=["rank_kill@rank=1,step=7"]',
    "node": 'faults=["node_kill@node=1,step=7"]',
    "the_node_of_rank_0": 'faults=["node_kill@node=0,step=9,phase=step_end"]',
    "two_after_another": 'faults=["node_kill@node=0,step=5","rank_kill@rank=3,step=6"]',
    "the_last_step": 'faults=["rank_kill@rank=0,step=12,phase=checkpoint"]',
}


@pytest.mark.full  # what the default run covers of it: tests/e2e/test_recovery.py
@pytest.mark.parametrize("name", sorted(FAULTS))
def test_at_most_one_step_is_lost_and_every_bit_is_right(name: str, folder: Path, undisturbed: RunStore) -> None:
    one = run(folder, name, FAULTS[name], ON_DISK_AT_THE_END)
    attempts = one.run().attempts
    assert all(generation_of(attempt.resume_from) for attempt in attempts[1:])
    assert one.run().steps_lost <= len(attempts) - 1
    assert_same(one, undisturbed)


def persisters(store: RunStore) -> list[int]:
    return [pid for pid, command in cli.processes_of(store.paths.root) if "launcher.host.persist" in command]


@pytest.mark.full
def test_without_persisters_the_disk_is_what_is_left(folder: Path) -> None:
    """Killed on every node, and what they held with them: the run says so and goes on from the disk."""
    words = cli.tiny(folder, "forgetful", "train.steps=40")
    process = cli.start(*words, cwd=folder)
    root = folder / "runs" / "forgetful"

    def committed() -> bool:
        assert process.poll() is None, process.communicate()
        return (root / "request.json").exists() and RunStore(root).run().committed_step >= 6

    cli.wait_for(committed, "a checkpoint")
    found = persisters(RunStore(root))
    assert len(found) >= 2
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    done = cli.end(process)
    assert done.code == 0, done.err
    one = cli.store(folder, "forgetful")
    second = one.run().attempts[1]
    assert second.resume_from.endswith(".manifest.json")
    assert "persister" in str(one.run().attempts[0].cause)
    assert sorted(cli.curve(one)) == list(range(1, 41))
    cli.assert_nothing_left(root)


@pytest.mark.full  # tests/launcher/host/test_persister.py does it to the process
def test_what_was_copied_for_the_disk_is_not_lost_with_the_ranks(folder: Path, undisturbed: RunStore) -> None:
    """No memory tier: the copy of step 6 is on its way to the disk when its ranks die."""
    one = run(folder, "copied", 'faults=["rank_kill@rank=1,step=7"]', "checkpoint.memory_every=0")
    assert one.run().attempts[1].first_step == 7
    assert one.run().steps_lost == 0
    assert_same(one, undisturbed)


@pytest.mark.full
def test_another_plan_restores_from_memory(folder: Path, undisturbed: RunStore) -> None:
    """Half of the nodes, no disk: the smaller plan reads the slices it needs of both nodes' parts."""
    words = ("cluster.spares=0", "recovery.shrink_after_s=0", 'faults=["node_kill@node=1,step=7"]')
    one = run(folder, "reshaped", *words, ON_DISK_AT_THE_END)
    first, second = one.run().attempts
    assert generation_of(second.resume_from)
    assert first.plan != second.plan
    assert one.run().steps_lost <= 1
    for step, (loss, norm, rate) in cli.curve(undisturbed).items():
        assert cli.curve(one)[step] == pytest.approx((loss, norm, rate), rel=1e-5)


@pytest.mark.full
def test_where_steps_are_short_copies_are_seldom_and_the_log_says_what_that_may_cost(folder: Path) -> None:
    """The default, undone by :data:`tests.support.cli.TINY`: no step of this size is worth a copy each."""
    long = ("train.steps=60", "checkpoint.memory_share=0.01", ON_DISK_AT_THE_END)
    plain = run(folder, "seldom", *long)
    one = run(folder, "seldom-struck", *long, 'faults=["rank_kill@rank=1,step=50"]')
    told = re.findall(r"copied into memory every (\d+) steps, so a failure", one.paths.rank_log(1, 0).read_text())
    every = int(told[-1])
    assert told == [str(2**power) for power in range(1, len(told) + 1)], "from every step on, by a factor of two"
    assert every >= 4
    second = one.run().attempts[1]
    assert generation_of(second.resume_from)
    assert 1 <= one.run().steps_lost <= every
    assert (second.first_step - 1) % every == 0
    assert cli.curve(one) == cli.curve(plain)
    assert one.run().weights_digest == plain.run().weights_digest is not None
