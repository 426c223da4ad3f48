"""Longer sequences in the configuration: what the base becomes, whose weights may be taken, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jobs.weights import check, find
from launcher.build import model_spec
from launcher.config import compose
from strategies.errors import ConfigError
from strategies.rotary import scaled_base
from tests.support.checkpoints import write_model_checkpoint
from tests.support.jobspecs import GPT, LLAMA


def test_the_base_is_scaled_by_the_width_of_a_head() -> None:
    words = ["model=llama_tiny", "model.seq=512", "model.rope_scaling=4"]
    model = model_spec(compose(words))
    assert model.rope_theta == scaled_base(10000.0, 4, model.head_dim) > 40000
    assert model_spec(compose(words[:1])).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model=gpt_tiny", "model.rope_scaling=4"], "learned positions, which reach no further than model.seq"),
        (["model=llama_tiny", "model.rope_scaling=0.5"], "rope_scaling"),
        (["model=gpt_tiny", "model.rope_stretch={factor: 8}"], "flavour gpt3 has no rotary positions"),
        (["model=llama_tiny", "model.rope_stretch={factor: 8, low: 4}"], "rope_stretch.high: 4 is not above low, 4"),
    ],
)
def test_what_cannot_be_scaled_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match="rope_s") as caught:
        compose(words)
    assert told in str(caught.value)


def test_weights_of_shorter_sequences_are_taken_where_positions_turn(tmp_path: Path) -> None:
    weights = find(str(write_model_checkpoint(tmp_path, LLAMA)))
    longer = dataclasses.replace(LLAMA, seq=4 * LLAMA.seq, rope_theta=scaled_base(LLAMA.rope_theta, 4, LLAMA.head_dim))
    check(weights, longer)
    with pytest.raises(ConfigError) as caught:
        check(weights, dataclasses.replace(longer, hidden=128, ffn=64))
    for difference in ("model.hidden: 64 in the checkpoint, 128 here", "model.ffn: 192 in the checkpoint, 64 here"):
        assert difference in str(caught.value)


def test_learned_positions_reach_no_further(tmp_path: Path) -> None:
    weights = find(str(write_model_checkpoint(tmp_path, GPT)))
    with pytest.raises(ConfigError, match=r"cannot be extended: keep model\.seq=32"):
        check(weights, dataclasses.replace(GPT, seq=128))


SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "tied", "norm_eps")


def beginning(manifest: Path, theta: float | None = None, factor: int = 1) -> float:
    """The rotary base of a run of :data:`LLAMA` that begins with a checkpoint."""
    sizes = [f"model.{name}={getattr(LLAMA, name)}" for name in SIZES]
    words = [f"train.init_from={manifest}", f"model.rope_scaling={factor}", "data.tokenizer=t.json"]
    words += [f"model.rope_theta={theta!r}"] if theta else []
    return model_spec(compose(["model=llama_tiny", *sizes, *words])).rope_theta


def test_another_base_than_the_checkpoints_is_no_extension(tmp_path: Path) -> None:
    manifest = write_model_checkpoint(tmp_path, dataclasses.replace(LLAMA, rope_theta=500000.0))
    for factor in (1, 2):
        with pytest.raises(ConfigError, match=r"model\.rope_theta: 10000, the weights in .* with 500000") as caught:
            beginning(manifest, factor=factor)
        assert caught.value.hint == "model.rope_theta=500000, and model.rope_scaling=FACTOR for longer sequences."
    assert beginning(manifest, 500000.0) == 500000.0
    assert beginning(manifest, 500000.0, 2) == scaled_base(500000.0, 2, LLAMA.head_dim)


def test_the_base_of_a_stage_that_was_scaled_is_the_scaled_one(tmp_path: Path) -> None:
    base = scaled_base(10000.0, 4, LLAMA.head_dim)
    manifest = write_model_checkpoint(tmp_path, dataclasses.replace(LLAMA, rope_theta=base))
    with pytest.raises(ConfigError, match=r"model\.rope_theta: 10000, the weights") as caught:
        beginning(manifest)
    told = float(str(caught.value.hint).split(",")[0].removeprefix("model.rope_theta="))
    assert told == base, "said so exactly that it can be typed"
    assert beginning(manifest, factor=4) == base, "the words of that stage mean its base"
    assert beginning(manifest, told, 2) == scaled_base(base, 2, LLAMA.head_dim)
