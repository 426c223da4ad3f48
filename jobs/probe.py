"""What every rank of ``phalanx cluster probe`` runs: it measures its device, its disk and its links.

    python -P -m jobs.probe [--quick] [--disk FOLDER]

A rank leaves ``<run dir>/probe/rank-<R>.json`` (:func:`record_path`), rank 0 tells in ``<run dir>/probe/progress`` what
it is at, and a rank that fails leaves its reason in ``<run dir>/probe/error-<R>.txt``. All ranks measure their devices
at the same time, as they work when they train; links and disks are then measured one after the other while the other
ranks rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cgroup import usable_memory
from jobs.spec import RankEnv

if TYPE_CHECKING:
    import torch

    from jobs.measure import Effort

FOLDER = "probe"
WAIT_S = 120.0  # for a peer
DISK_NODES = 16  # nodes that write at the same time, at most: enough to see whether they share a bottleneck
DISK_WRITERS = 8  # ranks of a node that write at the same time, at most
_DISK_BYTES = (16 << 20, 1 << 30)  # first and largest size of a writer's file
_FREE_SHARE = 0.05  # of the free space, for all writers together

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One rank at work.

    Attributes:
        env: Its place in the gang.
        device: Its device.
        effort: How much is measured.
        quick: A short probe.
        disk: Folder on a disk of the node itself, where state may be offloaded to.
    """

    env: RankEnv
    device: torch.device
    effort: Effort
    quick: bool
    disk: Path

    @property
    def nodes(self) -> int:
        """Nodes of the gang, all of which carry the same number of ranks."""
        return self.env.world_size // self.env.local_world_size

    def step(self, what: str) -> None:
        """Begin a phase together with all other ranks, and say so."""
        from jobs.measure import wait_for_all

        wait_for_all()
        if self.env.rank == 0:
            _replace(Path(self.env.run_dir) / FOLDER / "progress", what)


def record_path(run_dir: str | Path, rank: int) -> Path:
    """Where a rank leaves what it has measured."""
    return Path(run_dir) / FOLDER / f"rank-{rank}.json"


def main() -> int:
    """Be one rank, as the environment says; returns the exit code."""
    env = RankEnv.read(os.environ)
    (Path(env.run_dir) / FOLDER).mkdir(exist_ok=True)
    try:
        _run(env, quick="--quick" in sys.argv)
    except Exception as error:
        traceback.print_exc()
        _replace(Path(env.run_dir) / FOLDER / f"error-{env.rank}.txt", _reason(error))
        os._exit(1)  # the exit handlers would wait for the other ranks
    return 0


def _reason(error: Exception) -> str:
    where = f"on {socket.gethostname()}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} cannot be imported by {sys.executable} {where}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} {where}: {lines[0]}"


def _run(env: RankEnv, *, quick: bool) -> None:
    from jobs import distributed, measure

    distributed.set_threads()
    device = measure.device_of(env.local_rank)
    effort = measure.effort_for(device, quick=quick)
    words = sys.argv[1:]
    disk = Path(words[words.index("--disk") + 1] if "--disk" in words else tempfile.gettempdir())
    probe = Probe(env=env, device=device, effort=effort, quick=quick, disk=disk)
    distributed.init_process_group(env, measure.backend_of(device), timeout_s=WAIT_S)
    record = _identity(probe) | _device_figures(probe) | _disk_figures(probe)
    record |= _folder_figures(probe) | _link_figures(probe)
    _replace(record_path(env.run_dir, env.rank), json.dumps(record))
    probe.step("done")
    distributed.shutdown()


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


# ---- who and what -----------------------------------------------------------------------------------------------


def _identity(probe: Probe) -> Record:
    import torch

    from jobs.measure import has_bf16

    cuda = probe.device.type == "cuda"
    properties = torch.cuda.get_device_properties(probe.device) if cuda else None
    return {
        "rank": probe.env.rank,
        "node_rank": probe.env.node_rank,
        "host": socket.gethostname(),
        "machine": _machine(),
        "device": properties.name if properties else "cpu",
        "backend": "nccl" if cuda else "gloo",
        "devices": torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0)),
        "processors": properties.multi_processor_count if properties else torch.get_num_threads(),
        "memory_bytes": properties.total_memory if properties else 0,
        "host_memory_bytes": usable_memory(),
        "bf16": has_bf16(probe.device),
        "torch": torch.__version__,
    }


def _machine() -> str:
    """One word per running kernel: nodes with the same one share a machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


# ---- devices ----------------------------------------------------------------------------------------------------


def _device_figures(probe: Probe) -> Record:
    from jobs import measure

    rates = []
    for dtype in measure.dtypes_of(probe.device):
        probe.step(f"matmul {dtype}")
        for one in measure.matmuls(probe.device, dtype, probe.effort):
            rates.append({"dtype": one.dtype, "shape": list(one.shape), "flops": one.flops})
    probe.step("device memory")
    memory = measure.memory_bandwidth(probe.device, probe.effort)
    probe.step("host memory")
    return {
        "matmul": rates,
        "memory_bandwidth": memory,
        "host_bandwidth": measure.host_bandwidth(probe.device, probe.effort),
    }


# ---- disk -------------------------------------------------------------------------------------------------------


def _disk_figures(probe: Probe) -> Record:
    """(bytes, seconds) written and synced into the run directory: by the first node alone, then by several at once."""
    from jobs.measure import least_of_all

    env, nodes = probe.env, min(probe.nodes, DISK_NODES)
    writes = env.local_rank < DISK_WRITERS and env.node_rank < nodes
    limit = _disk_limit(probe, min(env.local_world_size, DISK_WRITERS) * nodes)
    found: Record = {"disk_alone": None, "disk_together": None}
    path = Path(env.run_dir) / FOLDER / f"disk-{env.rank}"
    try:
        probe.step("disk, how much to write")
        size = least_of_all(_disk_size(path, limit, probe.effort.seconds) if writes and env.node_rank == 0 else limit)
        probe.step("disk, one node")
        if writes and env.node_rank == 0:
            found["disk_alone"] = [size, _write_s(path, size)]
        if nodes > 1:
            probe.step(f"disk, {nodes} nodes")
            if writes:
                found["disk_together"] = [size, _write_s(path, size)]
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return found


def _disk_limit(probe: Probe, writers: int) -> int:
    """Largest file of one writer, in bytes."""
    status = os.statvfs(probe.env.run_dir)
    return min(_DISK_BYTES[1], int(status.f_bavail * status.f_frsize * _FREE_SHARE / writers))


def _disk_size(path: Path, limit: int, seconds: float) -> int:
    """Bytes whose writing takes long enough to be told from the noise."""
    size = min(_DISK_BYTES[0], limit)
    while 4 * size <= limit and _write_s(path, size) < seconds:
        size *= 4
    return size


def _write_s(path: Path, size: int) -> float:
    block = os.urandom(4 << 20)  # nothing that a file system could compress
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, size, len(block)):
            file.write(memoryview(block)[: size - begin])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _folder_figures(probe: Probe) -> Record:
    """What the first node's ranks write into and read from the checkpoints' storage and a local disk, all at once.

    ``store`` and ``local`` have sizes and seconds (:class:`jobs.disk_rate.DiskTimes`), or ``error``: why they have not.
    """
    found: Record = {"local_folder": str(probe.disk)}
    for name, folder in (("store", Path(probe.env.run_dir) / FOLDER), ("local", probe.disk)):
        probe.step(f"disk, reading and writing {name}")
        if probe.env.node_rank == 0 and probe.env.local_rank < DISK_WRITERS:
            found[name] = _folder_times(probe, folder)
    return found


def _folder_times(probe: Probe, folder: Path) -> Record:
    from jobs import disk_rate

    try:
        kind = disk_rate.file_system(folder)
        if kind in disk_rate.IN_MEMORY:
            return {"error": f"{folder} is memory ({kind}), no disk"}
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize * _FREE_SHARE / min(probe.env.local_world_size, DISK_WRITERS)
        if free < disk_rate.BLOCK_BYTES:
            return {"error": f"{folder} has no room"}
        return asdict(disk_rate.largest(folder, min(_DISK_BYTES[1], int(free)), probe.effort.seconds))
    except OSError as error:
        return {"error": f"{folder}: {error.strerror or error}"}


# ---- links ------------------------------------------------------------------------------------------------------


def _link_figures(probe: Probe) -> Record:
    """Links inside the first node and between the first two, each by one pair alone, then by all pairs at once."""
    env = probe.env
    slots = env.local_world_size
    found: Record = {}
    if slots > 1:
        inside = [(2 * pair, 2 * pair + 1) for pair in range(slots // 2)]
        found["intra"] = _link(probe, "inside a node", inside)
    if probe.nodes > 1:
        found["inter"] = _link(probe, "between nodes", [(slot, slots + slot) for slot in range(slots)])
    return {"links": found}


def _link(probe: Probe, where: str, pairs: list[tuple[int, int]]) -> Record:
    """What the sender of a pair has seen; empty on every other rank."""
    from jobs import measure

    device, effort = probe.device, probe.effort
    mine = next((pair for pair in pairs if probe.env.rank in pair), None)
    sends, peer = mine is not None and mine[0] == probe.env.rank, 0 if mine is None else sum(mine) - probe.env.rank
    found: Record = {}
    probe.step(f"link {where}, one pair")
    if mine == pairs[0]:
        delay = measure.latency(device, peer, sends=sends)
        curve = [
            [size, measure.stream(device, peer, sends=sends, size=size, seconds=effort.seconds)]
            for size in effort.messages
        ]
        found = {"latency_s": delay, "curve": curve} if sends else {}
    probe.step(f"link {where}, all pairs")
    if mine is not None:
        rate = measure.stream(device, peer, sends=sends, size=effort.messages[-1], seconds=effort.seconds)
        found |= {"shared": rate} if sends else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
