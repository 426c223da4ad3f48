"""The model on one rank: shapes, parameter counts, causality, positions, recomputation, and where stages are cut."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from jobs.distributed import Grid
from jobs.models.gpt import (
    Block,
    Decoder,
    FinalNorm,
    LossFunction,
    PositionEmbedding,
    Recipe,
    TokenEmbedding,
    layer_specs,
    rotate,
    stage_bounds,
)
from strategies.plan import Recompute
from strategies.specs import ModelSpec
from tests.support.jobspecs import GPT, LLAMA

TINY = dataclasses.replace(GPT, layers=2, hidden=32, ffn=96, vocab=61, seq=12)
MODELS = {
    "gpt3": dataclasses.replace(TINY, tied=False),
    "gpt3-tied": TINY,
    "llama": dataclasses.replace(LLAMA, layers=2, hidden=32, ffn=88, vocab=61, seq=12),
    "llama-tied": dataclasses.replace(LLAMA, layers=2, hidden=32, ffn=88, vocab=61, seq=12, tied=True),
}


def decoder(model: ModelSpec, recompute: Recompute = "none") -> Decoder:
    recipe = Recipe.of(model, Grid(), seed=0, recompute=recompute)
    return Decoder(recipe, LossFunction(model, Grid(), 1.0))


def tokens_of(model: ModelSpec) -> torch.Tensor:
    return torch.randint(0, model.vocab, (2, model.seq), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_parameter_count_is_the_formula(name: str) -> None:
    model = MODELS[name]
    assert sum(parameter.numel() for parameter in decoder(model).parameters()) == model.parameters


def test_gpt3_has_the_published_number_of_parameters() -> None:
    """GPT-3 Small: 12 layers, width 768, 2048 positions, 50257 tokens."""
    small = dataclasses.replace(GPT, layers=12, hidden=768, heads=12, kv_heads=12, ffn=3072, vocab=50257, seq=2048)
    assert small.parameters == 125_226_240
    one = dataclasses.replace(small, layers=1)
    block = Block(Recipe.of(one, Grid(), seed=0), 0)
    assert sum(parameter.numel() for parameter in block.parameters()) == small.block_parameters == 7_087_872


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_and_global(name: str) -> None:
    names = [vars(parameter)["phalanx"].name for parameter in decoder(MODELS[name]).parameters()]
    assert len(set(names)) == len(names)
    assert "blocks.1.attn.q.weight" in names
    assert ("head.output.weight" in names) == (not MODELS[name].tied)


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_the_future(name: str) -> None:
    model = MODELS[name]
    net, tokens = decoder(model), tokens_of(model)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % model.vocab
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("name", ["gpt3-tied", "llama"])
def test_recomputation_changes_nothing(name: str, recompute: Recompute) -> None:
    model = MODELS[name]
    tokens = tokens_of(model)
    grads = []
    for net in (decoder(model), decoder(model, recompute)):
        torch.autograd.backward(net(tokens, tokens))
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rotary_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator).expand(1, 1, 9, 16) for _ in range(2))
    scores = (rotate(q, 10000.0) @ rotate(k, 10000.0).transpose(2, 3))[0, 0]
    for distance in range(-8, 9):
        line = scores.diagonal(distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[0, 1])
    assert torch.equal(rotate(q, 10000.0)[:, :, 0], q[:, :, 0])


def test_grouped_query_attention_shares_keys_and_values() -> None:
    """As if every query head had a copy of its group's key and value head."""
    grouped = MODELS["llama"]
    full = dataclasses.replace(grouped, kv_heads=grouped.heads)
    one, other = decoder(grouped), decoder(full)
    group = grouped.heads // grouped.kv_heads
    values = {vars(p)["phalanx"].name: p.detach() for p in one.parameters()}
    with torch.no_grad():
        for parameter in other.parameters():
            name = vars(parameter)["phalanx"].name
            value = values[name]
            if name.endswith(("k.weight", "v.weight")):
                value = value.view(grouped.kv_heads, grouped.head_dim, -1).repeat_interleave(group, dim=0).flatten(0, 1)
            parameter.copy_(value)
    tokens = tokens_of(grouped)
    assert torch.allclose(one(tokens), other(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        (GPT, (4,)),
        (GPT, (2, 2)),
        (GPT, (3, 1)),
        (GPT, (1, 1, 1, 1)),
        (LLAMA, (1, 2, 1, 0)),
        (dataclasses.replace(LLAMA, tied=True), (1, 3)),
    ],
)
def test_stages_have_their_blocks_the_embedding_first_and_the_head_last(
    model: ModelSpec, stages: tuple[int, ...]
) -> None:
    layers = layer_specs(Recipe.of(model, Grid(), seed=0))
    bounds = stage_bounds(model, stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(layers)
    kinds = [[spec.build for spec in layers[a:b]] for a, b in itertools.pairwise(bounds)]
    assert tuple(kind.count(Block) for kind in kinds) == stages
    assert kinds[0][0] is TokenEmbedding
    assert (PositionEmbedding in kinds[0]) == (model.flavour == "gpt3")
    assert kinds[-1][-2] is FinalNorm
    assert (kinds[-1][-1] is TokenEmbedding) == model.tied
