"""What ranks do in the tests of tokens on their way to experts: one layer, counted, and against one on one rank."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
import torch.distributed as dist

from jobs.distributed import Grid, shutdown
from jobs.engine import assembly, process
from jobs.models.gpt import Block, Recipe
from jobs.models.init import cut
from jobs.models.moe import MixtureOfExperts
from jobs.parallel.meta import ParamMeta
from jobs.parallel.router_log import RouterLog
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from strategies.specs import ModelSpec, MoeSpec
from tests.support.exchanges import counted

ROW_WEIGHT = 0.5


def _layer(model: ModelSpec, grid: Grid) -> tuple[MixtureOfExperts, RouterLog]:
    log = RouterLog(model, cast(MoeSpec, model.moe), ROW_WEIGHT)
    block = Block(Recipe.of(model, grid, seed=0, router_log=log), 0)
    return cast(MixtureOfExperts, block.mlp), log


# --- counted ---------------------------------------------------------------------------------------------------------


def traffic(env: RankEnv, job: dict[str, Any]) -> dict[str, Any]:
    """One layer in 16 bit, forward and backward: what it sends each way, and what it keeps in between.

    Returns:
        ``forward`` and ``backward``: bytes by group; ``kept``: bytes of numbers that are neither weights nor the
        router's input; ``input``: bytes of that.
    """
    spec = from_json(JobSpec, job)
    process.join(env, deterministic=False)
    grid = assembly.grid_of(spec.plan)
    layer, _ = _layer(spec.model, grid)
    layer.bfloat16()
    length = spec.model.seq // (grid.tp if grid.split else 1)
    generator = torch.Generator().manual_seed(grid.data * 100 + (grid.model if grid.split else 0))
    x = torch.randn(spec.plan.micro_batch, length, spec.model.hidden, generator=generator).bfloat16().requires_grad_()
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    kept, routed = dict[int, int](), dict[int, int]()
    layer.router.register_forward_pre_hook(lambda _, given: routed.update(_storage(given[0])))

    held = list[torch.Tensor]()  # so that no storage is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            kept.update(_storage(tensor))
        return tensor

    with counted(grid) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    with counted(grid) as backward:
        torch.autograd.backward(out.float().square().sum())
    shutdown()
    ((place, size),) = routed.items()
    return {
        "forward": forward.sent_bytes,
        "backward": backward.sent_bytes,
        "kept": sum(count for where, count in kept.items() if where != place),
        "input": size if place in kept else 0,
    }


def _storage(tensor: torch.Tensor) -> dict[int, int]:
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}


# --- compared --------------------------------------------------------------------------------------------------------


def dealt(env: RankEnv, job: dict[str, Any], cases: list[dict[str, Any]]) -> list[dict[str, bool]]:
    """The layer on a rank of several replicas and shards against the layer on one rank: what agrees.

    Args:
        env: This rank.
        job: The model, with a router bias, and the plan.
        cases: Each with ``rows`` and ``tokens`` of a replica, whether the sequence is ``split``, and whether only the
            experts of the first share are wanted (``aside``).
    """
    spec = from_json(JobSpec, job)
    process.join(env, deterministic=False)
    grid = assembly.grid_of(spec.plan)
    found = [_compare(spec.model, grid, **case) for case in cases]
    shutdown()
    return found


def _compare(model: ModelSpec, grid: Grid, rows: int, tokens: int, split: bool, aside: bool) -> dict[str, bool]:
    grid = dataclasses.replace(grid, split=split)
    (ours, log), (whole, plain_log) = _layer(model, grid), _layer(model, Grid())
    for layer in (ours, whole):
        with torch.no_grad():
            cast(torch.Tensor, layer.router.bias)[: len(whole.experts) // 2].fill_(20.0 if aside else 0.0)
    wanted = [_pass(whole, *_given(model, replica, rows, tokens)) for replica in range(grid.dp)]
    held = grid.positions(tokens // grid.tp) if split else slice(None)
    x, gradient = (given[:, held] for given in _given(model, grid.data, rows, tokens))
    with counted(grid) as exchanges:
        found, own = _pass(ours, x, gradient), wanted[grid.data]
    near = {name: torch.allclose(found[name], own[name][:, held], atol=1e-5) for name in ("out", "x")}
    for parameter in ours.parameters():
        name, box = _meta(parameter).name, _meta(parameter).box
        # The engine adds up those of replicas, but for experts, which have seen the tokens of all.
        whole_gradient = sum((one[name] for one in wanted), start=torch.zeros(())) if ".experts." in name else own[name]
        near[name] = torch.allclose(found[name], cut(whole_gradient, box), atol=1e-4)
    mine, theirs = log.take(grid), plain_log.take(Grid())
    near["stats"] = (mine.load, mine.dropped) == (theirs.load, theirs.dropped)
    near["losses"] = abs(mine.aux_loss / theirs.aux_loss - 1) < 1e-5
    crossed = torch.tensor(exchanges.crossed)  # there and back again, and the gradients
    dist.all_reduce(crossed)
    near["crossed"] = crossed.tolist() == [mine.crossed] * 4
    near["aside"] = (mine.load[-1] == 0) == aside
    return near


def _pass(layer: MixtureOfExperts, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and gradients of the input and of the parameters by their names."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    torch.autograd.backward(out, gradient)
    gradients = {_meta(parameter).name: cast(torch.Tensor, parameter.grad).clone() for parameter in layer.parameters()}
    return {"out": out.detach(), "x": cast(torch.Tensor, x.grad), **gradients}


def _given(model: ModelSpec, replica: int, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input of a replica, and the gradient of its output."""
    generator = torch.Generator().manual_seed(replica)
    x, gradient = torch.randn(2, rows, tokens, model.hidden, generator=generator)
    return x, gradient


def _meta(parameter: torch.nn.Parameter) -> ParamMeta:
    return cast(ParamMeta, vars(parameter)["phalanx"])
