"""The test harness itself: results by rank, failures with their output, timeouts, no process left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.gang import GangFailed, WarmPool


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def test_results_come_by_rank(pool: WarmPool) -> None:
    answers = pool.run("tests.support.gang_bodies:echo", world_size=3, arguments={"word": "ho"})
    assert [answer["rank"] for answer in answers] == [0, 1, 2]
    assert {answer["word"] for answer in answers} == {"ho"}
    assert len({answer["port"] for answer in answers}) == 1
    assert len({answer["pid"] for answer in answers}) == 3


def test_a_failure_names_the_rank_and_shows_its_output(pool: WarmPool) -> None:
    with pytest.raises(GangFailed) as caught:
        pool.run("tests.support.gang_bodies:fail", world_size=3, arguments={"rank": 1})
    assert "rank 1 ended with 1" in str(caught.value)
    assert "[rank 1] about to fail" in str(caught.value)
    assert "[rank 1] RuntimeError: on purpose" in str(caught.value)


def test_a_gang_that_hangs_is_killed(pool: WarmPool) -> None:
    with pytest.raises(GangFailed, match="timed out"):
        pool.run("tests.support.gang_bodies:hang", world_size=2, timeout_s=1.0)
    assert len(pool.run("tests.support.gang_bodies:echo", world_size=1, arguments={"word": ""})) == 1


def test_ranks_meet_in_a_process_group(pool: WarmPool) -> None:
    assert pool.run("tests.support.gang_bodies:total", world_size=4) == [6.0] * 4


def test_closing_leaves_no_process(pool: WarmPool) -> None:
    with WarmPool() as other:
        pid = other.run("tests.support.gang_bodies:echo", world_size=1, arguments={"word": ""})[0]["parent"]
        assert os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"/proc/{pid}")
