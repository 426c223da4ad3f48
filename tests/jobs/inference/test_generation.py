"""Drawing tokens: greedy, top-k, top-p, the right frequencies, and a noise that depends on nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from jobs.forward import Forward
from jobs.hf.folder import model_of
from jobs.inference.generation import Sampling, draw, generate
from jobs.sample import load
from jobs.weights import find, open_weights
from strategies.specs import ModelSpec, MoeSpec
from tests.support import hf_models
from tests.support.checkpoints import write_model_checkpoint
from tests.support.jobspecs import GPT, LLAMA, make_job

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -5.0])


def frequencies(how: Sampling, draws: int = 4000) -> list[float]:
    counts = torch.bincount(torch.tensor([draw(LOGITS, how, "p", n) for n in range(draws)]), minlength=5)
    return [float(count) / draws for count in counts]


def test_greedy_takes_the_largest() -> None:
    assert draw(LOGITS, Sampling(), "p", 3) == 1
    assert draw(LOGITS, Sampling(temperature=5.0, top_k=1), "p", 3) == 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_have_the_probabilities_of_the_softmax(temperature: float) -> None:
    wanted = torch.softmax(LOGITS / temperature, dim=-1).tolist()
    assert frequencies(Sampling(temperature=temperature)) == pytest.approx(wanted, abs=0.03)


def test_top_k_and_top_p_leave_out_the_rest() -> None:
    shares = torch.softmax(LOGITS, dim=-1)
    assert float(shares[1]) < 0.7 < float(shares[1] + shares[2])
    for how in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.7)):
        found = frequencies(how, 1000)
        assert found[0] == found[3] == found[4] == 0.0
        assert found[1] == pytest.approx(float(shares[1] / (shares[1] + shares[2])), abs=0.05)


def test_a_draw_follows_from_seed_prompt_and_position() -> None:
    how = Sampling(temperature=1.0, seed=3)
    flat = torch.zeros(1000)
    one = [draw(flat, how, "p", n) for n in range(8)]
    assert one == [draw(flat, how, "p", n) for n in range(8)]
    assert len(set(one)) > 4
    assert one != [draw(flat, how, "q", n) for n in range(8)]
    assert one != [draw(flat, Sampling(temperature=1.0, seed=4), "p", n) for n in range(8)]
    nearly = flat + 1e-6 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert one == [draw(nearly, how, "p", n) for n in range(8)]  # rounding changes nothing


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_text_is_that_of_transformers_and_does_not_depend_on_the_batch(tmp_path: Path, kind: str) -> None:
    theirs = hf_models.make(tmp_path / "hf", kind)
    model = model_of(tmp_path / "hf")
    forward = Forward(model, open_weights(find(str(tmp_path / "hf")), model))
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]
    found = generate(forward, prompts, ["a", "b", "c"], count=12, how=Sampling())
    for prompt, (tokens, loss) in zip(prompts, found, strict=True):
        line = torch.tensor([prompt])
        for _ in range(12):
            line = torch.cat([line, hf_models.logits(theirs, line)[:, -1:].argmax(dim=-1)], dim=1)
        assert tokens == line[0].tolist()
        chosen = hf_models.logits(theirs, line[:, :-1]).log_softmax(dim=-1)[0, len(prompt) - 1 :]
        assert loss == pytest.approx(-float(chosen.gather(1, line[0, len(prompt) :, None]).sum()), rel=1e-4)


MOE = MoeSpec(experts=4, top_k=2, ffn=96)
KINDS: dict[str, tuple[ModelSpec, bool]] = {
    "gpt": (dataclasses.replace(GPT, init_std=0.2), False),
    "llama-packed": (dataclasses.replace(LLAMA, init_std=0.2), True),
    "gpt-packed-more-positions": (dataclasses.replace(GPT, init_std=0.2, position_rows=40), True),
    "llama-own-head-width": (dataclasses.replace(LLAMA, init_std=0.2, head_width=12), False),
    "experts": (dataclasses.replace(LLAMA, init_std=0.2, moe=MOE), False),
    "experts-with-a-capacity": (
        dataclasses.replace(LLAMA, init_std=0.2, moe=dataclasses.replace(MOE, capacity_factor=1.0)),
        False,
    ),
}


def forward_of(folder: Path, model: ModelSpec, *, packing: bool) -> Forward:
    job = make_job(model)
    data = dataclasses.replace(job.data, packing=packing, end_id=9)
    return load(dataclasses.replace(job, data=data), write_model_checkpoint(folder, model))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_only_what_is_new_goes_through_the_model(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what the whole text says, where some rows are shorter than others, until one is too long."""
    model, packing = KINDS[name]
    forward = forward_of(tmp_path, model, packing=packing)
    prompts, keys = [[3, 4, 9, 5, 6, 7], [7], list(range(20)), [9]], list("abcd")
    how, columns, run = Sampling(temperature=1.0), list[int](), forward._run

    def counted(tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor | None:
        columns.append(tokens.shape[1])
        return run(tokens, positions)

    monkeypatch.setattr(forward, "_run", counted)
    found = generate(forward, prompts, keys, count=16, how=how)
    cut = [32] * 3  # the longest prompt has 20 tokens: from its 33rd on it is cut
    assert columns == ([*range(20, 33), *cut] if "capacity" in name else [20, *[1] * 12, *cut])
    with monkeypatch.context() as patch:
        patch.setattr(Forward, "remembers", False)
        whole = generate(forward, prompts, keys, count=16, how=how)
    for (tokens, loss), (wanted, cost) in zip(found, whole, strict=True):
        assert tokens == wanted
        assert loss == pytest.approx(cost, rel=1e-4)
    assert len({tuple(tokens[-16:]) for tokens, _ in found}) == 4, "and not the same for all"


def test_nothing_of_one_text_is_left_for_the_next(tmp_path: Path) -> None:
    forward = forward_of(tmp_path, KINDS["gpt"][0], packing=False)
    row = torch.tensor([[1, 2, 3, 4]])
    fresh = forward.logits(row)
    generate(forward, [[5, 6]], ["a"], count=5, how=Sampling())
    again, losses = forward.logits(row), forward.losses(row[:, :-1], row[:, 1:])
    assert fresh is not None
    assert again is not None
    assert losses is not None
    assert torch.equal(fresh, again)
    wanted = -fresh.log_softmax(dim=-1)[:, :-1].gather(-1, row[:, 1:, None])[..., 0]
    assert torch.allclose(losses, wanted, rtol=1e-5)


def test_a_text_longer_than_the_sequence_slides_on(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "gpt2", n_positions=8)
    model = model_of(tmp_path / "hf")
    forward = Forward(model, open_weights(find(str(tmp_path / "hf")), model))
    ((tokens, _),) = generate(forward, [[1, 2, 3]], ["a"], count=20, how=Sampling())
    assert len(tokens) == 23


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_the_model_of_a_packed_run_sees_each_document_alone(tmp_path: Path, model: ModelSpec) -> None:
    """As in training, also where rows are padded."""
    manifest = write_model_checkpoint(tmp_path / "checkpoints", model)
    forwards = []
    for packing in (True, False):
        job = make_job(model)
        data = dataclasses.replace(job.data, packing=packing, end_id=9)
        forwards.append(load(dataclasses.replace(job, data=data), manifest))
    packed, plain = forwards
    row = torch.tensor([[3, 4, 9, 5, 6, 7, 9, 9, 8, 2, 3, 4]])
    logits, alone, whole = packed.logits(row), plain.logits(row[:, 3:7]), plain.logits(row)
    assert logits is not None
    assert alone is not None
    assert whole is not None
    assert torch.allclose(logits[:, 3:7], alone, atol=1e-5)
    assert not torch.allclose(logits[:, 3:7], whole[:, 3:7], atol=1e-2)
    prompts, keys = [row[0, :5].tolist(), row[0, :10].tolist()], ["a", "b"]
    found = generate(packed, prompts, keys, count=6, how=Sampling())
    for (tokens, _), prompt, part in zip(found, prompts, ([5, 6], [8, 2]), strict=True):
        ((wanted, _),) = generate(plain, [part], ["a"], count=6, how=Sampling())
        added = wanted[2:]
        cut = added.index(9) + 1 if 9 in added else 6  # behind an end begins another document
        assert tokens[len(prompt) :][:cut] == added[:cut]


def test_a_text_ends_with_the_token_that_ends_texts(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama")
    model = model_of(tmp_path / "hf")
    forward = Forward(model, open_weights(find(str(tmp_path / "hf")), model))
    prompts, keys = [[5, 9, 2], [7]], ["a", "b"]
    whole = generate(forward, prompts, keys, count=12, how=Sampling(temperature=1.0))
    end = whole[0][0][6]
    found = generate(forward, prompts, keys, count=12, how=Sampling(temperature=1.0, end=end))
    for prompt, (tokens, loss), (longer, more) in zip(prompts, found, whole, strict=True):
        added = longer[len(prompt) :]
        cut = added.index(end) + 1 if end in added else len(added)
        assert tokens == longer[: len(prompt) + cut]
        assert loss == pytest.approx(more) if cut == len(added) else loss < more
    assert len(found[0][0]) <= 7
