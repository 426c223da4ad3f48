"""Links as over NFS: the answer to the first request is lost, and the client asks once more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def lose_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every link is asked for twice."""
    link = os.link

    def asked_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", asked_twice)
