"""Tokenizing on a Ray cluster is killed: the client, and a worker. What was made is kept, and nothing else changes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from jobs.data import prepare_mixture, sources
from jobs.data.shards import META
from jobs.data.work import Answer, Processes, Request
from jobs.spec import DataSpec, SourceSpec
from launcher.host import process
from launcher.ray_map import OnRay
from tests.support import cli, netns

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not netns.available(), reason="needs root and ip netns"),
]
TOKEN = "ef" * 32
VOCAB, SEQ, SAMPLES, UNITS = 300, 16, 24, 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[netns.RayCluster]:
    with netns.network(3) as net:
        made = netns.RayCluster(net, token=TOKEN)
        try:
            made.start(nodes=2)
            yield made
        finally:
            made.close()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def text(path: Path, size: int) -> DataSpec:
    """A source of about so many bytes."""
    with path.open("w") as file:
        number = 0
        while file.tell() < size:
            file.write(json.dumps({"text": f"{number} words of {number * number} kinds " * 40}) + "\n")
            number += 1
    return DataSpec(kind="mixture", validation=0.1, sources=(SourceSpec(path=str(path), weight=1),))


def shards(cache: Path) -> dict[Path, tuple[int, int]]:
    """Shards that are whole, with the identity of their tokens' file."""
    tokens = [path.with_name(f"{path.stem}.train.bin") for path in cache.glob("[!.]*/**/[0-9]*.json")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tokens}


def contents(store: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(store).iterdir() if path.is_file() and path.name != META}


def test_a_client_that_is_killed_leaves_what_was_made_to_the_next(cluster: netns.RayCluster, tmp_path: Path) -> None:
    data = text(tmp_path / "text.jsonl", UNITS * sources.UNIT_BYTES)
    cache = tmp_path / "cache"
    source = "data.sources=[{path: " + str(tmp_path / "text.jsonl") + ", weight: 1}]"
    words = ["submit", *cli.TINY, "cluster=existing", f"cluster.address={cluster.address}"]
    words += ["data=mixture", source, "data.validation=0.1", f"data.cache={cache}", f"run.dir={tmp_path / 'runs'}"]
    client = cli.start(*words, cwd=tmp_path)
    try:
        patience = time.monotonic() + 240
        while len(shards(cache)) < 2:
            assert client.poll() is None, client.communicate()
            assert time.monotonic() < patience
            time.sleep(0.02)
    finally:
        os.killpg(client.pid, signal.SIGKILL)
        client.communicate()
    kept = shards(cache)
    assert 2 <= len(kept) < UNITS, "it was killed in the middle"
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/manifest*"))
    made = prepare_mixture(data, cache, VOCAB, seq=SEQ, samples=SAMPLES, runner=OnRay(cluster.address, cache))
    after = shards(cache)
    assert {path: after[path] for path in kept} == kept, "what was whole is not made anew"
    assert len(after) >= UNITS
    assert {path.parent for path in kept} == {Path(made.sources[0].store)}
    here = prepare_mixture(data, tmp_path / "here", VOCAB, seq=SEQ, samples=SAMPLES, runner=Processes(1))
    assert made.digest == here.digest
    assert contents(made.sources[0].store) == contents(here.sources[0].store)


class Killing(OnRay):
    """Kills the worker that gave the first answer of a kind, in the middle of its next task."""

    killed = 0

    def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer]]:
        for index, answer in super().__call__(requests):
            if requests[index]["verb"] == "tokenize" and not self.killed and len(requests) > 4:
                self.killed = answer["worker"]
                os.kill(self.killed, signal.SIGKILL)
                assert process.wait_until(lambda: not process.is_running(self.killed), 10)
            yield index, answer


def test_a_worker_that_is_killed_costs_its_task_only(
    cluster: netns.RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 400_000)
    data = text(tmp_path / "text.jsonl", UNITS * 400_000)
    killing = Killing(cluster.address, tmp_path / "there")
    made = prepare_mixture(data, tmp_path / "there", VOCAB, seq=SEQ, samples=SAMPLES, runner=killing)
    assert killing.killed
    here = prepare_mixture(data, tmp_path / "here", VOCAB, seq=SEQ, samples=SAMPLES, runner=Processes(1))
    assert made.digest == here.digest
    assert contents(made.sources[0].store) == contents(here.sources[0].store)
