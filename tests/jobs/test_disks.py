"""State on disks, as far as it needs neither the op nor DeepSpeed: folders of ranks, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest

from jobs import disks
from jobs.checkpoint.layout import Token
from jobs.spec import JobSpec, RankEnv
from strategies.errors import ConfigError, StorageError
from tests.support.direct_io import require_direct_io
from tests.support.jobspecs import GPT, make_job, make_plan


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    require_direct_io(tmp_path)
    plan = make_plan(GPT, 8, dp=2, zero_stage=3, offload="optimizer+params", offload_path=str(tmp_path))
    return make_job(GPT, plan)


def env_of(*, rank: int = 0, attempt: int = 1, epoch: int = 1) -> RankEnv:
    return RankEnv(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        node_rank=0,
        master_addr="127.0.0.1",
        master_port=1,
        run_id="mine",
        run_dir="",
        epoch=epoch,
        attempt=attempt,
    )


def places(job: JobSpec) -> set[str]:
    zero = job.deepspeed["zero_optimization"]
    return {zero[kind]["nvme_path"] for kind in ("offload_optimizer", "offload_param")}


def test_every_rank_of_every_attempt_has_an_empty_folder_of_its_own(job: JobSpec, tmp_path: Path) -> None:
    other = tmp_path / "phalanx-another" / "e0001-a0001-rank00000"
    other.mkdir(parents=True)
    first = [disks.placed(job, env_of(rank=rank)) for rank in (0, 1)]
    folders = [Path(*places(one)) for one in first]
    assert len(set(folders)) == 2
    for folder in folders:
        (folder / "state.swp").write_bytes(b"of the first attempt")
    again = disks.placed(job, env_of(rank=1, attempt=2))
    assert all(folder.exists() for folder in folders), "only one rank of a node cleans up"
    last = disks.placed(job, env_of(attempt=2))
    assert not any(folder.exists() for folder in folders)
    assert all(Path(*places(one)).is_dir() and not list(Path(*places(one)).iterdir()) for one in (again, last))
    assert places(job) == {str(tmp_path)}, "the job itself is what it was"
    disks.clear(again)
    assert Path(*places(last)).is_dir()
    disks.clear(last)
    assert [path.name for path in tmp_path.iterdir()] == ["phalanx-another"]
    assert other.is_dir()


def test_a_node_that_leaves_a_run_removes_the_folder_of_the_run(job: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    job = dataclasses.replace(job, run_id="mine")
    for rank in (0, 1):
        disks.placed(job, env_of(rank=rank, attempt=2))
    disks.sweep(job, Token(1, 2), [0])
    (left,) = (tmp_path / "phalanx-mine").iterdir()
    assert left.name == "e0001-a0002-rank00001"
    disks.sweep(dataclasses.replace(job, plan=make_plan(GPT, 8)), Token(1, 2), [1])
    assert left.is_dir(), "nothing of that plan is on disks"
    disks.sweep(job, Token(1, 2), [1])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_zombie_of_an_older_attempt_removes_nothing_of_a_newer_one(job: JobSpec) -> None:
    newer = disks.placed(job, env_of(attempt=1, epoch=2))
    older = disks.placed(job, env_of(attempt=7, epoch=1))
    assert Path(*places(newer)).is_dir()
    disks.clear(older)
    assert Path(*places(newer)).is_dir()


def test_a_folder_that_is_not_there_is_named_with_its_node(job: JobSpec, tmp_path: Path) -> None:
    away = dataclasses.replace(job, plan=dataclasses.replace(job.plan, offload_path=str(tmp_path / "disk7")))
    with pytest.raises(StorageError, match=r"disk7 on .*strategy\.offload_path") as caught:
        disks.placed(away, env_of())
    assert "No such file or directory" in str(caught.value)
    assert not (tmp_path / "disk7").exists(), "a disk that is not mounted is not replaced by a folder"


def test_without_the_op_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(disks, "comes_with_deepspeed", lambda: False)
    assert not disks.is_compiled()
    with pytest.raises(ConfigError, match="async_io") as caught:
        disks.require_op()
    assert "python -m jobs.engine" in str(caught.value)
    assert "libaio-dev" in str(caught.value)
    disks.op_folder().mkdir()
    assert not disks.is_compiled(), "a build that was killed is none"
    disks.seal(disks.op_folder()).touch()
    disks.require_op()


def test_buffers_are_as_large_as_they_must_be(job: JobSpec) -> None:
    zero = json.loads(json.dumps(job.deepspeed["zero_optimization"]))
    assert disks.fit_buffers({"zero_optimization": zero}, [300, 1000, 700], 2) == 4 * 4 * 2000 + 2 * (5 * 1000 + 2000)
    assert zero["offload_param"]["buffer_size"] == 1000
    assert "buffer_size" not in zero["offload_optimizer"]
    zero["sub_group_size"] = 500
    assert disks.fit_buffers({"zero_optimization": zero}, [300, 1000, 700], 2) == 4 * 4 * 1500 + 2 * (5 * 1000 + 1500)
    assert disks.fit_buffers({"zero_optimization": {"stage": 3}}, [300], 2) == 0


def test_a_limit_of_locked_memory_is_said_before_deepspeed_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 8_000_000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: set_to.append(both))
    monkeypatch.setattr(disks, "_may_lock_all", lambda: False)
    disks.require_locked(0)
    assert set_to == []
    disks.require_locked(8_000_000)
    assert set_to == [(8_000_000, 8_000_000)]
    with pytest.raises(ConfigError, match=r"needs 8,000,001 bytes .* and 8,000,000 are allowed"):
        disks.require_locked(8_000_001)
    monkeypatch.setattr(disks, "_may_lock_all", lambda: True)
    disks.require_locked(8_000_001)
