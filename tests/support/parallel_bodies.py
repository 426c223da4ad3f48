"""What ranks do in the tests of the parallel layers: compute a part and compare with the whole, computed locally."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from jobs.distributed import Grid, init_process_group, shutdown
from jobs.models.init import ParameterFactory, cut, global_value
from jobs.models.packing import layout_of
from jobs.models.routing import within
from jobs.parallel.linear import ColumnParallelLinear, RowParallelLinear
from jobs.parallel.meta import ParamMeta
from jobs.parallel.vocabulary import VocabParallelEmbedding, project, vocab_parallel_cross_entropy
from jobs.spec import RankEnv

STD = 0.3


def _join(env: RankEnv) -> ParameterFactory:
    torch.set_num_threads(1)
    init_process_group(env, "gloo")
    grid = Grid(model=env.rank, tp=env.world_size, model_group=dist.group.WORLD)
    return ParameterFactory(grid=grid, seed=0, std=STD)


def _meta(parameter: nn.Parameter) -> ParamMeta:
    return cast(ParamMeta, parameter.phalanx)  # type: ignore[attr-defined]


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """The global initial value, as a leaf of its own."""
    meta = _meta(parameter)
    std = 0.0 if meta.name.endswith("bias") else STD
    return global_value(meta.name, meta.shape, seed=0, mean=0.0, std=std).requires_grad_()


def _agrees(parameter: nn.Parameter, whole: torch.Tensor) -> bool:
    assert parameter.grad is not None
    assert whole.grad is not None
    return torch.allclose(parameter.grad, cut(whole.grad, _meta(parameter).box), atol=1e-5)


def vocabulary(env: RankEnv, vocab: int) -> dict[str, Any]:
    """Embedding, projection and cross entropy with one table, against torch."""
    make = _join(env)
    table = VocabParallelEmbedding(make, "table", vocab, 6)
    whole = _whole(table.weight)
    tokens = torch.arange(8).view(2, 4) % vocab
    targets = (tokens + 1) % vocab
    embedded, wanted = table(tokens), F.embedding(tokens, whole)
    embedded.retain_grad()
    wanted.retain_grad()
    group = make.grid.model_group
    loss = vocab_parallel_cross_entropy(
        project(embedded, table.weight, make.grid.region), targets, vocab=vocab, rank=env.rank, group=group
    )
    reference = F.cross_entropy((wanted @ whole.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 4)
    torch.autograd.backward(loss.sum())
    torch.autograd.backward(reference.sum())
    start = _meta(table.weight).box[0][0]
    assert table.weight.grad is not None
    out = {
        "embedding": torch.allclose(embedded, wanted, atol=1e-6),
        "loss": torch.allclose(loss, reference, atol=1e-5),
        "grad_x": torch.allclose(cast(torch.Tensor, embedded.grad), cast(torch.Tensor, wanted.grad), atol=1e-5),
        "grad_weight": _agrees(table.weight, whole),
        "padding": not table.weight.grad[max(0, vocab - start) :].any(),
    }
    shutdown()
    return out


def linears(env: RankEnv) -> dict[str, Any]:
    """A column-parallel layer, a nonlinearity, a row-parallel layer, against two plain layers."""
    make = _join(env)
    up = ColumnParallelLinear(make, "up", 6, 8, bias=True)
    down = RowParallelLinear(make, "down", 8, 6, bias=True, std=STD)
    weights = [up.weight, down.weight]
    biases = [bias for bias in (up.bias, down.bias) if bias is not None]
    a, b, c, d = (_whole(parameter) for parameter in (*weights, *biases))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours = down(F.gelu(up(make.grid.region.enter(x))))
    theirs = F.linear(F.gelu(F.linear(y, a, c)), b, d)
    torch.autograd.backward(ours.square().sum())
    torch.autograd.backward(theirs.square().sum())
    out = {
        "output": torch.allclose(ours, theirs, atol=1e-5),
        "grad_x": torch.allclose(cast(torch.Tensor, x.grad), cast(torch.Tensor, y.grad), atol=1e-4),
        "grad_weights": all(_agrees(parameter, whole) for parameter, whole in zip(weights, (a, b), strict=True)),
        "grad_bias": all(_agrees(parameter, whole) for parameter, whole in zip(biases, (c, d), strict=True)),
    }
    shutdown()
    return out


def split_region(env: RankEnv) -> dict[str, Any]:
    """A norm on a part of the sequence around what is split by width and what all ranks compute alike, against one."""
    factory = _join(env)
    grid = dataclasses.replace(factory.grid, split=True)
    make, region = dataclasses.replace(factory, grid=grid), grid.region
    up = ColumnParallelLinear(make, "up", 6, 8, bias=True)
    down = RowParallelLinear(make, "down", 8, 6, bias=True, std=STD)
    alike = make.make("alike", (6, 6))
    scale = make.make("scale", (6,), mean=1.0, std=0.0)
    whole = {name: global_value(name, shape, seed=0, mean=0.0, std=STD).requires_grad_() for name, shape in _SHAPES}
    gain, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    y = F.linear(F.gelu(F.linear(x * gain, whole["up.weight"])), whole["down.weight"], bias)
    wanted = y + torch.tanh(F.linear(y, whole["alike"]))
    part = grid.positions(8 // grid.tp)
    z = down(F.gelu(up(region.enter(x[:, part] * region.shared(scale)))))
    ours = z + region.part(torch.tanh(F.linear(region.whole(z), alike)))
    torch.autograd.backward(wanted.square().sum())
    torch.autograd.backward(ours.square().sum())
    out = {
        "output": torch.allclose(ours, wanted[:, part], atol=1e-5),
        "split": _agrees(up.weight, whole["up.weight"]) and _agrees(down.weight, whole["down.weight"]),
        "shared": all(_agrees(mine, theirs) for mine, theirs in ((scale, gain), (cast(Any, down.bias), bias))),
        "alike": _agrees(alike, whole["alike"]),
    }
    shutdown()
    return out


_SHAPES = (("up.weight", (8, 6)), ("down.weight", (6, 8)), ("alike", (6, 6)))


def sequence_ranks(env: RankEnv, kv_heads: int) -> dict[str, Any]:
    """Attention over a sequence of which each rank has a part, against the whole one."""
    _join(env)
    grid = Grid(seq=env.rank, sp=env.world_size, seq_group=dist.group.WORLD)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, 8, 4, generator=generator) for heads in (4, kv_heads, kv_heads))
    theirs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    held = grid.tokens(8)
    ours = [tensor[:, :, held].clone().requires_grad_() for tensor in (q, k, v)]
    wanted = _attend(*theirs)
    found = grid.sequence.to_tokens(_attend(*grid.sequence.to_heads(*ours)))
    torch.autograd.backward(wanted.square().sum())
    torch.autograd.backward(found.square().sum())
    grads = zip(ours, theirs, strict=True)
    out = {
        "output": torch.allclose(found, wanted[:, :, held], atol=1e-5),
        "grads": all(torch.allclose(cast(Any, a.grad), cast(Any, b.grad)[:, :, held], atol=1e-5) for a, b in grads),
    }
    shutdown()
    return out


def room_of_documents(env: RankEnv) -> dict[str, Any]:
    """Which visits experts have room for, where each rank has a part of the sequence, against the whole one."""
    _join(env)
    grid = Grid(seq=env.rank, sp=env.world_size, seq_group=dist.group.WORLD)
    generator = torch.Generator().manual_seed(3)
    experts = torch.rand(3, 24, 6, generator=generator).topk(2, dim=-1).indices
    layout = layout_of(torch.randint(0, 9, (3, 24), generator=generator), 0)
    held, out = grid.tokens(24), {}
    for name, lies in (("packed", layout), ("plain", None)):
        wanted = within(experts, 6, 2, layout=lies)
        found = within(experts[:, held], 6, 2, grid.sequence, lies)
        out[name] = torch.equal(found, wanted[:, held])
        out[f"{name} is tight"] = bool(wanted.any()) and not wanted.all()
    shutdown()
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
