"""One run under observation: made, started, struck, resumed where a person would, and cleared away.

The controller is a process of its own; this one only watches the run directory, as anybody could,
and acts from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs import checkpoint
from jobs.faults import named
from jobs.paths import RunPaths
from jobs.tail import Tail
from launcher import backends, build, launch, sites
from launcher.drill import ambush, disks
from launcher.drill.acts import Act
from launcher.drill.case import Aim, Case, faults_of, hold
from launcher.drill.changes import with_changes
from launcher.drill.network import Network, network
from launcher.follow import Screen
from launcher.host import process
from launcher.host.environment import packages_root
from launcher.preparation import prepare_data
from launcher.run import Run, RunEvent, fold
from launcher.schema import Config
from launcher.sites import Site
from launcher.store import RunStore, create_exclusive, dump
from strategies.codec import from_json
from strategies.errors import ClusterError, PhalanxError

POLL_S = 0.02
PATIENCE_S = 300.0  # for a whole rehearsal
END_S = 20.0
LOG = "drill.log"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What a rehearsal has left.

    Attributes:
        store: The run.
        exits: How each controller ended, in order: exit code, or the negative number of a signal.
        undone: Acts whose moment never came, or was over.
        problem: Why the rehearsal itself went wrong; "" if it did not.
        left: Processes of the run that were still there afterwards.
    """

    store: RunStore
    exits: tuple[int, ...]
    undone: int = 0
    problem: str = ""
    left: tuple[str, ...] = ()


def create(config: Config, name: str, faults: Sequence[str]) -> RunStore:
    """A filled run directory in ``config.run.dir``, not started yet.

    Raises:
        PhalanxError: It cannot be made.
    """
    config = replace(config, run=replace(config.run, name=name), faults=tuple(faults))
    config = build.settle(config, name=name, cwd=Path.cwd())
    request = prepare_data(config, build.build_request(config, ()), _Silent(sys.stderr))
    return launch.create(request, config, None)


class _Silent(Screen):
    def say(self, text: str) -> None:
        """Nothing: the drill speaks for itself."""

    def progress(self, text: str) -> None:
        """Nothing."""


class Rehearsal:
    """One run and what is done to it; implements :class:`launcher.drill.acts.Stage`.

    Args:
        store: A filled run directory.
        case: The fault; None for the undisturbed run.
        aim: Where it strikes.
        watch: Called now and then with a line that says how far it is.
    """

    def __init__(
        self, store: RunStore, case: Case | None, aim: Aim | None, watch: Callable[[str], None] = lambda line: None
    ) -> None:
        self.paths: RunPaths = store.paths
        self.network: Network | None = None
        self.held_pid = 0
        self._store = store
        self._case = case
        self._aim = aim
        self._watch = watch
        self._tail = Tail(store.paths.events)
        self._events: list[RunEvent] = []
        self._todo: list[Act] = list(case.acts) if case else []
        self._done = 0
        self._exits: list[int] = []

    # -- what acts see ---------------------------------------------------------------------------------------------

    def events(self) -> list[RunEvent]:
        """The log so far."""
        self._events += [from_json(RunEvent, line, where="events.jsonl") for line in self._tail.read()]
        return self._events

    def run(self) -> Run:
        """The run as its log tells it now."""
        return fold(self.events())

    def gang_node(self, which: str) -> str:
        """``target`` or ``other``: of the first attempt; ``spare``: a node that it left out."""
        assert self._aim is not None
        gang = self.run().attempts[0].nodes
        if which == "spare":
            cluster = self._store.request().cluster
            names = [f"node{index}" for index in range(cluster.nodes + cluster.spares)]
            return next(name for name in names if name not in gang)
        return gang[self._aim.node if which == "target" else self._aim.other]

    def saved(self) -> bool:
        """Whether the checkpoint that is due before the step of the fault is committed."""
        assert self._aim is not None
        every = self._store.request().job.checkpoint.every
        there = checkpoint.list_checkpoints(self.paths.checkpoints)  # the log learns of it when the ranks go on
        return bool(there) and there[0].step >= (self._aim.step - 1) // every * every

    # -- the whole -------------------------------------------------------------------------------------------------

    def play(self) -> Ended:
        """Run it to its end. Nothing of it is left afterwards, whatever happens."""
        case, problem = self._case, ""
        image = self.paths.root / "checkpoints.img"
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(disks.mounted(case.disk if case else "", self.paths.checkpoint_dir, image))
            if case is not None and case.network:
                self._make_machines(cleanup)
            if case is not None and case.ambush:
                step = self._aim.step - 1 if self._aim and case.ambush_late else 0
                ambush.lay(self._store, ambush.Ambush(phase=case.ambush, step=step))
            cleanup.callback(self._clear)
            try:
                self._follow([sys.executable, "-P", "-m", "launcher.drill.controlled", str(self.paths.root)])
                for _ in range(case.resumes if case else 0):
                    if not self._wants_resume():
                        break
                    words = ["resume", str(self.paths.root), "--yes"]
                    self._follow([sys.executable, "-P", "-m", "launcher.cli", *words])
            except PhalanxError as error:
                problem = f"{error.what} {error.why}".strip()
            left = self._leftovers() if not problem else ()
        return Ended(store=self._store, exits=tuple(self._exits), undone=len(self._todo), problem=problem, left=left)

    def _make_machines(self, cleanup: contextlib.ExitStack) -> None:
        cluster = self._store.request().cluster
        net = cleanup.enter_context(network(cluster.nodes + cluster.spares))
        placed = {
            f"node{index}": Site(address=address, enter=tuple(net.entering(index)))
            for index, address in enumerate(net.addresses)
        }
        sites.write(self.paths, placed)
        self.network = net

    def _wants_resume(self) -> bool:
        state = self.run().state
        return not state.terminal or state.value == "failed"

    def _follow(self, command: list[str]) -> None:
        """Watch one controller until it ends, and act when a moment has come.

        Raises:
            ClusterError: It takes too long, or an act was not possible.
        """
        deadline = time.monotonic() + PATIENCE_S
        with _controller(command, self.paths.root / LOG) as child:
            while child.poll() is None:
                self._look_for_the_held()
                self._act()
                self._watch(self._progress())
                if time.monotonic() > deadline:
                    raise ClusterError(f"The rehearsal has not ended within {PATIENCE_S:.0f} s.")
                time.sleep(POLL_S)
        self._exits.append(child.returncode)
        self._act()

    def _look_for_the_held(self) -> None:
        """Whether the rank has stopped itself: its proof is there, and the kernel says so."""
        if self.held_pid or self._case is None or not self._case.held:
            return
        assert self._aim is not None
        ((name, _),) = named([hold(self._aim)])
        with contextlib.suppress(OSError, ValueError):
            pid = int(json.loads((self.paths.faults / f"{name}.json").read_text())["pid"])
            if process.state(pid) == "T":
                self.held_pid = pid

    def _act(self) -> None:
        while self._todo and self._todo[0].due(self):
            act, attempt = self._todo.pop(0), self.run().attempt
            proof: dict[str, object] = {"attempt": attempt.number if attempt else 0, "time": time.time()}
            did = act.do(self)
            self._done += 1
            proof |= {"fault": did, "did": did, "done": time.time()}
            create_exclusive(self.paths.faults / f"{act.proof(self._done)}.json", dump(proof))

    def _progress(self) -> str:
        run = self.run()
        return f"{run.state.value}, attempt {len(run.attempts)}, checkpoint {run.committed_step}"

    # -- the end ---------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        """End what still lives of the run: after a failure, or because a person has interrupted the drill."""
        if not self._leftovers(patience_s=0.0):
            return
        with contextlib.suppress(PhalanxError, OSError), backends.left_over(self._store, self._store.request()):
            pass
        for pid in _processes_of(self.paths.root):
            process.send(pid, signal.SIGKILL)

    def _leftovers(self, patience_s: float = 10.0) -> tuple[str, ...]:
        """Living processes of the run, after a moment for the kernel to take them away."""
        deadline = time.monotonic() + patience_s
        while (found := _processes_of(self.paths.root)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return tuple(f"{pid} {' '.join(process.command_line(pid))[:120]}" for pid in found)


@contextlib.contextmanager
def _controller(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A controller in a session of its own: Ctrl-C at the terminal is the drill's, which passes it on."""
    path = os.pathsep.join(filter(None, [str(packages_root()), os.environ.get("PYTHONPATH", "")]))
    with open(log, "ab") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(END_S)
            child.kill()
            child.wait()


def _processes_of(root: Path) -> list[int]:
    """Living processes with the run directory in their environment or command line, this one left out."""
    word, own = str(root), os.getpid()
    return [
        pid
        for pid in process.all_pids()
        if pid != own
        and process.is_running(pid)
        and (any(word in part for part in process.command_line(pid)) or word in str(process.environment(pid)))
    ]


def undisturbed(store: RunStore, watch: Callable[[str], None]) -> Ended:
    """The run that all others are compared with.

    Raises:
        ClusterError: It has not succeeded, so that nothing can be compared with it.
    """
    ended = Rehearsal(store, None, None, watch).play()
    if ended.problem or store.run().state.value != "succeeded":
        raise ClusterError(
            f"The undisturbed run '{store.name}' has not succeeded: nothing can be compared with it.",
            why=ended.problem or store.run().reason,
            hint=f"See {store.paths.root / LOG}.",
        )
    return ended


def prepared(case: Case, aim: Aim, config: Config, name: str) -> RunStore:
    """The run directory of a fault's rehearsal."""
    return create(with_changes(config, case.changes), name, faults_of(case, aim))
