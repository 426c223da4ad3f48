"""What a rank trains with: a step, the weights, the norm of the gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import clip_grad_norm_
from torch import nn

from jobs import distributed
from jobs.distributed import Grid
from jobs.engine import assembly, process
from jobs.engine.norm import ExpertNorm
from jobs.own_time import OwnTime
from jobs.parallel.meta import ParamMeta
from jobs.parallel.router_log import RouterLog, RouterStats
from jobs.spec import JobSpec, RankEnv
from strategies.plan import ParallelPlan

MicroBatch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step reports; equal on every rank.

    Attributes:
        loss: Mean cross entropy over the real tokens of the global batch, before the update.
        grad_norm: Global gradient norm before clipping; inf when the gradients are not finite.
        lr: Learning rate of this update.
        overflow: The update was left out because the fp16 loss scale was too large; that is normal.
        moe: What the routers have done; None without experts. Their losses are in the gradient, not in ``loss``.
    """

    loss: float
    grad_norm: float
    lr: float
    overflow: bool = False
    moe: RouterStats | None = None


class Engine:
    """One rank's share of the model, its optimizer and the DeepSpeed engine that trains them.

    Attributes:
        ds: DeepSpeed's engine: a ``PipelineEngine`` when the plan has stages, else a ``DeepSpeedEngine``.
        grid: This rank's place in the gang.
        plan: The plan.
        own_time: Sees what this rank waits for others.
        router_log: Sees what routers do; None without experts.
    """

    def __init__(
        self, ds: Any, grid: Grid, plan: ParallelPlan, own_time: OwnTime, router_log: RouterLog | None = None
    ) -> None:
        self.ds = ds
        self.grid = grid
        self.plan = plan
        self.own_time = own_time
        self.router_log = router_log
        self._own_norm: torch.Tensor | None = None
        self._expert_norm = ExpertNorm(ds, grid) if plan.ep > 1 else None
        if _unwrapped_optimizer(ds):
            ds.clip_fp32_gradients = lambda: None  # done by the hook, which also keeps the norm
            ds.basic_optimizer.register_step_pre_hook(lambda *_: self._clip())

    @classmethod
    def build(cls, job: JobSpec, env: RankEnv) -> Engine:
        """Join the gang and build this rank's engine with the initial weights of the job. Collective.

        Raises:
            PlanInfeasible: The plan uses an axis or a schedule that is modelled only.
        """
        assembly.refuse_modelled_only(job.plan)
        own_time = process.join(env, deterministic=job.train.deterministic)
        ds, grid, router_log = assembly.assemble(job)
        return cls(ds, grid, job.plan, own_time, router_log)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self.ds.device)

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model."""
        module: nn.Module = self.ds.module
        return module

    @property
    def needs_data(self) -> bool:
        """Whether this rank looks at the batches it is given (the first stage embeds, the last has the loss)."""
        return self.grid.first_stage or self.grid.last_stage

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of everything this rank holds; each parameter carries ``.phalanx``."""
        for parameter in self.ds.module.parameters():
            yield parameter.phalanx.name, parameter

    def weights(self) -> Iterator[tuple[ParamMeta, torch.Tensor]]:
        """(place in the model, values as they are computed with) of everything this rank holds. Collective.

        Under ZeRO-3 the values of one parameter at a time are gathered from the replicas.
        """
        for parameter in self.ds.module.parameters():
            partitioned = self.plan.zero_stage == 3
            with deepspeed.zero.GatheredParameters([parameter]) if partitioned else contextlib.nullcontext():
                yield assembly.meta_of(parameter), parameter.detach().clone()

    def train_step(self, step: int, batches: Sequence[MicroBatch]) -> StepResult:
        """Run optimizer step ``step`` (from 1) on this replica's micro-batches. Collective.

        Args:
            step: Number of the step; decides the learning rate.
            batches: ``grad_accum`` pairs (tokens, targets), int64 ``[micro_batch, seq]`` each; targets are
                ``IGNORE`` where a row weighs nothing. Ranks of one replica get the same; ranks for which
                :attr:`needs_data` is false may get anything.

        Raises:
            ValueError: The number of micro-batches is not the plan's.
        """
        if len(batches) != self.plan.grad_accum:
            raise ValueError(f"step {step}: {len(batches)} micro-batches given, the plan has {self.plan.grad_accum}")
        self.set_position(step - 1)
        lr = float(self.ds.get_lr()[0])
        if self.router_log is not None and self.ds.fp16_enabled():
            self.router_log.loss_scale = float(self.ds.optimizer.loss_scale)
        loss = self._train_pipelined(batches) if self.plan.pp > 1 else self._train_unpipelined(batches)
        moe = None if self.router_log is None else self.router_log.take(self.grid)
        return StepResult(loss=loss, grad_norm=self._grad_norm(), lr=lr, overflow=self._overflow(), moe=moe)

    def set_position(self, step: int) -> None:
        """Make DeepSpeed's counters and the learning rate those of an engine that has done ``step`` steps."""
        self.ds.global_steps = step
        self.ds.global_samples = step * self.ds.train_batch_size()
        self.ds.micro_steps = step * self.plan.grad_accum
        self.ds.lr_scheduler.step(step + 1)  # its count is the number of the step to come, see deepspeed_config

    def close(self) -> None:
        """Leave the gang. The engine is of no use afterwards."""
        distributed.shutdown()

    def _train_pipelined(self, batches: Sequence[MicroBatch]) -> float:
        return float(self.ds.train_batch(iter(batches)))

    def _train_unpipelined(self, batches: Sequence[MicroBatch]) -> float:
        self.ds.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tokens, targets in batches:
            loss = self.ds(tokens.to(self.device), targets.to(self.device))
            total += loss.detach()
            self.ds.backward(loss)
            self.ds.step()
        if self.grid.data_group is not None:
            dist.all_reduce(total, group=self.grid.data_group)
        return float(total) / (self.plan.grad_accum * self.plan.dp)

    def _grad_norm(self) -> float:
        norm = self.ds.get_global_grad_norm() if self._own_norm is None else self._own_norm
        value = float(norm)
        return value if math.isfinite(value) and value >= 0 else math.inf  # DeepSpeed says -1 for not finite

    def _overflow(self) -> bool:
        # DeepSpeed sets the flag without fp16, too; there is no loss scale then that could be to blame
        return bool(self.ds.fp16_enabled() and getattr(self.ds.optimizer, "overflow", False))

    def _clip(self) -> None:
        limit = self.ds.gradient_clipping() or math.inf
        if self._expert_norm is not None:
            self._own_norm = self._expert_norm.clip(limit)
            return
        self._own_norm = clip_grad_norm_(self.ds.module.parameters(), max_norm=limit, mpu=self.ds.mpu)


def _unwrapped_optimizer(ds: Any) -> bool:
    """Whether DeepSpeed steps torch's optimizer itself (fp32, ZeRO-0); it reports no gradient norm then."""
    return ds.optimizer is ds.basic_optimizer
