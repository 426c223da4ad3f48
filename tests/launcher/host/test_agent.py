"""An agent with fake ranks: what ranks see, how they end, and that nothing is left, whoever is killed."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.host import announce, process
from launcher.host.reader import LogReader
from launcher.host.wire import read_secret
from strategies.codec import to_json
from strategies.errors import ClusterError, NotFound
from tests.support.agents import FAKE, Agents, Watcher, fake_env
from tests.support.jobspecs import GPT, make_job, make_plan

pytestmark = pytest.mark.timeout(60)


def seen_by(watcher: Watcher, agents: Agents, rank: int = 0, attempt: int = 1) -> dict[str, Any]:
    """What a rank that ran ``look`` has printed."""
    watcher.until_kind("exit", rank=rank, attempt=attempt)
    with LogReader(agents.address(), read_secret(agents.paths.secret)) as reader:
        text = reader.read(attempt, rank, 0, 100_000).text
    line = next(line for line in text.splitlines() if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found


def test_reports_and_exits_come_in_order(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    pids = watcher.spawn(1, {"n0": [0, 1]}, FAKE_0="step=1,step=2,done", FAKE_1="raise=broken")
    watcher.until_kind("exit", rank=1)
    watcher.until_kind("exit", rank=0)
    of = {rank: [o.data for o in watcher.seen if o.data.get("rank") == rank] for rank in (0, 1)}
    # of steps that come in one burst only the newest is told
    assert [d["kind"] for d in of[0] if d.get("step") != 1] == ["started", "step", "done", "exit"]
    assert [d["kind"] for d in of[1]] == ["started", "error", "exit"]
    assert of[0][0]["pid"] == pids[0]
    assert (of[0][-1]["code"], of[0][-1]["signal"], of[0][-1]["requested"]) == (0, None, False)
    assert of[1][-1]["code"] == 1
    assert "ValueError: broken" in of[1][-1]["log_tail"]
    assert agents.paths.rank_log(1, 0).read_text() == "rank 0 runs\n"
    assert "ValueError: broken" in agents.paths.rank_log(1, 1).read_text()


def test_a_rank_inherits_exactly_what_it_needs(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE="look,done")
    first, second = seen_by(watcher, agents, 0), seen_by(watcher, agents, 1)
    report, order, store = (int(first["env"][f"PHALANX_{name}_FD"]) for name in ("REPORT", "ORDER", "STORE"))
    assert set(first["fds"]) == {0, 1, 2, report, order, store}
    assert set(second["fds"]) == {0, 1, 2, *(int(second["env"][f"PHALANX_{name}_FD"]) for name in ("REPORT", "ORDER"))}
    assert second["env"]["PHALANX_STORE_FD"] == "-1"
    assert first["stdin"] == "/dev/null"
    assert first["session"] == first["group"] == first["pid"]
    assert first["env"]["MASTER_PORT"] == second["env"]["MASTER_PORT"] != "0"
    assert first["env"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert first["env"]["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    assert first["env"]["PHALANX_AGENT_PID"] == str(agents.started["n0"].pid)
    assert "" not in first["path"]


def test_the_rendezvous_socket_is_bound_and_listening_in_rank_0(agents: Agents, tmp_path: Path) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0]}, FAKE="look,wait")
    watcher.report("started")
    line = ""

    def printed() -> bool:
        nonlocal line
        line = next((x for x in agents.paths.rank_log(1, 0).read_text().splitlines() if x.endswith("}")), "")
        return bool(line)

    assert process.wait_until(printed, 10.0)
    port = int(json.loads(line)["env"]["MASTER_PORT"])
    socket.create_connection(("127.0.0.1", port), timeout=2.0).close()
    watcher.gang.kill(1)
    watcher.until_kind("killed", attempt=1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2.0)


def test_kill_is_gentle_first_and_then_not(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE_0="stubborn,step=1,wait", FAKE_1="step=1,wait")
    watcher.report("step", rank=0)
    watcher.report("step", rank=1)
    watcher.gang.kill(1, grace_s=0.5)
    watcher.until_kind("killed", attempt=1)
    endings = {o.data["rank"]: (o.data["signal"], o.data["requested"]) for o in watcher.seen if o.kind == "exit"}
    assert endings == {0: (signal.SIGKILL, True), 1: (signal.SIGTERM, True)}


def test_a_rank_that_fell_before_the_order_is_not_taken_for_killed_by_it(agents: Agents) -> None:
    """Its peers lose their connection and are heard of first; the cause must not be lost over that."""
    agents.start()
    watcher = agents.watch("n0")
    pids = watcher.spawn(1, {"n0": [0, 1]}, FAKE="step=1,wait")
    for rank in (0, 1):
        watcher.report("step", rank=rank)
    pool, _ = process.parent_and_session(pids[0])
    process.send(pool, signal.SIGSTOP)  # it brings the news of ends
    process.send(pids[0], signal.SIGKILL)
    assert process.wait_until(lambda: process.is_ending(pids[0]), 5.0)
    assert not process.is_ending(pids[1])
    watcher.gang.kill(1)
    watcher.listen(0.5)
    process.send(pool, signal.SIGCONT)
    watcher.until_kind("killed")
    endings = {o.data["rank"]: (o.data["signal"], o.data["requested"]) for o in watcher.seen if o.kind == "exit"}
    assert endings == {0: (signal.SIGKILL, False), 1: (signal.SIGKILL, True)}


def test_kill_of_an_attempt_that_is_not_there_is_answered(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.gang.kill(7)
    assert watcher.until_kind("killed", attempt=7).node == "n0"


def test_the_end_of_an_old_attempt_does_not_stop_the_next_from_starting(agents: Agents) -> None:
    """An agent that comes late and still holds the old one is told so while the port of the next is on its way."""
    agents.start()
    watcher = agents.watch("n0")
    watcher.gang.spawn(2, {"n0": [0]}, fake_env(agents.paths, 2, 1, FAKE="wait"))
    watcher.gang.kill(1)
    assert watcher.pids(2, {"n0": [0]})
    watcher.gang.spawn(3, {"n0": [0]}, fake_env(agents.paths, 3, 1, FAKE="wait"))
    watcher.gang.kill(3)
    assert not [o for o in watcher.listen(0.5) if o.kind == "spawned" and o.data["attempt"] == 3]


def test_a_newer_attempt_clears_the_older_and_an_older_one_is_ignored(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    old = watcher.spawn(1, {"n0": [0, 1]}, FAKE="wait")
    new = watcher.spawn(3, {"n0": [0, 1]}, FAKE="wait")
    assert not any(process.is_running(pid) for pid in old.values())
    watcher.gang.spawn(2, {"n0": [0, 1]}, fake_env(agents.paths, 2, 2, FAKE="done"))
    assert not [o for o in watcher.listen(0.5) if o.data.get("attempt") == 2]
    assert all(process.is_running(pid) for pid in new.values())


def test_what_a_rank_leaves_behind_goes_with_it(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE_0="daemon,step=1,wait", FAKE_1="daemon,step=1,kill")
    watcher.report("step", rank=0)
    watcher.until_kind("exit", rank=1)
    # pool, rank 0 and its helper stay; rank 1's helper has gone with it
    assert process.wait_until(lambda: len(agents.ranks_and_pool()) == 3, 10.0)
    watcher.gang.kill(1)
    watcher.until_kind("killed")
    assert process.wait_until(lambda: len(agents.ranks_and_pool()) == 1, 10.0)


def test_a_rank_does_not_speak_for_its_agent(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0]}, FAKE="forge=exit,forge=killed,forge=odd,flood=300000,step=1,wait")
    watcher.report("odd")
    assert not [o for o in watcher.listen(0.5) if o.kind in ("exit", "killed")]


@pytest.mark.parametrize(
    ("warm", "expected"), [("warm_fails", "no such wonder"), ("warm_starts_a_thread", "2 kernel tasks")]
)
def test_an_unsafe_pool_starts_ranks_afresh(agents: Agents, warm: str, expected: str) -> None:
    agents.start(warm=f"tests.support.fakejob:{warm}")
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE="step=1,look,done")
    fresh = watcher.until_kind("pool", state="fresh")
    assert expected in fresh.data["reason"]
    watcher.report("step", rank=1)
    assert seen_by(watcher, agents)["session"] == watcher.until_kind("exit", rank=0).data["pid"]
    given = (seen_by(watcher, agents)["env"][f"PHALANX_{name}_FD"] for name in ("REPORT", "ORDER", "STORE"))
    assert set(seen_by(watcher, agents)["fds"]) == {0, 1, 2, *map(int, given)}


def test_a_pool_that_dies_of_its_imports_is_replaced_by_a_cold_one(agents: Agents) -> None:
    agents.start(warm="tests.support.fakejob:warm_dies")
    watcher = agents.watch("n0")
    assert "while it warmed up" in watcher.until_kind("pool", state="failed").data["reason"]
    watcher.spawn(1, {"n0": [0]}, FAKE="done")
    assert watcher.until_kind("exit", rank=0).data["code"] == 0


def test_a_killed_pool_takes_its_ranks_and_is_replaced(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    pool = watcher.until_kind("pool", state="ready").data["pid"]
    first = watcher.spawn(1, {"n0": [0, 1]}, FAKE="daemon,step=1,wait")
    for rank in (0, 1):
        watcher.report("step", rank=rank)
    os.kill(pool, signal.SIGKILL)
    for rank in (0, 1):
        assert watcher.until_kind("exit", rank=rank).data["signal"] == signal.SIGKILL
    assert not any(process.is_running(pid) for pid in first.values())
    again = watcher.until(lambda o: o.kind == "pool" and o.data["state"] == "ready" and o.data["pid"] != pool)
    assert set(agents.ranks_and_pool()) == {again.data["pid"]}
    watcher.spawn(2, {"n0": [0, 1]}, FAKE="done")
    assert watcher.until_kind("exit", attempt=2, rank=1).data["code"] == 0


def test_a_killed_persister_is_replaced_and_what_it_held_is_gone(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    ready = process.wait_until(lambda: _holdings(watcher)["address"] is not None, 10.0)
    assert ready
    first = _holdings(watcher)
    assert first["held"] == []
    (pid,) = set(agents.alive()) - set(agents.ranks_and_pool())
    os.kill(pid, signal.SIGKILL)
    assert watcher.until_kind("pool", state="persister").data["reason"] == "the persister ended (signal 9)"
    assert process.wait_until(lambda: _holdings(watcher)["address"] not in (None, first["address"]), 10.0)


def _holdings(watcher: Watcher) -> dict[str, Any]:
    number = len(watcher.seen) + 1000
    assert watcher.gang.ask_holdings(number) == {"n0"}
    return watcher.until_kind("holdings", id=number).data


def test_kill_9_of_the_agent_leaves_nothing(agents: Agents) -> None:
    agent = agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE="daemon,stubborn,step=1,wait")
    for rank in (0, 1):
        watcher.report("step", rank=rank)
    assert len(agents.ranks_and_pool()) == 5
    agent.kill()
    assert watcher.until_kind("agent_lost").data["why"]
    agent.wait()
    assert agents.none_left()


def test_sigterm_at_the_agent_says_so_and_leaves_nothing(agents: Agents) -> None:
    agent = agents.start(preempt_grace_s=1.0)
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE_0="step=1,wait", FAKE_1="stubborn,daemon,step=1,wait")
    for rank in (0, 1):
        watcher.report("step", rank=rank)
    agent.terminate()
    notice, leaving = watcher.until_kind("notice"), watcher.until_kind("leaving")
    assert (notice.data["reason"], leaving.data["reason"]) == ("SIGTERM", "SIGTERM")
    assert leaving.time - notice.time >= 1.0
    watcher.until_kind("agent_lost")
    assert agent.wait(10) == 0
    assert agents.alive() == []
    assert announce.read_all(agents.paths) == []
    assert {o.data["signal"] for o in watcher.seen if o.kind == "exit"} == {signal.SIGKILL}


def test_a_second_notice_means_at_once(agents: Agents) -> None:
    agent = agents.start(preempt_grace_s=60.0)
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0]}, FAKE="step=1,wait")
    watcher.report("step", rank=0)
    agent.terminate()
    watcher.until_kind("notice")
    agent.terminate()
    watcher.until_kind("leaving")
    watcher.until_kind("agent_lost")
    assert agent.wait(10) == 0
    assert {o.data["signal"] for o in watcher.seen if o.kind == "exit"} == {signal.SIGTERM}


def test_ranks_that_leave_take_the_agent_with_them(agents: Agents) -> None:
    agent = agents.start(preempt_grace_s=60.0)
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0]}, FAKE="step=1,obey=3,done")
    watcher.report("step", rank=0)
    agent.terminate()
    watcher.until_kind("notice")
    watcher.gang.leave(1, 3)
    assert watcher.until_kind("exit", rank=0).data["code"] == 0
    watcher.until_kind("leaving")
    assert agent.wait(10) == 0


def test_shutdown_is_quiet_and_leaves_nothing(agents: Agents) -> None:
    agent = agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0]}, FAKE="wait")
    watcher.gang.shutdown_agents()
    assert agent.wait(10) == 0
    watcher.listen(0.3)
    assert "agent_lost" not in {o.kind for o in watcher.seen}
    assert agents.alive() == []
    assert list((agents.paths.root.parent / "logs").iterdir()) == []


def test_state_on_disks_goes_with_the_agent_and_nobody_elses(agents: Agents, tmp_path: Path) -> None:
    """Ranks that were killed cannot remove it; another node may be on this machine, and so may another run."""
    plan = make_plan(GPT, 8, dp=2, zero_stage=3, offload="optimizer+params", offload_path=str(tmp_path / "nvme"))
    agents.paths.attempt(2).mkdir(parents=True)
    agents.paths.job(2).write_text(json.dumps(to_json(make_job(GPT, plan))))
    run, gone = tmp_path / "nvme" / "phalanx-test", ["e0001-a0001-rank00003", "e0001-a0002-rank00000"]
    stays = ["e0001-a0002-rank00001", "e0001-a0003-rank00000", "notes"]
    others = tmp_path / "nvme" / "phalanx-test2" / "e0001-a0001-rank00000"
    for folder in (*(run / name for name in (*gone, *stays)), others):
        folder.mkdir(parents=True)
        (folder / "state.swp").write_bytes(b"of a rank")
    agent = agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(2, {"n0": [0]}, FAKE="wait")
    assert len(list(run.iterdir())) == 5
    watcher.gang.shutdown_agents()
    assert agent.wait(10) == 0
    assert sorted(path.name for path in run.iterdir()) == stays
    assert others.is_dir()


def test_the_lease_waits_for_progress_and_for_a_controller(agents: Agents) -> None:
    lease_s = 1.0
    agent = agents.start(lease_s=lease_s)
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE_0="steps=0.1", FAKE_1="wait")
    watcher.report("step")
    watcher.gang.close()
    assert not process.wait_until(lambda: agent.poll() is not None, 2.5), "steps are made: the ranks must live on"
    successor = agents.watch("n0", epoch=2)
    os.kill(successor.until_kind("spawned").data["ranks"][0]["pid"], signal.SIGKILL)
    successor.until_kind("exit", rank=0)
    assert successor.listen(2.0) is not None
    assert agent.poll() is None, "a controller is there: the other rank must live on"
    successor.gang.close()
    assert agent.wait(lease_s + 2.0) == 0  # two seconds to kill what it has, and to end
    assert agents.alive() == []


def test_an_adopting_controller_misses_nothing(agents: Agents) -> None:
    agents.start()
    first = agents.watch("n0")
    pids = first.spawn(1, {"n0": [0, 1]}, FAKE_0="step=1,step=2,step=3,wait", FAKE_1="step=1,exit=5")
    first.until_kind("exit", rank=1)
    first.report("step", step=3)
    first.gang.close()
    second = agents.watch("n0", epoch=2)
    welcome = second.until_kind("agent_up").data
    assert (welcome["attempt"], welcome["epoch_of_attempt"]) == (1, 1)
    assert {entry["rank"]: entry["pid"] for entry in welcome["ranks"]} == pids
    assert [(entry["exited"] or {}).get("code") for entry in welcome["ranks"]] == [None, 5]
    second.until_kind("exit", rank=1, code=5)
    second.report("step", rank=0, step=3)
    assert second.pids(1, {"n0": [0, 1]}) == pids
    steps = [o.data["step"] for o in second.seen if o.data.get("kind") == "step" and o.data["rank"] == 0]
    assert steps == [3], "only the newest step of a rank is replayed"
    assert process.is_running(pids[0])


def test_a_stale_controller_is_fenced_whether_it_is_there_or_comes_late(agents: Agents) -> None:
    agents.start()
    old = agents.watch("n0", epoch=4)
    pids = old.spawn(1, {"n0": [0]}, FAKE="wait")
    new = agents.watch("n0", epoch=5)
    assert old.until_kind("fenced").data["epoch"] == 5
    assert old.gang.links == {}
    late = Watcher(agents.paths, 3)
    agents.watchers.append(late)
    late.gang.connect(announce.read_all(agents.paths))
    assert late.until_kind("fenced").data["epoch"] == 5
    with pytest.raises(ClusterError):
        late.gang.spawn(9, {"n0": [0]}, fake_env(agents.paths, 9, 1))
    assert process.is_running(pids[0])
    assert "n0" in new.gang.links


def test_silence_is_loss_but_our_own_pause_is_not(agents: Agents) -> None:
    agent = agents.start(detect_s=0.5)
    watcher = agents.watch("n0", detect_s=0.5)
    import time

    time.sleep(1.5)  # not polling: our own fault
    assert "agent_lost" not in {o.kind for o in watcher.listen(0.5)}
    agent.send_signal(signal.SIGSTOP)
    try:
        assert "nothing was heard" in watcher.until_kind("agent_lost").data["why"]
    finally:
        agent.send_signal(signal.SIGCONT)
    watcher.gang.connect(announce.read_all(agents.paths))
    assert watcher.gang.links == {}, "a lost incarnation is not met again"


def test_two_nodes_share_one_rendezvous(agents: Agents) -> None:
    agents.start("a")
    agents.start("b")
    watcher = agents.watch("a", "b")
    watcher.spawn(1, {"b": [0, 1], "a": [2, 3]}, FAKE="look,done")
    for rank in range(4):
        watcher.until_kind("exit", rank=rank)
    look = {
        rank: json.loads(o.data["log_tail"].splitlines()[1])["env"]
        for rank in range(4)
        for o in watcher.seen
        if o.kind == "exit" and o.data["rank"] == rank
    }
    assert len({env["MASTER_PORT"] for env in look.values()}) == 1
    assert [look[rank]["NODE_RANK"] for rank in range(4)] == ["0", "0", "1", "1"]
    assert [look[rank]["LOCAL_RANK"] for rank in range(4)] == ["0", "1", "0", "1"]
    assert look[2]["PHALANX_STORE_FD"] == "-1"


def test_a_script_runs_with_our_python_and_without_our_packages(agents: Agents, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("jobs", "launcher", "strategies", "conf"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(f"WHOSE = 'the user, {name}'\n")
    (project / "train.py").write_text(
        "import json, os, socket, sys\n"
        "import jobs, launcher, strategies\n"
        "s = socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT'])))\n"
        "print(json.dumps([jobs.WHOSE, launcher.WHOSE, strategies.WHOSE, sys.executable,\n"
        "    os.environ.get('PYTHONPATH'), sorted(int(x) for x in os.listdir('/proc/self/fd')),\n"
        "    os.environ['PHALANX_REPORT_FD'], sys.argv[1:]]))\n"
    )
    agents.start()
    watcher = agents.watch("n0")
    env_of = fake_env(agents.paths, 1, 1)
    argv = ["python", "train.py", "--lr", "1e-3"]
    watcher.gang.spawn(1, {"n0": [0]}, env_of, kind="script", argv=argv, cwd=str(project))
    ended = watcher.until_kind("exit", rank=0)
    assert ended.data["code"] == 0, ended.data["log_tail"]
    *whose, python, path, fds, report_fd, arguments = json.loads(ended.data["log_tail"])
    assert whose == ["the user, jobs", "the user, launcher", "the user, strategies"]
    assert os.path.dirname(python) == os.path.dirname(sys.executable)
    assert path is None
    assert fds[:3] == [0, 1, 2]
    assert len(fds) == 5  # the socket, and the listing itself
    assert report_fd == "-1"
    assert arguments == ["--lr", "1e-3"]


def test_a_script_that_cannot_start_says_why(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.gang.spawn(1, {"n0": [0]}, fake_env(agents.paths, 1, 1), kind="script", argv=["no-such-program"], cwd="/")
    ended = watcher.until_kind("exit", rank=0).data
    assert ended["code"] == 127
    assert "no-such-program" in ended["log_tail"]


def test_kill_9_of_the_agent_ends_the_children_of_a_script(agents: Agents) -> None:
    agent = agents.start()
    watcher = agents.watch("n0")
    argv = ["sh", "-c", "setsid sleep 3600 & sleep 3600"]
    watcher.gang.spawn(1, {"n0": [0]}, fake_env(agents.paths, 1, 1), kind="script", argv=argv, cwd="/")
    watcher.until_kind("spawned")
    assert process.wait_until(lambda: len(agents.ranks_and_pool()) >= 4, 10.0)
    agent.kill()
    agent.wait()
    assert agents.none_left()


def test_an_environment_that_is_too_large_is_an_exit_with_a_reason(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.gang.spawn(1, {"n0": [0]}, fake_env(agents.paths, 1, 1, HUGE="x" * 300_000))
    ended = watcher.until_kind("exit", rank=0).data
    assert ended["code"] == 127
    assert "more than" in ended["log_tail"]


def test_logs_are_read_beside_the_controller(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE="print=hello,step=1,wait")
    watcher.report("step", rank=1)
    with LogReader(agents.address(), read_secret(agents.paths.secret)) as reader:
        piece = reader.read(1, 1, 0, 5)
        assert (piece.text, piece.offset, piece.next, piece.size) == ("rank ", 0, 5, 18)
        assert reader.read(1, 1, 5, 100).text == "1 runs\nhello\n"
        assert reader.read(1, 1, -6, 100).text == "hello\n"
        with pytest.raises(NotFound):
            reader.read(1, 77, 0, 5)
    assert "n0" in watcher.gang.links, "a reader does not disturb the owner"
    with pytest.raises(ClusterError):
        LogReader(agents.address(), b"not the secret")


def test_a_log_is_cut_when_it_grows_too_large(tmp_path: Path) -> None:
    from jobs.paths import RunPaths
    from launcher.host.beside import Beside
    from launcher.host.logs import RankLogs

    logs = RankLogs(RunPaths(tmp_path), "n0", Beside(), parent=str(tmp_path), max_bytes=1000)
    fd, path = logs.open(1, 3)
    os.write(fd, b"".join(b"%04d\n" % n for n in range(300)))
    logs.limit(path)
    os.write(fd, b"after\n")
    os.close(fd)
    text = path.read_text()
    assert len(text) < 600
    assert text.endswith("0299\nafter\n")
    assert (path.parent.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_new_agent_sweeps_the_logs_of_a_killed_one_and_no_others(tmp_path: Path) -> None:
    from jobs.paths import RunPaths
    from launcher.host.beside import Beside
    from launcher.host.logs import RankLogs

    run, other = RunPaths(tmp_path / "a" / "run"), RunPaths(tmp_path / "b" / "run")
    first = RankLogs(run, "n0", Beside(), parent=str(tmp_path))
    beside = [
        RankLogs(run, "n1", Beside(), parent=str(tmp_path)),
        RankLogs(other, "n0", Beside(), parent=str(tmp_path)),
    ]
    second = RankLogs(run, "n0", Beside(), parent=str(tmp_path))
    assert not first.folder.exists()
    assert all(logs.folder.exists() for logs in (second, *beside))


def test_kill_9_of_the_agent_while_its_pool_warms_up_leaves_nothing(agents: Agents) -> None:
    agent = agents.start(warm="tests.support.fakejob:warm_forever")
    watcher = agents.watch("n0")
    assert process.wait_until(lambda: len(agents.ranks_and_pool()) == 1, 10.0)
    watcher.gang.spawn(1, {"n0": [0]}, fake_env(agents.paths, 1, 1))
    watcher.gang.kill(1)
    watcher.until_kind("killed", attempt=1)
    agent.kill()
    agent.wait()
    assert agents.none_left()


IN_A_THREAD = """
import sys, threading
from launcher.host.agent import AgentOptions, HostAgent

root, parent, fake = sys.argv[1:]
options = AgentOptions(warm=fake + ":warm", target=fake + ":main", log_parent=parent, grace_s=0.5)
agent = HostAgent(run_dir=root, node="t", bind="127.0.0.1", slots=1, options=options)
ended = []
thread = threading.Thread(target=lambda: ended.append(agent.serve()))
thread.start()
sys.stdin.readline()
agent.stop("the actor is told to end")
thread.join(20)
print(agent.address.incarnation, *ended)
"""


def test_an_agent_in_a_thread_needs_no_signals(agents: Agents, tmp_path: Path) -> None:
    """As it lives in an actor, which is a process of its own, too."""
    command = [sys.executable, "-c", IN_A_THREAD, str(agents.paths.root), str(tmp_path), FAKE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as actor:
        try:
            watcher = agents.watch("t")
            watcher.spawn(1, {"t": [0]}, FAKE="daemon,step=1,wait")
            watcher.report("step")
            incarnation, _, said = actor.communicate("end\n", timeout=30.0)[0].strip().partition(" ")
        finally:
            actor.kill()
    assert (actor.returncode, said) == (0, "the actor is told to end")
    assert watcher.until_kind("leaving").data["reason"] == "the actor is told to end"
    assert process.marked(f"{incarnation}.") == []
    assert announce.read_all(agents.paths) == []


def test_a_node_that_cannot_write_logs_says_so(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.until_kind("pool", state="ready")
    for folder in (agents.paths.root.parent / "logs").iterdir():
        (folder / "1").write_text("in the way")
    agents.paths.attempts.write_text("in the way")
    watcher.gang.spawn(1, {"n0": [0]}, fake_env(agents.paths, 1, 1))
    ended = watcher.until_kind("exit", rank=0).data
    assert ended["code"] == 127
    assert "could not be started" in ended["log_tail"]


def test_a_pool_serves_however_high_its_descriptors_are() -> None:
    """An agent in an actor may be given numbers that select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"a process may have {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    high = fcntl.fcntl(theirs, fcntl.F_DUPFD, 1500)
    theirs.close()
    command = [sys.executable, "-m", "launcher.host.pool", "--fd", str(high), "--parent", str(os.getpid())]
    command += ["--warm", f"{FAKE}:warm", "--target", f"{FAKE}:main"]
    root = str(Path(__file__).parents[3])
    with ours, subprocess.Popen(command, pass_fds=[high], cwd=root, start_new_session=True) as pool:
        os.close(high)
        assert json.loads(ours.recv(65536)) == {"op": "ready", "reason": ""}
        ours.shutdown(socket.SHUT_RDWR)
        assert pool.wait(20.0) == 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
