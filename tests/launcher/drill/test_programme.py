"""Which faults a drill takes, and what it says of a run that was right but did not end well."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import compose
from launcher.drill import programme
from launcher.drill.catalogue import CATALOGUE
from launcher.drill.changes import with_changes
from launcher.drill.needs import Need
from launcher.drill.programme import choose
from launcher.drill.rehearsal import Ended
from launcher.drill.toy import Toy, shrink
from launcher.store import RunStore
from strategies.errors import ConfigError


@pytest.fixture(scope="module")
def toy() -> Toy:
    return shrink(compose(["cluster=process", "cluster.nodes=2", "strategy.tp=2", "strategy.pp=2"]))


def names(words: str, toy: Toy, **draw: int) -> list[str]:
    return [one.case.name for one in choose(words, toy, **{"seed": 0, "count": 5, **draw})]


def test_all_is_the_catalogue_and_names_are_taken_in_their_order(toy: Toy) -> None:
    assert names("all", toy) == [case.name for case in CATALOGUE]
    assert names("node_kill, rank_sigkill", toy) == ["node_kill", "rank_sigkill"]


def test_an_unknown_name_gets_the_nearest(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'node_kill'"):
        names("nodekill", toy)


def test_what_cannot_be_rehearsed_here_is_not_drawn(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(names("random", toy, seed=7, count=20)) == 20
    drawn = set(names("random", toy, count=400))
    monkeypatch.setattr(programme, "missing", lambda needs, plan: "root" if Need.TWO_NODES in needs else "")
    fewer = set(names("random", toy, count=400))
    assert drawn - fewer == {case.name for case in CATALOGUE if case.drawn and Need.TWO_NODES in case.needs}


def test_how_the_last_controller_ended_counts(tmp_path: Path) -> None:
    store, (case, *_) = RunStore(tmp_path), CATALOGUE
    assert programme._problem(case, Ended(store=store, exits=(0,))) == ""
    assert "ended with -6 instead of 0" in programme._problem(case, Ended(store=store, exits=(-9, -6)))
    left = programme._problem(case, Ended(store=store, exits=(0,), left=("7 python",)))
    assert left == "processes of the run were left: 7 python"
    assert programme._problem(case, Ended(store=store, exits=(), problem="too long")) == "too long"


def test_changes_go_into_their_group(toy: Toy) -> None:
    changed = with_changes(toy.config, {"cluster.spares": 2, "train.steps": 80})
    assert (changed.cluster.spares, changed.train.steps) == (2, 80)
    assert changed.model == toy.config.model
