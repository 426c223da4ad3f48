"""Every fault that a drill knows: a list of values, in the order in which ``--faults all`` takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from launcher.drill import acts, promises
from launcher.drill.acts import Act
from launcher.drill.case import Case, Outcome
from launcher.drill.needs import Need
from launcher.drill.toy import EVERY, NUMERIC_STEP, STEPS
from launcher.recovery import Action, FailureKind
from launcher.run import EventKind

HANG_STEP = 7  # a gang must have made a few steps before it is known how long one takes
LONG = 80  # steps, for what takes its time: the pace of each rank is learned, or ranks leave in good order
LEARNED_STEP = 40
NAMED_IN = promises.NAMED_WITHIN + 4  # steps after which a slow rank has been named
RELIEVED_IN = 3 * EVERY  # steps, in which a checkpoint is found unsaved and a later one is due
ONE_SPARE: dict[str, object] = {"cluster.spares": 1}
TWO_SPARES = {"cluster.spares": 2}
AT_ONCE: dict[str, object] = {"recovery.shrink_after_s": 1.0}  # nobody waits for a node that will not come
FROM_DISK = {"checkpoint.memory_every": 0}
_RANK_GONE: tuple[str, ...] = (FailureKind.RANK_KILLED,)
_NODE_GONE: tuple[str, ...] = (FailureKind.NODE_LOST,)
_CUT_OFF: tuple[str, ...] = (FailureKind.PARTITIONED,)
_LET_GO = Act(do=acts.let_go, relief=True)

RANKS = (
    Case(
        name="rank_sigkill",
        what="a rank is killed (SIGKILL)",
        faults=("rank_kill@rank={rank},step={step},phase={phase}",),
        failures=_RANK_GONE,
        drawn=True,
        least_step=2,
    ),
    Case(
        name="rank_exit",
        what="a rank exits without a word",
        faults=("rank_exit@rank={rank},step={step},phase={phase}",),
        failures=(FailureKind.RANK_EXIT,),
        drawn=True,
        least_step=2,
    ),
    Case(
        name="rank_exception",
        what="a rank raises an exception",
        faults=("rank_error@rank={rank},step={step},phase={phase}",),
        failures=(FailureKind.RANK_ERROR,),
        drawn=True,
        least_step=2,
    ),
    Case(
        name="device_lost",
        what="a device is gone, as its rank says: the spare takes the place of its node",
        faults=("device_lost@rank={rank},step={step},phase={phase}",),
        changes=ONE_SPARE,
        failures=(FailureKind.DEVICE_LOST,),
        drawn=True,
        least_step=2,
    ),
    Case(
        name="rank_sigstop",
        what="a rank is stopped (SIGSTOP) and never goes on",
        faults=("rank_stop@rank={rank},step={step}",),
        failures=(FailureKind.HANG,),
        drawn=True,
        least_step=HANG_STEP,
    ),
    Case(
        name="gil_hold",
        what="a rank holds the interpreter's lock for ever: none of its Python threads runs",
        faults=("rank_spin@rank={rank},step={step}",),
        failures=(FailureKind.HANG,),
        drawn=True,
        least_step=HANG_STEP,
    ),
    Case(
        name="deadlock",
        what="a rank enters a collective of another group than its own, and all wait for each other",
        faults=("rank_deadlock@rank={rank},step={step}",),
        failures=(FailureKind.HANG,),
        needs=(Need.TWO_NODES,),
        drawn=True,
        least_step=HANG_STEP,
    ),
    Case(
        name="straggler",
        what="a rank becomes slow and stays so: it must be named, and nothing restarted",
        faults=("rank_slow@rank={rank},step={step}",),
        needs=(Need.TWO_NODES,),
        events=(EventKind.STRAGGLER_FOUND,),
        promises=(promises.named_soon,),
        steps=LONG,
        drawn=True,
        least_step=LEARNED_STEP,
        last_step=LONG - NAMED_IN,
    ),
)

NODES = (
    Case(
        name="node_kill",
        what="a node dies: its agent and everything on it; the spare takes its place",
        faults=("node_kill@node={node},step={step},phase={phase}",),
        changes=ONE_SPARE,
        failures=_NODE_GONE,
        drawn=True,
        least_step=2,
    ),
    Case(
        name="agent_kill",
        what="the host agent of a node is killed alone",
        faults=("agent_kill@node={node},step={step}",),
        changes=ONE_SPARE,
        failures=_NODE_GONE,
        drawn=True,
        least_step=2,
    ),
    Case(
        name="node_kill_in_checkpoint",
        what="a node dies when shards are on disk and the checkpoint is not committed",
        faults=("node_kill@node={node},step={step},phase=shards_written",),
        changes=ONE_SPARE,
        failures=_NODE_GONE,
        saving=True,
        drawn=True,
    ),
    Case(
        name="node_kill_in_restore",
        what="a rank dies, and a node dies while the new ranks restore",
        faults=("rank_kill@rank={rank},step={step}", "node_kill@node={node},phase=restore"),
        changes=ONE_SPARE,
        failures=_NODE_GONE,
        drawn=True,
    ),
    Case(
        name="node_kill_in_recovery",
        what="a rank dies, and a node dies before the ranks train again",
        faults=("rank_kill@rank={rank},step={step}",),
        acts=(
            Act(
                do=acts.kill_node("other"),
                after=EventKind.FAILURE_DETECTED,
                before=EventKind.TRAINING_STARTED,
                strikes="other",
            ),
        ),
        changes=ONE_SPARE,
        failures=(FailureKind.NODE_LOST, Action.SWAP),  # seen to go, or found gone when the next gang is formed
        drawn=True,
    ),
    Case(
        name="two_nodes",
        what="two nodes die at once; two spares take their places",
        faults=("node_kill@node={node},step={step}", "node_kill@node={other},step={step}"),
        changes=TWO_SPARES,
        needs=(Need.TWO_NODES,),
        failures=_NODE_GONE,
        drawn=True,
    ),
    Case(
        name="spare_dies_first",
        what="the spare dies, then a node of the gang: a smaller plan takes over",
        acts=(Act(do=acts.kill_node("spare"), held=True), Act(do=acts.kill_node("target"), strikes="target"), _LET_GO),
        changes=ONE_SPARE | AT_ONCE,
        needs=(Need.TWO_NODES,),
        failures=_NODE_GONE,
        outcome=Outcome.CLOSE,
        drawn=True,
    ),
    Case(
        name="no_spare_left",
        what="a node dies and there is no spare: a smaller plan takes over",
        faults=("node_kill@node={node},step={step}",),
        changes=AT_ONCE,
        needs=(Need.TWO_NODES,),
        failures=_NODE_GONE,
        outcome=Outcome.CLOSE,
        drawn=True,
    ),
    Case(
        name="preemption",
        what="a node is told to leave (SIGTERM), as clouds do: the ranks save and leave in time",
        acts=(Act(do=acts.give_notice, held=True, strikes="target"), _LET_GO),
        changes=ONE_SPARE,
        failures=(Action.LEAVE,),
        promises=(promises.left_in_time,),
        steps=LONG,
        drawn=True,
    ),
)

LINKS = (
    Case(
        name="partition",
        what="a node's link goes down, nothing is closed; the spare takes its place",
        acts=(Act(do=acts.cut, held=True, strikes="target"), _LET_GO),
        changes=ONE_SPARE,
        needs=(Need.NETWORK, Need.TWO_NODES),
        network=True,
        failures=_CUT_OFF,
        drawn=True,
    ),
    Case(
        name="partition_heals",
        what="a node's link goes down, and comes up again when the others have gone on without it",
        acts=(
            Act(do=acts.cut, held=True, strikes="target"),
            _LET_GO,
            Act(
                do=acts.mend,
                after=EventKind.TRAINING_STARTED,
                attempt=2,
                before=EventKind.RUN_SUCCEEDED,
                relief=True,
            ),
        ),
        changes=ONE_SPARE | {"recovery.lease_s": 60.0},  # who was cut off is still there
        needs=(Need.NETWORK, Need.TWO_NODES),
        network=True,
        failures=_CUT_OFF,
        promises=(promises.outlived,),
        drawn=True,
    ),
    Case(
        name="slow_link",
        what=f"a node's link carries {acts.SLOW_RATE} from now on: slow is no failure",
        acts=(
            Act(do=acts.slow_down, held=True, strikes="target"),
            _LET_GO,
            Act(do=acts.count_packets, after=EventKind.RUN_SUCCEEDED, relief=True),
        ),
        needs=(Need.NETWORK, Need.SHAPING, Need.TWO_NODES),
        network=True,
        drawn=True,
    ),
)


def _damaged(name: str, what: str, do: Callable[[acts.Stage], str]) -> Case:
    """The newest checkpoint on disk is damaged, and then a rank dies."""
    return Case(
        name=name,
        what=what,
        acts=(Act(do=do, held=True, saved=True), Act(do=acts.kill_held, strikes="rank")),
        changes=FROM_DISK,
        failures=_RANK_GONE,
        events=(EventKind.CHECKPOINT_REJECTED,),
        least_step=8,
        drawn=True,
    )


STORAGE = (
    Case(
        name="disk_full",
        what="the disk of the checkpoints is full for a while: training goes on, and says so",
        acts=(
            Act(do=acts.fill_disk, held=True),
            _LET_GO,
            Act(do=acts.free_disk, after=EventKind.CHECKPOINT_FAILED, relief=True),
        ),
        disk="small",
        needs=(Need.TMPFS,),
        events=(EventKind.CHECKPOINT_FAILED,),
        drawn=True,
        last_step=STEPS - RELIEVED_IN,
    ),
    Case(
        name="stuck_storage",
        what="the disk of the checkpoints alone hangs in the kernel for a while: training goes on, and says so",
        acts=(
            Act(do=acts.freeze_disk, held=True),
            _LET_GO,
            Act(do=acts.thaw_disk, after=EventKind.CHECKPOINT_FAILED, relief=True),
        ),
        disk="freezable",
        needs=(Need.FREEZE,),
        events=(EventKind.CHECKPOINT_FAILED,),
        drawn=True,
        last_step=STEPS - RELIEVED_IN,
    ),
    Case(
        name="stuck_writer",
        what="a rank stands still in the middle of a checkpoint, and nobody notices from the outside",
        faults=("rank_stop@rank={rank},step={step},phase=checkpoint",),
        failures=(FailureKind.HANG,),
        saving=True,
        drawn=True,
        least_step=HANG_STEP,
    ),
    _damaged("truncated_shard", "half of a shard of the newest checkpoint is missing when it is needed", acts.truncate),
    _damaged("flipped_bit", "one bit of a shard of the newest checkpoint is wrong when it is needed", acts.flip_bit),
    _damaged("missing_shard", "a shard of the newest checkpoint is gone when it is needed", acts.remove_shard),
    _damaged(
        "corrupt_manifest", "the manifest of the newest checkpoint is damaged when it is needed", acts.spoil_manifest
    ),
)

NUMBERS = (
    Case(
        name="nan_gradient",
        what="a gradient is NaN: back to before it, without the samples of that step",
        faults=("nan_grad@rank={rank},step={step}",),
        failures=(FailureKind.NUMERIC,),
        numeric=True,
        least_step=NUMERIC_STEP,
        drawn=True,
    ),
    Case(
        name="loss_spike",
        what="the loss is a hundred times too large: back to before it, without the samples of that step",
        faults=("loss_spike@rank={rank},step={step}",),
        failures=(FailureKind.NUMERIC,),
        numeric=True,
        least_step=NUMERIC_STEP,
        drawn=True,
    ),
)

_ADOPTING = Case(
    name="controller_kill_run",
    what="the controller is killed while the ranks train: they go on, and are adopted",
    ambush="run",
    adopted=True,
    resumes=1,
    drawn=True,
)

CONTROL = (
    Case(
        name="controller_kill_gather",
        what="a rank dies, and the controller is killed while it gathers nodes for the next attempt",
        faults=("rank_kill@rank={rank},step={step}",),
        ambush="gather",
        failures=_RANK_GONE,
        resumes=1,
        drawn=True,
    ),
    _ADOPTING,
    replace(
        _ADOPTING,
        name="controller_kill_start",
        what="the controller is killed while the first ranks start",
        ambush_late=False,
        adopted=False,
        drawn=False,  # its place is always the same
    ),
    Case(
        name="controller_kill_stop",
        what="a rank dies, and the controller is killed while it stops the others",
        faults=("rank_kill@rank={rank},step={step}",),
        ambush="stop",
        failures=(*_RANK_GONE, FailureKind.SECONDARY),
        resumes=1,
        drawn=True,
    ),
    Case(
        name="controller_kill_backoff",
        what="a rank dies twice at the same step, and the controller is killed while it waits before the next attempt",
        faults=("rank_kill@rank={rank},step={step}",) * 2,
        ambush="backoff",
        failures=_RANK_GONE,
        resumes=1,
        drawn=True,
    ),
    Case(
        name="controller_kill_end",
        what="the controller is killed when the end is recorded and nothing given back: agents leave by their lease",
        ambush="end",
        changes={"recovery.lease_s": 4.0},
        drawn=True,
    ),
    Case(
        name="ray_head_kill",
        what="the head of the Ray cluster dies, and then a rank: what does not go on by itself is resumed",
        faults=("rank_kill@rank={rank},step={later}",),
        failures=_RANK_GONE,
        acts=(Act(do=acts.kill_ray_head, held=True), _LET_GO),
        changes={"cluster.kind": "local"},
        needs=(Need.RAY,),
        resumes=1,
        drawn=False,  # minutes, most of them Ray's own
    ),
)

CATALOGUE: tuple[Case, ...] = (*RANKS, *NODES, *LINKS, *STORAGE, *NUMBERS, *CONTROL)


def named(name: str) -> Case | None:
    """The fault of that name."""
    return next((case for case in CATALOGUE if case.name == name), None)
