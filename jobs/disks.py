"""State on disks (ZeRO-3, ``strategy.offload_path``): what a node needs for it, and a folder for every rank.

DeepSpeed needs an op of its own for it, ``async_io``, with ``pin_memory`` under it. Left alone it compiles them in the
first rank that needs them. That takes minutes, and a rank that is killed meanwhile leaves a lock that hangs every later
start on its host. So ranks only load what ``python -m jobs.engine`` has compiled (:mod:`jobs.engine.async_io`). Nothing
here imports torch or DeepSpeed: the launcher asks, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.checkpoint.layout import Token
from jobs.spec import JobSpec, RankEnv
from strategies.errors import ConfigError, StorageError
from strategies.plan import ParallelPlan

BUILD = "python -m jobs.engine"
NEEDS = "a C++ compiler and libaio's headers (Debian: apt-get install g++ libaio-dev; Fedora: gcc-c++ libaio-devel)"
ROOT = "TORCH_EXTENSIONS_DIR"  # torch's variable for where compiled extensions live
_STATE_BUFFERS = 4  # master, gradient, two moments: DeepSpeed's own default
_PARAMETER_BUFFERS = 5  # likewise
_CAP_IPC_LOCK = 14
_KINDS = ("offload_optimizer", "offload_param")


def on_disks(plan: ParallelPlan) -> bool:
    """Whether a plan keeps state on disks."""
    return plan.offload != "none" and bool(plan.offload_path)


def op_folder() -> Path:
    """Where the op is kept: one for every DeepSpeed, torch and Python, under torch's folder of compiled extensions."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    root = Path(os.environ.get(ROOT) or caches / "torch_extensions")
    versions = [f"{name}{version(name)}" for name in ("deepspeed", "torch")]
    return root / "-".join(["phalanx", *versions, str(sys.implementation.cache_tag)])


def seal(folder: Path) -> Path:
    """The file that says that all of the op is there."""
    return folder / "complete"


def comes_with_deepspeed() -> bool:
    """Whether DeepSpeed was installed with the op (``DS_BUILD_AIO=1``)."""
    spec = importlib.util.find_spec("deepspeed")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder) / "git_version_info_installed.py" for folder in folders or ()]
    return any("'async_io': True" in file.read_text() for file in files if file.is_file())


def is_compiled() -> bool:
    """Whether this machine has the op."""
    return comes_with_deepspeed() or seal(op_folder()).is_file()


def require_op() -> None:
    """Check that this machine has the op.

    Raises:
        ConfigError: It has not.
    """
    if not is_compiled():
        raise ConfigError(
            f"DeepSpeed's op for state on disks (async_io) is not compiled on {os.uname().nodename}.",
            why=f"there is none in {op_folder()}",
            hint=f"{BUILD} once on every node; it takes {NEEDS}. Or strategy.offload_path=null (host memory).",
        )


def require_folder(root: str) -> None:
    """Check that state can be kept in a folder of this machine.

    Raises:
        StorageError: There is none, it cannot be written, or its file system has no direct I/O.
    """
    check = Path(root) / f".check-{os.getpid()}"
    try:
        os.close(os.open(check, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
        check.unlink()
    except OSError as error:
        direct = error.errno == errno.EINVAL
        raise StorageError(
            f"State cannot be kept in {root} on {os.uname().nodename} (strategy.offload_path).",
            why="its file system has no direct I/O (O_DIRECT)" if direct else error.strerror or str(error),
            hint="It must be a folder on a local disk, there on every node. Or strategy.offload_path=null.",
        ) from error


def placed(job: JobSpec, env: RankEnv) -> JobSpec:
    """The job with what is on disks in an empty folder of this rank; what earlier attempts have left on the node goes.

    Raises:
        StorageError: There can be no such folder on this node.
    """
    require_folder(job.plan.offload_path)
    token = Token(env.epoch, env.attempt)
    run = _folder_of(job.plan, env.run_id)
    mine = run / _name_of(token, env.rank)
    if env.local_rank == 0:
        _remove_older(run, token)
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(dict(job.deepspeed)))
    for place in _places(config):
        place["nvme_path"] = str(mine)
    return dataclasses.replace(job, deepspeed=config)


def sweep(job: JobSpec, token: Token, ranks: Iterable[int]) -> None:
    """Remove what a node has on disks that leaves a run.

    Args:
        job: The job of the newest attempt that had ranks there.
        token: Of that attempt.
        ranks: Its ranks there; none of them may be alive. What other nodes of the same machine have stays.
    """
    if on_disks(job.plan):
        run = _folder_of(job.plan, job.run_id)
        _remove_older(run, token)
        for rank in ranks:
            shutil.rmtree(run / _name_of(token, rank), ignore_errors=True)
        with contextlib.suppress(OSError):
            run.rmdir()


def _folder_of(plan: ParallelPlan, run_id: str) -> Path:
    return Path(plan.offload_path) / f"phalanx-{run_id}"


def _name_of(token: Token, rank: int) -> str:
    return f"{token}-rank{rank:05d}"


def _remove_older(run: Path, token: Token) -> None:
    """Nobody is there any more who could use what earlier attempts have left."""
    for other in run.glob("e*-a*-rank*"):
        if other.name < str(token):
            shutil.rmtree(other, ignore_errors=True)


def clear(job: JobSpec) -> None:
    """Remove what a rank has on disks; the job is that of :func:`placed`."""
    for folder in {Path(place["nvme_path"]) for place in _places(job.deepspeed)}:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # of the last rank


def fit_buffers(config: Mapping[str, Any], shares: Sequence[int], width: int) -> int:
    """Make DeepSpeed's buffers for parameters on disks no larger than they must be; returns bytes of locked memory.

    Args:
        config: DeepSpeed's, changed in place.
        shares: Elements of this rank's part of each parameter.
        width: Bytes of an element of a parameter.
    """
    places, largest = list(_places(config)), max(shares, default=0)
    if not places:
        return 0
    turn: int = min(sum(shares), config["zero_optimization"]["sub_group_size"] + largest)
    locked = _STATE_BUFFERS * turn * 4
    for place in places:
        if "max_in_cpu" in place:
            place |= {"buffer_size": largest, "buffer_count": _PARAMETER_BUFFERS}
            locked += (_PARAMETER_BUFFERS * largest + turn) * width
    return locked


def require_locked(needed: int) -> None:
    """Check that this process may lock so many bytes of memory; else DeepSpeed would abort it.

    Raises:
        ConfigError: It may not.
    """
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if most != resource.RLIM_INFINITY and most < needed and not _may_lock_all():
        raise ConfigError(
            f"State on disks needs {needed:,} bytes of locked memory per rank, and {most:,} are allowed.",
            why=f"that is the limit of the user that runs the ranks on {os.uname().nodename}",
            hint="Raise it (ulimit -l, /etc/security/limits.conf). Or strategy.offload_path=null (host memory).",
        )
    if needed:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))


def _may_lock_all() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(effective >> _CAP_IPC_LOCK & 1)


def _places(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What DeepSpeed's config says of state on disks, by kind."""
    zero = config["zero_optimization"]
    yield from (zero[kind] for kind in _KINDS if zero.get(kind, {}).get("device") == "nvme")
