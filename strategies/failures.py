"""The failure process of a gang, in closed form: checkpoint intervals, spares and goodput.

Every node fails at a constant rate, so the gang of ``n`` nodes fails at ``L = n * rate``. Of the failures, a share
``f`` is correlated (a switch, a rack, the storage): only the checkpoint on disk survives these. The others leave the
replica in a peer's memory. A save stalls the step only for the copy out of the engine (``d`` seconds), which serves
both tiers; sending the replica and writing the file (``w`` seconds) overlap with the next steps, commit late, and bound
the intervals from below. After a failure the gang detects, takes a spare (or waits for a repair, or goes on smaller),
starts again, reads its state, and repeats what it had lost. :mod:`strategies.simulation` plays the same process event
by event.

Formulas, with ``T`` seconds of work between two saves and ``P = T + d``:

- **Interval**: J. W. Young, "A first order approximation to the optimum checkpoint interval" (CACM 1974):
  ``sqrt(2 d M)`` with ``M`` the mean time between failures; refined by J. T. Daly, "A higher order estimate of the
  optimum checkpoint interval for restart dumps" (FGCS 2006), eq. 37. The overlapped ``w`` is a constant factor of the
  progress (below), so the best ``T`` does not depend on it. With a memory tier, a save to disk takes a copy that is
  there anyway: it is due as often as the storage can follow, with every save to memory or every few of them.
- **Progress of one tier** under a rate ``L``: ``L T exp(-L w) / (exp(L P) - 1)`` per second of running. This is Daly's
  exact renewal form (his eq. 20, inverted), with a commit that comes ``w`` after the copy; derived here: a run of
  exponential length sees its j-th commit if it lasts ``j P + w``. The two tiers are nested: the disk tier sees the
  progress that the memory tier leaves.
- **Down time**: a recovery of ``r`` seconds that a failure starts over takes ``(exp(L r) - 1) / L`` (Daly 2006).
- **Waiting for nodes**: nodes break while the gang waits as while it works, so the broken ones are an infinite-server
  queue (:mod:`strategies.repair`), and the gang waits for as long as there are more of them than spares. What fails
  during a wait may take with it what memory held: with ``K`` failures in the waits that follow one failure on average,
  counted as geometric (exact without spares), memory is there with ``(1 - f) / (1 + f K)``. Going on with fewer
  replicas instead: as many are gone as that many broken nodes take.
- **Goodput** is the ETTR of Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters"
  (arXiv 2410.21680): seconds of work that counted over seconds of wall clock. Their first order form,
  ``1 - L (r + P / 2) - d / T``, is this one's expansion for small ``L``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from strategies.errors import ConfigError
from strategies.hardware import Hardware
from strategies.repair import SINGLE, Breaks, broken_nodes, scarcity, under_repair

DAY_S = 86400.0

CORRELATED = 0.1
"""Share of the failures that memory cannot recover. Llama 3 (arXiv 2407.21783, table 5): 35 of 419 unexpected
interruptions, 8.4 %, were switches and cables, which take more than one node; rounded up."""

SAVE_LATENCY_S = 0.2
"""Stall of a save beside the copy itself: the ranks agree on a step and drain their streams. DLRover's flash
checkpoint reports a stall of 0.2 s on 1,536 H800, where the copy is some 20 ms."""

REPLICA_SHARE = 0.1
"""Share of a network card that replicas may take from the training (a choice: it keeps the loss of bandwidth small)."""

STORAGE_SHARE = 0.5
"""Share of the time in which the storage may be busy with checkpoints; the rest is for data and others (a choice)."""

HOST_SHARE = 0.5
"""Share of the host's memory for the memory tier; the rest is for the job, its data and the page cache (a choice)."""

GENERATIONS = 7
"""Copies of a node's share that its host holds: two generations of its own and two of a peer, of both one that is being
filled, and one more of its own while the disk tier is written from it."""

UNHURRIED_S = DAY_S
"""Interval between saves where nothing ever fails."""

LEAST_GOODPUT = 1e-3
"""Goodput below which no end is predicted: a run that takes a thousand times as long never ends (a choice; the central
limit behind the quantiles does not hold there either)."""

LEAST = 1e-9
"""Goodput of a hopeless run: not 0, so that seconds per surviving step stay finite and in order."""

_TAIL = 1e-12  # smaller probabilities are dropped
_HOPELESS = 500.0  # exponents above would only overflow: the goodput is 0


class Standby(NamedTuple):
    """What happens to a gang that lacks a node.

    Attributes:
        spares: Nodes that stand by.
        unit_nodes: Nodes that the gang gives up at once when it shrinks: those of one replica.
        unit_loss: Share of the throughput that goes with them; 1 means that it can only wait.
        breaks: Nodes that one failure breaks: more than one where some failures take a rack.
    """

    spares: int
    unit_nodes: int = 1
    unit_loss: float = 1.0
    breaks: Breaks = SINGLE


class Shortage(NamedTuple):
    """What the lack of nodes costs.

    Attributes:
        lost: Share of the wall clock.
        moment_s2: Second moment of what one failure costs by it, in seconds squared.
        shrinks: The gang goes on smaller; otherwise it waits.
    """

    lost: float
    moment_s2: float
    shrinks: bool


class Process(NamedTuple):
    """The failure process of one gang: what the closed form and the simulation share. Seconds unless said otherwise.

    Attributes:
        rate: Failures of the gang per second.
        correlated: Share of them that only the disk tier recovers; 1 without a memory tier.
        copy_s: Stall of one save (either tier).
        replica_s: Until a copy in memory is also on a peer, overlapped.
        write_s: Until a copy is durable on disk, overlapped.
        memory_s: Work between two saves to memory; infinite without a memory tier.
        disk_s: Work between two saves to disk; at least ``memory_s`` with a memory tier.
        detect_s: From a failure until it is noticed.
        recover_memory_s: From a failure until the ranks train again from memory, without a wait for a node.
        recover_disk_s: The same from disk.
        repair_s: Until a broken node stands by again.
    """

    rate: float
    correlated: float
    copy_s: float
    replica_s: float
    write_s: float
    memory_s: float
    disk_s: float
    detect_s: float
    recover_memory_s: float
    recover_disk_s: float
    repair_s: float

    @property
    def stall(self) -> float:
        """Seconds of stall per second of work."""
        return self.copy_s / min(self.memory_s, self.disk_s)

    @property
    def reshape_s(self) -> float:
        """Stop of a running gang that goes on with other nodes: save, start again, read; nothing is repeated."""
        through_disk_s = self.write_s + self.recover_disk_s
        return self.copy_s + (self.recover_memory_s if self.correlated < 1 else through_disk_s) - self.detect_s

    @property
    def restore_s(self) -> float:
        """Reading the state after a failure, in the mean over the tiers."""
        return self.write_s - (1 - self.correlated) * (self.recover_disk_s - self.recover_memory_s)

    def replay_s(self, work_s: float) -> float:
        """Work that a failure undoes, in the mean over the tiers: half an interval, and what was not committed yet.

        To first order in the rate, as in Kokolis et al. With ``work_s`` seconds of work in the whole run no failure
        undoes more than half of them in the mean.
        """
        disk_s = min(self.disk_s / 2 + self.write_s, work_s / 2)
        if self.correlated == 1:
            return disk_s
        memory_s = min(self.memory_s / 2 + self.replica_s, work_s / 2)
        return self.correlated * disk_s + (1 - self.correlated) * memory_s

    def rounded(self, step_s: float) -> Process:
        """The same with intervals of whole steps, at least one; every save to disk is also one to memory."""
        if math.isinf(self.memory_s):
            return self._replace(disk_s=step_s * max(1, round(self.disk_s / step_s)))
        memory_s = step_s * max(1, round(self.memory_s / step_s))
        return self._replace(memory_s=memory_s, disk_s=memory_s * math.ceil(self.disk_s / self.memory_s - 0.1))


class Shares(NamedTuple):
    """Factors of the goodput: each the share that is left of what the one before left."""

    staffed: float
    running: float
    memory: float
    disk: float

    @property
    def goodput(self) -> float:
        """Share of the wall clock that is work which counted."""
        return self.staffed * self.running * self.memory * self.disk


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Daly's estimate (2006, eq. 37) of the best work between two saves that stall for ``stall_s``."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(stall_s / (2 * mtbf_s))
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + ratio / 3 + ratio * ratio / 9) - stall_s


def process(
    nodes: int,
    step_s: float,
    ckpt_bytes: float,
    hardware: Hardware,
    *,
    slots_per_node: int = 8,
    memory_tier: bool = True,
) -> Process:
    """The failure process of a gang with the best intervals for it.

    Args:
        nodes: Nodes that carry ranks.
        step_s: Seconds of one step: no save comes more often.
        ckpt_bytes: One checkpoint, over all ranks.
        hardware: Bandwidths, failure rate and times.
        slots_per_node: Devices of a node, each with its own link to the host and to the network.
        memory_tier: The hosts hold replicas.

    Raises:
        ConfigError: The hardware has no bandwidth to the storage or the host.
    """
    if hardware.storage_bandwidth <= 0 or hardware.host_bandwidth <= 0:
        raise ConfigError(
            "The cluster has no bandwidth to its storage or its hosts, so no checkpoint can be planned.",
            hint="hardware.storage_bandwidth and hardware.host_bandwidth are bytes per second",
        )
    rate = nodes * hardware.failures_per_node_day / DAY_S
    share = ckpt_bytes / nodes
    storage = nodes * hardware.storage_bandwidth
    if 0 < hardware.storage_total_bandwidth < storage:
        storage = hardware.storage_total_bandwidth
    write_s = ckpt_bytes / storage
    # At most this: a large state is copied beside the forward and backward of the next step, which hide most of it.
    copy_s = SAVE_LATENCY_S + share / (slots_per_node * hardware.host_bandwidth)
    best_s = max(best_interval_s(copy_s, 1 / rate) if rate else UNHURRIED_S, step_s)
    disk_s = max(best_s, write_s / STORAGE_SHARE)
    correlated, replica_s, fetch_s, memory_s = 1.0, 0.0, 0.0, math.inf
    if memory_tier and hardware.inter_bandwidth > 0:
        correlated = CORRELATED
        fetch_s = share / (slots_per_node * hardware.inter_bandwidth)
        replica_s = fetch_s / REPLICA_SHARE
        memory_s = max(best_s, replica_s)
        disk_s = max(disk_s, memory_s)
    down_s = hardware.detect_s + hardware.restart_s
    return Process(
        rate,
        correlated,
        copy_s,
        replica_s,
        write_s,
        memory_s,
        disk_s,
        hardware.detect_s,
        down_s + fetch_s,
        down_s + write_s,
        hardware.repair_s,
    )


def shares(what: Process, standby: Standby | None = None) -> Shares:
    """The factors of the goodput; without ``standby`` there is always a spare."""
    short = shortage(what, standby)
    tier = what.correlated < 1
    rate, correlated, copy_s, replica_s, write_s, memory_s, disk_s, _, from_memory_s, from_disk_s, _ = outwaited(
        what, short
    )
    if not rate:
        return Shares(1.0, 1.0, 1.0, 1.0)
    down = (1 - correlated) * _grown(rate * from_memory_s) + correlated * _grown(rate * from_disk_s)
    pace = 1 / (1 + copy_s / min(memory_s, disk_s))
    if tier:
        simple = rate * (1 - correlated)
        pace *= _renewed(simple * memory_s / pace) * math.exp(-simple * replica_s)
    kept = _renewed(rate * correlated * disk_s / max(pace, _TAIL)) * math.exp(-rate * correlated * write_s)
    return Shares(1 - short.lost, 1 / (1 + down), pace, kept)


def _renewed(exposed: float) -> float:
    exposed = min(exposed, _HOPELESS)
    return exposed / math.expm1(exposed) if exposed else 1.0


def _grown(exposed: float) -> float:
    return math.expm1(min(exposed, _HOPELESS))


def shortage(what: Process, standby: Standby | None) -> Shortage:
    """What a lack of nodes costs: waiting for a repair, or going on with fewer replicas where that is cheaper."""
    failures = what.rate * what.repair_s
    if not failures or standby is None:
        return Shortage(0.0, 0.0, False)
    waiting, chance = scarcity(standby.spares, failures, standby.breaks)
    if standby.unit_loss < 1 and failures * broken_nodes(standby.breaks) < _HOPELESS:
        smaller = _smaller(what, standby)
        if smaller.lost < waiting:
            return smaller
    if not waiting or not chance:
        return Shortage(waiting, 0.0, False)
    mean_s = waiting / (what.rate * max(1 - waiting, _TAIL) * chance)
    return Shortage(waiting, chance * _spread(standby.spares, failures) * mean_s**2, False)


def _spread(spares: int, failures: float) -> float:
    """Mean square of one wait over the square of its mean.

    Without spares a wait ends with the first repair in which nothing breaks; its moments are those of a recovery that a
    failure starts over. With spares and few failures it is the residual time of the first of ``spares + 1`` repairs,
    with many of them nearly exponential. In between by the formula for no spares, over the length of such a residual.
    """
    exposed = min(failures / (spares + 1), 100.0)
    grown = math.expm1(exposed)
    single = 1 + max(0.0, math.expm1(2 * exposed) - 2 * exposed * math.exp(exposed)) / grown**2
    return 2 - 2 * (2 - single) / (spares + 2)


def _smaller(what: Process, standby: Standby) -> Shortage:
    """Going on with fewer replicas: slower while nodes are missing, and one more restart when each unit grows back."""
    spares, unit_nodes, unit_loss, breaks = standby
    failures = what.rate * what.repair_s
    mean, slower, growing = failures * broken_nodes(breaks), 0.0, 0.0
    for broken, probability in enumerate(under_repair(failures, breaks)):
        missing = broken - spares
        if missing > 0:
            slower += probability * min(1.0, -(-missing // unit_nodes) * unit_loss)
            if unit_nodes == 1 or missing % unit_nodes == 1:
                growing += probability * broken / what.repair_s
            if probability <= LEAST and broken > mean:
                break
    lost = min(1.0, slower + growing * what.reshape_s)
    return Shortage(lost, growing / what.rate * (unit_loss * what.repair_s) ** 2, True)


def outwaited(what: Process, short: Shortage) -> Process:
    """The same, with the share of failures after which memory is gone because more nodes broke during a wait."""
    if short.shrinks or not short.lost:
        return what
    others = what.correlated * short.lost / max(1 - short.lost, _TAIL)
    return what._replace(correlated=1 - (1 - what.correlated) / (1 + others))
