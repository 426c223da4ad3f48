"""Where DeepSpeed keeps the fp32 masters and the Adam moments of each parameter, for every ZeRO stage and precision.

A :class:`Fragment` ties a slice of the global model to the live memory of this rank's optimizer, so that saving is a
copy out of these views and restoring is a copy into them. DeepSpeed is not imported: the shapes of its optimizers are
told apart by the attributes that hold the state (deepspeed 0.19).
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from jobs.checkpoint.shardfile import Slice
from jobs.checkpoint.slices import clip
from jobs.parallel.meta import ParamMeta
from strategies.errors import PhalanxError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """A part of one parameter whose optimizer state lives on this rank.

    Attributes:
        slice: What it is in the global model, without vocabulary padding.
        save: [from, to) of the slice, in elements, that this rank saves; empty when another rank does.
        owner: The fp32 master that the inner optimizer updates, and under which it keeps the moments.
        offset: Where the slice begins in ``owner`` and in its moments, in elements.
    """

    slice: Slice
    save: tuple[int, int]
    owner: torch.Tensor
    offset: int


class _Owned(Protocol):
    @property
    def owner(self) -> torch.Tensor: ...


_Part = TypeVar("_Part", bound=_Owned)


def of_owners(parts: Iterable[_Part], owners: Iterable[torch.Tensor]) -> list[_Part]:
    """The parts that lie in one of the owners, in their order."""
    wanted = {id(owner) for owner in owners}
    return [part for part in parts if id(part.owner) in wanted]


class OptimizerAccess(ABC):
    """The optimizer state of this rank, whatever DeepSpeed made of it.

    Args:
        ds: DeepSpeed's engine, whose parameters carry :class:`ParamMeta` as ``phalanx``.
    """

    def __init__(self, ds: Any) -> None:
        self.ds = ds
        self.outer = ds.optimizer

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The Adam that does the work."""
        inner: torch.optim.Optimizer = self.outer.optimizer
        return inner

    @abstractmethod
    def owners(self) -> list[torch.Tensor]:
        """Every tensor that the inner optimizer updates on this rank."""

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """Every fragment on this rank, in the order of the module's parameters."""

    @abstractmethod
    def publish(self) -> None:
        """Make the weights from the masters. Collective."""

    @property
    def on_disks(self) -> bool:
        """Whether state is in memory by turns only."""
        return False

    def resident(self, *, write: bool) -> Iterator[list[torch.Tensor]]:
        """Owners by turns, whose masters and moments are in memory until the next turn: all at once, as a rule.

        Where state lives on disks each owner has a turn of its own: read before it and, with ``write``, written back
        after it. Ranks of one model part have the same turns.
        """
        yield self.owners()

    def whole(self, owner: torch.Tensor, kind: str) -> torch.Tensor | None:
        """Flat view of the masters or of a moment of a resident owner; None before the first step for a zero moment."""
        if kind == "master":
            return owner.detach().view(-1)
        state = self.inner.state.get(owner)
        return state[kind].view(-1) if state else None

    def view(self, fragment: Fragment, kind: str) -> torch.Tensor | None:
        """Likewise of a fragment, whose owner is resident."""
        whole = self.whole(fragment.owner, kind)
        return None if whole is None else whole.narrow(0, fragment.offset, fragment.slice.elements)

    def create_moments(self) -> None:
        """Make the zero moments that the first step would make, where there are none yet."""
        for owner in itertools.chain.from_iterable(self.resident(write=True)):
            if not self.inner.state.get(owner):
                zeros = {kind: torch.zeros_like(owner.detach()) for kind in MOMENTS}
                self.inner.state[owner] = {"step": self._counter(owner, 0), **zeros}
        link = getattr(self.outer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()  # DeepSpeed's own pointers to the moments, taken once

    @property
    def steps(self) -> int:
        """Updates that Adam has made.

        Raises:
            PhalanxError: Parts of the state disagree.
        """
        counts = {int(state["step"]) for owner in self.owners() if (state := self.inner.state.get(owner))}
        if len(counts) > 1:
            raise PhalanxError(f"The optimizer has made {sorted(counts)} steps on parts of one rank.")
        return counts.pop() if counts else 0

    @steps.setter
    def steps(self, count: int) -> None:
        for owner in self.owners():
            self.inner.state[owner]["step"] = self._counter(owner, count)
        for group in self.inner.param_groups:
            if "step" in group:  # fused optimizers count per group
                group["step"] = count

    def _counter(self, owner: torch.Tensor, count: int) -> torch.Tensor:
        # The fused update reads it where the weights are, torch's others on the host.
        device = owner.device if self.inner.defaults.get("fused") else torch.device("cpu")
        return torch.tensor(float(count), dtype=torch.float32, device=device)

    def _parameters(self) -> Iterator[tuple[torch.nn.Parameter, ParamMeta]]:
        for name, parameter in self.ds.module.named_parameters():
            if not parameter.requires_grad:
                continue
            meta = getattr(parameter, "phalanx", None)
            if meta is None:
                raise PhalanxError(f"The parameter {name} does not say what it is in the global model.")
            yield parameter, meta


class Unsharded(OptimizerAccess):
    """ZeRO-0 in fp32: a plain torch optimizer whose parameters are their own masters."""

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer itself, unless a wrapper holds it."""
        inner: torch.optim.Optimizer = getattr(self.outer, "optimizer", self.outer)
        return inner

    def owners(self) -> list[torch.Tensor]:
        return [master for _, _, master in self._masters()]

    def fragments(self) -> Iterator[Fragment]:
        for parameter, meta, master in self._masters():
            piece = clip(meta.name, meta.shape, meta.box, 0, master.numel())
            group = self._replicas(parameter)
            rank, world = dist.get_rank(group), dist.get_world_size(group)
            # Every replica has all of it, and saves an equal share.
            share = (piece.elements * rank // world, piece.elements * (rank + 1) // world)
            yield Fragment(
                slice=piece,
                save=share if meta.primary else (0, 0),
                owner=master,
                offset=0,
            )

    def _replicas(self, parameter: torch.nn.Parameter) -> dist.ProcessGroup:
        """Ranks that hold the same values: all replicas, of experts those with the same share of them."""
        name = getattr(parameter, "group_name", None)
        group: dist.ProcessGroup = (
            self.ds.seq_data_parallel_group if name is None else self.ds.expert_data_parallel_group[name]
        )
        return group

    def publish(self) -> None:
        """Nothing to do: the weights are the masters."""

    def _masters(self) -> Iterator[tuple[torch.nn.Parameter, ParamMeta, torch.Tensor]]:
        for parameter, meta in self._parameters():
            yield parameter, meta, parameter


class UnshardedMixed(Unsharded):
    """ZeRO-0 in 16 bits (``FP16_UnfusedOptimizer``): one fp32 master per parameter."""

    def publish(self) -> None:
        """Round the masters."""
        for parameter, _, master in self._masters():
            parameter.data.copy_(master.data)

    def _masters(self) -> Iterator[tuple[torch.nn.Parameter, ParamMeta, torch.Tensor]]:
        pairs = zip(self.outer.fp16_groups, self.outer.fp32_groups, strict=True)
        of = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        for parameter, meta in self._parameters():
            yield parameter, meta, of[id(parameter)]


class FlatPartition(OptimizerAccess):
    """ZeRO-1 and 2, and ``BF16_Optimizer``: per group one flat master, cut evenly over the data-parallel ranks."""

    def owners(self) -> list[torch.Tensor]:
        flat = getattr(self.outer, "single_partition_of_fp32_groups", None)
        return list(self.outer.fp32_groups_flat_partition if flat is None else flat)

    def fragments(self) -> Iterator[Fragment]:
        flat = self.owners()
        for parameter, meta in self._parameters():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue  # no part of it lives here
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _fragment(meta, low.start, low.numel, flat[mapping.param_group_index], high.start)

    def publish(self) -> None:
        """Round the masters and gather the parts of all replicas."""
        self.outer.update_lp_params()


class ZeroThree(OptimizerAccess):
    """ZeRO-3: each parameter is cut evenly over the data-parallel ranks, the last part padded."""

    def owners(self) -> list[torch.Tensor]:
        return list(self.outer.fp32_partitioned_groups_flat)

    def fragments(self) -> Iterator[Fragment]:
        flat = self.owners()
        for parameter, meta in self._parameters():
            group, offset, count = self.outer.grad_position[self.outer.get_param_id(parameter)]
            start = self.outer._get_param_partition_rank(parameter) * count
            live = max(0, min(count, parameter.ds_numel - start))  # type: ignore[attr-defined]
            if live:
                yield _fragment(meta, start, live, flat[group], offset)

    def publish(self) -> None:
        """Round the masters into the partitions, and gather the parameters that stay whole."""
        whole = self.outer.persistent_parameters
        if whole:
            whole[0].partition(whole)
        groups = {id(owner): group for group, owner in enumerate(self.owners())}
        for owner in itertools.chain.from_iterable(self.resident(write=False)):
            self.outer._reassign_or_swap_out_partitioned_parameters(groups[id(owner)])
        if whole:
            whole[0].all_gather(whole)

    @property
    def on_disks(self) -> bool:
        """Whether DeepSpeed keeps a part of it there."""
        return any(self._away())

    def _away(self) -> list[bool]:
        return [bool(self.outer._swappable_optimizer_subgroup(group)) for group in range(len(self.owners()))]

    def resident(self, *, write: bool) -> Iterator[list[torch.Tensor]]:
        """DeepSpeed keeps on disks what is not too small for that."""
        owners, away = self.owners(), self._away()
        at_home = [owner for owner, gone in zip(owners, away, strict=True) if not gone]
        if at_home:
            yield at_home
        for owner in itertools.compress(owners, away):
            with self._swapped_in(owner, write=write):
                yield [owner]

    @contextlib.contextmanager
    def _swapped_in(self, owner: torch.Tensor, *, write: bool) -> Iterator[None]:
        swapper = self.outer.optimizer_swapper
        swapper.swap_in_optimizer_state(parameter=owner)
        try:
            yield
            if write:
                swapper.swap_out_optimizer_state(parameter=owner)  # also moments that are new
        finally:
            swapper.release_swap_buffers(parameter=owner)
            owner.grad = None  # swapped in with the rest


def _fragment(meta: ParamMeta, start: int, count: int, flat: torch.Tensor, offset: int) -> Fragment:
    piece = clip(meta.name, meta.shape, meta.box, start, start + count)
    return Fragment(
        slice=piece,
        save=(0, piece.elements if meta.primary else 0),
        owner=flat,
        offset=offset,
    )


def access(ds: Any) -> OptimizerAccess:
    """Access to the optimizer state of a DeepSpeed engine.

    Raises:
        PhalanxError: The optimizer is of a kind that cannot be saved.
    """
    outer = ds.optimizer
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        return ZeroThree(ds)
    if hasattr(outer, "single_partition_of_fp32_groups") or hasattr(outer, "fp32_groups_flat_partition"):
        return FlatPartition(ds)
    if hasattr(outer, "fp16_groups") and hasattr(outer, "fp32_groups"):
        return UnshardedMixed(ds)
    if isinstance(getattr(outer, "optimizer", outer), torch.optim.Optimizer):
        return Unsharded(ds)
    raise PhalanxError(f"The state of {type(outer).__name__} cannot be saved.", hint="Use another ZeRO stage.")
