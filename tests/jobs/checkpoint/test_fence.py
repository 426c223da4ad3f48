"""Gangs that were replaced and do not know it: what they may commit, and what of it counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.checkpoint import CheckpointConflict, fence, list_checkpoints, newest, prune
from jobs.checkpoint.fence import Branch, in_order
from jobs.checkpoint.layout import Place, Token, manifests
from jobs.checkpoint.manifest import commit
from jobs.checkpoint.memory import Generation
from jobs.checkpoint.slices import whole
from jobs.checkpoint.storage import PosixStorage
from jobs.location import Location
from strategies.errors import StorageError
from tests.support.checkpoints import manifest_of, write_checkpoint, write_shards
from tests.support.fulldisk import fill, needs_root, small_disk

OLD, NEW = Token(1, 1), Token(2, 2)


def state(step: int, attempt: int, epoch: int = 1) -> Generation:
    return Generation(step, Token(epoch, attempt))


def listed(root: Path) -> list[tuple[int, int]]:
    return [(one.step, one.token.attempt) for one in list_checkpoints(root)]


def ready(root: Path, step: int, token: Token = OLD) -> Callable[[], Path]:
    """All parts of a checkpoint are durable; the commit is what is left to do."""
    place = Place(root, step, token)
    records = write_shards(place, [[whole("w", (30, 10))]])
    return lambda: commit(root, manifest_of(place, records, {"w": (30, 10)}))


def successor(root: Path, *history: tuple[int, int, int], finishing: bool = False) -> None:
    """What the controller does before the next gang is started; it has no rank, and has written nothing."""
    fence.raise_fence(root, NEW, owner="b")
    fence.begin(root, Branch(epoch=2, attempt=2, history=history, finishing=finishing))


# --- the order ----------------------------------------------------------------------------------------------------


def test_without_a_fence_the_youngest_gang_comes_first() -> None:
    states = [state(100, 1), state(90, 1), state(96, 2), state(7, 1, epoch=2)]
    assert in_order(states, None) == [state(7, 1, epoch=2), state(96, 2), state(100, 1), state(90, 1)]


def test_of_older_gangs_that_counts_which_the_branch_contains() -> None:
    branch = Branch(epoch=1, attempt=3, history=((95, 1, 2), (90, 1, 1)))
    later, own = state(99, 4), state(98, 3)
    within = [state(95, 2), state(92, 2), state(90, 1), state(80, 1)]
    without = [state(96, 2), state(91, 1), state(100, 1)]
    assert in_order([*without, *within, own, later], branch) == [later, own, *within]


def test_what_was_passed_over_counts_until_there_is_something_younger() -> None:
    branch = Branch(epoch=1, attempt=2, history=((20, 1, 1),), passed=((30, 1, 1),))
    old = [state(10, 1), state(20, 1), state(30, 1), state(31, 1)]
    assert in_order(old, branch) == [state(30, 1), state(20, 1), state(10, 1)]
    assert in_order([*old, state(25, 2)], branch) == [state(25, 2), state(20, 1), state(10, 1)]


class History:
    """A run of gangs that begin with what can be had, and of zombies that write when they please.

    Each state knows who made each step of it, which is what the order is judged by.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.made: dict[Generation, tuple[Token, ...]] = {}  # all states that any gang has come to
        self.kept: set[Generation] = set()  # of which somebody has a copy, legal or not
        self.begins: dict[Token, tuple[Token, ...]] = {}
        self.branch: Branch | None = None

    def begin(self, token: Token) -> None:
        there = in_order([one for one in self.kept if self.rng.random() < 0.8], self.branch)
        first = there[0] if there else None
        self.begins[token] = path = self.made[first] if first else ()
        history: dict[Token, int] = {maker: at + 1 for at, maker in enumerate(path)}
        rows = tuple((step, *maker) for maker, step in sorted(history.items(), reverse=True))
        self.branch = Branch(epoch=token.epoch, attempt=token.attempt, history=rows)

    def work(self, token: Token) -> None:
        """Of a zombie, too: it trains on from where it began."""
        path = self.begins[token]
        for _ in range(self.rng.randint(0, 6)):
            path = (*path, token)
            self.made[Generation(len(path), token)] = path
        own = [one for one in self.made if one.token == token]
        self.kept |= set(self.rng.sample(own, self.rng.randint(0, len(own))))


@pytest.mark.parametrize("seed", range(200))
def test_what_counts_is_what_the_newest_gang_goes_back_to_whoever_writes_when(seed: int) -> None:
    rng = random.Random(seed)
    run, tokens = History(rng), [Token(1 + attempt // 3, attempt) for attempt in range(1, 8)]
    for number, token in enumerate(tokens):
        run.begin(token)
        for writer in rng.choices(tokens[: number + 1], k=4):
            run.work(writer)
        start = run.begins[token]
        counted = in_order(run.kept, run.branch)
        for one in run.kept:
            path = run.made[one]
            ours = path == start[: len(path)] or (one.token == token and path[: len(start)] == start)
            assert (one in counted) is ours
        assert [len(run.made[one]) for one in counted] == sorted((one.step for one in counted), reverse=True)


# --- commits ------------------------------------------------------------------------------------------------------


def test_a_gang_that_was_cut_off_commits_nothing_although_its_successor_has_written_nothing(tmp_path: Path) -> None:
    best = write_checkpoint(tmp_path, 90)
    late = ready(tmp_path, 100)
    successor(tmp_path, (90, 1, 1))
    with pytest.raises(CheckpointConflict, match="may not commit step 100") as raised:
        late()
    assert "a later gang, e0002-a0002, has begun" in raised.value.why
    assert [place.step for place in manifests(tmp_path)] == [90]
    assert newest(tmp_path) == best


def test_the_fence_alone_is_enough(tmp_path: Path) -> None:
    """The controller is still looking for where the gang begins, and must not miss what comes now."""
    late = ready(tmp_path, 100)
    fence.raise_fence(tmp_path, NEW, owner="b")
    with pytest.raises(CheckpointConflict):
        late()
    assert manifests(tmp_path) == []


@pytest.mark.parametrize("begins", [90, 100])
def test_a_commit_that_slips_in_counts_only_if_the_successor_has_begun_with_it(
    begins: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked for fences, then it is stopped for a while; the manifest is there before it looks again."""
    best = write_checkpoint(tmp_path, 90)
    late, create = ready(tmp_path, 100), PosixStorage.create

    def stopped_before(self: PosixStorage, where: Location, parts: list[bytes]) -> int:
        monkeypatch.undo()
        successor(tmp_path, (begins, 1, 1))
        return create(self, where, parts)

    monkeypatch.setattr(PosixStorage, "create", stopped_before)
    with pytest.raises(CheckpointConflict):
        late()
    assert sorted(place.step for place in manifests(tmp_path)) == [90, 100]
    assert listed(tmp_path) == ([(100, 1), (90, 1)] if begins == 100 else [(90, 1)])
    assert begins == 100 or newest(tmp_path) == best
    write_checkpoint(tmp_path, 96, NEW)
    assert listed(tmp_path)[0] == (96, 2)


@pytest.mark.parametrize(
    ("step", "history", "finishing", "may"),
    [
        (100, ((101, 1, 1),), True, True),  # the gang has died while its persisters live, and memory has a later step
        (100, ((100, 1, 1),), True, True),
        (100, ((101, 1, 1),), False, False),  # one of its nodes has not answered
        (100, ((90, 1, 1),), True, False),
        (100, (), True, False),
        (100, ((101, 1, 3), (100, 1, 1)), True, False),  # it is not the one before
    ],
)
def test_what_is_on_its_way_is_committed_if_the_next_gang_goes_on_from_there_and_nobody_was_cut_off(
    step: int, history: tuple[tuple[int, int, int], ...], finishing: bool, may: bool, tmp_path: Path
) -> None:
    late = ready(tmp_path, step)
    successor(tmp_path, *history, finishing=finishing and bool(history))
    if may:
        assert late() == newest(tmp_path)
    else:
        with pytest.raises(CheckpointConflict):
            late()
        assert newest(tmp_path) is None


def test_a_fence_stops_nobody_who_came_with_it_or_after_it(tmp_path: Path) -> None:
    successor(tmp_path)
    ready(tmp_path, 3, NEW)()
    ready(tmp_path, 5, Token(2, 3))()
    assert listed(tmp_path) == [(5, 3), (3, 2)]


# --- the records --------------------------------------------------------------------------------------------------


def test_of_two_controllers_the_older_cannot_fence_and_one_number_is_used_once(tmp_path: Path) -> None:
    fence.raise_fence(tmp_path, NEW, owner="b")
    fence.raise_fence(tmp_path, NEW, owner="b")
    for token, owner in ((Token(1, 2), "a"), (NEW, "another")):
        with pytest.raises(CheckpointConflict, match="cannot begin"):
            fence.raise_fence(tmp_path, token, owner=owner)
    branch = Branch(epoch=2, attempt=2, history=((9, 1, 1),), passed=((10, 1, 1),))
    fence.begin(tmp_path, branch)
    with pytest.raises(CheckpointConflict):
        fence.begin(tmp_path, Branch(epoch=2, attempt=2))
    assert fence.current(tmp_path) == branch


def test_only_the_newest_records_stay_once_their_gang_has_saved(tmp_path: Path) -> None:
    for attempt in (2, 3, 4):
        fence.raise_fence(tmp_path, Token(1, attempt), owner="a")
        fence.begin(tmp_path, Branch(epoch=1, attempt=attempt))
    write_checkpoint(tmp_path, 5, (1, 4))
    prune(tmp_path, 1, token=(1, 4))
    assert sorted(path.name for path in (tmp_path / "fences").iterdir()) == [
        "ballast",
        "e0001-a0004.branch.json",
        "e0001-a0004.fence.json",
    ]
    fence.raise_fence(tmp_path, Token(2, 5), owner="b")  # whose gang never comes to be
    assert fence.highest(tmp_path) == (2, 5)
    assert fence.current(tmp_path) == Branch(epoch=1, attempt=4)


def test_what_the_log_knows_counts_where_the_record_is_older(tmp_path: Path) -> None:
    known = Branch(epoch=2, attempt=3, history=((9, 1, 1),))
    assert fence.current(tmp_path, known) is None, "nobody was ever fenced here: a run of an earlier version"
    fence.raise_fence(tmp_path, NEW, owner="b")
    assert fence.current(tmp_path, known) == known
    recorded = Branch(epoch=2, attempt=2, history=((7, 1, 1),))
    fence.begin(tmp_path, recorded)
    assert fence.current(tmp_path, known) == known
    assert fence.current(tmp_path, Branch(epoch=2, attempt=2)) == recorded
    assert fence.current(tmp_path, Branch(epoch=1, attempt=1)) == recorded


def test_a_record_that_nobody_can_read_is_not_taken_for_none(tmp_path: Path) -> None:
    successor(tmp_path)
    path = tmp_path / "fences" / f"{NEW}.branch.json"
    path.write_text("{")
    with pytest.raises(StorageError, match="cannot be understood") as raised:
        newest(tmp_path)
    assert "Delete it" in raised.value.hint


def test_checkpoints_of_a_run_without_fences_can_be_read(tmp_path: Path) -> None:
    """Of an earlier version, or of ranks that no controller has started."""
    for step, token in [(10, (1, 1)), (20, (1, 1)), (30, (1, 2))]:
        write_checkpoint(tmp_path, step, token)
    assert listed(tmp_path) == [(30, 2), (20, 1), (10, 1)]


@needs_root
def test_a_full_disk_has_room_for_a_fence(tmp_path: Path) -> None:
    """A gang may begin because the one before could not save; the younger one has what is in memory."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        fence.take_ballast(disk)
        filler = fill(disk)
        with pytest.raises(OSError, match="No space left"):
            (disk / "more").write_bytes(b"x")
        successor(disk, (9, 1, 1))
        assert fence.current(disk) == Branch(epoch=2, attempt=2, history=((9, 1, 1),))
        fill(disk)
        with pytest.raises(StorageError, match="No space left"):
            fence.raise_fence(disk, Token(3, 3), owner="c")
        filler.unlink()
        fence.raise_fence(disk, Token(3, 3), owner="c")
