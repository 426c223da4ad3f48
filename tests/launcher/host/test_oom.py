"""A rank that the kernel has killed for want of memory is told from one that somebody else has killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import exclusion, recovery
from launcher.gang import Observation
from launcher.host.oom import RECENT_S, VictimWatch
from launcher.recovery import BUDGET_OF, FailureKind
from tests.support.agents import Agents, Watcher, agents_in
from tests.support.cgroups import Tree, limited

KILLED = (None, int(signal.SIGKILL))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=[1, 2])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    """A node whose ranks, 7 and 8, are in one group and 9 in another."""
    tree = Tree(tmp_path, request.param)
    tree.machine(40)
    for path, pids in (("/pods/a", (7, 8)), ("/pods/b", (9,))):
        tree.group(path.lstrip("/"), limit=10**9, kills=2)
        for pid in pids:
            tree.put(pid, path)
    return tree


@pytest.fixture
def watch(tree: Tree, clock: Clock) -> VictimWatch:
    watch = VictimWatch(tree.proc, clock)
    for pid in (7, 8, 9):
        watch.begin(pid)
    return watch


def test_a_victim_of_the_own_group_is_told(tree: Tree, watch: VictimWatch) -> None:
    tree.group("pods/a", limit=10**9, kills=3)
    said = watch.verdict(7, *KILLED)
    assert said == (
        "the kernel had just killed 1 process of the cgroup /pods/a, which may use 1.00 GB, for want of memory"
    )
    assert watch.verdict(9, *KILLED) == "", "it was not in its group"


@pytest.mark.parametrize("ending", [(0, None), (1, None), (None, int(signal.SIGTERM)), (None, int(signal.SIGSEGV))])
def test_other_endings_are_not_the_kernels(tree: Tree, watch: VictimWatch, ending: tuple[int | None, int]) -> None:
    tree.group("pods/a", kills=3)
    assert watch.verdict(7, *ending) == ""


def test_a_shell_passes_the_signal_on_as_a_code(tree: Tree, watch: VictimWatch) -> None:
    tree.group("pods/a", kills=3)
    assert watch.verdict(7, 128 + signal.SIGKILL, None)


def test_nothing_is_told_when_nothing_has_happened(tree: Tree, watch: VictimWatch) -> None:
    tree.machine(41)  # somewhere else on the machine
    assert watch.verdict(7, *KILLED) == ""


def test_what_happened_before_the_rank_began_does_not_count(tree: Tree, clock: Clock) -> None:
    watch = VictimWatch(tree.proc, clock)
    watch.begin(8)
    tree.group("pods/a", kills=3)
    clock.now += 1
    watch.begin(7)
    assert watch.verdict(7, *KILLED) == ""
    assert watch.verdict(8, *KILLED)


def test_an_old_death_does_not_explain_a_new_one(tree: Tree, watch: VictimWatch, clock: Clock) -> None:
    """Another process of the group was the victim, and the rank goes on; much later somebody kills it."""
    tree.group("pods/a", kills=3)
    watch.look()
    clock.now += RECENT_S - 1
    watch.look()
    assert watch.verdict(8, *KILLED), "a large process takes its time to die"
    clock.now += 2
    assert watch.verdict(7, *KILLED) == ""


def test_several_deaths_are_counted_not_assigned(tree: Tree, watch: VictimWatch) -> None:
    tree.group("pods/a", kills=3)
    assert "killed 1 process of" in watch.verdict(7, *KILLED)
    assert "killed 1 process of" in watch.verdict(8, *KILLED)


def test_without_a_group_the_machine_is_asked(tmp_path: Path, clock: Clock) -> None:
    tree = Tree(tmp_path, 2)
    tree.machine(40)
    watch = VictimWatch(tree.proc, clock)
    for pid in (7, 8):
        watch.begin(pid)
    assert watch.verdict(7, *KILLED) == ""
    tree.machine(42)
    assert watch.verdict(8, *KILLED) == "the kernel had just killed 2 processes of the machine for want of memory"


def test_where_nothing_can_be_read_nothing_is_told(tmp_path: Path, clock: Clock) -> None:
    watch = VictimWatch(tmp_path, clock)
    watch.begin(7)
    watch.look()
    assert watch.verdict(7, *KILLED) == ""


# --- the kernel itself --------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Agents]:
    """Agents that are started in a cgroup of 256 MB, with everything below them."""
    with limited(256 << 20) as folder, agents_in(tmp_path) as agents:
        agents.enter = ("sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh")
        yield agents


def _ending(watcher: Watcher, rank: int, attempt: int) -> Observation:
    return watcher.until_kind("exit", rank=rank, attempt=attempt)


@pytest.mark.timeout(60)
def test_the_kernel_kills_a_rank(narrow: Agents) -> None:
    """In the same group one rank eats more than there is, and in the next attempt one is killed by a person."""
    narrow.start()
    watcher = narrow.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE_0="step=1,wait", FAKE_1="step=1,eat=1024")
    starved = _ending(watcher, 1, 1).data
    assert (starved["signal"], starved["requested"]) == (signal.SIGKILL, False)
    assert "which may use 0.27 GB, for want of memory" in starved["oom"]
    found = recovery.classify_exit(starved, node="n0", when=1.0, error=None)
    assert (found.kind, BUDGET_OF[found.kind]) == (FailureKind.OUT_OF_MEMORY, "memory")
    assert found.kind not in exclusion.AGAINST_THE_NODE
    assert found.signature
    assert found.detail == f"rank 1 on n0 was ended by signal 9; {starved['oom']}"

    watcher.gang.kill(1)
    assert (_ending(watcher, 0, 1).data["signal"], _ending(watcher, 0, 1).data["oom"]) == (signal.SIGKILL, "")
    pids = watcher.spawn(2, {"n0": [0, 1]}, FAKE="step=1,wait")
    os.kill(pids[1], signal.SIGKILL)
    killed = _ending(watcher, 1, 2).data
    assert (killed["signal"], killed["requested"], killed["oom"]) == (signal.SIGKILL, False, "")
    assert recovery.classify_exit(killed, node="n0", when=1.0, error=None).kind is FailureKind.RANK_KILLED
