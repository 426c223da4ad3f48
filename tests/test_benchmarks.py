"""Benchmarks that miss a figure fail, after all of them was measured; and what they are made of does as it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from tests.benchmarks.contenders import Contender, Running
from tests.benchmarks.stats import QUICK, Musts
from tests.benchmarks.turns import Turns, take_turns

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"

BENCHMARK = """
from tests.benchmarks.conftest import musts
from tests.benchmarks.stats import Musts


def test_slow(musts: Musts) -> None:
    musts.ratio([3.0, 2.0, 9.0], [2.0], what="ours / theirs", must=1.3)
    musts.hold("share", 0.5, "<", 0.6, ".1%")
    print("the last line")


def test_fast(musts: Musts) -> None:
    musts.ratio([1.0], [2.0], what="ours / theirs", must=1.3)
"""


@pytest.mark.parametrize(
    ("sign", "reached", "missed"), [("<=", 2.0, 2.1), ("<", 1.9, 2.0), (">=", 2.0, 1.9), (">", 2.1, 2.0)]
)
def test_a_figure_beside_its_bound(
    sign: str, reached: float, missed: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(QUICK, raising=False)
    musts = Musts()
    assert musts.hold("good", reached, sign, 2.0) == reached
    assert musts.verdict() == ""
    musts.hold("bad", missed, sign, 2.0)
    musts.hold("none", float("nan"), sign, 2.0)
    assert musts.verdict() == f"missed: 2\n  bad: {missed:.3f} (must: {sign} 2.000)\n  none: nan (must: {sign} 2.000)"
    assert [line.rsplit(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["met", "MISSED", "MISSED"]


@pytest.mark.parametrize("quick", [False, True])
def test_a_benchmark_fails_for_what_it_missed(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUICK, raising=False)
    if quick:
        monkeypatch.setenv(QUICK, "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "test_one.py").write_text(BENCHMARK)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", "-rA", str(tmp_path / "test_one.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ours / theirs: 1.500 (must: <= 1.300) MISSED" in done.stdout
    assert "share: 50.0% (must: < 60.0%) met\nthe last line" in done.stdout, "everything is measured first"
    assert done.returncode == (0 if quick else 1), done.stdout
    failed = re.findall(r"^(?:ERROR|FAILED) \S+::(\w+) - (.*)$", done.stdout, re.MULTILINE)
    assert failed == ([] if quick else [("test_slow", "Failed: missed: 1")]), done.stdout


def test_every_must_of_the_benchmarks_is_one_that_fails() -> None:
    for path in BENCHMARKS.glob("test_*.py"):
        said = re.findall(r".*(?:\bmust:|MISSED|\bwanted\b).*", path.read_text())
        assert not said, f"{path.name} says what must be, and nothing fails for it: {said}"


STEPPING = """
import json, os, sys, time
if os.fork():
    os.wait()
for step in range(1, 10**6):
    time.sleep(0.02)
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"step": step, "attempt": 1, "time": time.time()}) + chr(10))
"""


def stepping(name: str, folder: Path) -> Running:
    """Takes steps in a child process."""
    command = [sys.executable, "-c", STEPPING, str(RunPaths(folder / name).metrics)]
    contender = Contender(name=name, command=lambda _: command, environment={})
    return Running(contender, folder / name, {})


def test_two_by_turns(tmp_path: Path) -> None:
    runs = [stepping(name, tmp_path) for name in "ab"]
    try:
        for run in runs:
            run.wait_for_step(3)
        turns = [Turns(run) for run in runs]
        for one in turns:
            one.stop()
        first, second = turns
        for _ in range(3):
            before = first.step, second.step
            first.go()
            runs[0].wait_for_step(before[0] + 5)
            first.stop()
            assert first.step >= before[0] + 5
            assert second.step == before[1], "one was stopped, and its child, too"
            second.go()
            runs[1].wait_for_step(before[1] + 5)
            second.stop()
        assert len(first.spans) == len(second.spans) == 3
        before = first.step, second.step
        assert all(len(one.spans) >= 2 for one in take_turns(runs, 20, own_s=0.1))
        assert first.step >= before[0] + 20
        assert second.step >= before[1] + 20
        for run in runs:
            run.wait_for_step(run.lines(1)[-1]["step"] + 3)  # in the end all go on
    finally:
        for run in runs:
            run.close()


def test_a_rate_counts_ones_own_turns_only(tmp_path: Path) -> None:
    run = Running(Contender(name="a", command=lambda _: ["true"], environment={}), tmp_path / "a", {})
    run.close()
    ended = [(99.5, 1), (100.5, 2), (101.5, 3), (111.0, 4), (112.0, 5), (121.0, 6), (122.01, 7)]
    run.paths.metrics.write_text("".join(json.dumps({"attempt": 1, "time": t, "step": s}) + "\n" for t, s in ended))
    turns = Turns(run)
    turns.spans = [(100.0, 102.0), (110.0, 112.0), (120.0, 122.0)]
    assert turns.rate() == pytest.approx(4 / 4.5), "steps 2 to 6: 1.5 s, 2 s and 1 s"
