"""The controller: observe, decide, record, act. No ray, no torch, and no waiting outside the gang's poll.

One turn looks at what the agents have said, records what follows from it and acts. All that it knows is in the run
directory, so it may be killed between any two instructions: its successor folds the log, adopts the gang if it lives
(:mod:`launcher.adoption`), and goes on.

::

    GATHER --enough agents--> RUN --every rank exited 0--> END
       ^                       | failure, cancel
       |                       v
    BACKOFF <--restart------ STOP --give up, cancelled--> END

How large the next gang is, is the business of :mod:`launcher.sizing`: with too few nodes GATHER waits, and then goes on
with a smaller plan. Why ranks leave although all is well (RUN, STOP, GATHER) is that of :mod:`launcher.departure`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.spec import JobSpec
from launcher import aftermath, progress, rank_errors, recovery, stopping
from launcher.backend import AgentAddress, Backend
from launcher.clock import Clock
from launcher.departure import Departure
from launcher.gang import Gang, Observation
from launcher.gang_state import GangState, Note, spawn
from launcher.hang_watch import HangWatch
from launcher.lineup import form, swapped, told
from launcher.lock import ControllerLock
from launcher.logbook import Fenced, Logbook
from launcher.memory_tier import MemoryTier
from launcher.muster import Muster
from launcher.origin import NothingLeft
from launcher.outset import Beginning, Outset
from launcher.phase import Phase
from launcher.recovery import Action, Decision, Failure, FailureKind
from launcher.request import LaunchRequest
from launcher.run import EventKind, Run, RunEvent, RunState
from launcher.shortage import Shortage
from launcher.sizing import Sizing
from launcher.store import RunStore, dump, write_atomic
from launcher.vigil import Vigil
from strategies.errors import ClusterError
from strategies.plan import ParallelPlan
from strategies.schedule import Skip


class Controller:
    """Keeps one run alive until it ends.

    Args:
        store: The run.
        request: What to run.
        backend: Where to run it.
        gang: Connections to the agents.
        lock: The right to control, already won.
        clock: Source of time.
        observer: Called with every event, and with None whenever a phase has acted; for progress displays.
    """

    def __init__(
        self,
        store: RunStore,
        request: LaunchRequest,
        backend: Backend,
        *,
        gang: Gang,
        lock: ControllerLock,
        clock: Clock,
        observer: Callable[[RunEvent | None], None] = lambda event: None,
    ) -> None:
        self.store, self.request, self.backend = store, request, backend
        self.gang, self.lock, self.clock = gang, lock, clock
        self.log = Logbook(store, lock, observer)
        self.phase = Phase.GATHER
        self.state: GangState | None = None
        self.start_reason = "start"
        self.muster = Muster(backend, request.cluster, clock, self.record)
        self.sizing, self.shortage = Sizing(request), Shortage(clock, blip_s=request.recovery.detect_s)
        self.memory = MemoryTier(clock)
        self.outset = Outset(store, self.memory)
        self.vigil = Vigil(clock, patience_s=request.recovery.wait_for_nodes_s)
        self.hangs = HangWatch(first_s=request.recovery.first_step_s, save_s=request.recovery.save_timeout_s)
        self.departure = Departure(
            request, store.paths, sizing=self.sizing, muster=self.muster, clock=clock, record=self.record
        )
        self._observer = observer
        self._since = clock.monotonic()  # of the present phase
        self.pause_until = 0.0  # end of the back-off (monotonic)
        self._cancelling = False

    @property
    def run(self) -> Run:
        """The run, as its log tells it."""
        return self.log.run

    def follow(self) -> RunState:
        """Turn until the run has ended.

        Raises:
            Fenced: Another controller has taken over.
            StorageError: The run directory cannot be written.
        """
        while self.phase is not Phase.END:
            self.turn()
        return self.run.state

    def turn(self, timeout_s: float = 0.2) -> None:
        """Look once, act once."""
        with self.hangs.held_up(self.clock):
            self.log.require_ours(self.gang.shutdown_agents)
            self.lock.beat()
        heard = self.gang.poll(timeout_s)
        with self.hangs.held_up(self.clock):
            self._act(heard)

    def _act(self, heard: Sequence[Observation]) -> None:
        # While we listened, or while this process was stopped, it may have been lost: what we heard is stale then.
        self.log.require_ours(self.gang.shutdown_agents)
        for seen in heard:
            self.observe(seen)
        if not self._cancelling and self.store.paths.cancel.exists():
            self._begin_cancel()
        do = {Phase.GATHER: self._gather, Phase.RUN: self._watch, Phase.STOP: self._stop, Phase.BACKOFF: self._back_off}
        done: Phase | None = None
        while self.phase not in (done, Phase.END):  # one that was just entered acts at once: nothing need be seen
            done = self.phase
            do[done]()
            self._observer(None)

    # --- recording ------------------------------------------------------------------------------------------------

    def record(self, kind: EventKind, *, attempt: int | None = None, **data: Any) -> None:
        """Write one event, durably, before anything that depends on it is done.

        Raises:
            Fenced: Another controller has taken over; nothing was written.
        """
        self.log.record(kind, attempt=self._number if attempt is None else attempt, **data)
        self.muster.excluded = self.run.excluded

    @property
    def _number(self) -> int:
        return self.state.attempt if self.state else 0

    def record_faults(self) -> None:
        """Write down which injected faults have fired."""
        self.log.record_faults(attempt=self._number)

    def decide(self, decision: Decision | None, **more: Any) -> None:
        """Put a decision on record, if there is one; giving up ends the run."""
        if decision is not None:
            self.record(EventKind.DECISION, **decision.fields, **more)
        if decision is not None and decision.action is Action.GIVE_UP:
            self.end(EventKind.RUN_FAILED, reason=decision.reason)

    def enter(self, phase: Phase) -> None:
        """Change the phase."""
        self.phase = phase
        self._since = self.clock.monotonic()
        self.shortage.end()
        self.vigil.end()
        if phase is Phase.GATHER:  # asks now, so that the answers are what ends the next poll
            self.memory.ready(self.gang, self.muster.up, self.run, self.request.job)

    # --- observing ------------------------------------------------------------------------------------------------

    def observe(self, seen: Observation) -> None:
        """Take in what one agent says, record what is worth it, and start to recover from what is a failure."""
        self.note_agent(seen)
        if seen.kind == "agent_up":
            self._end_leftovers(seen)
        elif seen.kind == "cut_off":
            self.record(EventKind.CUT_OFF, **seen.data)
        if self.state is None:
            return
        if self.hangs.starting and seen.saves(self.state.attempt):
            self.watch_training(self.state)  # no step is left to do, only the last checkpoint
        self.hangs.note(seen, seen.heard)
        self.departure.note(seen)
        for found in self.state.observe(self.muster.clocks.ours(seen)):
            if isinstance(found, Failure):
                self._suspect(found)
            elif self.phase is not Phase.STOP or found.kind in stopping.STILL_TRUE:
                self._take_note(found)

    def _end_leftovers(self, seen: Observation) -> None:
        """An agent that answers late may still hold ranks of an attempt that was given up."""
        attempt = int(seen.data.get("attempt") or 0)
        if attempt not in (0, self._number):
            self.gang.kill(attempt, grace_s=0.0)

    def note_agent(self, seen: Observation) -> None:
        """Keep the list of agents that are up.

        Raises:
            Fenced: An agent refused us for a later epoch.
        """
        if seen.kind == "fenced":
            raise Fenced
        self.muster.note(seen)
        self.memory.note(seen)

    def _take_note(self, note: Note) -> None:
        assert self.state is not None
        if note.kind is EventKind.RANKS_SPAWNED:
            self.store.write_ranks(self.state.attempt, self.state.rank_table())
        if note.kind is EventKind.TRAINING_STARTED:
            self.watch_training(self.state)
        self.record(note.kind, **note.data)

    def watch_training(self, state: GangState) -> None:
        """It has begun: look for hangs and stragglers from now on; a script reports no steps."""
        self.hangs.end()
        if not state.script:
            told = progress.last_metric(self.store.paths)
            self.hangs.begin(state.plan, self.clock.monotonic(), told_s=float(told.get("seconds", 0.0)))
            self.departure.stragglers.begin(state.plan)

    # --- gathering nodes and starting ranks -----------------------------------------------------------------------

    def _gather(self) -> None:
        if final := progress.completed(self.store.paths, self.request.job):  # while no controller looked
            self.end(EventKind.RUN_SUCCEEDED, step=final["step"], weights_digest=final.get("weights_digest"))
            return
        if self.gang.in_doubt or not self.memory.ready(self.gang, self.muster.up, self.run, self.request.job):
            return
        self.muster.call_up(self.gang, urgent=True)
        again, why = self.start_reason == "resume", self.muster.why_missing
        nodes, back = self.muster.choose(lambda count: self.sizing.largest(count) is not None)
        up = len(nodes)
        lapse = self.shortage.lapse(possible=self.sizing.possible(self.run, up), enough=up >= self.sizing.need)
        before = self.run.attempt.nodes if self.run.attempt else ()
        hopeless = up < self.sizing.need and self.muster.hopeless(before)
        answer = self.sizing.choose(self.run, up=up, lapse=lapse, resumed=again, why=why, hopeless=hopeless)
        if answer.plan is None:
            self.vigil.end()
        if answer.plan is not None:
            if (begins := self._begin(answer.plan)) is None:
                return
            if back:
                self.record(EventKind.NODE_READMITTED, nodes=list(back), reason="without it there is no legal plan")
            self.decide(answer.decision, **self.shortage.told)
            for path, reason in begins.passed.items():
                self.record(EventKind.CHECKPOINT_REJECTED, path=path, reason=reason, absent=True)
            self._start(answer.plan, nodes, begins)
        elif answer.decision is None or answer.decision.action is Action.GIVE_UP:
            self.decide(answer.decision)
        elif self.run.attempts and self.shortage.note():  # before the first attempt it is no wait, but the start
            self.decide(answer.decision, **self.shortage.told)
            self.record(EventKind.WAITING_FOR_NODES, have=up, need=self.sizing.need, why=why())

    def _job(self, plan: ParallelPlan, skip: Skip | None = None) -> JobSpec:
        return self.request.job.under(plan).skipping(self.run.rollback.skips(self.run.skips, skip))

    def _begin(self, plan: ParallelPlan) -> Beginning | None:
        """Where the ranks begin; None while no checkpoint can be used, which an outage of the storage may be."""
        try:
            return self.outset.find(self._job(plan), self.run, self.lock.epoch, self.muster.up)
        except NothingLeft as nothing:
            self.decide(self.vigil.judge(nothing, resumed=self.start_reason == "resume"))
            return None

    def _start(self, plan: ParallelPlan, nodes: Mapping[str, AgentAddress], at: Beginning) -> None:
        wanted, paths = self.request.job, self.store.paths
        self.state = form(self.run, plan, nodes, self.request.cluster, point=at.point, script=wanted.kind == "script")
        if self.start_reason in ("restart", "move"):
            self.decide(swapped(self.run, self.state), **self.shortage.told)
        write_atomic(paths.job(self.state.attempt), dump(self._job(plan, at.skip)))
        self.memory.settle(paths.memory(self.state.attempt), at.point)
        self.outset.sign(paths.debt(self.state.attempt))
        planned = told(self.run, self.state, wanted.plan, reason=self.start_reason)
        self.record(EventKind.ATTEMPT_PLANNED, **planned, **at.told, **self.shortage.told)
        self.muster.clocks.first(next(iter(self.state.placement)))
        self.start_reason = "restart"
        self.hangs.start(plan, self.clock.monotonic(), self.state.nodes)
        self.enter(Phase.RUN)
        try:
            spawn(self.gang, self.request, self.state, self.lock.epoch)
        except ClusterError as error:  # a node fell between being counted and being used
            self._suspect(Failure(kind=FailureKind.NODE_LOST, time=self.clock.time(), detail=error.what))

    # --- running and failing --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self.state is not None
        with contextlib.suppress(ClusterError):  # a gang that trains needs nothing of the cluster; its spares can wait
            self.muster.call_up(self.gang, urgent=False)
        if self.state.all_finished:
            self._finish(self.state)
        else:
            self._watch_for_hangs(self.state)
        if self.phase is Phase.RUN and (news := self.outset.settle()):
            self.record(EventKind.FENCE_LAID, **news)
        if self.phase is Phase.RUN and (gone := self.departure.look(self.gang, self.state, self.hangs)) is not None:
            self._suspect(gone)

    def _finish(self, state: GangState) -> None:
        """Every rank has exited well: the run is done, or they have left, as they were asked to or not."""
        steps = self.request.job.train.steps
        if state.script or state.last_step >= steps:
            found = progress.result(self.store.paths, state.last_step, script=state.script)
            self.end(EventKind.RUN_SUCCEEDED, **found)
        elif self._excused(state):
            self._stop_ranks(state)
        else:
            self._suspect(recovery.deserted(state.last_step, steps, self.clock.time()))

    def _excused(self, state: GangState) -> bool:
        """Ranks that have all exited well were asked to leave, or are done."""
        done = state.last_step >= self.request.job.train.steps or progress.completed(self.store.paths, self.request.job)
        return state.asked or bool(done)

    def _watch_for_hangs(self, state: GangState) -> None:
        now, wall = self.clock.monotonic(), self.clock.time()
        hang = self.hangs.look(self.gang, state.attempt, state.world_size, now=now, wall=wall)
        if hang is not None:
            write_atomic(self.store.paths.hang(state.attempt), dump(self.hangs.account(hang, state.world_size)))
            self._suspect(hang)

    def _suspect(self, failure: Failure) -> None:
        """Take in one piece of evidence; the first stops the gang, later ones only explain."""
        state = self.state
        assert state is not None
        state.evidence.append(failure)
        if self.phase is Phase.STOP:
            return
        fired = [float(record["time"]) for record in self.log.new_faults()]
        self.record(
            EventKind.FAILURE_DETECTED,
            failure=failure,
            last_step=state.last_step,
            failed_at=min(fired, default=failure.time),
        )
        self._stop_ranks(state)

    def _stop_ranks(self, state: GangState) -> None:
        self.gang.kill(state.attempt, grace_s=0.0)
        self.hangs.end()
        self.departure.stragglers.end()
        self.enter(Phase.STOP)

    def _stop(self) -> None:
        """Wait until no rank of the attempt is left, then conclude."""
        state = self.state
        assert state is not None
        if self.gang.in_doubt and not self._cancelling:  # whoever does not answer may be heard again
            self._since = self.clock.monotonic()
        if not state.all_stopped:
            spec = self.request.recovery
            waited_s = self.clock.monotonic() - self._since - (spec.grace_s if self._cancelling else 0.0)
            for left_out in stopping.give_up_late(self.gang, state, waited_s, spec, self.clock.time()):
                self.record(EventKind.NODE_EXCLUDED, **left_out.fields)
        elif self._cancelling:
            self.end(EventKind.RUN_CANCELLED, reason="cancelled on request")
        elif state.all_finished and (not state.evidence or self._excused(state)):
            aftermath.regroup(self, state)
        else:
            rank_errors.keep(self.store.paths, state.attempt, state.evidence)
            aftermath.conclude(self, recovery.culprit(state.evidence))

    def _back_off(self) -> None:
        if self.clock.monotonic() >= self.pause_until:
            self.enter(Phase.GATHER)

    # --- ending ---------------------------------------------------------------------------------------------------

    def _begin_cancel(self) -> None:
        self._cancelling = True
        self.record(EventKind.CANCEL_REQUESTED)
        if self.phase is Phase.RUN and self.state is not None:
            self.gang.kill(self.state.attempt, grace_s=self.request.recovery.grace_s)
            self.enter(Phase.STOP)
        elif self.phase in (Phase.GATHER, Phase.BACKOFF):
            self.end(EventKind.RUN_CANCELLED, reason="cancelled on request")

    def end(self, kind: EventKind, **data: Any) -> None:
        """Record how the run ended, then give everything back."""
        self.record_faults()
        self.record(kind, **data)
        self.leave()

    def leave(self) -> None:
        """Give everything back; there is nothing more to do for this run."""
        self.enter(Phase.END)
        self.gang.shutdown_agents()
        self.backend.release()
