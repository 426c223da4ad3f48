"""Comparing whole texts with files under ``tests/golden``; ``PHALANX_UPDATE_GOLDEN=1`` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "golden"


def assert_golden(name: str, text: str) -> None:
    """Assert that ``text`` is, to the letter, what ``tests/golden/<name>`` says."""
    path = FOLDER / name
    if os.environ.get("PHALANX_UPDATE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text.rstrip("\n") + "\n")
    assert text.rstrip("\n") + "\n" == path.read_text()
