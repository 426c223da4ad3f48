"""Agents for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agents import Agents, agents_in


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    """A run directory in which agents can be started."""
    with agents_in(tmp_path) as started:
        yield started
