"""Runs with state on disks through the command line: as in memory, to the bit, with a rank killed on the way."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from jobs.disks import BUILD, is_compiled
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.support import cli
from tests.support.direct_io import require_state_on_disks

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(420),
    pytest.mark.skipif(not is_compiled(), reason=f"DeepSpeed's async_io is not compiled here: {BUILD}"),
]

HIDDEN, FFN = 256, 4096  # DeepSpeed leaves in memory what is less than 1 MiB on a rank
MATRICES = 2 * 2 * HIDDEN * FFN // 2  # elements of a rank that are not
WORDS = (
    *(f"model.hidden={HIDDEN}", f"model.ffn={FFN}", "train.precision=bf16", "cluster.slots_per_node=1"),
    *("strategy.tp=1", "strategy.pp=1", "strategy.dp=2", "strategy.zero_stage=3"),
)
ON_DISK = {"exp_avg-": 4 * MATRICES, "exp_avg_sq-": 4 * MATRICES, "_param": 2 * MATRICES}  # kind: least bytes of a rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload-run")
    require_state_on_disks(path)
    return path


@pytest.fixture(scope="module")
def in_memory(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "memory", *WORDS), cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, "memory")


def bytes_of(disks: Path, kind: str, rank: int) -> int:
    """What a rank has on disks; files may go meanwhile."""
    total = 0
    for root, _, names in os.walk(disks):
        for name in names:
            if kind in name and root.endswith(f"rank{rank}"):
                with contextlib.suppress(FileNotFoundError):
                    total += Path(root, name).stat().st_size
    return total


RESTARTS = [
    pytest.param("optimizer", "rank_kill@rank=1,step=8", [], "memory:7:", id="optimizer-from-memory"),
    pytest.param(
        "optimizer+params",
        "rank_kill@rank=0,step=8",
        ["checkpoint.memory_every=0"],
        "/checkpoints/step-",
        id="params-from-a-checkpoint",
    ),
]


@pytest.mark.parametrize(("offload", "fault", "more", "origin"), RESTARTS)
def test_a_killed_rank_changes_nothing(
    folder: Path, in_memory: RunStore, tmp_path: Path, offload: str, fault: str, more: list[str], origin: str
) -> None:
    """Losses, norms and weights are those of the undisturbed run with all state in memory; no file stays on disks."""
    name = tmp_path.name
    where = (f"strategy.offload={offload}", f"strategy.offload_path={tmp_path}")
    process = cli.start(*cli.tiny(folder, name, *WORDS, *where, f'faults=["{fault}"]', *more), cwd=folder)
    kinds = [kind for kind in ON_DISK if "exp_avg" in kind or "params" in offload]
    for kind in kinds:
        for rank in (0, 1):
            cli.wait_for(lambda: bytes_of(tmp_path, kind, rank) >= ON_DISK[kind], f"{kind} of rank {rank} on disk")  # noqa: B023
    done = cli.end(process)
    assert done.code == 0, done.err
    run = cli.store(folder, name)
    first, second = run.run().attempts
    assert f"rank {fault[15]} on " in str(first.cause)
    assert "was ended by signal 9" in str(first.cause)
    assert origin in second.resume_from
    assert [event.data["record"]["fault"] for event in run.events() if event.kind is EventKind.FAULT_FIRED] == [fault]
    assert run.run().state is RunState.SUCCEEDED
    assert cli.curve(run) == cli.curve(in_memory)
    assert run.run().weights_digest == in_memory.run().weights_digest is not None
    cli.assert_nothing_left(run.paths.root)
    assert list(tmp_path.iterdir()) == []
