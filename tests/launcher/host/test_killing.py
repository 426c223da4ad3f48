"""The end of ranks that do not die at once: stepped by hand, and with a rank that nothing can kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.host import process
from launcher.host.killing import FORCE_AFTER_S, TELL_AFTER_S, TELL_EVERY_S, Killing, Target
from launcher.host.pool_link import PoolLink
from launcher.host.sweep import Sweep
from tests.support.agents import Agents, Watcher, fake_env
from tests.support.frozen import frozen_disk

pytestmark = pytest.mark.timeout(90)


class FakePool:
    """Answers at once, or never."""

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers
        self.pid = 1
        self.left: tuple[int, ...] = ()
        self.signals: list[int] = []
        self.forced = 0
        self._asked: float | None = None

    def kill(self, key: str, signum: int) -> None:
        self.signals.append(signum)

    def ask(self, now: float) -> None:
        self._asked = now if self._asked is None and not self.answers else self._asked

    def owes_s(self, now: float) -> float:
        return 0.0 if self._asked is None else now - self._asked

    def force(self) -> None:
        self.forced += 1


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that nobody here signals, unless it is killed directly."""
    code = "import time; print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        assert process.wait_until(lambda: _rests(popen.pid), 5.0)
        yield popen
        popen.kill()


def _rests(pid: int) -> bool:
    """On a busy machine it may be seen asleep before it has come to its long sleep."""
    looks = set()
    for _ in range(5):
        looks.add(process.standing(pid))
        time.sleep(0.02)
    return len(looks) == 1 and looks.pop().startswith("state S")


class Scene:
    """A killing that a test steps through time."""

    def __init__(self, pid: int, *, answers: bool) -> None:
        self.pool = FakePool(answers=answers)
        self.link = cast(PoolLink, self.pool)
        self.targets = [Target(3, "1/3", pid, process.birth(pid))]
        self.told: list[tuple[float, list[dict[str, Any]]]] = []
        self.killing = Killing(lambda: self.targets, lambda rows, waited_s: self.told.append((waited_s, rows)))

    def until(self, end: float) -> None:
        """As the agent's loop does: a tick whenever something is due."""
        while (due := self.killing.due) is not None and due <= end:
            self.killing.tick(self.link, due)


def test_a_pool_that_answers_is_left_alone_however_long_a_rank_takes(sleeper: subprocess.Popen[bytes]) -> None:
    scene = Scene(sleeper.pid, answers=True)
    scene.killing.begin(scene.link, 0.0, 100.0)
    scene.until(100.0 + TELL_AFTER_S - 0.1)
    assert (scene.pool.signals, scene.told) == ([signal.SIGKILL], [])
    scene.until(1000.0)
    assert scene.pool.forced == 0
    assert sleeper.poll() is None
    ((waited_s, (row,)),) = scene.told  # nothing has changed since, so nothing more is said
    assert waited_s == TELL_AFTER_S
    assert (row["rank"], row["pid"]) == (3, sleeper.pid)
    assert row["state"].startswith("state S")
    scene.killing.begin(scene.link, 0.0, 1001.0)  # another controller asks
    assert len(scene.told) == 2
    scene.targets.clear()
    scene.killing.end()
    assert scene.killing.due is None


def test_a_change_is_told_and_not_too_often(sleeper: subprocess.Popen[bytes]) -> None:
    scene = Scene(sleeper.pid, answers=True)
    scene.killing.begin(scene.link, 0.0, 0.0)
    scene.until(2.0)
    sleeper.send_signal(signal.SIGSTOP)
    assert process.wait_until(lambda: process.state(sleeper.pid) == "T", 5.0)
    scene.until(2.0 + TELL_EVERY_S - 1.0)
    assert len(scene.told) == 1
    scene.until(2.0 + TELL_EVERY_S)
    assert [rows[0]["state"][:7] for _, rows in scene.told] == ["state S", "state T"]
    sleeper.send_signal(signal.SIGCONT)


def test_a_pool_that_does_not_answer_is_ended_and_its_ranks_directly(sleeper: subprocess.Popen[bytes]) -> None:
    scene = Scene(sleeper.pid, answers=False)
    scene.killing.begin(scene.link, 3.0, 0.0)
    assert scene.pool.signals == [signal.SIGTERM]
    scene.until(3.0 + FORCE_AFTER_S - 0.1)
    assert scene.pool.forced == 0
    assert sleeper.poll() is None
    scene.until(3.0 + FORCE_AFTER_S)
    assert scene.pool.forced == 1
    assert sleeper.wait(5.0) == -signal.SIGKILL


def test_a_zombie_has_ended_and_so_has_one_whose_number_is_another_s(sleeper: subprocess.Popen[bytes]) -> None:
    born = process.birth(sleeper.pid)
    assert born
    assert not process.has_ended(sleeper.pid, born)
    assert process.has_ended(sleeper.pid, born - 1)
    sleeper.kill()
    assert process.wait_until(lambda: process.state(sleeper.pid) == "Z", 5.0)
    assert process.has_ended(sleeper.pid, born)
    sleeper.wait()
    assert process.has_ended(sleeper.pid, born)
    assert process.birth(sleeper.pid) == 0


def test_a_first_thread_that_is_a_zombie_says_nothing_of_the_others() -> None:
    """As the ranks of CUDA end: the first thread is gone while others are still in the driver."""
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
    code += "; print(flush=True); ctypes.CDLL(None).pthread_exit(None)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        born = process.birth(popen.pid)
        assert process.wait_until(lambda: process.state(popen.pid) == "Z", 5.0)
        assert not process.has_ended(popen.pid, born)
        assert process.wait_until(lambda: process.standing(popen.pid).startswith("state S"), 5.0)  # it may be starting
        popen.kill()
        popen.wait()
        assert process.has_ended(popen.pid, born)


def test_a_sweep_waits_for_those_that_show_no_mark(sleeper: subprocess.Popen[bytes]) -> None:
    sweep = Sweep("no-such-mark.", [(sleeper.pid, process.birth(sleeper.pid)), (sleeper.pid, 1)])
    assert sweep.left == (sleeper.pid, sleeper.pid) or sweep.left == (sleeper.pid,)
    assert sleeper.wait(5.0) == -signal.SIGKILL
    assert process.wait_until(lambda: sweep.done, 5.0)


# --- an agent -------------------------------------------------------------------------------------------------------


def test_a_rank_that_nothing_can_kill_costs_neither_pool_nor_node(agents: Agents, tmp_path: Path) -> None:
    """In the kernel's uninterruptible sleep for longer than a pool, or an agent, may be silent."""
    with frozen_disk(tmp_path / "disk", tmp_path / "image") as thaw:
        agents.start(detect_s=2.0)
        watcher = agents.watch("n0", detect_s=2.0)
        pool = watcher.until_kind("pool", state="ready").data["pid"]
        pids = watcher.spawn(1, {"n0": [0, 1]}, FAKE_0=f"step=1,write={tmp_path}/disk/x,wait", FAKE_1="step=1,wait")
        assert process.wait_until(lambda: process.state(pids[0]) == "D", 10.0)
        watcher.report("step", rank=1)
        watcher.gang.kill(1)
        watcher.until_kind("exit", rank=1)
        watcher.listen(FORCE_AFTER_S + 1.5)
        (dying,) = [o.data for o in watcher.seen if o.kind == "dying"]
        assert [(row["rank"], row["pid"], row["state"][:7]) for row in dying["left"]] == [(0, pids[0], "state D")]
        watcher.gang.spawn(2, {"n0": [0, 1]}, fake_env(agents.paths, 2, 2, FAKE="step=1,wait"))
        watcher.listen(1.0)
        assert not {o.kind for o in watcher.seen} & {"killed", "agent_lost"}
        assert not [o for o in watcher.seen if o.data.get("attempt") == 2]  # nothing of a new attempt beside the old
        thaw()
        watcher.report("step", attempt=2, rank=1)
        assert not process.is_running(pids[0])
        _goes_on(watcher, pool)


def test_an_agent_whose_pool_is_dead_waits_for_its_ranks_and_beats_on(agents: Agents, tmp_path: Path) -> None:
    with frozen_disk(tmp_path / "disk", tmp_path / "image") as thaw:
        agents.start(detect_s=2.0)
        watcher = agents.watch("n0", detect_s=2.0)
        pool = watcher.until_kind("pool", state="ready").data["pid"]
        pids = watcher.spawn(1, {"n0": [0, 1]}, FAKE_0=f"write={tmp_path}/disk/x,wait", FAKE_1="wait")
        assert process.wait_until(lambda: process.state(pids[0]) == "D", 10.0)
        process.send(pool, signal.SIGKILL)
        watcher.gang.spawn(2, {"n0": [0, 1]}, fake_env(agents.paths, 2, 2, FAKE="step=1,wait"))
        dying = watcher.until_kind("dying", attempt=1)
        watcher.listen(2.0)
        assert pids[0] in [row["pid"] for row in dying.data["left"]]
        assert not {o.kind for o in watcher.seen} & {"killed", "agent_lost"}
        assert not [o for o in watcher.seen if o.data.get("attempt") == 2]
        thaw()
        watcher.report("step", attempt=2, rank=1)
        assert not [o for o in watcher.seen if o.kind == "agent_lost"]


def test_a_pool_that_stands_still_is_replaced(agents: Agents) -> None:
    agents.start(detect_s=2.0)
    watcher = agents.watch("n0", detect_s=2.0)
    pool = watcher.until_kind("pool", state="ready").data["pid"]
    watcher.spawn(1, {"n0": [0, 1]}, FAKE="step=1,wait")
    for rank in (0, 1):
        watcher.report("step", rank=rank)
    process.send(pool, signal.SIGSTOP)
    watcher.gang.kill(1)
    watcher.until_kind("killed", attempt=1)
    assert "signal 9" in watcher.until_kind("pool", state="failed").data["reason"]
    assert watcher.until(lambda o: o.kind == "pool" and o.data["state"] == "ready" and o.data["pid"] != pool)
    assert not [o for o in watcher.seen if o.kind == "agent_lost"]


def _goes_on(watcher: Watcher, pool: int) -> None:
    """The same pool has never failed."""
    told = [o.data for o in watcher.seen if o.kind == "pool"]
    assert {row["pid"] for row in told if row["state"] == "ready"} == {pool}
    assert not [row for row in told if row["state"] == "failed"]
