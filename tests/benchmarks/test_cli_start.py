"""How long the reading verbs take from the shell: ``make bench`` prints the numbers; nothing is asserted about time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
@pytest.mark.parametrize("words", [["--help"], ["status"], ["plan"], ["plan", "experiment=quickstart", "--json"]])
def test_start(words: list[str], tmp_path: Path) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-P", "-m", "launcher.cli", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    print(f"\nphalanx {' '.join(words)}: median {statistics.median(seconds):.3f} s of {len(seconds)}")
