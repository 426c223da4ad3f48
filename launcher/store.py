"""Runs on disk: create, find, read, append. The log is append-only and fsynced; a torn last line is not an event.

There is no snapshot of it that could disagree with it: it grows with decisions and with checkpoints that are committed
to disk, never with ranks, steps or heartbeats. The 74,000 events of a hundred days on 3,120 nodes with a checkpoint
every 144 s (tests/benchmarks/test_scale.py) are 18 MB, and read and folded in a second and a half.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.checkpoint.claim import claim, require_ours
from jobs.checkpoint.storage import link_new, sync_dir
from jobs.location import locate
from jobs.metrics import append_whole, tells_of_a_step
from jobs.paths import RunPaths
from launcher.host.logs import KEPT_ATTEMPTS
from launcher.request import LaunchRequest
from launcher.run import EventKind, Run, RunEvent, fold
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, NotFound, StorageError, did_you_mean

_TYPES = {"seq": int, "time": float, "epoch": int, "attempt": int, "kind": str, "data": dict}
_DECODER = json.JSONDecoder()
_KINDS = {kind.value: kind for kind in EventKind}
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` so that a reader (or a crash) sees the old or the new content, never a mixture.

    Raises:
        StorageError: The file system refuses.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_dir(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise _refused(path, error) from error


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create ``path`` with its whole content, unless it exists: one of several contenders wins, on any POSIX share.

    Returns:
        Whether this call created the file.

    Raises:
        StorageError: The file system refuses; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _link(aside, path)
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        sync_dir(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    return True


def _link(aside: Path, path: Path) -> None:
    try:
        link_new(aside, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise StorageError(
            f"The run directory cannot be in {path.parent}: its file system gives no file a second name.",
            why=f"{error.strerror}; one of several contenders can be given a name, on every node, and no more",
            hint="Choose another run.dir: a local disk, NFS, Lustre, GPFS, CephFS. Checkpoints may be elsewhere.",
        ) from error


def _refused(path: Path, error: OSError) -> StorageError:
    hint = "Free space or mend the folder's permissions, then try again: what was written before is intact."
    return StorageError(f"Cannot write {path}.", why=error.strerror or str(error), hint=hint)


def dump(value: Any) -> bytes:
    """JSON as written to the run directory: indented, so that people can read and diff it."""
    return (json.dumps(to_json(value), indent=2) + "\n").encode()


def taken(root: Path) -> ConfigError:
    """What to say when a run directory exists already."""
    return ConfigError(
        f"A run named '{root.name}' exists in {root.parent}.",
        hint=f"Choose another run.name, or continue it: phalanx resume {root.name}",
    )


class RunStore:
    """One run directory.

    Args:
        root: An existing run directory.
        wall: UTC seconds; every event carries them.
    """

    def __init__(self, root: Path, *, wall: Callable[[], float] = time.time) -> None:
        self.paths = RunPaths(root)
        self._wall = wall
        self._seq = 0

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.paths.root.name

    @classmethod
    def create(cls, request: LaunchRequest) -> RunStore:
        """Make a new run directory and its first event.

        Raises:
            ConfigError: A run of this name exists.
            StorageError: The folder cannot be written.
        """
        root = Path(request.run_dir)
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir()
        except FileExistsError as error:
            raise taken(root) from error
        except OSError as error:
            raise StorageError(
                f"Cannot create the run directory {root}.", why=str(error), hint="Choose another run.dir."
            ) from error
        store = cls(root)
        try:
            # First: a controller whose directory was here before knows by it that this is another run.
            write_atomic(store.paths.secret, os.urandom(32).hex().encode(), mode=0o600)
            if url := request.job.checkpoint.url:  # before it is a run: nobody may look for its checkpoints elsewhere
                write_atomic(store.paths.pointer, url.encode() + b"\n")
            store.write_request(request)
            store.append(EventKind.RUN_SUBMITTED, request=request.digest)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        return store

    @classmethod
    def open(cls, root: Path | str) -> RunStore:
        """Open an existing run directory.

        Raises:
            NotFound: It is not a run directory.
        """
        store = cls(Path(root))
        if not store.paths.request.exists():
            why = "it has no request.json" if store.paths.root.is_dir() else "there is no such folder"
            raise NotFound(f"{root} is not a run directory ({why}).", hint="phalanx status --dir FOLDER lists runs.")
        return store

    @classmethod
    def names(cls, parent: Path) -> list[str]:
        """Names of all runs in ``parent``, oldest first."""
        if not parent.is_dir():
            return []
        found = [path for path in parent.iterdir() if os.path.isfile(path / "request.json")]
        return [path.name for path in sorted(found, key=lambda path: ((path / "request.json").stat().st_mtime, path))]

    @classmethod
    def find(cls, parent: Path, ref: str) -> RunStore:
        """Find a run by name, unique prefix or ``latest``.

        Raises:
            NotFound: No run, or more than one, answers to ``ref``.
        """
        names = cls.names(parent)
        if not names:
            raise NotFound(
                f"There are no runs in {parent.absolute()}.", hint="phalanx submit, or --dir FOLDER to look elsewhere."
            )
        if ref == "latest":
            newest = max(names, key=lambda name: (_last_event_time(parent / name / "events.jsonl"), name))
            return cls(parent / newest)
        if ref in names:
            return cls(parent / ref)
        matches = [name for name in names if name.startswith(ref)]
        if len(matches) == 1:
            return cls(parent / matches[0])
        if matches:
            raise NotFound(f"'{ref}' fits {len(matches)} runs: {', '.join(matches)}.", hint="Type more of the name.")
        raise NotFound(f"There is no run '{ref}' in {parent.absolute()}.", hint=did_you_mean(ref, names[-20:]))

    def request(self) -> LaunchRequest:
        """The request of the newest submit or resume."""
        return from_json(LaunchRequest, read_json(self.paths.request), where=str(self.paths.request))

    def write_request(self, request: LaunchRequest) -> None:
        """Store the request; an earlier one stays beside it under its digest."""
        if self.paths.request.exists():
            older = self.request()
            write_atomic(self.paths.root / f"request-{older.digest[:12]}.json", dump(older))
        write_atomic(self.paths.request, dump(request))
        write_atomic(self.paths.plan, dump(request.job.plan))
        write_atomic(self.paths.ds_config, dump(request.job.deepspeed))

    def secret(self) -> bytes:
        """Key of the control connections."""
        return self.paths.secret.read_bytes().strip()

    @property
    def owner(self) -> str:
        """What identifies the run where others keep checkpoints too; says nothing about the secret."""
        return hashlib.sha256(b"checkpoints of " + self.secret()).hexdigest()[:32]

    def place_checkpoints(self, request: LaunchRequest) -> None:
        """Claim the place of the checkpoints, if it is not the run directory.

        Raises:
            ConfigError: Another run keeps its checkpoints there.
            StorageError: They cannot be kept there.
        """
        url = request.job.checkpoint.url
        if url:
            claim(locate(url), run=self.name, owner=self.owner)

    def require_checkpoints(self) -> None:
        """Refuse to go on with what another run has saved, or where everything is gone.

        Raises:
            ResumeRefused: The checkpoints are another run's.
            StorageError: They are gone, or cannot be read.
        """
        if self.paths.pointer.exists():
            require_ours(self.paths.checkpoints, run=self.name, owner=self.owner)

    def append(self, kind: EventKind, *, epoch: int = 0, attempt: int = 0, **data: Any) -> RunEvent:
        """Append one event, durably.

        Raises:
            StorageError: The log cannot be written.
        """
        return self.commit(self.draft(kind, epoch=epoch, attempt=attempt, **data))

    def draft(self, kind: EventKind, *, epoch: int = 0, attempt: int = 0, **data: Any) -> RunEvent:
        """The event that would be next; nothing is written."""
        number = max(self._seq, self._last_seq()) + 1
        return RunEvent(seq=number, time=self._wall(), epoch=epoch, attempt=attempt, kind=kind, data=to_json(data))

    def commit(self, event: RunEvent) -> RunEvent:
        """Append a drafted event, durably.

        Raises:
            StorageError: The log cannot be written.
        """
        line = json.dumps(to_json(event)).encode() + b"\n"
        try:
            append_line(self.paths.events, line)
        except OSError as error:
            hint = "Free space, then phalanx resume."
            if isinstance(error, FileNotFoundError):
                hint = "Bring the run directory back, or phalanx resume RUN --moved goes on where it is now."
            raise StorageError(f"Cannot append to {self.paths.events}.", why=str(error), hint=hint) from error
        self._seq = event.seq
        return event

    def write_ranks(self, attempt: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write where the ranks of an attempt run, and forget tables whose logs the agents have forgotten, too.

        Raises:
            StorageError: The file system refuses.
        """
        lines = ",\n".join(json.dumps(rows[at : at + 8])[1:-1] for at in range(0, len(rows), 8))
        write_atomic(self.paths.ranks(attempt), f"[\n{lines}\n]\n".encode())
        with contextlib.suppress(OSError):
            self.paths.ranks(attempt - KEPT_ATTEMPTS).unlink(missing_ok=True)

    def events(self) -> list[RunEvent]:
        """Every event so far."""
        return [read_event(line) for line in read_lines(self.paths.events)]

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Every line of metrics.jsonl that tells of a step."""
        return filter(tells_of_a_step, read_lines(self.paths.metrics))

    def run(self) -> Run:
        """The run as its log tells it."""
        return fold(self.events())

    def _last_seq(self) -> int:
        if self._seq:
            return self._seq
        return max((event.seq for event in self.events()), default=0)


def _last_event_time(path: Path, window_bytes: int = 65536) -> float:
    """UTC seconds of the newest event of a log; 0 when there is none. Reads the end of the file only."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - window_bytes))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0.0
    for line in reversed([line for line in lines if line.endswith(b"\n")]):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0


def append_line(path: Path, line: bytes) -> None:
    """Append one line and fsync it; see :func:`jobs.metrics.append_whole`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if not os.fstat(fd).st_size:
            sync_dir(path.parent)
        append_whole(fd, line)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a ``.jsonl`` file; torn or damaged lines are left out, a missing file is empty."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, after the generator has been consumed
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                value = _DECODER.decode(line.decode())
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def read_event(row: Mapping[str, Any]) -> RunEvent:
    """One line of the log. As strict as the codec, which it leaves whatever is unusual: logs are long and often read.

    Raises:
        ConfigError: It is no event.
    """
    if {key: type(value) for key, value in row.items()} == _TYPES and row["kind"] in _KINDS:
        return RunEvent(**{**row, "kind": _KINDS[row["kind"]]})
    return from_json(RunEvent, row, where="events.jsonl")


def read_json(path: Path) -> Any:
    """A JSON document of the run directory.

    Raises:
        StorageError: It cannot be read or is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot read {path}.", why=str(error)) from error
