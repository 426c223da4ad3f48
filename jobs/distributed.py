"""The gang as one rank sees it: its coordinates and groups, and the rendezvous that brings the ranks together.

The rendezvous is fresh for every attempt: rank 0 serves the store on a socket that was bound before any rank was
started, and every key carries run, epoch and attempt, so that nobody ever meets a peer of an earlier attempt.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from jobs.parallel.region import TensorRegion
from jobs.parallel.ulysses import SequenceRanks
from jobs.spec import RankEnv

STORE_TIMEOUT_S = 300.0
COLLECTIVE_TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """This rank's place in the gang, with the process groups of its axes.

    Attributes:
        pipe: Pipeline stage, from 0.
        data: Data-parallel replica, from 0.
        model: Tensor-parallel rank, from 0.
        seq: Which part of its replica's sequences this rank has, from 0 (Ulysses).
        pp: Number of stages.
        dp: Number of replicas.
        tp: Tensor-parallel degree.
        sp: Number of parts that sequences are cut into.
        model_group: Ranks that hold the other shards of the same layers; None when ``tp`` is 1.
        data_group: Ranks that hold the same part of the model: replicas, and the ranks of a replica's sequences; None
            for a group of one.
        seq_group: Ranks that have the other parts of the same sequences, in order; None when ``sp`` is 1.
        pipe_group: Ranks of the other stages of this replica; None when ``pp`` is 1.
        split: What lies between tensor-parallel layers is split over their ranks, along the sequence.
        folded: The model runs down through the stages and up again (DualPipeV), so the first has both its ends.
        expert: Which share of the experts this rank has, from 0.
        ep: Number of shares.
        expert_group: Replicas that hold the other shares of the experts; None when ``ep`` is 1.
        expert_group_name: DeepSpeed's name for that group.
    """

    pipe: int = 0
    data: int = 0
    model: int = 0
    seq: int = 0
    pp: int = 1
    dp: int = 1
    tp: int = 1
    sp: int = 1
    model_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    seq_group: dist.ProcessGroup | None = None
    pipe_group: dist.ProcessGroup | None = None
    split: bool = False
    folded: bool = False
    expert: int = 0
    ep: int = 1
    expert_group: dist.ProcessGroup | None = None
    expert_group_name: str = ""

    @property
    def region(self) -> TensorRegion:
        """What lies between tensor-parallel layers."""
        return TensorRegion(group=self.model_group, split=self.split)

    @property
    def sequence(self) -> SequenceRanks:
        """The ranks that share a sequence."""
        return SequenceRanks(group=self.seq_group, size=self.sp)

    def tokens(self, length: int) -> slice:
        """Which of the ``length`` tokens of a sequence this rank is given."""
        held = length // self.sp
        return slice(self.seq * held, (self.seq + 1) * held)

    def positions(self, count: int) -> slice:
        """Where the ``count`` tokens that this rank has between its layers are in their sequence."""
        held = count * self.tp if self.split else count
        first = self.seq * held + (self.model * count if self.split else 0)
        return slice(first, first + count)

    @property
    def first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pipe == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipe == (0 if self.folded else self.pp - 1)


def init_process_group(env: RankEnv, backend: str, *, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
    """Meet the other ranks of this attempt. Collective.

    Args:
        env: This rank's view of the gang; ``store_fd`` is used on rank 0 if it is not -1.
        backend: Name of the communication backend, as the accelerator says.
        timeout_s: How long a collective may wait for a peer before it raises.
    """
    if "gloo" in backend:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(env.master_addr, env.master_port))
    serve = env.rank == 0
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in the module's __all__
        env.master_addr,
        env.master_port,
        env.world_size,
        is_master=serve,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=env.store_fd if serve and env.store_fd >= 0 else None,
    )
    key = f"{env.run_id}/{env.epoch}/{env.attempt}"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(key, store),  # type: ignore[attr-defined]
        rank=env.rank,
        world_size=env.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def shutdown() -> None:
    """Leave the gang; safe to call when it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_threads() -> None:
    """One CPU thread per rank, unless ``OMP_NUM_THREADS`` says otherwise (a warm pool forks ranks with one)."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def interface_towards(address: str, port: int) -> str:
    """Name of the network interface whose traffic reaches ``address``.

    gloo would otherwise announce whatever this host's name resolves to, which is often a loopback address.
    """
    family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing; only asks the kernel for the route
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address == own for item in addresses):
            return str(name)
    raise RuntimeError(f"no network interface carries {own}, the address from which {address} is reached")
