"""An agent whose run directory does not answer any more: it stays in touch, and it keeps its lease."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launcher.host import announce
from launcher.host.beside import Beside
from launcher.host.reader import LogReader
from launcher.host.wire import read_secret
from strategies.errors import NotFound
from tests.support.agents import Agents
from tests.support.frozen import silent_share

pytestmark = pytest.mark.timeout(120)
LOOKS_S = 5.0  # so often an agent looks at the logs of its ranks
LEASE_S = LOOKS_S + 3.0
ENDING_S = 4.0  # as in tests/e2e/test_partition.py


def test_a_cut_off_agent_ends_within_its_lease_though_its_run_directory_hangs(agents: Agents) -> None:
    """The link that is down carried both: no controller is heard, and the log of rank 0 cannot be looked at."""
    agent = agents.start(lease_s=LEASE_S)
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0, 1]}, FAKE="daemon,step=1,wait")
    for rank in (0, 1):
        watcher.report("step", rank=rank)
    silent_since = time.monotonic()
    with silent_share(agents.paths.root):
        assert agent.wait(LEASE_S + 2 * ENDING_S) == 0
        assert time.monotonic() - silent_since > LEASE_S - 1.0, "not before its lease was over"
        assert agents.alive() == []
    assert [one.node for one in announce.read_all(agents.paths)] == ["n0"], "it could not take that back"


def test_an_agent_whose_run_directory_hangs_stays_in_touch_and_obeys(agents: Agents) -> None:
    agents.start(detect_s=4.0)
    watcher = agents.watch("n0", detect_s=4.0)
    pids = watcher.spawn(1, {"n0": [0, 1]}, FAKE="step=1,wait")
    for rank in (0, 1):
        watcher.report("step", rank=rank)
    secret = read_secret(agents.paths.secret)
    with silent_share(agents.paths.root) as mend:
        watcher.listen(LOOKS_S + 1.0)
        for rank in (1, 0):
            os.kill(pids[rank], signal.SIGKILL)
            watcher.until_kind("exit", rank=rank, attempt=1)
        tails = {o.data["rank"]: o.data["log_tail"] for o in watcher.seen if o.kind == "exit"}
        assert tails == {0: "", 1: "rank 1 runs\n"}, "that of rank 0 is in the run directory"
        watcher.spawn(2, {"n0": [0, 1]}, FAKE="step=1,wait")
        watcher.report("step", rank=0, attempt=2)
        assert not [o for o in watcher.seen if o.kind == "agent_lost"]
        mend()
    with LogReader(agents.address(), secret) as reader:
        assert reader.read(2, 0, 0, 100).text == "rank 0 runs\n"
        assert reader.read(1, 0, 0, 100).text == "rank 0 runs\n"
        with pytest.raises(NotFound):
            reader.read(3, 0, 0, 100)
    watcher.spawn(3, {"n0": [0]}, FAKE="step=1,wait")
    watcher.report("step", rank=0, attempt=3)
    assert agents.paths.rank_log(3, 0).read_text() == "rank 0 runs\n"
    assert not agents.paths.rank_log(2, 0).exists(), "it was kept on the node"


def test_what_hangs_beside_holds_up_one_turn_and_nothing_else_is_begun_meanwhile() -> None:
    beside, mended, done = Beside(), threading.Event(), list[str]()

    def hang() -> str:
        mended.wait(30.0)
        done.append("late")
        return "late"

    assert beside.do(lambda: "in time", "") == "in time"
    began = time.monotonic()
    assert beside.do(hang, "given up", patience_s=0.2) == "given up"
    assert 0.2 <= time.monotonic() - began < 2.0
    for _ in range(100):
        assert beside.do(lambda: done.append("begun"), None, patience_s=10.0) is None
    assert time.monotonic() - began < 5.0
    mended.set()
    while not done:
        time.sleep(0.01)
    time.sleep(0.1)
    assert done == ["late"]
    assert beside.do(lambda: "in time", "") == "in time"


def test_what_goes_wrong_beside_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Beside().do((tmp_path / "missing").read_bytes, b"")
