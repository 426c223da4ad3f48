"""``status``, ``logs``, ``cancel`` and ``resume`` on run directories whose cluster is long gone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import launch, proposal
from launcher.cli import main
from launcher.lock import ControllerLock
from launcher.run import EventKind, RunState
from launcher.store import append_line
from tests.support.runs import failed_run, make_run, put, recovered_run

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Calls ``phalanx`` in this process; returns exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def test_status_of_all_runs(tmp_path: Path, invoke: Invoke) -> None:
    recovered_run(tmp_path, "one")
    failed_run(tmp_path, "two")
    (tmp_path / ".data").mkdir()
    code, out, _ = invoke("status", "--dir", str(tmp_path))
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["RUN", "one", "two"]
    document = json.loads(invoke("status", "--json", f"run.dir={tmp_path}")[1])
    assert document["schema_version"] == 1
    assert [(row["run"], row["state"]) for row in document["runs"]] == [("one", "succeeded"), ("two", "failed")]


def test_damaged_run_hides_no_other(tmp_path: Path, invoke: Invoke) -> None:
    recovered_run(tmp_path, "one")
    store = make_run(tmp_path, "two")
    store.paths.request.write_text("{")
    code, out, _ = invoke("status", "--dir", str(tmp_path))
    assert code == 0
    assert "damaged" in out
    code, _, err = invoke("status", "two", "--dir", str(tmp_path))
    assert code == 7
    assert "request.json" in err


@pytest.mark.parametrize("content", [None, "", "not JSON\n", '{"seq": 1'])
def test_a_log_that_says_nothing_is_said(tmp_path: Path, invoke: Invoke, content: str | None) -> None:
    store = recovered_run(tmp_path, "one")
    store.paths.events.unlink()
    if content is not None:
        store.paths.events.write_text(content)
    code, _, err = invoke("status", "one", "--dir", str(tmp_path))
    assert code == 7
    assert "events.jsonl" in err


def test_lines_of_others_among_the_metrics_are_left_out(tmp_path: Path, invoke: Invoke) -> None:
    store = recovered_run(tmp_path, "one")
    before = invoke("status", "one", "--dir", str(tmp_path))[1]
    for line in (b'{"accuracy": 0.5}\n', b'{"step": "first", "attempt": 1, "time": 0}\n', b"[1, 2]\n"):
        append_line(store.paths.metrics, line)
    assert invoke("status", "one", "--dir", str(tmp_path))[:2] == (0, before)


def test_no_runs(tmp_path: Path, invoke: Invoke) -> None:
    code, out, err = invoke("status", "--dir", str(tmp_path))
    assert (code, out) == (0, "")
    assert "There are no runs" in err
    assert json.loads(invoke("status", "--json", "--dir", str(tmp_path))[1])["runs"] == []


def test_status_json_has_the_promised_fields(tmp_path: Path, invoke: Invoke) -> None:
    recovered_run(tmp_path)
    code, out, err = invoke("status", "latest", "--json", "--dir", str(tmp_path))
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["run"] == "demo"
    assert document["state"] == "succeeded"
    assert document["step"] == 20
    assert document["steps_lost"] == 2
    assert document["weights_digest"] == "d" * 16
    assert document["ranks"] == []
    first, second = document["attempts"]
    assert {"number", "plan", "nodes", "started", "ended", "cause", "first_step"} <= set(first)
    assert (first["number"], first["first_step"], second["first_step"]) == (1, 1, 11)
    assert second["nodes"] == ["a", "b", "e", "d"]
    books = document["ledger"]
    assert books["wall"] == pytest.approx(sum(value for name, value in books.items() if name != "wall"))
    assert document["recoveries"] == [4.0]
    assert {"goodput", "incidents", "predicted", "measured", "slow_starts", "excluded", "stragglers"} <= set(document)
    assert set(document["incidents"][0]) == {
        *("number", "attempt", "kind", "cause", "node", "rank", "at", "step", "steps_lost", "action", "recovered"),
        *("detect_s", "decide_s", "place_s", "restore_s", "replay_s", "wait_s", "total_s"),
        *("teardown_s", "device_s", "communicators_s", "engine_s", "state_s"),
    }


def test_status_names_slow_ranks_and_the_nodes_that_carry_none(tmp_path: Path, invoke: Invoke) -> None:
    store = failed_run(tmp_path)
    detail = "rank 2 on b takes 1.4 x its peers' time"
    failure = {"detail": detail, "node": "b", "rank": 2}
    put(store, 20.0, EventKind.STRAGGLER_FOUND, failure=failure, ratio=1.4)
    for node, hours, reason in (("b", 6, "slow"), ("c", -1, "long ago")):
        put(store, 20.0, EventKind.NODE_EXCLUDED, node=node, until=time.time() + 3600 * hours, reason=reason)
    document = json.loads(invoke("status", "demo", "--json", "--dir", str(tmp_path))[1])
    assert [(one["node"], one["reason"]) for one in document["excluded"]] == [("b", "slow")]
    assert [one["failure"]["rank"] for one in document["stragglers"]] == [2]
    out = invoke("status", "demo", "--dir", str(tmp_path))[1]
    assert f"found slow:\n  {detail}" in out
    assert "carry no ranks for now:\n  node b until" in out


def test_status_of_a_live_and_of_an_orphaned_run(tmp_path: Path, invoke: Invoke) -> None:
    store = failed_run(tmp_path)
    lines = store.paths.events.read_bytes().splitlines(keepends=True)
    store.paths.events.write_bytes(b"".join(lines[:4]))  # up to the first step
    lock = ControllerLock.acquire(store.paths)
    document = json.loads(invoke("status", "demo", "--json", "--dir", str(tmp_path))[1])
    assert (document["state"], document["orphaned"], document["step"]) == ("running", False, 12)
    assert [row["rank"] for row in document["ranks"]] == list(range(8))
    assert {"rank", "node", "pid", "coordinates"} <= set(document["ranks"][0])
    lock.release()
    document = json.loads(invoke("status", "demo", "--json", "--dir", str(tmp_path))[1])
    assert (document["state"], document["orphaned"]) == ("running", True)
    code, out, _ = invoke("status", "demo", "--dir", str(tmp_path))
    assert code == 0
    assert "phalanx resume" in out


def test_run_by_prefix_path_and_latest(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    recovered_run(tmp_path / "runs", "alpha-1")
    monkeypatch.chdir(tmp_path)
    for ref in ("alpha-1", "al", "latest", str(tmp_path / "runs" / "alpha-1"), "runs/alpha-1"):
        assert "alpha-1" in invoke("status", ref)[1]
    code, _, err = invoke("status", "beta")
    assert code == 5
    assert "alpha-1" in err


def test_logs_from_the_run_directory(tmp_path: Path, invoke: Invoke) -> None:
    store = recovered_run(tmp_path)
    store.paths.rank_log(2, 0).write_text("second\n")
    store.paths.rank_log(1, 3).write_text("first\nno end")
    where = ("--dir", str(tmp_path))
    assert invoke("logs", "demo", *where)[:2] == (0, "second\n")
    assert invoke("logs", "demo", "--rank", "3", "--attempt", "1", *where)[:2] == (0, "first\nno end\n")
    document = json.loads(invoke("logs", "demo", "-r", "3", "-a", "1", "--json", *where)[1])
    assert document["lines"] == ["first", "no end"]
    code, out, err = invoke("logs", "demo", "--rank", "5", *where)
    assert (code, out) == (5, "")
    assert "attempt 1 rank 3, attempt 2 rank 0" in err
    assert invoke("logs", "demo", "--attempt", "7", *where)[0] == 5
    code, out, err = invoke("logs", "demo", "-f", *where)
    assert (code, out) == (0, "second\n")
    assert "succeeded" in err
    assert invoke("logs", "demo", "-f", "--json", *where)[0] == 2


def test_following_goes_on_after_a_log_was_cut(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    store = failed_run(tmp_path)
    log, whole = store.paths.rank_log(1, 0), store.paths.events.read_bytes()
    store.paths.events.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))  # it still runs
    log.write_text("old and long\n" * 10)
    story = iter(["cut\n", "cut\nnew\n"])

    def pause(seconds: float) -> None:
        text = next(story, None)
        log.write_text(text) if text is not None else store.paths.events.write_bytes(whole)

    monkeypatch.setattr("launcher.commands.logs.time.sleep", pause)
    code, out, err = invoke("logs", "demo", "-f", "--dir", str(tmp_path))
    assert (code, out) == (0, "old and long\n" * 10 + "new\n")
    assert "was cut" in err


def test_logs_before_any_rank(tmp_path: Path, invoke: Invoke) -> None:
    make_run(tmp_path)
    assert invoke("logs", "demo", "--dir", str(tmp_path))[0] == 5


def test_cancel_of_an_ended_run(tmp_path: Path, invoke: Invoke) -> None:
    recovered_run(tmp_path)
    code, _, err = invoke("cancel", "demo", "--dir", str(tmp_path))
    assert code == 2
    assert "succeeded" in err


def test_cancel_of_an_orphan_becomes_its_controller(tmp_path: Path, invoke: Invoke) -> None:
    store = make_run(tmp_path, words=["cluster=process", "tracking=none"])
    code, out, _ = invoke("cancel", "demo", "--json", "--dir", str(tmp_path))
    assert code == 0
    assert json.loads(out)["state"] == "cancelled"
    assert store.run().state is RunState.CANCELLED
    assert [event.kind for event in store.events()].count(EventKind.CANCEL_REQUESTED) == 1
    assert invoke("cancel", "demo", "--dir", str(tmp_path))[0] == 0


def test_resume_is_refused_with_reasons(tmp_path: Path, invoke: Invoke) -> None:
    recovered_run(tmp_path / "done")
    code, _, err = invoke("resume", "demo", "--yes", "--dir", str(tmp_path / "done"))
    assert code == 6
    assert "succeeded" in err
    store = failed_run(tmp_path / "failed")
    before = store.paths.events.read_bytes()
    words = ["resume", "demo", "--yes", "--dir", str(tmp_path / "failed")]
    code, out, err = invoke(*words, "model.hidden=64", "train.seed=9", "train.lr=0.5")
    assert (code, out) == (6, "")
    assert "model.hidden" in err
    assert "train.seed" in err
    lock = ControllerLock.acquire(store.paths)
    code, _, err = invoke(*words)
    assert code == 6
    assert "live controller" in err
    lock.release()
    assert invoke(*words, "strategy.tp=3")[0] == 3
    assert invoke(*words, "strategy.tq=3")[0] == 2
    assert store.paths.events.read_bytes() == before


@pytest.mark.parametrize("content", ["{", "- a list", None])
def test_resume_of_a_damaged_run_directory(tmp_path: Path, invoke: Invoke, content: str | None) -> None:
    store = failed_run(tmp_path)
    if content is None:
        store.paths.config.unlink()
    else:
        store.paths.config.write_text(content)
    code, out, err = invoke("resume", "demo", "--yes", "--dir", str(tmp_path))
    assert (code, out) == (7, "")
    assert "config.yaml" in err
    assert "next:" in err
    assert all(line.startswith(("error:", "  why:", "  next:")) for line in err.splitlines())


def test_resume_shows_the_difference_and_never_asks_without_a_terminal(tmp_path: Path, invoke: Invoke) -> None:
    store = failed_run(tmp_path)
    code, out, err = invoke("resume", "demo", "train.lr=0.5", "--dir", str(tmp_path))
    assert (code, out) == (2, "")
    assert "train.lr" in err
    assert "changes the run" in err
    assert "--yes" in err
    assert "from the very beginning" in err or "step 1 of 20" in err
    assert store.request().job.train.lr == 3e-3
    assert invoke("resume", "demo", "--dry-run", "--dir", str(tmp_path))[0] == 0


def test_resume_takes_the_same_path_as_submit(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    store = failed_run(tmp_path)
    seen: dict[str, object] = {}

    def run(given: object, screen: object, **options: object) -> launch.Outcome:
        seen.update(options)
        proposal.accept(store, options["resume"])  # type: ignore[arg-type]
        put(store, 100.0, EventKind.RESUME_REQUESTED, epoch=2, request=store.request().digest)
        put(store, 101.0, EventKind.RUN_FAILED, epoch=2, reason="as planned")
        return launch.Outcome(state=RunState.FAILED)

    monkeypatch.setattr(launch, "run", run)
    code, out, err = invoke("resume", "demo", "train.lr=0.5", "--yes", "--json", "--dir", str(tmp_path))
    assert code == 100
    assert json.loads(out)["state"] == "failed"
    assert "as planned" in err
    assert seen["adopt"] is False
    assert store.request().job.train.lr == 0.5
    assert list(store.paths.root.glob("request-*.json"))
    code, _, _ = invoke("resume", "demo", "--yes", "--dir", str(tmp_path))
    assert seen["adopt"] is True
