"""Benchmarks that miss a figure fail, after all of them was measured; checked on a small one of their own kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.stats import QUICK, Musts

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
