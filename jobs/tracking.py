"""Experiment tracking, in a process of its own: ``python -P -m jobs.tracking RUN_DIR``, a child of the controller.

It follows ``metrics.jsonl`` and logs every step once, however often the run was restarted; ``attempt`` is logged with
each step, so that restarts can be seen. It ends when the run has ended (the last event is a final one), on SIGTERM, and
when its parent is gone. Training never waits for it and does not notice if it fails.

One W&B run spans all attempts and all trackers: its id and how far it got are kept in ``tracking.json``. A killed
tracker may have lost what it logged last, so offline the W&B file itself says how far it really got.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jobs.paths import RunPaths
from jobs.tail import Tail
from strategies.errors import ConfigError, PhalanxError, StorageError

POLL_S = 0.5
FLUSH_S = 2.0
ENDINGS = {"run_succeeded": 0, "run_failed": 1, "run_cancelled": 255}
"""Kinds of the events after which nothing follows, and the exit code that W&B shows for them."""

_LOGGED = ("loss", "grad_norm", "lr", "tokens_per_s", "seconds", "attempt", "epoch")
_OF_ROUTERS = ("aux_loss", "balance_loss", "z_loss", "imbalance", "imbalance_layer", "dropped", "crossed")


def numbers_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line of metrics.jsonl is logged; what routers do has names of its own."""
    routers = line.get("moe", {})
    routing = {f"moe/{key}": value for key, value in routers.items() if key in _OF_ROUTERS}
    loads = {f"moe/load/{expert}": visits for expert, visits in enumerate(routers.get("load", ()))}
    return {key: line[key] for key in _LOGGED if key in line} | routing | loads


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Log one line of metrics.jsonl, unless its step was logged before."""

    def finish(self, exit_code: int) -> None:
        """Write out everything; the run ended with ``exit_code``."""


class NullTracker:
    """Tracks nothing."""

    def log(self, line: Mapping[str, Any]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class WandbTracker:
    """Logs to W&B; starts it at the first line, so that a starting run has the machine to itself.

    Args:
        paths: The run directory; W&B writes to its ``wandb`` folder.
        name: Name of the run.
        project: W&B project.
        mode: ``offline`` or ``online``.
        config: What W&B shows as the run's configuration.
    """

    def __init__(self, paths: RunPaths, *, name: str, project: str, mode: str, config: Mapping[str, Any]) -> None:
        self._paths = paths
        self._options: dict[str, Any] = {"name": name, "project": project, "mode": mode, "config": dict(config)}
        self._run: Any = None
        self._state = _read_state(paths.tracking) or {"id": secrets.token_hex(4), "step": 0, "segment": "", "before": 0}
        if mode == "offline":
            self._state["step"] = self._really_logged()
        self._keep()

    def log(self, line: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""
        if self._run is None:
            self._start()
        step = int(line["step"])
        if step > self._state["step"]:
            self._run.log(numbers_of(line), step=step)
            self._state["step"] = step
            self._keep()

    def finish(self, exit_code: int) -> None:
        """See :class:`Tracker`."""
        if self._run is not None:
            import wandb

            self._run.finish(exit_code=exit_code)
            wandb.teardown(exit_code)  # ends wandb-core and waits for it
            self._run = None

    def _start(self) -> None:
        import wandb

        os.environ.pop("WANDB_SERVICE", None)  # somebody else's wandb-core
        self._run = wandb.init(
            **self._options,
            dir=self._paths.root,
            id=self._state["id"],
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                symlink=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=FLUSH_S,
            ),
        )
        self._state["step"] = max(self._state["step"], self._run.starting_step - 1)  # online, W&B knows best
        segment = Path(self._run.settings.sync_file).relative_to(self._paths.root)
        self._state |= {"segment": str(segment), "before": self._state["step"]}
        self._keep()

    def _really_logged(self) -> int:
        """The last step that is in the W&B file; what the state says where the file was moved away."""
        segment = self._paths.root / self._state["segment"]
        if not self._state["segment"] or not segment.is_file():
            return int(self._state["step"])
        return max(logged_steps(segment), default=int(self._state["before"]))

    def _keep(self) -> None:
        aside = self._paths.tracking.with_name(f".tracking.{os.getpid()}")
        try:
            aside.write_text(json.dumps(self._state) + "\n", encoding="utf-8")
            os.replace(aside, self._paths.tracking)
        except OSError as error:
            raise StorageError(
                f"The position of the tracker cannot be written: {self._paths.tracking}.",
                why=f"{error.strerror or error}.",
                hint="Check the run directory.",
            ) from error


def logged_steps(path: Path) -> Iterator[int]:
    """Steps in an offline W&B file, in the order in which they were logged; what is torn at its end is left out."""
    from wandb.proto import wandb_internal_pb2 as messages

    for data in _records(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a W&B file: LevelDB's log format (blocks of 32 KiB; parts full 1, first 2, middle 3, last 4)."""
    block, position, parts = 32768, 7, b""  # 7: magic and version of the file
    while position + 7 <= len(data):
        if block - position % block < 7:  # too little for a header: padding
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        if kind == 0 or position + length > len(data):
            return
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):
            yield parts
            parts = b""


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {"step": 0, "segment": "", "before": 0} | state if isinstance(state, dict) and state.get("id") else None


class Watch:
    """Says when to stop: SIGTERM, or the parent is gone.

    (Not the kernel's parent-death signal: that is sent when the *thread* that started us ends.)
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's

    def _ask(self, *_: object) -> None:
        self._asked = True

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self._asked or os.getppid() != self._parent


def follow(paths: RunPaths, tracker: Tracker, watch: Watch) -> None:
    """Log until the run has ended or ``watch`` says so."""
    metrics, events = Tail(paths.metrics), Tail(paths.events)
    ending: int | None = None
    while True:
        over = watch.over
        for event in events.read():
            ending = ENDINGS.get(event.get("kind", ""))  # a resumed run goes on after an ending
        for line in metrics.read():
            if isinstance(line.get("step"), int):
                tracker.log(line)
        if over or ending is not None:
            tracker.finish(ending or 0)
            return
        time.sleep(POLL_S)


def make_tracker(paths: RunPaths) -> Tracker:
    """The tracker that the run's request asks for.

    Raises:
        StorageError: The request cannot be read.
        ConfigError: wandb is not installed.
    """
    try:
        request = json.loads(paths.request.read_text(encoding="utf-8"))
        tracking, job = request["tracking"], request["job"]
        if tracking["kind"] == "none":
            return NullTracker()
        config = {key: job[key] for key in ("kind", "model", "plan", "batch", "train", "data", "checkpoint")}
        name, project, mode = request["run_name"], tracking["project"], tracking["mode"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"The request cannot be read: {paths.request}.", why=repr(error)) from error
    # wandb reads these before it sees our settings
    os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_GIT": "true", "WANDB_SILENT": "true"}
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "Tracking needs wandb, which is not installed.", hint="pip install 'phalanx[train]', or tracking=none"
        )
    return WandbTracker(paths, name=name, project=project, mode=mode, config=config)


def main(arguments: list[str]) -> int:
    """Entry point of the tracker's process."""
    if len(arguments) != 1:
        print("usage: python -P -m jobs.tracking RUN_DIR", file=sys.stderr)
        return ConfigError.exit_code
    watch = Watch()
    paths = RunPaths(arguments[0])
    try:
        follow(paths, make_tracker(paths), watch)
    except PhalanxError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
