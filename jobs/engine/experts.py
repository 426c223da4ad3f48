"""Expert parallelism in DeepSpeed's terms: its groups, and the sign by which it knows that there are experts.

DeepSpeed sums the gradients of parameters marked ``allreduce = False`` over the replicas that hold the same experts,
and ZeRO cuts them over those. The layers are ours; of DeepSpeed's own mixture of experts nothing runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import nn

from jobs.distributed import Grid


def with_groups(grid: Grid, mpu: Any, ep: int) -> Grid:
    """The same place, with the group of replicas over which ``ep`` shares of the experts are spread. Collective."""
    groups.mpu = mpu  # DeepSpeed sets it, too, but only when the layers exist
    groups._create_expert_data_and_model_parallel(ep, mpu)
    name = f"ep_size_{ep}"  # DeepSpeed's own
    group = groups._get_expert_parallel_group(name)
    return dataclasses.replace(grid, ep=ep, expert=dist.get_rank(group), expert_group=group, expert_group_name=name)


class _Sign(MoE):  # type: ignore[misc]  # deepspeed has no types
    """DeepSpeed looks for modules of this class before it treats experts as such. This one holds nothing."""

    def __init__(self, number: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = number

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already."""


def declare(module: nn.Module) -> None:
    """Tell DeepSpeed of the experts among the parameters of a rank, if there are any."""
    number = sum(is_moe_param(parameter) for parameter in module.parameters())
    if number:
        module.add_module("has_experts", _Sign(number))
