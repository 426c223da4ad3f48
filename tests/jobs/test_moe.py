"""Experts on one rank: routing, capacity, losses against their formulas, the layer against a loop over tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from jobs.distributed import Grid
from jobs.hf.config import pooled_weight
from jobs.models.gpt import Decoder, LossFunction, Recipe
from jobs.models.moe import Expert, MixtureOfExperts
from jobs.models.routing import balance_loss, capacity, choose, visits, within, z_loss
from jobs.parallel.router_log import RouterLog, Seen
from jobs.parallel.vocabulary import IGNORE
from strategies.plan import Recompute
from strategies.specs import ModelSpec, MoeSpec, Routing
from tests.support.jobspecs import GPT, LLAMA

MOE = MoeSpec(experts=6, top_k=2, ffn=24)
TINY = dataclasses.replace(GPT, layers=2, hidden=32, ffn=48, vocab=61, seq=12, init_std=0.1, moe=MOE)


def variant(flavour: str = "gpt3", **changes: object) -> ModelSpec:
    moe = dataclasses.replace(MOE, **changes)  # type: ignore[arg-type]
    if flavour == "gpt3":
        return dataclasses.replace(TINY, moe=moe)
    return dataclasses.replace(LLAMA, layers=2, hidden=32, ffn=48, vocab=61, seq=12, init_std=0.1, moe=moe)


MODELS = {
    "gpt3": variant(),
    "llama": variant("llama"),
    "sigmoid": variant("llama", routing="sigmoid", router_bias=True),
    "shared": variant(shared_ffn=16, dense_layers=1),
    "one": variant(top_k=1),
    "plain weights": variant(normalize=False),
    "tight": variant(capacity_factor=0.5),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- routing ---------------------------------------------------------------------------------------------------------


def test_softmax_weights_sum_to_one() -> None:
    logits = noise(2, 5, 6)
    choice = choose(logits, MOE)
    scores = logits.softmax(-1)
    best = scores.gather(-1, choice.experts)
    assert torch.allclose(choice.weights, best / best.sum(-1, keepdim=True))
    assert torch.equal(choice.shares, scores)
    assert (best.min(-1).values >= scores.sort(-1).values[..., -2]).all()
    assert choice.kept is None


def test_weights_that_are_not_normalized_are_the_scores() -> None:
    logits = noise(2, 5, 6)
    for moe in (dataclasses.replace(MOE, normalize=False), dataclasses.replace(MOE, top_k=1)):
        choice = choose(logits, moe)
        assert torch.equal(choice.weights, logits.softmax(-1).gather(-1, choice.experts))


def test_sigmoid_scores_experts_one_by_one() -> None:
    logits = noise(2, 5, 6)
    choice = choose(logits, dataclasses.replace(MOE, routing="sigmoid", normalize=False))
    assert torch.allclose(choice.weights, 1 / (1 + (-logits.gather(-1, choice.experts)).exp()))
    assert torch.allclose(choice.shares.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("far", [-120.0, 120.0])
def test_sigmoid_scores_that_no_number_tells_apart(far: float, normalize: bool) -> None:
    """In fp32 all of them are 0, or 1: the best are still the best, and nothing is divided by 0."""
    logits = (noise(2, 4, 6) + far).requires_grad_()
    choice = choose(logits, dataclasses.replace(MOE, routing="sigmoid", normalize=normalize))
    assert torch.equal(choice.experts, logits.topk(2, dim=-1).indices)
    assert torch.allclose(choice.shares.sum(dim=-1), torch.ones(2, 4))
    if normalize:
        exact = logits.double().sigmoid().gather(-1, choice.experts)
        assert torch.allclose(choice.weights.double(), exact / exact.sum(dim=-1, keepdim=True), rtol=1e-5)
    loss = (choice.weights * noise(2, 4, 2, seed=1)).sum() + balance_loss(choice).sum() + z_loss(logits).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_capacity_is_a_share_of_the_sequence() -> None:
    assert capacity(MOE, 12) is None
    assert capacity(dataclasses.replace(MOE, capacity_factor=1.0), 12) == 4  # 12 tokens x 2 visits / 6 experts
    assert capacity(dataclasses.replace(MOE, capacity_factor=1.1), 12) == 5
    assert capacity(dataclasses.replace(MOE, capacity_factor=0.01), 12) == 1


def test_an_expert_takes_the_first_of_a_sequence() -> None:
    experts = torch.tensor([[[0, 1], [1, 0], [0, 2], [0, 1]], [[3, 0], [0, 1], [1, 0], [2, 3]]])
    kept = within(experts, 4, 2)
    assert kept.tolist() == [
        [[True, True], [True, True], [False, True], [False, False]],
        [[True, True], [True, True], [True, False], [True, True]],
    ]
    assert visits(experts, 4, kept).tolist() == [[2, 2, 1, 0], [2, 2, 1, 2]]
    assert visits(experts, 4).tolist() == [[4, 3, 1, 0], [3, 2, 1, 2]]


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_when_one_gets_all() -> None:
    even = torch.full((1, 6, 6), -10.0)
    even[0, torch.arange(6), torch.arange(6)] = 10.0
    one = dataclasses.replace(MOE, top_k=1)
    assert balance_loss(choose(even, one)).item() == pytest.approx(1.0, rel=1e-6)
    uneven = torch.full((1, 6, 6), -10.0)
    uneven[..., 2] = 10.0
    assert balance_loss(choose(uneven, one)).item() == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_the_balance_loss_is_its_formula(routing: str) -> None:
    logits = noise(3, 7, 6).double()
    choice = choose(logits, dataclasses.replace(MOE, routing=cast(Routing, routing)))
    for row in range(3):
        wanted = 0.0
        for expert in range(6):
            share = (choice.experts[row] == expert).sum().item() / (7 * 2)
            scores = [logits[row, token].exp() for token in range(7)]
            if routing == "sigmoid":
                scores = [1 / (1 + (-logits[row, token]).exp()) for token in range(7)]
            wanted += share * sum((score[expert] / score.sum()).item() for score in scores) / 7
        assert balance_loss(choice)[row].item() == pytest.approx(6 * wanted, rel=1e-9)


@pytest.mark.parametrize(("experts", "top_k", "layers"), [(8, 2, 1), (8, 2, 3), (4, 3, 2)])
def test_the_balance_loss_weighs_as_that_of_transformers(experts: int, top_k: int, layers: int) -> None:
    """For layers that route alike: theirs is one loss for all layers, whose shares sum to top_k, ours one for each."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    moe = MoeSpec(experts=experts, top_k=top_k, ffn=8, balance_weight=0.3)
    logits = [noise(1, 16, experts, seed=7).requires_grad_() for _ in range(layers)]
    ours = moe.balance_weight * sum(balance_loss(choose(one, moe)).sum() for one in logits)
    assert isinstance(ours, torch.Tensor)
    own = torch.autograd.grad(ours, logits)
    theirs = load_balancing_loss_func(tuple(one.flatten(0, 1) for one in logits), experts, top_k)
    assert isinstance(theirs, torch.Tensor)
    theirs = pooled_weight(moe, layers) * theirs
    other = torch.autograd.grad(theirs, logits)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for mine, their in zip(own, other, strict=True):
        assert torch.allclose(mine, their, rtol=1e-4, atol=1e-8)
        assert mine.abs().max() > 1e-4


def test_the_z_loss_is_its_formula() -> None:
    logits = noise(2, 3, 6).double()
    wanted = [
        sum(math.log(sum(math.exp(value) for value in token)) ** 2 for token in row.tolist()) / 3 for row in logits
    ]
    assert z_loss(logits).tolist() == pytest.approx(wanted, rel=1e-12)


# --- the layer -------------------------------------------------------------------------------------------------------


def layer_of(model: ModelSpec, log: RouterLog | None = None) -> MixtureOfExperts:
    block = Decoder(Recipe.of(model, Grid(), seed=0, router_log=log)).layers[-3]
    return cast(MixtureOfExperts, block.mlp)


def by_token(layer: MixtureOfExperts, moe: MoeSpec, x: torch.Tensor) -> torch.Tensor:
    """The same function, one token and one expert at a time."""
    choice = choose(layer.router(x), moe)
    rows = []
    for row in range(x.shape[0]):
        tokens = []
        for token in range(x.shape[1]):
            total = torch.zeros(x.shape[2])
            for place in range(moe.top_k):
                if choice.kept is None or choice.kept[row, token, place]:
                    expert = cast(Expert, layer.experts[int(choice.experts[row, token, place])])
                    total = total + choice.weights[row, token, place] * expert(x[row, token : token + 1])[0]
            tokens.append(total)
        rows.append(torch.stack(tokens))
    out = torch.stack(rows)
    return out if layer.shared is None else out + layer.shared(x)


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_is_a_sum_over_the_experts_of_each_token(name: str) -> None:
    model = MODELS[name]
    assert model.moe is not None
    layer = layer_of(model)
    grads = []
    for function in (layer, lambda x: by_token(layer, model.moe, x)):
        x = noise(2, 12, 32).requires_grad_()
        out = function(x)
        torch.autograd.backward(out, noise(2, 12, 32, seed=1))
        grads.append([out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
        layer.zero_grad()
    for ours, theirs in zip(*grads, strict=True):
        assert ours is not None
        wanted = torch.zeros_like(ours) if theirs is None else theirs  # an expert that nobody visits
        assert torch.allclose(ours, wanted, atol=1e-5)


def test_an_expert_that_nobody_visits_has_a_gradient_of_zero() -> None:
    """Else Adam would leave it alone under some plans, and decay its weights under others."""
    layer = layer_of(variant(top_k=1))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = 1.0
    torch.autograd.backward(layer(torch.ones(1, 12, 32)).sum())
    for parameter in layer.experts[5].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


# --- the model -------------------------------------------------------------------------------------------------------


def decoder(model: ModelSpec, recompute: Recompute = "none", log: RouterLog | None = None) -> Decoder:
    recipe = Recipe.of(model, Grid(), seed=0, recompute=recompute, router_log=log)
    return Decoder(recipe, LossFunction(model, Grid(), 1.0))


def tokens_of(model: ModelSpec, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, model.vocab, (rows, model.seq), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_parameter_count_is_the_formula(name: str) -> None:
    model = MODELS[name]
    assert sum(parameter.numel() for parameter in decoder(model).parameters()) == model.parameters


def test_names_count_through_all_experts() -> None:
    names = {vars(parameter)["phalanx"].name for parameter in decoder(MODELS["shared"]).parameters()}
    assert {f"blocks.1.mlp.experts.{number}.up.weight" for number in range(6)} <= names
    assert {"blocks.0.mlp.up.weight", "blocks.1.mlp.router.weight", "blocks.1.mlp.shared.down.bias"} <= names


@pytest.mark.parametrize("ep", [2, 3])
def test_shares_of_the_experts_make_the_whole(ep: int) -> None:
    """Names and initial values do not depend on who has which."""
    whole = {vars(p)["phalanx"].name: p.detach() for p in decoder(TINY).parameters()}
    found = {}
    for expert in range(ep):
        grid = Grid(expert=expert, ep=ep, expert_group_name=f"ep_size_{ep}")
        for parameter in Decoder(Recipe.of(TINY, grid, seed=0)).parameters():
            found[vars(parameter)["phalanx"].name] = parameter.detach()
            assert ("experts" in vars(parameter)["phalanx"].name) == (getattr(parameter, "allreduce", True) is False)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["gpt3", "sigmoid", "tight"])
def test_no_token_sees_the_future(name: str) -> None:
    """Not even through the room that later tokens take from experts."""
    model = MODELS[name]
    net, tokens = decoder(model), tokens_of(model)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % model.vocab
    before, after = net(tokens), net(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_what_a_row_is_padded_with_takes_no_room_from_it() -> None:
    """Else a text would be judged by the longest one that it happens to be evaluated with."""
    net, row = decoder(MODELS["tight"]), tokens_of(MODELS["tight"], rows=1)
    short = row[:, :5]
    padded = torch.cat([short, torch.zeros(1, 6, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        assert torch.allclose(net(padded)[:, :5], net(short), atol=1e-6)
        assert torch.allclose(net(row)[:, :5], net(short), atol=1e-6)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_nothing_and_counts_once(recompute: Recompute) -> None:
    model = variant(balance_weight=0.1, z_weight=0.01)
    tokens = tokens_of(model)
    found = []
    for kind in ("none", recompute):
        log = RouterLog(model, cast(MoeSpec, model.moe), 0.5)
        net = decoder(model, kind, log)
        torch.autograd.backward(net(tokens, tokens))
        found.append(([parameter.grad for parameter in net.parameters()], log.take(Grid())))
    (one, stats), (other, again) = found
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert stats == again
    assert sum(stats.load) == 2 * 12 * 2 * 2  # rows, tokens, visits, layers


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_the_auxiliary_losses_are_in_the_gradient_and_padding_is_not(routing: str) -> None:
    """As if they were added to the loss: mean over the real rows; a row without targets weighs nothing."""
    model = variant(routing=routing, balance_weight=0.3, z_weight=0.05)
    moe = cast(MoeSpec, model.moe)
    tokens = tokens_of(model, rows=3)
    targets = tokens.clone()
    targets[1] = IGNORE
    log = RouterLog(model, moe, 1 / 2)  # two real rows
    net = decoder(model, log=log)
    torch.autograd.backward(net(tokens, targets))
    ours = [parameter.grad for parameter in net.parameters()]

    plain, logits = decoder(model), list[torch.Tensor]()
    for module in plain.modules():
        if isinstance(module, MixtureOfExperts):
            module.router.register_forward_hook(lambda _module, _inputs, out: logits.append(out))
    loss = plain(tokens, targets)
    rows = torch.tensor([0.5, 0.0, 0.5])
    balance = sum(((rows * balance_loss(choose(one, moe))).sum() for one in logits), torch.zeros(()))
    z = sum(((rows * z_loss(one)).sum() for one in logits), torch.zeros(()))
    torch.autograd.backward(loss + 0.3 * balance + 0.05 * z)
    for mine, parameter in zip(ours, plain.parameters(), strict=True):
        assert mine is not None
        assert parameter.grad is not None
        assert torch.allclose(mine, parameter.grad, atol=1e-5, rtol=1e-4)
    stats = log.take(Grid())
    assert stats.balance_loss == pytest.approx(balance.item(), rel=1e-5)
    assert stats.z_loss == pytest.approx(z.item(), rel=1e-5)
    assert stats.aux_loss == pytest.approx(0.3 * balance.item() + 0.05 * z.item(), rel=1e-5)
    assert sum(stats.load) == 2 * 12 * 2 * 2
    assert stats.crossed == stats.dropped == 0
    assert log.take(Grid()).load == (0,) * 6, "taken once"


def test_dropped_visits_are_counted() -> None:
    model = variant(capacity_factor=0.5)
    log = RouterLog(model, cast(MoeSpec, model.moe), 1.0)
    tokens = tokens_of(model)
    torch.autograd.backward(decoder(model, log=log)(tokens, tokens))
    stats = log.take(Grid())
    assert stats.dropped > 0
    assert sum(stats.load) + stats.dropped == 2 * 12 * 2 * 2


def test_layers_that_are_uneven_in_opposite_ways_do_not_look_even() -> None:
    """Of two layers the one sends every token to one expert and the other to the other; a third is a little uneven."""
    model = dataclasses.replace(TINY, layers=4, moe=dataclasses.replace(MOE, experts=2, top_k=1, dense_layers=1))
    log = RouterLog(model, cast(MoeSpec, model.moe), 1.0)
    for layer, load in ((1, [8, 0]), (2, [0, 8]), (3, [5, 3])):
        x, row = torch.ones(1, 4, 3, requires_grad=True), torch.zeros(1)
        seen = Seen(layer=layer, part=1.0, load=torch.tensor([load]), dropped=row, crossed=row)
        torch.autograd.backward(log.watch(x, row, row, seen), torch.ones(1, 4, 3))
    stats = log.take(Grid())
    assert stats.load == (13, 11)
    assert (stats.imbalance, stats.imbalance_layer) == (2.0, 1)


def test_nothing_is_counted_without_gradients() -> None:
    log = RouterLog(TINY, MOE, 1.0)
    with torch.no_grad():
        decoder(TINY, log=log)(tokens_of(TINY))
    assert log.take(Grid()).load == (0,) * 6


def test_the_router_computes_in_fp32() -> None:
    layer = layer_of(TINY).bfloat16()
    x = noise(1, 12, 32).bfloat16()
    logits = layer.router(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(x.float(), layer.router.weight.float()))
    assert layer(x).dtype == torch.bfloat16
