"""A controller that waits for its disk: its agents hear it, and what it missed meanwhile is nobody's hang."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.backend import AgentAddress
from launcher.gang import ASIDE_S, Gang, Link
from launcher.hang_watch import AFTER_S, MARGIN_S
from launcher.host.wire import LineReader, Stream, decode
from launcher.run import EventKind, RunState
from launcher.supervise import beating
from tests.support.agents import agents_in
from tests.support.stage import Stage

STUCK_S = 90.0
SAVE_S = 300.0
STEP_S = 0.4  # two turns of a stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A controller that has seen how long steps take."""
    made = Stage(tmp_path, save_timeout_s=SAVE_S)
    made.start()
    for step in range(1, 8):
        for rank in range(4):
            made.report("ab"[rank // 2], "step", 1, rank=rank, step=step)
        made.turn(2)
    return made


def wait_for_the_disk(stage: Stage, monkeypatch: pytest.MonkeyPatch, act: str, stuck_s: float = STUCK_S) -> None:
    """One turn in which a beat, or a look for a later controller, takes long."""
    real: Callable[..., Any] = getattr(stage.lock, act)

    def slow() -> Any:
        stage.clock.now += stuck_s
        return real()

    with monkeypatch.context() as patch:
        patch.setattr(stage.lock, act, slow)
        stage.turn()


def dumps(stage: Stage) -> int:
    return sum(call[0] == "dump" for call in stage.gang.calls)


def turn_for(stage: Stage, seconds: float) -> None:
    """As an agent answers: at once."""
    asked = dumps(stage)
    for _ in range(round(seconds / 0.2)):
        stage.turn()
        if dumps(stage) > asked and stage.controller.phase.value == "run":
            asked = dumps(stage)
            for rank in range(4):
                stage.gang.say("stack", "ab"[rank // 2], rank=rank, attempt=1, state="S", stack="")


@pytest.mark.parametrize("act", ["beat", "lost"])
def test_ranks_that_go_on_a_minute_after_the_disk_did_not_hang(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    wait_for_the_disk(stage, monkeypatch, act)
    turn_for(stage, AFTER_S)
    assert stage.state() is RunState.RUNNING
    most_s = stage.controller.hangs.present(7, stage.clock.now, save_s=0.0).most_s
    for rank in range(4):
        stage.report("ab"[rank // 2], "step", 1, rank=rank, step=8)
    stage.turn()
    present = stage.controller.hangs.present(8, stage.clock.now, save_s=0.0)
    assert most_s <= present.most_s < AFTER_S + 10.0, "what the disk took is not the time of a step"


def test_the_disk_may_be_stuck_while_ranks_are_asked(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the very turn that would judge them: their answers wait to be read."""
    while not dumps(stage):
        stage.turn()
    look = stage.controller.log.require_ours

    def slow(give_back: Callable[[], None]) -> None:
        if stage.gang.calls[-1] == ("read", 0):
            stage.clock.now += STUCK_S
        stage.gang.calls.append(("read", 0))
        look(give_back)

    with monkeypatch.context() as patch:
        patch.setattr(stage.controller.log, "require_ours", slow)
        stage.turn()
    assert stage.state() is RunState.RUNNING
    for rank in range(4):
        stage.report("ab"[rank // 2], "step", 1, rank=rank, step=8)
    stage.turn(3)
    assert stage.state() is RunState.RUNNING


def test_ranks_that_do_not_go_on_at_all_hang(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_the_disk(stage, monkeypatch, "beat")
    turn_for(stage, AFTER_S + 3 * STEP_S + 2 * MARGIN_S)
    (failure,) = [e.data["failure"] for e in stage.store.events() if e.kind is EventKind.FAILURE_DETECTED]
    assert failure["kind"] == "hang"


def test_a_disk_that_is_slow_all_the_time_hides_no_hang(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    began = stage.clock.now
    while stage.state() is RunState.RUNNING and stage.clock.now < began + 2 * SAVE_S:
        wait_for_the_disk(stage, monkeypatch, "beat", 2 * MARGIN_S)
    assert stage.state() is RunState.RECOVERING
    assert SAVE_S < stage.clock.now - began < SAVE_S + AFTER_S + 4 * MARGIN_S


def test_without_a_wait_a_hang_is_found_as_soon_as_ever(stage: Stage) -> None:
    turn_for(stage, 3 * STEP_S + 2 * MARGIN_S)
    assert stage.state() is RunState.RECOVERING


# --- beats ----------------------------------------------------------------------------------------------------------


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def linked(clock: Time) -> Iterator[tuple[Gang, socket.socket]]:
    """A gang of one agent, and the agent's end."""
    ours, theirs = socket.socketpair()
    gang = Gang(b"secret", 1, clock, lease_s=60.0, wall=clock)
    address = AgentAddress(node="a", host="127.0.0.1", port=1, pid=1, slots=4, incarnation="1")
    gang.links["a"] = Link(address, Stream(ours), up=True, greeted=True)
    theirs.setblocking(False)
    with theirs:
        yield gang, theirs
        gang.close()


def heard(agent: socket.socket) -> list[str]:
    with contextlib.suppress(BlockingIOError):
        return [str(decode(line)["op"]) for line in LineReader().feed(agent.recv(1 << 16))]
    return []


def test_beats_come_from_elsewhere_only_while_the_gang_itself_sends_none_and_not_for_ever() -> None:
    clock = Time()
    with linked(clock) as (gang, agent):
        gang._beat_at = 110.0
        gang.beat_aside()
        assert heard(agent) == []
        clock.now = 111.0
        gang.beat_aside()
        gang.beat_aside()
        assert heard(agent) == ["beat", "beat"]
        gang.links["a"].up = False
        gang.beat_aside()
        assert heard(agent) == [], "it knows no beats before it is greeted"
        gang.links["a"].up = True
        clock.now = 111.0 + ASIDE_S
        gang.beat_aside()
        assert heard(agent) == [], "that controller is as good as gone"


def test_an_agent_that_is_gone_is_for_the_gang_itself_to_see() -> None:
    clock = Time()
    with linked(clock) as (gang, agent):
        agent.sendall(b'{"op": "event", "event": {"kind": "leaving"}}\n')
        agent.shutdown(socket.SHUT_RDWR)
        clock.now += 60.0
        gang.beat_aside()
        stream = gang.links["a"].stream
        assert not stream.closed
        assert [message["op"] for message in stream.receive()] == ["event"], "its last words were not lost"


def test_no_message_is_torn_by_a_beat_of_another_thread() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    stream, over = Stream(ours), threading.Event()

    def nudge() -> None:
        while not over.is_set():
            stream.nudge(b'{"op":"beat"}\n')

    thread, reader, ops = threading.Thread(target=nudge), LineReader(), list[str]()
    thread.start()
    theirs.settimeout(0.2)
    for number in range(200):
        stream.send({"op": "order", "number": number, "text": "x" * (37 * number)})
        for line in reader.feed(theirs.recv(997)):
            ops.append(str(decode(line)["op"]))
    over.set()
    thread.join()
    with contextlib.suppress(TimeoutError):
        while True:
            stream.flush()
            ops += [str(decode(line)["op"]) for line in reader.feed(theirs.recv(1 << 16))]
    assert ops.count("order") == 200
    assert ops.count("beat") > 0
    theirs.close()
    stream.close("over")


@pytest.mark.timeout(60)
def test_a_real_agent_stays_for_as_long_as_its_controller_waits_and_no_longer(tmp_path: Path) -> None:
    lease_s = 3.0
    with agents_in(tmp_path) as agents:
        agent = agents.start(lease_s=lease_s)
        watcher = agents.watch("n0", lease_s=lease_s)
        watcher.spawn(1, {"n0": [0]}, FAKE="step=1,wait")
        watcher.report("step")
        with beating(watcher.gang, lease_s / 12):
            time.sleep(3 * lease_s)  # in the disk
            assert agent.poll() is None
            assert not [o for o in watcher.listen(0.5) if o.kind == "agent_lost"]
        assert agent.wait(3 * lease_s) == 0
        assert watcher.until_kind("leaving").data["reason"] == "lease"
