"""Tokenizing beside the bare tokenizers library on all processors, and what a step waits for its samples.

The library tokenizes the same documents, which are in memory already, in one call with all its threads: no file is read
and nothing is written. Ours reads JSON lines, tokenizes, digests and writes shards, all of it durable. Runs alternate.

``python -m pytest tests/benchmarks/test_data.py -m full -s``; PHALANX_BENCH_QUICK=1 for one repeat.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.data import prepare_mixture
from jobs.data.ahead import ReadAhead
from jobs.data.work import Processes
from jobs.spec import DataSpec, SourceSpec
from launcher.ledger import account
from tests.benchmarks.stats import Musts, repeats, show
from tests.support import cli

RAW = """
import json, sys, time
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[2])]
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.encode_batch_fast(texts[:50])
began = time.perf_counter()
tokens = 0
for start in range(0, len(texts), 1000):
    tokens += sum(len(one.ids) for one in tokenizer.encode_batch_fast(texts[start : start + 1000]))
print(tokens, time.perf_counter() - began)
"""


def corpus(folder: Path, megabytes: int) -> Path:
    """Documents of about 4 kB."""
    path, size = folder / "text.jsonl", 0
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            text = source.read_text(encoding="utf-8", errors="replace")
            for start in range(0, len(text), 4000):
                size += file.write(json.dumps({"text": text[start : start + 4000]}) + "\n")
            if size > megabytes << 20:
                break
    return path


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_tokenizing(tmp_path: Path, musts: Musts) -> None:
    path = corpus(tmp_path, 24)
    source = SourceSpec(path=str(path), weight=1)
    first = prepare_mixture(DataSpec(kind="mixture", sources=(source,)), tmp_path / "first", 2048, seq=64, samples=10)
    tokenizer = Path(first.store, "tokenizer.json")
    rates: dict[str, list[float]] = {"phalanx": [], "phalanx, looking first included": [], "tokenizers": []}
    for number in range(repeats(5)):
        stamps: dict[str, float] = {}
        mark = _marks(stamps)
        data = DataSpec(kind="mixture", sources=(source,), tokenizer=str(tokenizer))
        began = time.perf_counter()
        made = prepare_mixture(data, tmp_path / f"{number}", 2048, mark, seq=64, samples=10, runner=Processes())
        ended = time.perf_counter()
        told = subprocess.run(
            [sys.executable, "-c", RAW, str(tokenizer), str(path)], capture_output=True, text=True, check=True
        )
        tokens, seconds = told.stdout.split()
        assert made.sources[0].tokens - made.sources[0].documents == int(tokens)
        rates["phalanx"].append(int(tokens) / (ended - stamps["tokenizing"]) / 1e6)
        rates["phalanx, looking first included"].append(int(tokens) / (ended - began) / 1e6)
        rates["tokenizers"].append(int(tokens) / float(seconds) / 1e6)
    show("tokenizing on all processors", rates, unit="M tokens/s")
    for name in ("phalanx", "phalanx, looking first included"):
        value = statistics.median(rates[name]) / statistics.median(rates["tokenizers"])
        musts.hold(f"{name} / tokenizers", value, ">=", 0.8)


def _marks(stamps: dict[str, float]) -> Callable[[str, float], None]:
    def mark(phase: str, part: float) -> None:
        stamps.setdefault(phase, time.perf_counter())

    return mark


@pytest.mark.full
@pytest.mark.timeout(600)
def test_reading_samples(tmp_path: Path, musts: Musts) -> None:
    """How long ranks wait for their samples, of all the time of steps: from every step's line, and from the ledger.

    A loader that is late in a few steps only counts in both; the median of steps, which hides it, is shown beside them.
    """
    path = corpus(tmp_path, 4)
    sources = f"data.sources=[{{path: {path}, weight: 3}}, {{path: {path}, name: again, weight: 1}}]"
    shares: dict[str, list[float]] = {}
    sums: dict[str, float] = {}
    for packing in ("false", "true"):
        run = (f"run.dir={tmp_path / 'runs'}", f"run.name=packing-{packing}", "data=mixture", sources)
        size = ("model.vocab=2048", "train.steps=30", "train.global_batch=8", "checkpoint.every=0", "tracking=none")
        done = cli.phalanx("submit", *cli.PROCESSES, *cli.TP2_PP2, *run, *size, f"data.packing={packing}", cwd=tmp_path)
        assert done.code == 0, done.err
        store = cli.store(tmp_path, f"packing-{packing}")
        lines, books = list(store.metrics())[5:], account(store.events(), store.metrics(), time.time())
        assert books.steps == 30
        shares[f"packing={packing}"] = [100 * line["data_s"] / line["seconds"] for line in lines]
        sums[f"packing={packing}: waiting / all steps but the first five"] = (
            100 * sum(line["data_s"] for line in lines) / sum(line["seconds"] for line in lines)
        )
        sums[f"packing={packing}: the ledger's share"] = 100 * books.data_share
    show("waiting for samples, of the time of a step", shares, unit="%")
    for name, found in sums.items():
        musts.hold(f"{name}, in %", found, "<", 1)


@pytest.mark.full
@pytest.mark.timeout(120)
@pytest.mark.parametrize("takes", [0.3, 0.8, 1.5])
def test_a_slow_store(takes: float, musts: Musts) -> None:
    """A store whose samples of a step take so many times a step: a step waits for what exceeds it."""
    step_s, count, steps = 0.2, 16, 12
    reads, waits, lasted = [], list[float](), list[float]()

    def read(step: int, breathe: Callable[[], None]) -> int:
        seconds = 0.0
        for _ in range(count):
            began = time.perf_counter()
            time.sleep(takes * step_s / count)
            seconds += time.perf_counter() - began  # on a busy machine longer than asked for
            breathe()
        reads.append(seconds)
        return step

    ahead = ReadAhead(read, 1, steps)
    for step in range(1, steps + 1):
        began = time.perf_counter()
        ahead.take(step)
        taken = time.perf_counter()
        time.sleep(step_s)
        waits.append(taken - began)
        lasted.append(time.perf_counter() - taken)
    ahead.close()
    pairs = zip(waits[1:], reads[1:], lasted, strict=False)
    beyond = [100 * (wait - max(0.0, read - before)) / before for wait, read, before in pairs]
    show(f"reading takes {takes} steps; waited beyond what exceeds a step", {"phalanx": beyond}, unit="%")
    musts.hold("waited beyond what exceeds a step / step, in %", statistics.median(beyond), "<", 5)
