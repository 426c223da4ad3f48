"""The global gradient norm where DeepSpeed's is not right: with spread experts, and with offload.

With experts spread over replicas:

- It takes one all-reduce per group of parameters over all stages: a stage without experts has one group less than the
  others, and they wait for each other for ever.
- Without ZeRO, it takes the mean over replicas of norms that differ from replica to replica.
- In 16 bit, it counts what an expert holds whole on every tensor-parallel rank (a bias) once per rank.

Here, squares are summed on each rank, every element of the model once, and then over all ranks.

With offload, the last steps of the sum are made in other precisions than without (the root in fp64, where torch's fp32
``pow(0.5)`` is off by a bit on processors without AVX-512). The factor that gradients are clipped by then differs in
its last bit, and with 16-bit weights that grows: some round the other way after the second step, and after the third
losses differ by 1e-5. Here, without spread experts, where state lives changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from torch import nn

from jobs.distributed import Grid
from jobs.engine.assembly import meta_of
from jobs.parallel.collectives import all_reduce

Pairs = Iterable[tuple[nn.Parameter, torch.Tensor]]


def keep_precision(optimizer: Any) -> None:
    """Make the norm with offloaded state what it is without.

    Args:
        optimizer: DeepSpeed's, of stage 1 to 3, whose state is not on the device.
    """

    def norm(parameters: list[nn.Parameter]) -> torch.Tensor:
        none = torch.zeros(1)  # of what has no gradient
        found = optimizer.norm_for_param_grads
        norms = [found.get(optimizer.get_param_id(parameter), none).view(1) for parameter in parameters]
        # Where nothing counts (all padding, or copies of what another stage counts) its sum begins where the state
        # lives, and ranks cannot send that to each other.
        home, optimizer.device = optimizer.device, get_accelerator().current_device_name()
        try:
            total: torch.Tensor = optimizer.get_grad_norm_direct(norms, parameters)  # a norm is its own norm
        finally:
            optimizer.device = home
        return total.cpu()  # where the gradients are that it scales

    optimizer.complete_grad_norm_calculation_for_cpu_offload = norm


class ExpertNorm:
    """Replaces the norm in one of DeepSpeed's engines.

    Args:
        ds: The engine, with experts spread over replicas.
        grid: This rank's place.
    """

    def __init__(self, ds: Any, grid: Grid) -> None:
        self._ds = ds
        self._grid = grid
        if hasattr(ds.optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
            ds.optimizer.scaled_global_norm = self._of_partitions
        elif hasattr(ds.optimizer, "get_grads_for_norm"):  # 16 bit, gradients in another precision
            self._all_gradients = ds.optimizer.get_grads_for_norm
            ds.optimizer.get_grads_for_norm = self._of_gradients

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients of the parameters so that the norm is at most ``limit``; the norm before. Collective."""
        pairs = [(one, one.grad) for one in self._ds.module.parameters() if one.grad is not None]
        norm = self._over_stages(self._of_whole(pairs)).sqrt()
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        for _, gradient in pairs:
            gradient.mul_(factor)
        return norm

    def _of_partitions(self, norm_type: int = 2) -> torch.Tensor:
        """ZeRO-1 and 2: every replica has its part of the sums, of experts among those that share them."""
        optimizer = self._ds.optimizer
        total = torch.zeros((), device=self._ds.device)
        for group in range(len(optimizer.bit16_groups)):
            total += _squares(self._part(group), total)
        norm = self._over_stages(all_reduce(total, self._grid.data_group)).sqrt()
        return torch.where(norm.isfinite(), norm, torch.full_like(norm, math.inf)).to(optimizer.device)

    def _part(self, group: int) -> Pairs:
        """This replica's part of the sums of a group of parameters."""
        optimizer = self._ds.optimizer
        parameters = optimizer.params_in_partition[group]
        if not optimizer.cpu_offload:
            gradients = (g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            return zip(parameters, gradients, strict=False)
        flat = optimizer.single_partition_of_fp32_groups[group].grad
        places = (optimizer.grad_position[optimizer.get_param_id(parameter)] for parameter in parameters)
        gradients = (flat.narrow(0, start, count) for _, _, start, count in places)
        return zip(parameters, gradients, strict=True)

    def _of_gradients(self, for_clipping: bool = False) -> Any:
        """``BF16_Optimizer``: every replica has whole sums. What is returned is summed over stages and shards."""
        if for_clipping:
            return self._all_gradients(for_clipping=True)
        optimizer = self._ds.optimizer
        pairs = [
            (parameter, gradient)
            for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        return [self._of_whole(pairs).sqrt()], {}

    def _of_whole(self, pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> torch.Tensor:
        """Sum of squares on this rank and, of experts, on those with the other shares; equal on all replicas."""
        zero = torch.zeros((), device=self._ds.device)
        expert = _squares(((one, gradient) for one, gradient in pairs if is_moe_param(one)), zero)
        dense = _squares(((one, gradient) for one, gradient in pairs if not is_moe_param(one)), zero)
        return dense + all_reduce(expert, self._grid.expert_group)

    def _over_stages(self, squares: torch.Tensor) -> torch.Tensor:
        return all_reduce(all_reduce(squares, self._grid.model_group), self._grid.pipe_group)


def _squares(pairs: Pairs, zero: torch.Tensor) -> torch.Tensor:
    """Sum over gradients whose parameters count on this rank."""
    norms = [gradient.detach().float().norm() for parameter, gradient in pairs if meta_of(parameter).primary]
    return torch.stack(norms).square().sum() if norms else zero.clone()
