"""Linear layers whose weight is split over the tensor-parallel ranks.

A column-parallel layer makes a slice of the outputs from the whole input; a row-parallel one takes that slice and sums
over the ranks. The input of column-parallel layers goes through :meth:`TensorRegion.enter` once, in the caller, because
q, k and v (or gate and up) share it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jobs.models.init import ParameterFactory


class ColumnParallelLinear(nn.Module):
    """``[..., inputs] -> [..., outputs / tp]``: weight and bias split along the outputs.

    Args:
        make: Makes the parameters.
        name: Global name, without ``.weight``.
        inputs: Width of the input.
        outputs: Width of the output over all ranks.
        bias: Whether there is a bias.
    """

    def __init__(self, make: ParameterFactory, name: str, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = make.make(f"{name}.weight", (outputs, inputs), axis=0)
        self.bias = make.make(f"{name}.bias", (outputs,), axis=0, std=0.0) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The local slice of the outputs; ``x`` is the whole input, already through :meth:`TensorRegion.enter`."""
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """``[..., inputs / tp] -> [..., outputs]``, summed over the ranks; weight split along the inputs, bias whole.

    Args:
        make: Makes the parameters.
        name: Global name, without ``.weight``.
        inputs: Width of the input over all ranks.
        outputs: Width of the output.
        bias: Whether there is a bias; it is added once, after the sum.
        std: Standard deviation of the initial weight.
    """

    def __init__(self, make: ParameterFactory, name: str, inputs: int, outputs: int, *, bias: bool, std: float) -> None:
        super().__init__()
        self.weight = make.make(f"{name}.weight", (outputs, inputs), axis=1, std=std)
        self.bias = make.make(f"{name}.bias", (outputs,), std=0.0) if bias else None
        self._region = make.grid.region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole output, equal on all tensor-parallel ranks, or this rank's part of the sequence."""
        y = self._region.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self._region.shared(self.bias)
