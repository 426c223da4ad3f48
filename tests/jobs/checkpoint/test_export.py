"""Checkpoints as Hugging Face folders: transformers' own models give the same logits."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from jobs.checkpoint.export import export
from jobs.hf.folder import model_of
from jobs.sample import load
from jobs.spec import DataSpec
from strategies.errors import ConfigError, StorageError
from strategies.specs import MoeSpec, RotaryStretch
from tests.support import hf_models
from tests.support.checkpoints import flip_bit, write_model_checkpoint
from tests.support.jobspecs import GPT, LLAMA, make_job

MODELS = {
    "gpt": GPT,
    "gpt-untied": dataclasses.replace(GPT, tied=False, norm_eps=1e-3),
    "llama": dataclasses.replace(LLAMA, rope_theta=500.0),
    "llama-3.1": dataclasses.replace(LLAMA, rope_stretch=RotaryStretch(factor=4.0, original=16)),
    "llama-own-head-width": dataclasses.replace(LLAMA, head_width=12),
    "gpt-more-positions": dataclasses.replace(GPT, position_rows=40),
    "llama-tied": dataclasses.replace(LLAMA, tied=True),
    "mixtral": dataclasses.replace(LLAMA, moe=MoeSpec(experts=4, top_k=2, ffn=96)),
    "mixtral-own-head-width": dataclasses.replace(LLAMA, head_width=12, moe=MoeSpec(experts=4, top_k=2, ffn=96)),
}


def theirs(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return model.eval()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_transformers_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    manifest = write_model_checkpoint(tmp_path / "checkpoints", model)
    done = export(manifest, tmp_path / "hf", file_bytes=40_000)
    assert done.files > 1
    tokens = torch.randint(0, model.vocab, (2, model.seq), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load(make_job(model), manifest).logits(tokens)
        assert ours is not None
        other = theirs(done.path)
        assert sum(p.numel() for p in other.parameters()) == model.parameters
        logits = other(tokens).logits
    assert ours.std() > 0.1
    assert (ours - logits).abs().max() < 1e-4


def test_the_balance_of_experts_survives_the_way_out_and_in(tmp_path: Path) -> None:
    moe = MoeSpec(experts=4, top_k=2, ffn=96, balance_weight=0.013)
    model = dataclasses.replace(LLAMA, moe=moe)
    done = export(write_model_checkpoint(tmp_path / "checkpoints", model), tmp_path / "hf")
    assert theirs(done.path).config.router_aux_loss_coef == pytest.approx(0.013 * model.layers / 2)
    again = model_of(done.path).moe
    assert again is not None
    assert again.balance_weight == pytest.approx(0.013, rel=1e-12)


def test_the_tokenizer_goes_with_the_weights(tmp_path: Path) -> None:
    manifest, store = write_model_checkpoint(tmp_path / "checkpoints", LLAMA), tmp_path / "store"
    store.mkdir()
    hf_models.tokenizer(store / "tokenizer.json", 300)
    done = export(manifest, tmp_path / "hf", data=DataSpec(kind="text", store=str(store), end_id=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(done.path)
    ours = Tokenizer.from_file(str(store / "tokenizer.json"))
    text = "def f(x):\n    return x + 1"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_special_tokens=False).ids
    assert (theirs.eos_token_id, theirs.eos_token) == (0, "<|endoftext|>")
    assert json.loads((done.path / "config.json").read_text())["eos_token_id"] == 0
    gone = export(manifest, tmp_path / "bare", data=DataSpec(kind="text", store=str(tmp_path / "gone"), end_id=5))
    assert not (gone.path / "tokenizer.json").exists()
    assert json.loads((gone.path / "config.json").read_text())["eos_token_id"] == 5


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_narrow_types_are_rounded_as_torch_rounds(tmp_path: Path, dtype: Any, kind: torch.dtype) -> None:
    manifest = write_model_checkpoint(tmp_path / "checkpoints", GPT)
    wide = theirs(export(manifest, tmp_path / "wide").path).state_dict()
    narrow = theirs(export(manifest, tmp_path / "narrow", dtype=dtype).path).state_dict()
    for name, tensor in wide.items():
        assert narrow[name].dtype == kind
        assert torch.equal(narrow[name], tensor.to(kind)), name


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = write_model_checkpoint(tmp_path / "checkpoints", LLAMA)
    done = export(manifest, tmp_path / "hf", progress=lambda now, total: seen.append((now, total)))
    assert seen[-1] == (done.bytes, done.bytes)
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)
    assert done.bytes == 4 * LLAMA.parameters
    assert json.loads((done.path / "config.json").read_text())["num_key_value_heads"] == LLAMA.kv_heads


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    manifest = write_model_checkpoint(tmp_path / "checkpoints", GPT)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export(manifest, tmp_path / "there")
    shard = next((tmp_path / "checkpoints").rglob("shard-00001.safetensors"))

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(manifest, tmp_path / "new" / "hf", progress=interrupted)
    with pytest.raises(StorageError, match="The export cannot be written"):
        export(manifest, shard / "hf")
    flip_bit(shard, 8 + int.from_bytes(shard.read_bytes()[:8], "little"))  # the first master weight
    with pytest.raises(Exception, match=r"digest|damaged"):
        export(manifest, tmp_path / "new" / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "there"]


def test_experts_that_are_not_mixtrals_are_refused(tmp_path: Path) -> None:
    moe = MoeSpec(experts=4, top_k=2, ffn=96, routing="sigmoid", shared_ffn=32)
    model = dataclasses.replace(LLAMA, moe=moe)
    with pytest.raises(ConfigError, match="no layout for the experts") as caught:
        export(write_model_checkpoint(tmp_path, model), tmp_path / "hf")
    assert caught.value.why == "it has no shared experts, no routing by sigmoids"


def test_what_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    model = dataclasses.replace(GPT, kv_heads=2)
    with pytest.raises(ConfigError, match="grouped key/value heads"):
        export(write_model_checkpoint(tmp_path, model), tmp_path / "hf")
