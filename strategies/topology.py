"""Rank <-> coordinates, process groups, placement on nodes, and a picture of it all.

Ranks count with the model axis innermost, then data, then pipe, exactly as DeepSpeed's
``PipeModelDataParallelTopology``: ``rank = (pipe * data_size + data) * tp + model``. Neighbouring ranks are thus
tensor-parallel peers, and filling nodes with consecutive ranks keeps them inside a node where they fit. Sequence- and
context-parallel ranks lie on the data axis, as in DeepSpeed: ``data = (replica * cp + context) * sp + sequence``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from strategies.errors import NotFound, PlanInfeasible, Violation
from strategies.plan import ParallelPlan

_NODES_DRAWN_ONE_BY_ONE = 16
_WIDEST_LINE = 100
_LONGEST_NAME = 24
_LINES_AT_MOST = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Place of a rank in the plan.

    Attributes:
        pipe: Pipeline stage.
        data: Index on the data axis: replica, and part of the sequence within it.
        model: Tensor-parallel shard.
    """

    pipe: int
    data: int
    model: int

    def __str__(self) -> str:
        return f"({self.pipe},{self.data},{self.model})"


class Topology:
    """The axes of a plan as arithmetic on rank numbers; O(1) memory for any number of ranks.

    Args:
        plan: A plan with positive degrees.
    """

    def __init__(self, plan: ParallelPlan) -> None:
        self.pipe_size = plan.pp
        self.data_size = plan.dp * plan.sp * plan.cp
        self.model_size = plan.tp
        self.seq_size = plan.sp
        self.world_size = plan.world_size

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of ``rank``. Raises NotFound for a rank outside of the world."""
        if not 0 <= rank < self.world_size:
            raise NotFound(f"There is no rank {rank}.", hint=f"ranks go from 0 to {self.world_size - 1}")
        replica, model = divmod(rank, self.model_size)
        pipe, data = divmod(replica, self.data_size)
        return Coordinates(pipe=pipe, data=data, model=model)

    def rank_of(self, at: Coordinates) -> int:
        """Rank at ``at``. Raises NotFound for coordinates outside of the plan."""
        sizes = (self.pipe_size, self.data_size, self.model_size)
        values = (at.pipe, at.data, at.model)
        if not all(0 <= value < size for value, size in zip(values, sizes, strict=True)):
            raise NotFound(f"There is no rank at {at}.", hint=f"the axes pipe, data, model have sizes {sizes}")
        return (at.pipe * self.data_size + at.data) * self.model_size + at.model

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the shards of the same layers and see the same samples, in order of their shard."""
        start = rank - self.coordinates(rank).model
        return tuple(range(start, start + self.model_size))

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same weights and see different samples, in order of their replica."""
        at = self.coordinates(rank)
        start = at.pipe * self.data_size * self.model_size + at.model
        return tuple(range(start, start + self.data_size * self.model_size, self.model_size))

    def sp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that have the other parts of the same sequences (Ulysses), in order of their parts."""
        start = rank - self.coordinates(rank).data % self.seq_size * self.model_size
        return tuple(range(start, start + self.seq_size * self.model_size, self.model_size))

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that pass activations of the same samples to each other, first stage to last."""
        stride = self.data_size * self.model_size
        return tuple(range(rank - self.coordinates(rank).pipe * stride, self.world_size, stride))


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRanks:
    """The ranks of one node, ascending; the position of a rank in ``ranks`` is its local rank.

    Attributes:
        node: Name of the node.
        ranks: Global ranks.
    """

    node: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Which node carries which ranks.

    Attributes:
        assignments: One entry per node that carries ranks, in order of the ranks.
        slots_per_node: Number of devices per node.
    """

    assignments: tuple[NodeRanks, ...]
    slots_per_node: int

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that carry ranks; the position is the node rank."""
        return tuple(entry.node for entry in self.assignments)

    def node_rank(self, rank: int) -> int:
        """Index in ``assignments`` of the node of ``rank``. Raises NotFound for a rank that is not placed."""
        index = rank // self.slots_per_node
        if not 0 <= index < len(self.assignments) or rank not in self.assignments[index].ranks:
            raise NotFound(f"Rank {rank} is not placed on any node.")
        return index

    def node_of(self, rank: int) -> str:
        """Name of the node that carries ``rank``."""
        return self.assignments[self.node_rank(rank)].node

    def local_rank(self, rank: int) -> int:
        """Index of ``rank`` among the ranks of its node."""
        return rank - self.assignments[self.node_rank(rank)].ranks[0]


def nodes_needed(plan: ParallelPlan, slots_per_node: int) -> int:
    """Number of nodes that the plan takes when it fills them one after the other."""
    return -(-plan.world_size // slots_per_node)


def place(plan: ParallelPlan, nodes: Sequence[str], slots_per_node: int) -> Placement:
    """Fill nodes with consecutive ranks, whole nodes first to last; the last one may stay partly empty.

    Args:
        plan: The plan.
        nodes: Names of the nodes to use, in order; those that are not needed are left alone.
        slots_per_node: Ranks per node.

    Raises:
        PlanInfeasible: There are too few nodes.
    """
    needed = nodes_needed(plan, slots_per_node) if slots_per_node > 0 else 0
    if slots_per_node < 1 or needed > len(nodes):
        raise PlanInfeasible(
            [
                Violation(
                    rule="world_size_fits_cluster",
                    message=f"{plan.describe()} needs {plan.world_size} ranks = {needed} nodes of {slots_per_node} "
                    f"slots, there are {len(nodes)} nodes",
                    hint="add nodes, or choose smaller degrees",
                )
            ],
            what="The plan does not fit the nodes:",
        )
    world = plan.world_size
    return Placement(
        assignments=tuple(
            NodeRanks(node=node, ranks=tuple(range(i * slots_per_node, min(world, (i + 1) * slots_per_node))))
            for i, node in enumerate(nodes[:needed])
        ),
        slots_per_node=slots_per_node,
    )


def draw(plan: ParallelPlan, placement: Placement) -> str:
    """A picture for people: the nodes, their ranks and the coordinates (pipe, data, model) of each rank.

    A few ranks are drawn one by one. Up to 16 nodes have a line each; of more, neighbours of equal shape on the same
    stages share a line.
    """
    topology = Topology(plan)
    head = [
        f"{plan.describe()}: {_count(plan.world_size, 'rank')} on {_count(len(placement.assignments), 'node')} "
        f"of {_count(placement.slots_per_node, 'slot')}; rank (pipe, data, model)",
        *_notes(topology, placement),
    ]
    rows = _rank_rows(topology, placement)
    if len(placement.assignments) > _NODES_DRAWN_ONE_BY_ONE:
        rows = _grouped_rows(topology, placement)
    elif max(len(line) for line in _aligned(rows)) > _WIDEST_LINE:
        rows = [_group_row(topology, [entry]) for entry in placement.assignments]
    stages = [_stage_line(plan, stage) for stage in range(plan.pp)] if 1 < plan.pp <= _NODES_DRAWN_ONE_BY_ONE else []
    return "\n".join([*head, *_aligned(rows), *stages])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _notes(topology: Topology, placement: Placement) -> list[str]:
    """What a person should know about the placement and would not see at a glance."""
    notes = []
    slots, tp = placement.slots_per_node, topology.model_size
    groups = topology.world_size // tp
    split = sum(1 for i in range(groups) if i * tp // slots != ((i + 1) * tp - 1) // slots)
    if split:
        notes.append(f"note: {split} of {groups} tensor-parallel groups cross nodes (slow: tp {tp}, {slots} slots)")
    idle = slots * len(placement.assignments) - topology.world_size
    if idle:
        notes.append(f"note: {_count(idle, 'slot')} of the last node stay{'s' if idle == 1 else ''} empty")
    return notes


def _stage_line(plan: ParallelPlan, stage: int) -> str:
    if stage >= len(plan.stages):
        return f"  stage {stage}: no blocks"
    start = sum(plan.stages[:stage])
    extras = " + embedding" * (stage == 0) + " + head" * (stage == plan.pp - 1)
    return f"  stage {stage}: blocks {_span(start, start + plan.stages[stage] - 1)}{extras}"


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with straight columns."""
    columns = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    ]


def _rank_rows(topology: Topology, placement: Placement) -> list[tuple[str, ...]]:
    """One row per node: every rank with its coordinates."""
    width = len(str(topology.world_size - 1))
    rows: list[tuple[str, ...]] = []
    for entry in placement.assignments[: _NODES_DRAWN_ONE_BY_ONE + 1]:
        ranks = (f"{rank:>{width}} {topology.coordinates(rank)}" for rank in entry.ranks)
        rows.append((_short(entry.node), "| " + " | ".join(ranks) + " |"))
    return rows


def _extent(topology: Topology, first: int, last: int) -> tuple[str, ...]:
    """Ranks first..last as ranges of their coordinates."""
    low, high = topology.coordinates(first), topology.coordinates(last)
    data = (low.data, high.data) if low.pipe == high.pipe else (0, topology.data_size - 1)
    model = (low.model, high.model) if (low.pipe, low.data) == (high.pipe, high.data) else (0, topology.model_size - 1)
    return (
        f"ranks {_span(first, last)}",
        f"pipe {_span(low.pipe, high.pipe)}",
        f"data {_span(*data)}",
        f"model {_span(*model)}",
    )


def _shape(topology: Topology, entry: NodeRanks) -> tuple[int, int, int, int, int]:
    """What makes two nodes equal: the stages on them, the number of ranks and where the shards begin and end."""
    low, high = topology.coordinates(entry.ranks[0]), topology.coordinates(entry.ranks[-1])
    return low.pipe, high.pipe, len(entry.ranks), low.model, high.model


def _grouped_rows(topology: Topology, placement: Placement) -> list[tuple[str, ...]]:
    rows = [_group_row(topology, entries) for entries in _runs(topology, placement, fine=True)]
    if len(rows) > _LINES_AT_MOST:  # shards begin and end differently on every node: tell only the stages apart
        rows = [_group_row(topology, entries) for entries in _runs(topology, placement, fine=False)]
    if len(rows) > _LINES_AT_MOST:
        half = _LINES_AT_MOST // 2
        rows = [*rows[:half], ("...", f"{len(rows) - 2 * half} lines of nodes left out"), *rows[-half:]]
    return rows


def _runs(topology: Topology, placement: Placement, *, fine: bool) -> list[list[NodeRanks]]:
    """Neighbouring nodes of equal shape; without ``fine``, of equal stages."""
    runs = groupby(placement.assignments, key=lambda entry: _shape(topology, entry)[: 5 if fine else 2])
    return [list(members) for _, members in runs]


def _group_row(topology: Topology, entries: list[NodeRanks]) -> tuple[str, ...]:
    first, last = entries[0], entries[-1]
    name = _short(first.node)
    if len(entries) > 1:
        name = f"{name} .. {_short(last.node)} ({len(entries)} nodes)"
    return name, *_extent(topology, first.ranks[0], last.ranks[-1])
