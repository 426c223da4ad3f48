"""Which rank sits where: every node of a small cluster, or the stages over the nodes of a large one."""

from __future__ import annotations

from launcher.report.svg import CHARACTER, Svg
from strategies.plan import ParallelPlan
from strategies.specs import ClusterSpec
from strategies.topology import Topology, nodes_needed

WIDE = 1096.0
_NODES_IN_FULL = 16
_STAGES_SHOWN = 24
_ROW, _HIGH, _GAP = 78.0, 42.0, 22.0
_LIGHT, _DARK = (191, 219, 238), (0, 84, 140)


def placement(plan: ParallelPlan, cluster: ClusterSpec) -> tuple[str, str]:
    """The picture, and what to read under it."""
    nodes = nodes_needed(plan, cluster.slots_per_node)
    idle = cluster.nodes - nodes
    note = f"{plan.world_size:,} ranks on {nodes:,} nodes of {cluster.slots_per_node}"
    note += f"; {idle:,} further node{'s' if idle != 1 else ''} without ranks" if idle > 0 else ""
    note += f"; {cluster.spares:,} spare{'s' if cluster.spares != 1 else ''}" if cluster.spares else ""
    crossing = _crossing(plan, cluster.slots_per_node)
    note += f"; {crossing} tensor-parallel groups cross nodes, which is slow" if crossing else ""
    if nodes <= _NODES_IN_FULL and cluster.slots_per_node <= 16:
        return _nodes_in_full(plan, cluster, nodes), note + ". Colour: pipeline stage, first light, last dark."
    return _stages_over_nodes(plan, cluster, nodes), note + ". Every bar covers the nodes that carry the stage."


def _crossing(plan: ParallelPlan, slots: int) -> int:
    groups = plan.world_size // plan.tp
    return sum(1 for i in range(groups) if i * plan.tp // slots != ((i + 1) * plan.tp - 1) // slots)


def _shade(stage: int, pp: int) -> tuple[str, bool]:
    """Colour of a stage, and whether it is so dark that text on it must be white."""
    part = stage / (pp - 1) if pp > 1 else 0.35
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_LIGHT, _DARK, strict=True))
    return f"rgb({red},{green},{blue})", part > 0.45


def _nodes_in_full(plan: ParallelPlan, cluster: ClusterSpec, nodes: int) -> str:
    slots, topology = cluster.slots_per_node, Topology(plan)
    least = max(22.0, len(str(plan.world_size - 1)) * (CHARACTER + 1) + 8)
    cell = min(112.0, max(least, (WIDE + _GAP) / nodes / slots - _GAP / slots))
    columns = max(1, min(nodes, int((WIDE + _GAP + 0.1) / (slots * cell + _GAP))))
    if nodes > columns:  # rows of equal length look calmer than a short last one
        columns = -(-nodes // -(-nodes // columns))
    figure = Svg(WIDE, _ROW * -(-nodes // columns), "ranks on nodes")
    for node in range(nodes):
        x, y = node % columns * (slots * cell + _GAP), node // columns * _ROW
        figure.text(x, y + 12, f"node-{node}", "small")
        last = min(plan.world_size, (node + 1) * slots) - 1
        stages = [topology.coordinates(rank).pipe for rank in (node * slots, last)]
        where = f"stage {stages[0]}" + (f"-{stages[1]}" if stages[1] > stages[0] else "")
        if slots * cell > (len(where) + len(str(node)) + 6) * CHARACTER:
            figure.text(x + slots * cell - 2, y + 12, where, "soft small", anchor="end")
        for slot in range(slots):
            _cell(figure, topology, node * slots + slot, (x + slot * cell, y + 18), cell)
    return str(figure)


def _cell(figure: Svg, topology: Topology, rank: int, corner: tuple[float, float], cell: float) -> None:
    """One slot; where it is wide enough, with the coordinates of its rank."""
    x, y = corner
    if rank >= topology.world_size:
        figure.rect(x, y, cell - 2, _HIGH, "frame", tip="an empty slot")
        return
    at = topology.coordinates(rank)
    colour, dark = _shade(at.pipe, topology.pipe_size)
    tip = f"rank {rank}: stage {at.pipe}, replica {at.data}, shard {at.model}"
    figure.rect(x, y, cell - 2, _HIGH, "", tip=tip, fill=colour)
    ink, middle = "on" if dark else "dark", x + cell / 2 - 1
    if cell < 96:
        figure.text(middle, y + 25, str(rank), f"{ink} small", anchor="middle")
        return
    figure.text(middle, y + 18, f"rank {rank}", f"{ink} strong", anchor="middle")
    figure.text(middle, y + 34, f"replica {at.data}, shard {at.model}", f"{ink} small", anchor="middle")


def _stages_over_nodes(plan: ParallelPlan, cluster: ClusterSpec, nodes: int) -> str:
    slots, per_stage = cluster.slots_per_node, plan.world_size // plan.pp
    shown: list[int | None] = list(range(plan.pp))
    if plan.pp > _STAGES_SHOWN:
        half = _STAGES_SHOWN // 2
        shown = [*range(half), None, *range(plan.pp - half, plan.pp)]
    left, right, lane = 62.0, 170.0, 20.0
    zoom = 96.0
    figure = Svg(WIDE, zoom + lane * len(shown) + 44, "stages over nodes")
    room = WIDE - left - right
    _one_node(figure, plan, slots, room)
    for i, stage in enumerate(shown):
        y = zoom + lane * i
        if stage is None:
            figure.text(left - 8, y + 13, "...", "soft", anchor="end")
            continue
        first, last = stage * per_stage // slots, ((stage + 1) * per_stage - 1) // slots
        start, end = stage * per_stage / plan.world_size, (stage + 1) * per_stage / plan.world_size
        colour, _ = _shade(stage, plan.pp)
        figure.text(left - 8, y + 14, f"stage {stage}", "soft", anchor="end")
        figure.rect(left, y + 2, room, lane - 4, "lane")
        figure.rect(left + room * start, y + 2, room * (end - start), lane - 4, "", fill=colour, tip=f"stage {stage}")
        where = f"node {first:,}" if first == last else f"nodes {first:,} to {last:,}"
        figure.text(WIDE - right + 12, y + 14, where, "soft")
    axis = zoom + lane * len(shown) + 4
    figure.line(left, axis, left + room, axis, "axis")
    figure.text(left, axis + 17, "node 0", "soft")
    figure.text(left + room, axis + 17, f"node {nodes - 1:,}", "soft", anchor="end")
    return str(figure)


def _one_node(figure: Svg, plan: ParallelPlan, slots: int, room: float) -> None:
    """The first node with all its ranks: how tensor parallelism and replicas share a node."""
    topology, left = Topology(plan), 62.0
    shown = min(slots, 16, plan.world_size)
    figure.text(left - 8, 40, "node 0", "soft", anchor="end")
    for rank in range(shown):
        _cell(figure, topology, rank, (left + rank * room / shown, 14), room / shown)
    if slots > shown:
        figure.text(left, 74, f"the first {shown} of {slots} slots", "soft small")
