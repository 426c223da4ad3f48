"""Resumes that would start from the wrong thing: refused with every reason, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint.layout import Place, Token, place_of
from jobs.checkpoint.manifest import commit, read_manifest
from jobs.checkpoint.slices import whole
from jobs.data import prepare
from jobs.paths import RunPaths
from jobs.spec import DataSpec
from launcher import origin, resume_checks, resume_plan
from launcher.cli import main
from launcher.lock import ControllerLock
from launcher.run import EventKind
from launcher.store import RunStore, dump
from strategies.errors import ResumeRefused
from tests.support.checkpoints import manifest_of, write_shards
from tests.support.folders import contents
from tests.support.runs import T0, WORDS, begin_attempt, make_run, put

Resume = Callable[..., tuple[int, str]]


@pytest.fixture
def resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Resume:
    """Runs ``phalanx resume demo --yes`` and proves that it has written nothing."""

    def call(*words: str, folder: Path = tmp_path, name: str = "demo") -> tuple[int, str]:
        before = contents(folder)
        with pytest.raises(SystemExit) as ended:
            main(["resume", name, *words, "--yes", "--dir", str(folder)])
        assert contents(folder) == before
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A failed run with prepared data and the checkpoints of steps 5 and 10."""
    store = make_run(tmp_path)
    request = store.request()
    cache = tmp_path / "cache"
    cache.mkdir()
    data = DataSpec(kind="stdlib", store=str(cache), digest="abc", vocab=request.job.model.vocab)
    request = dataclasses.replace(request, job=dataclasses.replace(request.job, data=data))
    store.paths.request.write_bytes(dump(request))
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    for step in (5, 10):
        path = save(store, step)
        put(store, 10.0 + step, EventKind.CHECKPOINT_COMMITTED, attempt=1, step=step, path=str(path), bytes=1)
    put(store, 30.0, EventKind.RUN_FAILED, attempt=1, reason="all restarts are used")
    return RunStore.open(store.paths.root)


def save(store: RunStore, step: int, *, token: tuple[int, int] = (1, 1), **changes: Any) -> Path:
    """A committed checkpoint of the run, or of one that differs from it."""
    job = store.request().job
    place = Place(store.paths.checkpoint_dir, step, Token(*token))
    manifest = manifest_of(place, write_shards(place, [[whole("w", (30, 10))]]), {"w": (30, 10)}, job.model)
    extra = {"data": {"digest": job.data.digest, "vocab": job.data.vocab}, "seed": job.train.seed}
    return commit(place.root, dataclasses.replace(manifest, **{"run_id": job.run_id, "extra": extra} | changes))


def test_the_runs_own_checkpoint_is_welcome(store: RunStore) -> None:
    assert resume_checks.check(store, store.run(), store.request()) == []


def test_a_checkpoint_of_another_model_vocabulary_and_seed(store: RunStore, resume: Resume) -> None:
    """All of it at once, before any process is started."""
    job = store.request().job
    model = dataclasses.replace(job.model, layers=job.model.layers + 1, vocab=77)
    save(store, 15, model=model, extra={"data": {"digest": "def", "vocab": 77}, "seed": job.train.seed + 1})
    code, told = resume()
    assert code == 6
    for words in (
        f"model.layers: {job.model.layers + 1} in the checkpoint, {job.model.layers} here",
        "model.vocab: 77 in the checkpoint",
        "vocabulary: 77 in the checkpoint",
        "data digest: def in the checkpoint, abc here",
        f"seed: {job.train.seed + 1} in the checkpoint",
    ):
        assert words in told


def test_a_checkpoint_of_a_run_of_the_same_sweep(store: RunStore, resume: Resume) -> None:
    """Model, samples and seed are the same."""
    save(store, 15, run_id="sweep-2")
    code, told = resume()
    assert code == 6
    assert "run: sweep-2 in the checkpoint, demo here" in told


def test_a_checkpoint_without_any_word_of_its_samples(store: RunStore, resume: Resume) -> None:
    save(store, 15, extra={})
    code, told = resume()
    assert code == 6
    assert "seed: None in the checkpoint" in told


def edit(manifest: Path, **changes: Any) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def newest(store: RunStore) -> Path:
    return max(store.paths.checkpoint_dir.glob("*/*.manifest.json"))


def test_a_manifest_edited_by_hand_is_passed_over_and_named(
    store: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(newest(store), step=9)
    before = contents(store.paths.root)
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(store.paths.root), "--dry-run"])
    told = capsys.readouterr().err
    assert not ended.value.code
    assert contents(store.paths.root) == before
    assert "step-00000005" in told
    assert f"passed over, damaged: {newest(store)}: the manifest does not match its own digest" in told
    assert "all steps after 5 are done anew" in told


def test_when_every_manifest_was_edited(store: RunStore, resume: Resume) -> None:
    """Beginning again at step 1 without a word would throw the run away."""
    for path in store.paths.checkpoint_dir.glob("*/*.manifest.json"):
        edit(path, time=3.0)
    code, told = resume()
    assert code == 7
    assert told.count("does not match its own digest") == 2
    assert "committed step 10" in told


def test_when_the_checkpoints_were_deleted(store: RunStore, resume: Resume) -> None:
    shutil.rmtree(store.paths.checkpoint_dir)
    code, told = resume()
    assert code == 7
    assert "there is none in" in told


def test_a_manifest_under_another_name(store: RunStore, resume: Resume) -> None:
    """Nobody makes a later step of an earlier one by renaming."""
    path = newest(store)
    place = Place(store.paths.checkpoint_dir, 20, Token(1, 1))
    place.step_dir.mkdir()
    shutil.copy(path, place.manifest)
    shutil.copytree(place_of(path).shard_dir, place.shard_dir)
    assert any("not what its name says" in one for one in resume_checks.check(store, store.run(), store.request()))


def test_a_run_directory_that_was_moved(store: RunStore, tmp_path: Path, resume: Resume) -> None:
    """Something may still go by its old path: a person must say that it is meant. Then nothing knows where it lay."""
    moved = tmp_path / "elsewhere" / "demo"
    moved.parent.mkdir()
    os.rename(store.paths.root, moved)
    code, told = resume(folder=moved.parent)
    assert code == 6
    assert f"was {store.paths.root}, and is {moved}" in told
    assert f"phalanx resume demo --dir {moved.parent} --moved" in told
    there = RunStore.open(moved)
    assert resume_checks.check(there, there.run(), there.request(), moved=True) == []


def test_a_run_directory_under_another_name_of_its_place(store: RunStore, tmp_path: Path) -> None:
    """A link, a bind mount, an automounter."""
    (tmp_path / "link").symlink_to(store.paths.root.parent, target_is_directory=True)
    there = RunStore.open(tmp_path / "link" / "demo")
    assert resume_checks.check(there, there.run(), there.request()) == []


@pytest.mark.parametrize("words", [(), ("--moved",)])
def test_a_copy_of_a_run(store: RunStore, tmp_path: Path, resume: Resume, words: tuple[str, ...]) -> None:
    """Both would write to the same places outside of them; in the copy of another run of that name there is no harm."""
    store.paths.secret.write_text("of this run")
    copy = tmp_path / "copies" / "demo"
    shutil.copytree(store.paths.root, copy)
    code, told = resume(*words, folder=copy.parent)
    assert code == 6
    assert f"is a copy: the run itself is in {store.paths.root}" in told
    there = RunStore.open(copy)
    store.paths.secret.write_text("of another")
    assert resume_checks.check(there, there.run(), there.request(), moved=True) == []


def test_a_copy_of_a_run_whose_place_can_only_be_read(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot, or a file system that has failed: nothing can be written there any more."""
    store.paths.secret.write_text("of this run")
    copy = tmp_path / "copies" / "demo"
    shutil.copytree(store.paths.root, copy)
    there = RunStore.open(copy)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != store.paths.root)
    assert resume_checks.check(there, there.run(), there.request(), moved=True) == []
    with pytest.raises(ResumeRefused, match="is a copy"):
        resume_checks.check(there, there.run(), there.request())


@pytest.mark.parametrize("absent", [True, False])
def test_what_was_found_damaged_is_so_where_the_run_directory_was_moved_to(
    store: RunStore, tmp_path: Path, absent: bool
) -> None:
    """Only a rank that reads every byte can see it."""
    bad = newest(store)
    store.append(EventKind.CHECKPOINT_REJECTED, epoch=1, attempt=1, path=str(bad), reason="a digest", absent=absent)
    moved = tmp_path / "elsewhere" / "demo"
    moved.parent.mkdir()
    os.rename(store.paths.root, moved)
    there = RunStore.open(moved)
    rejected = there.run().rejected
    point, _ = origin.newest(there.paths, rejected=rejected, script=False)
    assert point.path
    assert Path(point.path).is_relative_to(moved)
    assert point.step < place_of(bad).step
    assert rejected == {str(bad)}, "people read where it was"


def test_what_was_found_damaged_elsewhere_is_so_there(store: RunStore, tmp_path: Path) -> None:
    """Checkpoints that are kept outside the run directory, in a folder that is called like the run."""
    kept = tmp_path / "bucket" / store.name / "checkpoints"
    kept.parent.mkdir(parents=True)
    os.rename(store.paths.checkpoint_dir, kept)
    store.paths.pointer.write_text(f"{kept}\n")
    bad, _ = origin.newest(store.paths, rejected=frozenset(), script=False)
    assert Path(bad.path).is_relative_to(kept)
    point, _ = origin.newest(store.paths, rejected=frozenset({bad.path}), script=False)
    assert point.path
    assert point.step < bad.step
    store.paths.pointer.write_text("s3://bucket/demo/checkpoints\n")
    url = "s3://bucket/demo/checkpoints/step-5/manifest.json"
    assert store.paths.at_home(url) == url


def test_a_checkpoint_that_is_where_it_was_stays_there(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "demo")
    here = str(paths.checkpoint_dir / "demo" / "checkpoints" / "step-5")
    assert paths.at_home(here) == here


def test_a_run_directory_under_another_name(store: RunStore, tmp_path: Path, resume: Resume) -> None:
    os.rename(store.paths.root, tmp_path / "other")
    code, told = resume(name="other")
    assert code == 6
    assert "is called 'other', and the run in it 'demo'" in told
    assert f"mv {tmp_path / 'other'} {store.paths.root}" in told


def test_a_copy_of_a_run_under_another_name_is_not_moved_into_it(
    store: RunStore, tmp_path: Path, resume: Resume
) -> None:
    shutil.copytree(store.paths.root, store.paths.root.with_name("backup"))
    code, told = resume(name="backup", folder=store.paths.root.parent)
    assert code == 6
    assert f"phalanx resume demo --dir {store.paths.root.parent}" in told
    assert "mv " not in told


def test_a_run_that_is_moved_while_it_runs(store: RunStore, tmp_path: Path, resume: Resume) -> None:
    ControllerLock.acquire(store.paths)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(store.paths.root, moved / "demo")
    code, told = resume(folder=moved)
    assert code == 6
    assert "live controller" in told


def test_a_run_that_runs(store: RunStore, resume: Resume) -> None:
    ControllerLock.acquire(store.paths)
    for words in ((), ("train.lr=0.5",)):
        code, told = resume(*words)
        assert code == 6
        assert "live controller" in told


def test_a_clock_that_is_behind(store: RunStore, resume: Resume) -> None:
    """An event from the future: ages, and the seconds of the ledger, would be nonsense."""
    put(store, time.time() + 7200 - T0, EventKind.CONTROLLER_STARTED, host="h", pid=1, adopted=False)
    code, told = resume()
    assert code == 6
    assert "the clock here is 7" in told
    assert "set the clock" in told


def test_a_checkpoint_from_a_node_whose_clock_is_ahead(store: RunStore) -> None:
    """It dates what it commits; the log has another clock, and only that one counts."""
    save(store, 15, time=time.time() + 7200)
    assert resume_checks.check(store, store.run(), store.request()) == []


def test_a_log_from_the_future(store: RunStore, resume: Resume) -> None:
    put(store, time.time() + 3600 - T0, EventKind.RUN_FAILED, attempt=1, reason="later")
    code, told = resume()
    assert code == 6
    assert "the clock here is 3" in told


@pytest.mark.parametrize("kind", ["script", "evaluate", "generate"])
def test_a_clock_that_is_behind_is_refused_whatever_the_job_is(kind: Any, store: RunStore) -> None:
    request = store.request()
    request = dataclasses.replace(request, job=dataclasses.replace(request.job, kind=kind))
    last = max(event.time for event in store.events())
    assert resume_checks.check(store, store.run(), request, clock=lambda: last - 200.0) == []
    with pytest.raises(ResumeRefused, match="the clock here is 400 s behind") as refused:
        resume_checks.check(store, store.run(), request, clock=lambda: last - 400.0)
    way_on = f"phalanx resume demo --dir {store.paths.root.parent} --clock-was-ahead"
    assert (
        refused.value.hint == f"First set the clock, or phalanx submit a new run. If the clock here is right: {way_on}"
    )
    assert "checkpoints" not in refused.value.what, "it has none, or nothing is wrong with them"


def test_clocks_that_differ_a_little_or_are_ahead_do_no_harm(store: RunStore) -> None:
    now = max(event.time for event in store.events())
    run, request = store.run(), store.request()
    assert resume_checks.check(store, run, request, clock=lambda: now - 200.0) == []
    assert resume_checks.check(store, run, request, clock=lambda: now + 86_400.0) == []


def test_a_lock_from_the_future_is_judged_by_its_process(store: RunStore, tmp_path: Path) -> None:
    """Locks hold no times at all: who is alive is looked up or watched, on any clock."""
    lock = ControllerLock.acquire(store.paths)
    record = store.paths.controllers / f"{lock.epoch}.json"
    future = time.time() + 1e7
    os.utime(record, (future, future))
    document = json.loads(record.read_text())
    record.write_text(json.dumps(document | {"pid": 2**22 + 1}))
    assert ControllerLock.acquire(store.paths).epoch == lock.epoch + 1


def text_of(folder: Path, name: str, lines: int, word: str = "value") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(f"{word} {line} of {line * line % 97}" for line in range(lines)))
    return path


@pytest.fixture
def with_text(tmp_path: Path) -> RunStore:
    """A failed run with text that is prepared, as submit prepares it."""
    text = text_of(tmp_path, "text/corpus.txt", 400)
    words = [*WORDS, "data=text", f"data.path={text}", f"data.cache={tmp_path / 'cache'}", "model.vocab=300"]
    store = make_run(tmp_path, words=words)
    request = store.request()
    data = prepare(request.job.data, tmp_path / "cache", 300)
    store.paths.request.write_bytes(dump(dataclasses.replace(request, job=dataclasses.replace(request.job, data=data))))
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    put(store, 30.0, EventKind.RUN_FAILED, attempt=1, reason="all restarts are used")
    return RunStore.open(store.paths.root)


@pytest.mark.parametrize(("lines", "word"), [(300, "value"), (400, "Value")], ids=["shorter", "as long"])
def test_other_text_is_refused_before_it_is_made_into_tokens(
    lines: int, word: str, with_text: RunStore, tmp_path: Path, resume: Resume
) -> None:
    other = text_of(tmp_path, "other/text.txt", lines, word)
    code, told = resume(f"data.path={other}")
    assert code == 6
    assert "other text would be other samples under the same numbers" in told


def test_other_kinds_of_data_are_refused_before_they_are_made(
    with_text: RunStore, tmp_path: Path, resume: Resume
) -> None:
    text = tmp_path / "text" / "corpus.txt"
    for words in (
        ("data.validation=0.1",),
        ("data=stdlib", "data.path=null"),
        ("data=mixture", f"data.sources=[{{path: {text}, weight: 1}}]"),
    ):
        code, told = resume(*words)
        assert code == 6, words
        assert "other text would be other samples under the same numbers" in told


def test_the_same_text_may_lie_elsewhere_and_is_not_prepared_again(with_text: RunStore, tmp_path: Path) -> None:
    """In a folder of another name, or under a name of its own: only the bytes of the text count."""
    for name in ("moved/corpus.txt", "moved/renamed.txt"):
        moved = text_of(tmp_path, name, 400)
        before = contents(tmp_path)
        planned = resume_plan.prepare(with_text, [f"data.path={moved}"], lambda line: None)
        assert contents(tmp_path) == before
        assert [(change.field, change.verdict) for change in planned.changes] == [("data.path", "safe")]
        assert planned.request.job.data.store == with_text.request().job.data.store


def test_everything_wrong_at_once(store: RunStore, resume: Resume) -> None:
    save(store, 15, extra={"data": {"digest": "abc", "vocab": 128}, "seed": 99})
    put(store, time.time() + 7200 - T0, EventKind.RUN_FAILED, attempt=1, reason="later")
    code, told = resume()
    assert code == 6
    assert "seed: 99" in told
    assert "the clock here" in told
    assert read_manifest(newest(store)).extra["seed"] == 99
