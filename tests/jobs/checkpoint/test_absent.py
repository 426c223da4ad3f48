"""A file that a rank does not find proves nothing: its file system may not be mounted there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import worker
from jobs.checkpoint.errors import AbsentFile, CorruptCheckpoint
from jobs.checkpoint.gang import _describe, revive
from jobs.checkpoint.layout import place_of
from jobs.checkpoint.reader import Reader
from launcher.gang_state import GangState
from launcher.observation import Observation
from launcher.recovery import Failure, FailureKind
from strategies.plan import ParallelPlan
from tests.support.checkpoints import flip_bit, write_checkpoint


def read(path: Path) -> None:
    Reader(path).read_flat("w", "master", 0, 300)


def spoil(path: Path) -> None:
    flip_bit(path, 20)


@pytest.mark.parametrize("what", ["manifest", "shard"])
@pytest.mark.parametrize(("befalls", "gone"), [(Path.unlink, True), (spoil, False)])
def test_what_is_gone_and_what_is_damaged(
    tmp_path: Path, what: str, befalls: Callable[[Path], None], gone: bool
) -> None:
    path = write_checkpoint(tmp_path)
    befalls(path if what == "manifest" else place_of(path).shard(1))
    with pytest.raises(CorruptCheckpoint) as raised:
        read(path)
    told = revive(_describe(raised.value) or {}, "rank 1: ")
    for error in (raised.value, told):  # as the rank raises it, and as the others do
        assert isinstance(error, AbsentFile) is gone
        assert worker.damaged(error) is not gone
        assert worker.exit_code(error) == (7 if gone else worker.CORRUPT_EXIT_CODE)
    assert ("mounted on every node" in str(told)) is gone


def test_a_rank_that_finds_nothing_costs_no_checkpoint(tmp_path: Path) -> None:
    """The controller has seen the file just before, so the gang starts again, and then stops with the reason."""
    path = write_checkpoint(tmp_path)
    place_of(path).shard(1).unlink()
    with pytest.raises(AbsentFile) as raised:
        read(path)
    error = {"type": "AbsentFile", "message": str(raised.value), "traceback": "", "step": 0}
    plan = ParallelPlan(tp=1, pp=1, stages=(1,), micro_batch=1, grad_accum=1)
    state = GangState(attempt=1, plan=plan, placement={"a": [0]})
    for kind, data in (("report", {"kind": "error", **error}), ("exit", {"code": 7, "signal": None})):
        fields = {"rank": 0, "attempt": 1, **data}
        found = state.observe(Observation(kind=kind, node="a", time=1.0, data=fields))  # type: ignore[arg-type]
    (failure,) = found
    assert isinstance(failure, Failure)
    assert failure.kind is FailureKind.RANK_ERROR
    assert failure.signature
    assert "shard-00001.safetensors is missing" in failure.detail
