"""Runs whose checkpoints are in an object store: they recover from it, and say what is wrong with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import checkpoint
from jobs.checkpoint import fence
from jobs.checkpoint.memory import generation_of
from jobs.location import Url
from launcher.host import announce
from launcher.run import EventKind
from launcher.store import RunStore
from tests.support import cli
from tests.support.objectstore import BUCKET, SECRET, ObjectStore, client, object_store

pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("store") / "log") as running:
        yield running


@pytest.mark.full
def test_a_run_recovers_from_an_object_store(store: ObjectStore, tmp_path: Path) -> None:
    """Ranks die until the run fails; a resume, from another place of the run directory, restores from the store."""
    tier = (f"checkpoint.url=s3://{BUCKET}/team", "checkpoint.memory_every=0")
    words = (*tier, "train.steps=8", "checkpoint.keep=2", "recovery.max_restarts=1")
    faults = 'faults=["rank_exit@rank=1,step=5", "rank_exit@rank=2,step=8"]'
    done = cli.phalanx(*cli.tiny(tmp_path, "demo", *words, faults), cwd=tmp_path)
    assert done.code == 100, done.err
    run = cli.store(tmp_path, "demo")
    root = Url(f"s3://{BUCKET}/team/demo")
    assert run.paths.checkpoints == root
    assert not run.paths.checkpoint_dir.exists()
    moved = tmp_path / "elsewhere"
    os.rename(tmp_path / "runs", moved)
    done = cli.phalanx("resume", "demo", "--yes", "--moved", "--dir", str(moved), cwd=tmp_path)
    assert done.code == 0, done.err
    planned = [event for event in RunStore(moved / "demo").events() if event.kind is EventKind.ATTEMPT_PLANNED]
    assert str(planned[-1].data["resume_from"]).startswith(f"{root}/step-"), "nothing was left in memory"
    listed = checkpoint.list_checkpoints(root)
    assert [one.step for one in listed] == [8, 6]
    assert all(checkpoint.verify(one.path, deep=True) == [] for one in listed)
    done = cli.phalanx("checkpoint", "verify", "demo", "--all", "--dir", str(moved), cwd=tmp_path)
    assert done.out == "step 8: whole\nstep 6: whole\n"
    quiet = cli.phalanx(*cli.tiny(tmp_path, "quiet", "train.steps=8"), cwd=tmp_path)
    assert quiet.code == 0, quiet.err
    digests = [RunStore(path).run().weights_digest for path in (moved / "demo", tmp_path / "runs" / "quiet")]
    assert digests[0] == digests[1] is not None
    seen = [path for path in moved.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert seen == []
    done = cli.phalanx(*cli.tiny(tmp_path, "demo", *words), cwd=tmp_path)
    assert done.code == 2
    assert "another run" in done.err
    assert not (tmp_path / "runs" / "demo").exists()


@pytest.mark.full  # tests/launcher/test_outset.py has every order of events
def test_a_node_is_lost_while_the_store_is_away(store: ObjectStore, tmp_path: Path) -> None:
    """Every byte that is needed is in memory: the run goes on, and fences before it commits anything."""
    words = cli.tiny(tmp_path, "away", f"checkpoint.url=s3://{BUCKET}/outage", "train.steps=60", "checkpoint.every=20")
    process = cli.start(*words, cwd=tmp_path)
    root = tmp_path / "runs" / "away"

    def until(what: str, reached: Callable[[RunStore], bool]) -> None:
        def done() -> bool:
            assert process.poll() is None, process.communicate()
            return (root / "request.json").exists() and reached(RunStore(root))

        cli.wait_for(done, what)

    until("a checkpoint", lambda run: run.run().committed_step >= 20)
    with store.stuck():
        run = RunStore(root)
        attempt = run.run().attempt
        assert attempt is not None
        agent = announce.read(announce.path_of(run.paths, attempt.nodes[1]))
        assert agent is not None
        os.kill(agent.pid, signal.SIGKILL)
        until(
            "another attempt that trains", lambda run: [bool(one.trained) for one in run.run().attempts] == [True, True]
        )
    done = cli.end(process)
    assert done.code == 0, done.err
    state = run.run()
    assert [one.reason for one in state.attempts] == ["start", "restart"]
    assert generation_of(state.attempts[1].resume_from)
    assert state.steps_lost <= 1
    planned = [event for event in run.events() if event.kind is EventKind.ATTEMPT_PLANNED][-1]
    assert "has not answered" in planned.data["unfenced"]
    assert fence.highest(run.paths.checkpoints) == (state.attempts[1].epoch, 2)
    branch = fence.current(run.paths.checkpoints)
    assert branch is not None
    assert branch.token == (state.attempts[1].epoch, 2)
    assert checkpoint.list_checkpoints(run.paths.checkpoints)[0].token.attempt == 2
    quiet = cli.phalanx(*cli.tiny(tmp_path, "undisturbed", "train.steps=60", "checkpoint.every=20"), cwd=tmp_path)
    assert quiet.code == 0, quiet.err
    other = cli.store(tmp_path, "undisturbed")
    assert cli.curve(run) == cli.curve(other)
    assert state.weights_digest == other.run().weights_digest is not None
    cli.assert_nothing_left(root)


@pytest.mark.parametrize(
    ("url", "env", "words"),
    [
        ("s3://no-such-bucket/x", {}, "there is no such bucket"),
        (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_a_store_that_cannot_be_used_ends_submit(
    store: ObjectStore, tmp_path: Path, url: str, env: dict[str, str], words: str
) -> None:
    done = cli.phalanx(*cli.tiny(tmp_path, "demo", f"checkpoint.url={url}"), cwd=tmp_path, env=env)
    assert done.code == 7, done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert list((tmp_path / "runs").glob("demo*")) == []
    assert not client().exists(f"{BUCKET}/x")
