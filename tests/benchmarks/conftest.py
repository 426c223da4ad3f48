"""Every benchmark fails for the figures that it missed, once all of it was measured and printed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.planned import Planned, gpt4
from tests.benchmarks.stats import Musts


@pytest.fixture(autouse=True)
def musts() -> Iterator[Musts]:
    found = Musts()
    yield found
    verdict = found.verdict()
    if verdict:
        pytest.fail(verdict, pytrace=False)


@pytest.fixture(scope="session")
def planned() -> Planned:
    return gpt4()
