"""Documents in one sequence: each gives what it gives alone."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F

from jobs.distributed import Grid
from jobs.models.gpt import Decoder, LossFunction, Recipe
from jobs.models.packing import Documents, layout_of
from jobs.models.routing import within
from strategies.plan import Recompute
from strategies.specs import ModelSpec, MoeSpec
from tests.support.jobspecs import GPT, LLAMA

END = 0
TINY = dataclasses.replace(GPT, layers=2, hidden=32, ffn=96, vocab=61, seq=12)
EXPERTS = MoeSpec(experts=4, top_k=2, ffn=24)
TIGHT = dataclasses.replace(TINY, init_std=0.1, moe=dataclasses.replace(EXPERTS, capacity_factor=0.4))
MODELS = {
    "gpt3": TINY,
    "llama": dataclasses.replace(LLAMA, layers=2, hidden=32, ffn=88, vocab=61, seq=12),
    "experts": dataclasses.replace(TINY, init_std=0.1, moe=EXPERTS),
    "tight": TIGHT,
}
ROW = torch.tensor([[3, 4, END, 5, 6, 7, END, END, 8, 9, 3, 4]])


def decoder(model: ModelSpec, *, packing: bool, recompute: Recompute = "none") -> Decoder:
    recipe = Recipe.of(model, Grid(), seed=0, recompute=recompute)
    recipe = dataclasses.replace(recipe, documents=Documents(END) if packing else None)
    return Decoder(recipe, LossFunction(model, Grid(), 1.0))


def test_the_layout_of_a_row() -> None:
    layout = layout_of(ROW, END)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2, 3]]
    mask = layout.sees()[0, 0]
    assert mask[4].tolist() == [False] * 3 + [True] * 2 + [False] * 7
    assert mask[2].tolist() == [True] * 3 + [False] * 9, "an end sees the document that it ends"
    assert mask.diagonal().all()


@pytest.mark.parametrize("name", MODELS)
def test_every_document_gives_what_it_gives_alone(name: str) -> None:
    model = MODELS[name]
    packed, plain = decoder(model, packing=True), decoder(model, packing=False)
    logits = packed(ROW)
    for start, stop in ((0, 3), (3, 7), (7, 8), (8, 12)):
        assert torch.allclose(logits[:, start:stop], plain(ROW[:, start:stop]), atol=1e-5)
    assert not torch.allclose(logits[:, 3:], plain(ROW)[:, 3:], atol=1e-3), "without packing they see each other"


@pytest.mark.parametrize("name", MODELS)
def test_one_document_is_as_without_packing(name: str) -> None:
    row = torch.arange(1, 13)[None]
    assert torch.allclose(
        decoder(MODELS[name], packing=True)(row), decoder(MODELS[name], packing=False)(row), atol=1e-5
    )


def test_experts_have_room_for_every_document_as_for_one_alone() -> None:
    """Two documents of four tokens which all want the same expert, and room for three."""
    experts = torch.zeros(1, 12, 2, dtype=torch.int64)
    experts[..., 1] = 1
    layout = layout_of(ROW, END)
    alone = [within(experts[:, start:stop], 4, 3) for start, stop in ((0, 3), (3, 7), (7, 8), (8, 12))]
    kept = within(experts, 4, 3, layout=layout)
    assert torch.equal(kept, torch.cat(alone, dim=1))
    assert kept[0, :, 0].tolist() == [True] * 6 + [False] + [True] * 4 + [False]
    assert within(experts, 4, 3).sum() == 6, "of one document"


@pytest.mark.parametrize("model", [TINY, TIGHT], ids=["dense", "experts"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_nothing_even_when_another_micro_batch_has_begun(
    model: ModelSpec, recompute: Recompute
) -> None:
    other = ROW.flip(1)
    grads = []
    for net in (decoder(model, packing=True), decoder(model, packing=True, recompute=recompute)):
        first = net(ROW, ROW)
        second = net(other, other)  # as in a pipeline: forward passes run ahead of backward passes
        torch.autograd.backward(first)
        torch.autograd.backward(second)
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_mask_is_what_attention_makes_of_what_tokens_see() -> None:
    """Bit by bit, forward and backward."""
    layout, generator = layout_of(ROW, END), torch.Generator().manual_seed(0)
    found = []
    for mask in (layout.sees(), layout.mask(torch.float32, keep=False)):
        generator.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 12, 16, generator=generator, requires_grad=True) for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("recompute", "kept"), [("full", 0), ("selective", 0), ("none", 1)])
def test_masks_do_not_wait_for_a_backward_pass_that_makes_them_again(recompute: Recompute, kept: int) -> None:
    """They grow with the square of the sequence; where nothing is recomputed all blocks share the one they need."""
    net, square, waiting = decoder(TINY, packing=True, recompute=recompute), (12, 12), dict[int, torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == square:
            waiting[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(ROW, ROW)
    assert len(waiting) == kept
    gc.collect()
    held = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape[-2:] == square]
    assert {one.data_ptr() for one in held} == set(waiting)
    loss.backward()


def test_stages_take_the_micro_batches_in_order() -> None:
    """Under DualPipeV twice, on the way down and up again, and the first need not wait for the second."""
    documents, rows = Documents(END), (ROW, ROW.flip(1))
    documents.load(rows, torch.device("cpu"))
    for phase, number in ((0, 0), (0, 1), (1, 0), (1, 1)):
        documents.begin(phase)
        assert torch.equal(documents.layout.positions, layout_of(rows[number], END).positions)
