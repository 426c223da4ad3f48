"""Every kind of store that has a commit rule: the rule is what is asked for, and who comes second is refused."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import fsspec
import pytest

from jobs.checkpoint import storage
from jobs.checkpoint.claim import RECORD, claim
from jobs.checkpoint.storage import storage_of
from jobs.location import COMMIT_RULES, Url
from strategies.errors import ConfigError, StorageError
from tests.support.buckets import Azure, Bucket, Google, Server
from tests.support.objectstore import BUCKET, object_store

CLIENTS: dict[str, type[Bucket]] = {"gs": Google, "gcs": Google, "az": Azure, "abfs": Azure, "abfss": Azure}
S3 = ("s3", "s3a")


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """What the client of the scheme of the test reaches."""
    running = Server()
    client = CLIENTS[request.node.callspec.params["scheme"]]
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda _: lambda **options: client(running, **options))
    monkeypatch.setattr(storage, "_ONE_PUT_BYTES", 1 << 20)
    monkeypatch.setattr(storage, "_PART_BYTES", 1 << 20)
    return running


def test_every_rule_is_tried_here() -> None:
    assert set(COMMIT_RULES) == {*CLIENTS, *S3}


@pytest.mark.parametrize("size", [3, 5 << 20], ids=["one request", "in parts"])
@pytest.mark.parametrize("scheme", list(CLIENTS))
def test_the_rule_is_what_is_asked_for(scheme: str, size: int, server: Server) -> None:
    where = Url(f"{scheme}://bucket/run/it")
    ours, theirs = b"a" * size, b"b" * size
    assert storage_of(where).create(where, [ours[:2], memoryview(ours)[2:]]) == size
    with pytest.raises(FileExistsError):
        storage_of(where).create(where, [theirs])
    assert storage_of(where).read(where) == ours
    ((name, value),) = CLIENTS[scheme].exclusive.items()
    assert [condition for _, condition in server.asked] == [{name: value}] * 2
    words = COMMIT_RULES[scheme].replace("=", " ").replace(":", "").split()
    assert words == ["PUT", "with", name, value], "the rule says what is asked for"


@pytest.mark.parametrize("scheme", list(CLIENTS))
def test_a_place_is_one_runs(scheme: str, server: Server) -> None:
    root = Url(f"{scheme}://bucket/run")
    claim(root, run="one", owner="a")
    with pytest.raises(ConfigError, match="another run"):
        claim(root, run="one", owner="b")
    assert b'"owner": "a"' in storage_of(root).read(root / RECORD)


@pytest.mark.parametrize("scheme", list(CLIENTS))
def test_a_client_that_knows_no_condition_is_refused(
    scheme: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clients of some years ago, which took ``mode`` for something else and overwrote."""
    monkeypatch.setattr(CLIENTS[scheme], "exclusive", {})
    with pytest.raises(StorageError, match="cannot be kept") as raised:
        claim(Url(f"{scheme}://bucket/run"), run="one", owner="a")
    assert "second writer" in raised.value.why


@pytest.mark.parametrize("scheme", list(CLIENTS))
def test_what_has_failed_halfway_leaves_nothing(scheme: str, server: Server) -> None:
    """A client's file ends its upload when nobody holds it any more, and would name the half of a shard."""
    where = Url(f"{scheme}://bucket/run/it")
    server.broken = True
    with pytest.raises(
        OSError, match="refused a part"
    ) as raised:  # which holds the file, until the server is well again
        storage_of(where).create(where, [b"a" * (5 << 20)])
    server.broken = False
    del raised
    gc.collect()
    assert server.objects == {}
    assert storage_of(where).create(where, [b"b" * (5 << 20)]) == 5 << 20


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("s3fs")
    with object_store(tmp_path_factory.mktemp("store") / "log"):
        yield


@pytest.mark.parametrize("scheme", S3)
def test_s3_by_either_name(scheme: str, s3: None) -> None:
    """Against a real server; more of it in test_object_store."""
    where = Url(f"{scheme}://{BUCKET}/{scheme}/it")
    assert storage_of(where).create(where, [b"ab", b"c"]) == 3
    with pytest.raises(FileExistsError):
        storage_of(where).create(where, [b"abd"])
    assert storage_of(where).read(where) == b"abc"
