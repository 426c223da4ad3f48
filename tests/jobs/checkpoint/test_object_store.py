"""Checkpoints in an object store: a real S3-compatible server, its conditional PUT, and what goes wrong with it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.checkpoint import (
    CheckpointConflict,
    damaged,
    fence,
    list_checkpoints,
    manifest,
    newest,
    prune,
    read_manifest,
    storage,
    verify,
)
from jobs.checkpoint.claim import claim, require_ours
from jobs.checkpoint.digest import weights_digest
from jobs.checkpoint.errors import CorruptCheckpoint
from jobs.checkpoint.export import export
from jobs.checkpoint.fence import Branch
from jobs.checkpoint.layout import Place, Token, manifests, place_of
from jobs.checkpoint.manifest import commit
from jobs.checkpoint.parts import write_part
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.shardfile import KINDS
from jobs.checkpoint.slices import whole
from jobs.checkpoint.storage import ObjectStorage, storage_of
from jobs.location import Location, Url, locate
from strategies.errors import ConfigError, ResumeRefused, StorageError
from tests.support.checkpoints import manifest_of, values, write_checkpoint, write_model_checkpoint, write_shards
from tests.support.jobspecs import LLAMA
from tests.support.objectstore import BUCKET, ObjectStore, client, object_store

pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("store") / "log") as running:
        yield running


@pytest.fixture
def root(store: ObjectStore, request: pytest.FixtureRequest) -> Url:
    return Url(f"s3://{BUCKET}/{request.node.name}")


def write(root: Url, step: int = 1, token: tuple[int, int] = (1, 1)) -> Location:
    return write_checkpoint(root, step, token)


def flip_bit(where: Location, at: int) -> None:
    data = bytearray(client().cat_file(str(where)))
    data[at] ^= 1
    client().pipe_file(str(where), bytes(data))


def test_what_is_committed_is_listed_newest_first(root: Url) -> None:
    assert list_checkpoints(root) == []
    paths = [write(root, step, token) for step, token in [(20, (1, 1)), (10, (1, 1)), (20, (2, 10))]]
    assert [(one.step, one.token) for one in list_checkpoints(str(root))] == [(20, (2, 10)), (20, (1, 1)), (10, (1, 1))]
    assert newest(root) == paths[2]
    assert newest(root, exclude=[str(paths[2])]) == paths[0]
    assert [verify(path, deep=True) for path in paths] == [[], [], []]


def test_the_second_commit_is_refused(root: Url) -> None:
    path = write(root)
    before = client().cat_file(str(path))
    again = dataclasses.replace(read_manifest(path), time=2.5)
    with pytest.raises(CheckpointConflict, match="committed already"):
        commit(root, again)
    assert client().cat_file(str(path)) == before


def test_of_many_writers_at_once_one_wins(root: Url) -> None:
    """The store decides, not a look before the write."""
    outcomes: list[str] = []

    def attempt(number: int) -> None:
        try:
            ObjectStorage("s3").create(root / "it", [f"writer {number}".encode()])
            outcomes.append("won")
        except FileExistsError:
            outcomes.append("lost")

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


def test_a_large_file_comes_in_parts_and_is_exclusive_too(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_ONE_PUT_BYTES", 1 << 20)
    monkeypatch.setattr(storage, "_PART_BYTES", 5 << 20)
    place = Place(root, 1, Token(1, 1))
    records = write_shards(place, [[whole("w", (1200, 1000)), whole("v", (1000, 1000))]])
    assert storage_of(root).size(place.shard(0)) == records[0].bytes > 20 << 20
    with pytest.raises(FileExistsError):
        storage_of(root).create(place.shard(0), [b"x" * records[0].bytes])
    reader = Reader(commit(root, manifest_of(place, records, {"w": (1200, 1000), "v": (1000, 1000)})))
    expected = values((1200, 1000), "exp_avg")
    assert (reader.read_flat("w", "exp_avg", 999_000, 1_100_000) == expected[999_000:1_100_000]).all()


def test_a_lost_answer_is_no_conflict(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PUT that was carried out but whose answer was lost is tried again, and refused: it was ours."""
    once = ObjectStorage("s3")
    put = once._put

    def put_twice(where: Location, views: list[memoryview], size: int) -> None:
        put(where, views, size)
        put(where, views, size)

    monkeypatch.setattr(once, "_put", put_twice)
    assert once.create(root / "it", [b"ab", b"c"]) == 3
    with pytest.raises(FileExistsError):
        once.create(root / "it", [b"abd"])


def test_a_replaced_gang_may_not_commit_and_deletes_nothing(root: Url) -> None:
    zombie = Place(root, 5, Token(1, 1))
    records = write_shards(zombie, [[whole("w", (30, 10))]])
    kept = write(root, 4, (1, 2))
    with pytest.raises(CheckpointConflict, match="e0001-a0001 may not commit"):
        commit(root, manifest_of(zombie, records, {"w": (30, 10)}))
    assert prune(root, 1, token=(1, 1)) == []
    assert newest(root) == kept


def test_a_gang_that_was_cut_off_commits_nothing_although_its_successor_has_written_nothing(
    root: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = write(root, 90)
    zombie, new = Place(root, 100, Token(1, 1)), Token(2, 2)
    records = write_shards(zombie, [[whole("w", (30, 10))]])
    late = manifest_of(zombie, records, {"w": (30, 10)})
    for _ in range(2):  # the second time it is ours already
        fence.raise_fence(root, new, owner="b")
    with pytest.raises(CheckpointConflict, match="cannot begin"):
        fence.raise_fence(root, new, owner="another")
    with pytest.raises(CheckpointConflict, match="may not commit"):
        commit(root, late)
    fence.begin(root, Branch(epoch=2, attempt=2, history=((90, 1, 1),)))
    with pytest.raises(CheckpointConflict, match="may not commit"):
        commit(root, late)
    assert [place.step for place in manifests(root)] == [90]
    assert prune(root, 1, token=(1, 1)) == []
    with monkeypatch.context() as patch:  # it had looked before, and the store has taken its time
        patch.setattr(manifest, "refuse_if_fenced", lambda place: None)
        commit(root, late)
    assert sorted(place.step for place in manifests(root)) == [90, 100]
    assert newest(root) == best
    write(root, 96, new)
    assert [one.step for one in list_checkpoints(root)] == [96, 90]
    prune(root, 2, token=new)
    assert sorted(place.step for place in manifests(root)) == [90, 96]


def test_retention(root: Url) -> None:
    paths = [write(root, step) for step in range(1, 5)]
    dead = Place(root, 2, Token(0, 9))
    write_shards(dead, [[whole("w", (30, 10))]])
    removed = prune(root, 2, token=(1, 1))
    assert sorted(map(str, removed)) == sorted(map(str, [*paths[:2], dead.shard_dir]))
    assert [one.step for one in list_checkpoints(root)] == [4, 3]
    assert sorted(storage_of(root).names(root)) == ["step-00000003", "step-00000004"]


def test_damage_is_found(root: Url) -> None:
    good, bad, torn = (write(root, step) for step in (1, 2, 3))
    flip_bit(place_of(bad).shard(1), -3)
    client().pipe_file(str(torn), client().cat_file(str(torn))[:-30])
    assert verify(bad) == []
    assert "does not match its digest" in verify(bad, deep=True)[0]
    assert [path for path, _ in damaged(root)] == [torn]
    with pytest.raises(CorruptCheckpoint):
        Reader(bad, 1).read_flat("w", "exp_avg_sq", 0, 300)
    client().rm_file(str(place_of(good).shard(0)))
    assert verify(good) == [f"{place_of(good).shard(0)} is missing"]
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        Reader(good).read_flat("w", "master", 0, 300)


def test_digest_and_export_read_it(root: Url, tmp_path: Path) -> None:
    there = write_model_checkpoint(root, LLAMA)
    here = write_model_checkpoint(tmp_path / "checkpoints", LLAMA)
    assert weights_digest(there) == weights_digest(here)
    export(there, tmp_path / "there")
    export(here, tmp_path / "here")
    files = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert [(tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes() for name in files] == [
        True
    ] * len(files)


def test_a_place_is_one_runs(root: Url) -> None:
    claim(root, run="one", owner="a")
    claim(root, run="one", owner="a")
    with pytest.raises(ConfigError, match="another run"):
        claim(root, run="one", owner="b")
    require_ours(root, run="one", owner="a")
    with pytest.raises(ResumeRefused, match="another run"):
        require_ours(root, run="one", owner="b")
    with pytest.raises(StorageError, match="gone"):
        require_ours(root / "elsewhere", run="one", owner="a")


def test_a_store_that_lets_a_second_writer_overwrite_is_refused(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that ignores If-None-Match would."""

    def put(self: ObjectStorage, where: Location, views: list[memoryview], size: int) -> None:
        self._fs.pipe_file(str(where), b"".join(views))

    monkeypatch.setattr(ObjectStorage, "_put", put)
    with pytest.raises(StorageError, match="cannot be kept") as raised:
        claim(root, run="one", owner="a")
    assert "second writer" in raised.value.why


# ---- what goes wrong --------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist(store: ObjectStore) -> None:
    root = Url("s3://no-such-bucket/x")
    for act in (lambda: list_checkpoints(root), lambda: claim(root, run="one", owner="a")):
        with pytest.raises(StorageError) as raised:
            act()
        assert "there is no such bucket" in raised.value.why
        assert "checkpoint.url" in raised.value.hint


def test_a_store_that_is_not_there(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    client()  # forgets
    try:
        with pytest.raises(StorageError, match="list the checkpoints") as raised:
            list_checkpoints(root)
    finally:
        client()
    assert "127.0.0.1:9" in raised.value.why


def test_credentials_that_are_missing(root: Url, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    client()
    try:
        with pytest.raises(StorageError, match="keep checkpoints") as raised:
            claim(root, run="one", owner="a")
    finally:
        client()
    assert "credentials" in raised.value.why
    assert "environment" in raised.value.hint


def test_a_store_that_says_nothing(store: ObjectStore, root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call ends, and says so."""
    path = write(root)
    pieces = [(whole("w", (4,)), {kind: memoryview(bytes(16)) for kind in KINDS})]
    acts: list[Callable[[], object]] = [
        lambda: list_checkpoints(root),
        lambda: read_manifest(path),
        lambda: write_part(Place(root, 2, Token(1, 1)), 0, pieces, {}, 2),
    ]
    with store.stuck(), monkeypatch.context() as patch:
        patch.setattr(storage, "_ANSWER_S", 0.5)
        patch.setattr(ObjectStorage, "delete", lambda *_: pytest.fail("who has not answered is not asked again"))
        for act in acts:
            with pytest.raises(StorageError) as raised:
                act()
            assert "imeout" in raised.value.why
    assert [one.path for one in list_checkpoints(root)] == [path]


def test_a_client_that_gives_no_reason_has_one_all_the_same(root: Url) -> None:
    with pytest.raises(OSError, match="TimeoutError: no answer"), storage._explained(root):
        raise TimeoutError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s4://bucket/x", "s4:// addresses"),
        ("http://host/x", "http:// addresses"),
        ("s3://", "no bucket"),
        ("s3:///x", "no bucket"),
        ("s3://key:hush@bucket/x", "credentials"),
        ("s3://bucket/x?token=hush", "credentials or options"),
    ],
)
def test_addresses_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        locate(text)
    assert "hush" not in str(raised.value)


def test_addresses_and_paths() -> None:
    assert locate("/a/b") == locate("file:///a/b") == Path("/a/b")
    address = locate("s3://bucket/a/")
    assert (str(address), address.name, str(address.parent)) == ("s3://bucket/a", "a", "s3://bucket")
    assert str(address / "b") == "s3://bucket/a/b"
    assert sorted([Url("s3://b/2"), Url("s3://b/1")])[0] == Url("s3://b/1")
    assert Url("s3://b/1/") == Url("s3://b/1") != Path("s3://b/1")


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(StorageError, match="cannot reach s3://") as raised:
        list_checkpoints("s3://bucket/x")
    assert "phalanx[s3]" in raised.value.hint
