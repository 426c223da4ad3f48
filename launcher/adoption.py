"""How a controller begins: find out what is alive, adopt the gang, or clear it away and start from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.checkpoint.layout import Token
from launcher import aftermath, progress, rank_errors, stopping
from launcher.attempts import Attempt
from launcher.controller import Controller
from launcher.gang import Observation
from launcher.gang_state import GangState
from launcher.lock import identity
from launcher.phase import Phase
from launcher.recovery import Action, Decision, Failure, FailureKind, culprit
from launcher.run import EventKind, Run, RunState
from launcher.sizing import plan_of, wanted_of
from launcher.store import read_json
from strategies.codec import from_json, to_json
from strategies.errors import PlanInfeasible
from strategies.topology import place

Welcomes = Mapping[str, Mapping[str, Any]]
REPLAY_S = 0.5  # an agent that answers tells at once all that it remembers
_ASKING = (Action.GROW, Action.REPLACE)


def begin(controller: Controller, *, resume: Mapping[str, Any] | None = None, adopt: bool = True) -> None:
    """Bring a new controller to its first phase.

    Args:
        controller: Fresh from its constructor.
        resume: A person's wish to continue (``overrides``, ``changes``); None at the first submit and when a
            controller replaces a dead one by itself.
        adopt: A live gang may be taken over as it is (false when the request was changed).
    """
    welcomes, heard = _meet_agents(controller)
    if _over(controller.run, resume):
        controller.leave()  # its predecessor fell between recording the end and giving everything back
        return
    adopts = adopt and _adoptable(controller, welcomes)
    if not adopts:
        heard += _clear(controller, welcomes, asked=_unfinished(controller.run))
    wish = {"id": resume["id"]} if adopts and resume and "id" in resume else {}
    held = controller.run.attempt.number if adopts and controller.run.attempt else 0
    controller.record(EventKind.CONTROLLER_STARTED, attempt=held, **identity(), adopted=adopts, **wish)
    if _over(controller.run, resume):  # from here on nothing of a predecessor counts; until then it may have ended it
        controller.leave()
        return
    controller.muster.clocks.begin(controller.store.events())
    if adopts and _adoptable(controller, welcomes):
        _adopt(controller, welcomes)
        for seen in heard:
            controller.observe(seen)
    else:
        heard += _clear(controller, welcomes, asked=True) if adopts else []
        _go_on(controller, welcomes, heard, resume)


def _over(run: Run, resume: Mapping[str, Any] | None) -> bool:
    """Nothing is left to do: the run has ended, and nobody wants it to go on, or nobody can."""
    return run.state is RunState.SUCCEEDED or (run.state.terminal and resume is None)


def _unfinished(run: Run) -> bool:
    return run.attempt is not None and run.attempt.ended is None


def _go_on(
    controller: Controller, welcomes: Welcomes, heard: Sequence[Observation], resume: Mapping[str, Any] | None
) -> None:
    """Nothing lives that could be adopted."""
    attempt, unfinished = controller.run.attempt, _unfinished(controller.run)
    if resume is not None:
        last = last_metric_step(controller, attempt.number) if attempt is not None and unfinished else 0
        controller.record(EventKind.RESUME_REQUESTED, request=controller.request.digest, last_step=last, **resume)
        controller.start_reason = "resume"
        return
    if unfinished:
        _lost_gang(controller, welcomes, heard)
    else:
        aftermath.go_on(controller)


def _meet_agents(controller: Controller) -> tuple[dict[str, Mapping[str, Any]], list[Observation]]:
    """Connect to every announced agent; returns the welcome of each that answers, and all that was heard meanwhile."""
    heard: list[Observation] = []
    known = list(controller.muster.look().values())
    controller.gang.connect(known)
    welcomes: dict[str, Mapping[str, Any]] = {}
    gone: set[str] = set()
    deadline = controller.clock.monotonic() + controller.request.recovery.detect_s
    while len(welcomes) + len(gone) < len(known) and controller.clock.monotonic() < deadline:
        controller.lock.beat()
        for seen in controller.gang.poll(0.1):
            heard.append(seen)
            if seen.kind == "agent_up":
                welcomes[seen.node] = seen.data
            elif seen.kind == "agent_lost":
                gone.add(seen.node)
            controller.note_agent(seen)
    return welcomes, [seen for seen in heard if seen.kind != "agent_up"]


def _adoptable(controller: Controller, welcomes: Welcomes) -> bool:
    """Every node of the newest attempt answers and holds all its ranks, and nobody has begun to stop them."""
    attempt = controller.run.attempt
    if attempt is None or attempt.ended is not None:
        return False
    if controller.run.state not in (RunState.STARTING, RunState.RUNNING):
        return False
    plan, job = plan_of(attempt), controller.request.job
    if plan is None or wanted_of(attempt) != job.plan:
        return False
    if read_json(controller.store.paths.job(attempt.number)) != to_json(job.under(plan).skipping(controller.run.skips)):
        return False  # a resume had changed the request when its controller fell
    if not all(
        welcomes.get(node, {}).get("attempt") == attempt.number
        and not any((rank.get("exited") or {}).get("requested") for rank in welcomes[node].get("ranks", ()))
        for node in attempt.nodes
    ):
        return False
    held = [rank for ranks in _ranks_of(controller, attempt, welcomes).values() for rank in ranks]
    return sorted(held) == list(range(plan.world_size))


def _ranks_of(controller: Controller, attempt: Attempt, welcomes: Welcomes) -> dict[str, dict[int, int]]:
    """Node to its ranks with their process ids: as on record or, where a predecessor fell before that, as agents say.

    An agent that has been told to start ranks will; until then their process ids are 0.
    """
    found: dict[str, dict[int, int]] = {node: {} for node in attempt.nodes}
    path = controller.store.paths.ranks(attempt.number)
    if path.exists():
        for entry in read_json(path):
            found[entry["node"]][entry["rank"]] = entry["pid"]
        return found
    for node, ranks in found.items():
        ranks |= {int(entry["rank"]): int(entry["pid"]) for entry in welcomes[node].get("ranks", ())}
    return found


def _remember_orders(controller: Controller, state: GangState, welcomes: Welcomes) -> None:
    """What the ranks were asked to do before this controller came: to leave after a step, or at a checkpoint."""
    state.remaining_s = {n: float(welcomes[n]["leaves_in_s"]) for n in state.placement if "leaves_in_s" in welcomes[n]}
    after = {int(welcomes[node].get("leave_after", 0)) for node in state.placement}
    state.leave_after = max(after, default=0)
    if len(after) > 1:  # the word had not come to all nodes: ranks that have it would wait for those that go on
        controller.gang.leave(state.attempt, state.leave_after)
    if controller.store.paths.leave(state.attempt).exists():
        excluded = any(controller.run.excluded.get(node, 0.0) > controller.clock.time() for node in state.placement)
        state.leaving = "move" if excluded else "grow"
    elif state.leave_after:
        state.leaving = "move"


def _adopt(controller: Controller, welcomes: Welcomes) -> None:
    """Take over the live attempt. Its agents replay what they have seen, so nothing is missed."""
    attempt = controller.run.attempt
    assert attempt is not None
    plan = plan_of(attempt)
    assert plan is not None
    held = _ranks_of(controller, attempt, welcomes)
    log = controller.store.events()
    mine = [event for event in log if event.attempt == attempt.number]
    script, training = controller.request.job.kind == "script", controller.run.state is RunState.RUNNING
    # A script has begun with its ranks: a controller that fell between these two lines has both said again.
    told = any(event.kind is EventKind.RANKS_SPAWNED for event in mine) and (training or not script)
    controller.state = GangState(
        attempt=attempt.number,
        plan=plan,
        placement={node: sorted(ranks) for node, ranks in held.items()},
        script=script,
        resume_from=attempt.resume_from,
        spawned=held if told else {},  # else the agents' own word of it is put on record
        commits={int(e.data["step"]) for e in mine if e.kind is EventKind.CHECKPOINT_COMMITTED},
        unsaved={float(e.data.get("told", 0.0)) for e in mine if e.kind is EventKind.CHECKPOINT_FAILED},
        afresh={str(e.data["node"]) for e in mine if e.kind is EventKind.POOL_UNSAFE},
        first_step=attempt.first_step,
        last_step=max(attempt.last_step, last_metric_step(controller, attempt.number)),
        training=training,
        asked=any(event.data.get("action") in _ASKING for event in mine),
    )
    _remember_orders(controller, controller.state, welcomes)
    controller.state.asked |= bool(controller.state.leave_after)
    if not any(event.kind is EventKind.FENCE_LAID for event in mine):
        controller.outset.inherit(controller.store.paths.debt(attempt.number), Token(attempt.epoch, attempt.number))
    if controller.state.training:
        controller.watch_training(controller.state)
    else:
        controller.hangs.start(plan, controller.clock.monotonic(), controller.state.nodes)
    since = controller.state.last_step - max(controller.run.committed_step, attempt.first_step - 1)
    words = f"all {len(attempt.nodes)} nodes answer and hold attempt {attempt.number} at step "
    words += f"{controller.state.last_step}: taking it over loses 0 steps, a restart {max(0, since)}"
    controller.record(EventKind.DECISION, **Decision(action=Action.ADOPT, reason=words).fields)
    controller.enter(Phase.RUN)


def _clear(controller: Controller, welcomes: Welcomes, *, asked: bool) -> list[Observation]:
    """End what is left of attempts that will not be adopted; returns what was heard meanwhile, but for that end.

    Where it is ``asked`` for, agents are given the time to tell what they remember.
    """
    left = {node: int(data["attempt"]) for node, data in welcomes.items() if _has_live_ranks(data)}
    numbers, heard = set(left.values()), list[Observation]()
    for number in numbers:
        controller.gang.kill(number, grace_s=0.0)
    heard += _await_end(controller, left)
    deadline = controller.clock.monotonic() + REPLAY_S
    while asked and welcomes and controller.clock.monotonic() < deadline and (news := _listen(controller)):
        heard += news
    return [seen for seen in heard if not (numbers and seen.kind == "exit" and seen.data.get("requested"))]


def _await_end(controller: Controller, left: dict[str, int]) -> list[Observation]:
    """Until no rank is left on these nodes; those that say what keeps theirs, and take too long, are given up."""
    spec, since = controller.request.recovery, controller.clock.monotonic()
    heard, dying = list[Observation](), dict[str, list[dict[str, Any]]]()
    while left:
        waited_s = controller.clock.monotonic() - since
        for node in [node for node in left if waited_s >= stopping.patience_s(spec, dying=node in dying)]:
            del left[node]
            if node in dying:
                controller.gang.drop(node, stopping.why(dying[node], spec))
        news = _listen(controller) if left else []
        heard += news
        for seen in news:
            if seen.kind == "dying" and seen.data.get("attempt") == left.get(seen.node):
                dying[seen.node] = list(seen.data["left"])
            elif seen.kind in ("killed", "agent_lost"):
                left.pop(seen.node, None)
    return heard


def _listen(controller: Controller) -> list[Observation]:
    controller.lock.beat()
    heard = controller.gang.poll(0.1)
    for seen in heard:
        controller.note_agent(seen)
    return heard


def _has_live_ranks(welcome: Mapping[str, Any]) -> bool:
    ranks: Sequence[Mapping[str, Any]] = welcome.get("ranks", ())
    return bool(welcome.get("attempt")) and any(rank.get("exited") is None for rank in ranks)


def _lost_gang(controller: Controller, welcomes: Welcomes, heard: Sequence[Observation]) -> None:
    """A controller that replaces a dead one found the gang gone or broken: an ordinary failure, with its cause."""
    attempt = controller.run.attempt
    assert attempt is not None
    now = controller.clock.time()
    last = last_metric_step(controller, attempt.number)
    evidence = [*_known_failure(controller, attempt.number), *_evidence(controller, attempt, welcomes, heard, last)]
    if not evidence:
        held = any(welcomes.get(node, {}).get("attempt") == attempt.number for node in attempt.nodes)
        why = "its controller fell while the ranks started" if held else "the gang was gone when a new controller came"
        evidence.append(Failure(kind=FailureKind.NODE_LOST, time=now, step=last, detail=why))
    rank_errors.keep(controller.store.paths, attempt.number, evidence)
    failure = culprit(evidence)
    seen = float(progress.last_metric(controller.store.paths).get("time", 0.0))  # the last sign of life, by rank 0
    seen -= controller.muster.clocks.ahead_s(attempt.nodes[0])
    controller.record(
        EventKind.FAILURE_DETECTED, attempt=attempt.number, failure=failure, last_step=last, failed_at=min(seen, now)
    )
    aftermath.conclude(controller, failure)


def _evidence(
    controller: Controller, attempt: Attempt, welcomes: Welcomes, heard: Sequence[Observation], last: int
) -> list[Failure]:
    """What agents remember of an attempt, and which of them are gone: its controller had no time to record it."""
    plan = plan_of(attempt)
    try:
        placed = place(plan, attempt.nodes, controller.request.cluster.slots_per_node) if plan else None
    except PlanInfeasible:  # a resume had changed the cluster when its controller fell
        placed = None
    if plan is None or placed is None:
        return []
    placement = {entry.node: entry.ranks for entry in placed.assignments}
    trained = attempt.trained is not None
    state = GangState(attempt=attempt.number, plan=plan, placement=placement, last_step=last, training=trained)
    ours = map(controller.muster.clocks.ours, heard)
    found = [one for seen in ours for one in state.observe(seen) if isinstance(one, Failure)]
    lost = [node for node in attempt.nodes if node not in welcomes and node not in state.gone]
    if len(lost) == len(attempt.nodes):  # that was no accident of one of them
        return found
    now = controller.clock.time()
    detail = "node {} was gone when a new controller came"
    return found + [
        Failure(kind=FailureKind.NODE_LOST, time=now, node=node, step=last, detail=detail.format(node)) for node in lost
    ]


def _known_failure(controller: Controller, attempt: int) -> list[Failure]:
    """What the predecessor had detected when it fell in the middle of recovering from it; empty if nothing."""
    detected = [
        event
        for event in controller.store.events()
        if event.attempt == attempt and event.kind is EventKind.FAILURE_DETECTED
    ]
    return [from_json(Failure, event.data["failure"], where="events.jsonl") for event in detected[-1:]]


def last_metric_step(controller: Controller, attempt: int) -> int:
    """Highest step of an attempt in metrics.jsonl; 0 for none."""
    last = progress.last_metric(controller.store.paths)
    if int(last.get("attempt", 0)) == attempt:
        return int(last["step"])
    lines = controller.store.metrics()  # somebody who was cut off has written since
    return max((int(line["step"]) for line in lines if int(line["attempt"]) == attempt), default=0)
