"""Parameters and their initial values: a pure function of (model, seed, global name), whatever the plan.

Every parameter is drawn whole from a generator of its own, keyed by seed and name; a rank then keeps its box. Rows of
vocabulary padding are zero.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from jobs.distributed import Grid
from jobs.parallel.meta import ParamMeta


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for the parameter called ``name``; equal on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def global_value(name: str, shape: tuple[int, ...], *, seed: int, mean: float, std: float) -> torch.Tensor:
    """The whole initial tensor, in fp32 on the CPU: normal with ``mean`` and ``std``; constant when ``std`` is 0."""
    if std == 0.0:
        return torch.full(shape, mean)
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    return torch.empty(shape).normal_(mean, std, generator=generator)


def box_of(shape: tuple[int, ...], axis: int | None, rank: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Part ``rank`` of ``parts`` equal ones along ``axis``; the last ones may reach beyond ``shape`` (padding)."""
    box = [(0, size) for size in shape]
    if axis is not None:
        width = -(-shape[axis] // parts)
        box[axis] = (rank * width, (rank + 1) * width)
    return tuple(box)


def cut(value: torch.Tensor, box: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """A copy of ``value`` inside ``box``; what lies beyond ``value`` is zero."""
    part = value.new_zeros([stop - start for start, stop in box])
    inside = tuple(slice(start, min(stop, size)) for (start, stop), size in zip(box, value.shape, strict=True))
    found = value[inside]
    part[tuple(slice(0, size) for size in found.shape)] = found
    return part


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterFactory:
    """Makes the parameters of one rank.

    Attributes:
        grid: The rank's place, which decides its box.
        seed: Seed of the run.
        std: Default standard deviation.
    """

    grid: Grid
    seed: int
    std: float

    def make(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        axis: int | None = None,
        mean: float = 0.0,
        std: float | None = None,
        expert: bool = False,
    ) -> nn.Parameter:
        """One parameter, with its :class:`ParamMeta` as ``.phalanx``.

        Args:
            name: Global name.
            shape: Global shape.
            axis: Dimension that tensor parallelism splits; None for a replicated parameter.
            mean: Mean of the initial values.
            std: Standard deviation; the factory's by default.
            expert: It belongs to an expert, of which this rank has a share.
        """
        box = box_of(shape, axis, self.grid.model, self.grid.tp)
        value = global_value(name, shape, seed=self.seed, mean=mean, std=self.std if std is None else std)
        parameter = nn.Parameter(cut(value, box))
        split = axis is not None and self.grid.tp > 1
        primary = split or self.grid.model == 0
        parameter.phalanx = ParamMeta(name=name, shape=shape, box=box, primary=primary)  # type: ignore[attr-defined]
        # DeepSpeed's name for "every tensor-parallel rank has its own part": without it the gradient norm is wrong
        parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
        if expert and self.grid.ep > 1:  # likewise: its gradients are not summed over all replicas, but over a group
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.grid.expert_group_name  # type: ignore[attr-defined]
        return parameter
