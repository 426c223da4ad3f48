"""Hugging Face folders as our models: the logits of transformers' own, whole and in slices, and back again."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.checkpoint.slices import clip
from jobs.forward import Forward
from jobs.hf.config import config_of, read_config
from jobs.hf.folder import model_of, open_folder
from jobs.hf.names import parts_of
from jobs.hf.weights import HfWeights
from jobs.weights import check, digested, find, open_weights, verify
from strategies.capabilities import unbuilt
from strategies.codec import to_json
from strategies.errors import ConfigError, NotFound, StorageError
from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec
from tests.support import hf_models
from tests.support.jobspecs import LLAMA

STRETCHED: dict[str, Any] = {  # one frequency in part, the slower ones wholly
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ONE = ParallelPlan(stages=(1,), micro_batch=1, grad_accum=1)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-sharded": ("llama", {"tie_word_embeddings": True, "shard": "20KB"}),
    "llama-bf16": ("llama", {"dtype": torch.bfloat16}),
    "llama-3.1": ("llama", {"rope_parameters": STRETCHED}),
    "llama-own-head-width": ("llama", {"head_dim": 12}),
    "llama-own-head-width-tied-sharded": ("llama", {"head_dim": 4, "tie_word_embeddings": True, "shard": "20KB"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-nemo": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-0.1": ("mistral", {"sliding_window": 20}),
    "mixtral-own-head-width": ("mixtral", {"head_dim": 12}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied-fp16-sharded": ("gpt2", {"tie_word_embeddings": False, "shard": "20KB", "dtype": torch.float16}),
    "gpt2-inner": ("gpt2", {"n_inner": 56}),
    "mixtral": ("mixtral", {}),
    "mixtral-3-of-4-sharded": ("mixtral", {"num_experts_per_tok": 3, "shard": "20KB"}),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    kind, changes = CASES[name]
    theirs = hf_models.make(tmp_path / "hf", kind, **changes)
    weights = find(str(tmp_path / "hf"))
    model = model_of(tmp_path / "hf")
    assert model.parameters == sum(p.numel() for p in theirs.parameters())
    tokens = hf_models.tokens(model.vocab, 2, model.seq)
    forward = Forward(model, open_weights(weights, model))
    wanted = hf_models.logits(theirs, tokens)
    assert wanted.std() > 0.3
    ours = forward.logits(tokens)
    assert ours is not None
    assert (ours - wanted).abs().max() < 1e-4
    one = forward.logits_at(tokens, torch.tensor([3, model.seq - 1]))
    assert one is not None
    assert (one - wanted[[0, 1], [3, model.seq - 1]]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_slice_is_what_the_whole_tensor_has_there(tmp_path: Path, kind: str) -> None:
    """Any box of any tensor, and any range of it, by our names; what is fused and transposed there included."""
    theirs = hf_models.make(tmp_path / "hf", kind).state_dict() if kind != "mixtral" else {}
    if kind == "mixtral":
        hf_models.make(tmp_path / "hf", kind)
    model = model_of(tmp_path / "hf")
    source = HfWeights(open_folder(tmp_path / "hf", model), model)
    rng = np.random.default_rng(0)
    for part in parts_of(model):
        for name, shape in part.sources:
            full = np.empty(int(np.prod(shape)), dtype=np.float32)
            source.read_slice(clip(name, shape, tuple((0, size) for size in shape), 0, full.size), full)
            whole = full.reshape(shape)
            box = tuple(tuple(sorted(rng.choice(size + 1, 2, replace=False).tolist())) for size in shape)
            cut = whole[tuple(slice(low, high) for low, high in box)].reshape(-1)
            start, stop = sorted(rng.integers(0, cut.size + 1, 2).tolist())
            out = np.full(stop - start, np.nan, dtype=np.float32)
            source.read_slice(clip(name, shape, box, start, stop), out)
            assert np.array_equal(out, cut[start:stop]), name
        if theirs:
            stacked = torch.cat([torch.from_numpy(_whole(source, name, shape)) for name, shape in part.sources])
            assert torch.equal(stacked.T if part.transposed else stacked, theirs[part.name]), part.name


def _whole(source: HfWeights, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    out = np.empty(int(np.prod(shape)), dtype=np.float32)
    source.read_slice(clip(name, shape, tuple((0, size) for size in shape), 0, out.size), out)
    return out.reshape(shape)


def test_mixtral_by_the_names_of_our_experts(tmp_path: Path) -> None:
    theirs = hf_models.make(tmp_path / "hf", "mixtral")
    model = model_of(tmp_path / "hf")
    assert model.moe is not None
    assert (model.moe.experts, model.moe.top_k, model.moe.ffn) == (4, 2, 40)
    assert model.parameters == sum(p.numel() for p in theirs.parameters())
    names = {part.name: [source for source, _ in part.sources] for part in parts_of(model)}
    block = "model.layers.2.block_sparse_moe"
    assert names[f"{block}.gate.weight"] == ["blocks.2.mlp.router.weight"]
    assert names[f"{block}.experts.3.w1.weight"] == ["blocks.2.mlp.experts.3.gate.weight"]
    assert names[f"{block}.experts.3.w2.weight"] == ["blocks.2.mlp.experts.3.down.weight"]
    assert names[f"{block}.experts.3.w3.weight"] == ["blocks.2.mlp.experts.3.up.weight"]


def test_gpt2_without_its_prefix_and_with_old_buffers(tmp_path: Path) -> None:
    """As the files of openai-community/gpt2 are: no ``transformer.``, masks stored with the weights."""
    from safetensors.torch import load_file, save_file

    theirs = hf_models.make(tmp_path / "hf", "gpt2")
    file = tmp_path / "hf" / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 48, 48)}, file)
    model = model_of(tmp_path / "hf")
    tokens = hf_models.tokens(model.vocab, 1, 9)
    ours = Forward(model, open_weights(find(f"hf:{tmp_path / 'hf'}"), model)).logits_at(tokens, torch.tensor([8]))
    assert ours is not None
    assert (ours - hf_models.logits(theirs, tokens)[:, 8]).abs().max() < 1e-4


def test_a_window_of_attention_bounds_the_sequence(tmp_path: Path) -> None:
    """Within it attention is that of a Llama, and beyond it is not: transformers' own logits show where it begins."""
    theirs = hf_models.make(tmp_path / "hf", "mistral", sliding_window=20)
    model = model_of(tmp_path / "hf")
    assert (model.seq, model.flavour) == (20, "llama")
    longer = dataclasses.replace(model, seq=21)
    tokens = hf_models.tokens(model.vocab, 2, 21)
    source = HfWeights(open_folder(tmp_path / "hf", model), model)
    ours = Forward(longer, source).logits(tokens)
    assert ours is not None
    apart = (ours - hf_models.logits(theirs, tokens)).abs().amax(dim=(0, 2))
    assert apart[:20].max() < 1e-4
    assert apart[20] > 1e-3
    told = refusal(tmp_path / "hf", longer)
    assert "sliding_window: attention sees 20 tokens there, and whole sequences here" in told
    assert "model.seq=20 or less" in told
    change_config(tmp_path / "hf", sliding_window=48)  # as long as the longest sequence: no window
    assert model_of(tmp_path / "hf").seq == 48
    values, _ = read_config({"model_type": "mistral", **hf_models.LLAMA, "max_position_embeddings": 9000}, "tiny")
    assert values["seq"] == 4096, "where the file says nothing, transformers' Mistral has a window"
    values, _ = read_config({"model_type": "mistral", **hf_models.LLAMA, "sliding_window": None}, "tiny")
    assert values["seq"] == 48


def test_gpt2_in_shorter_sequences_keeps_its_positions(tmp_path: Path) -> None:
    theirs = hf_models.make(tmp_path / "hf", "gpt2")
    whole = model_of(tmp_path / "hf")
    model = dataclasses.replace(whole, seq=20, position_rows=48)
    assert model.parameters == whole.parameters
    tokens = hf_models.tokens(model.vocab, 2, 20)
    ours = Forward(model, open_weights(find(str(tmp_path / "hf")), model)).logits(tokens)
    assert ours is not None
    assert (ours - hf_models.logits(theirs, tokens)).abs().max() < 1e-4
    assert config_of(model)["n_positions"] == 48
    cut = dataclasses.replace(whole, seq=20)
    told = refusal(tmp_path / "hf", cut)
    assert "learned_positions 48 in the folder, 20 here" in told
    assert "model.position_rows=48 keeps the positions that shorter sequences do not use" in told


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what config.json of the model says, beside its sizes, and what of it the model must have
    "gpt2": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
         "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02,
         "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
         "bos_token_id": 50256, "eos_token_id": 50256, "summary_type": "cls_index", "vocab_size": 50257},
        {"parameters": 124_439_808},
    ),
    "distilgpt2": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
         "_num_labels": 1, "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 6,
         "n_positions": 1024, "vocab_size": 50257},
        {"parameters": 81_912_576},
    ),
    "llama-2-7b": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
         "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000},
        {"parameters": 6_738_415_616, "rope_theta": 1e4},
    ),
    "llama-3.2-1b": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
         "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
         "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
         "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256},
        {"parameters": 1_235_814_400, "tied": True, "head_width": 0},
    ),
    "tinyllama-1.1b": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu",
         "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048, "num_attention_heads": 32,
         "num_hidden_layers": 22, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_scaling": None,
         "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000},
        {"parameters": 1_100_048_384},
    ),
    "mistral-7b-0.1": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000},
        {"parameters": 7_241_732_096, "seq": 4096},
    ),
    "mistral-nemo-12b": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128,
         "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336, "max_position_embeddings": 131072,
         "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 131072},
        {"parameters": 12_247_782_400, "seq": 131072, "head_width": 128},
    ),
    "mixtral-8x7b": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
         "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
         "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
         "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
         "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
        {"parameters": 46_702_792_704},
    ),
    "mixtral-8x22b": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
         "hidden_act": "silu", "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
         "num_attention_heads": 48, "num_experts_per_tok": 2, "num_hidden_layers": 56, "num_key_value_heads": 8,
         "num_local_experts": 8, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "rms_norm_eps": 1e-5,
         "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
        {"parameters": 140_620_634_112},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs_are_read(tmp_path: Path, name: str) -> None:
    """Our count of the parameters is the published one, the model can be built, and the way out leads in again."""
    document, wanted = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(document))
    model = model_of(tmp_path)
    assert {key: getattr(model, key) for key in wanted} == wanted
    assert unbuilt(ONE, "bf16", model) is None
    back, flaws = read_config(config_of(model), model.name)
    assert not flaws
    assert {key: value for key, value in back.items() if key != "moe"} == {
        key: to_json(model)[key] for key in back if key != "moe"
    }


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("llama-2-7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not implemented"),
        ("llama-2-7b", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not implemented"),
        ("llama-2-7b", {"attention_bias": True}, "attention_bias"),
        ("llama-2-7b", {"mlp_bias": True}, "mlp_bias"),
        ("llama-2-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral-nemo-12b", {"hidden_act": "gelu"}, "hidden_act"),
        ("mistral-nemo-12b", {"sliding_window": 0}, "sliding_window: expected a whole number from 1, found 0"),
        ("mixtral-8x7b", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ],
)
def test_what_published_models_could_have_and_ours_have_not_is_refused(
    name: str, change: dict[str, Any], told: str
) -> None:
    _, flaws = read_config(PUBLISHED[name][0] | change, name)
    assert len(flaws) == 1
    assert told in flaws[0].message


def refusal(folder: Path, model: ModelSpec | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        open_folder(folder, model or model_of(folder))
    return str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_every_problem_with_the_tensors_is_told_at_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf_models.make(tmp_path / "hf", "llama")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_projection.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    tensors["model.norm.weight"] = torch.ones(31)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)
    save_file(tensors, file)
    told = refusal(tmp_path / "hf")
    assert "has 4 problems" in told
    assert "1 tensor is missing: model.layers.0.self_attn.q_proj.weight" in told
    assert "Did you mean 'model.layers.0.self_attn.q_projection.weight'?" in told
    assert "1 tensor is not in the model: model.layers.0.self_attn.q_projection.weight" in told
    assert "model.norm.weight is [31], [32] is needed" in told
    assert "lm_head.weight is I32" in told


def test_every_feature_that_is_not_ours_is_told_at_once(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama")
    change_config(
        tmp_path / "hf",
        attention_bias=True,
        hidden_act="gelu",
        sliding_window=16,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        num_hidden_layers="three",
    )
    told = refusal(tmp_path / "hf")
    for word in (
        "5 problems",
        "attention_bias",
        "hidden_act",
        "sliding_window",
        "'yarn' is not implemented",
        "'three'",
    ):
        assert word in told


def test_old_rope_scaling_and_gpt2_variants_are_refused(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "gpt2", "gpt2")
    change_config(tmp_path / "gpt2", activation_function="relu", scale_attn_by_inverse_layer_idx=True)
    told = refusal(tmp_path / "gpt2")
    assert "activation_function: 'relu' is not implemented" in told
    assert "scale_attn_by_inverse_layer_idx" in told
    hf_models.make(tmp_path / "llama", "llama")
    change_config(tmp_path / "llama", rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0})
    assert "'linear' is not implemented" in refusal(tmp_path / "llama")
    change_config(tmp_path / "llama", rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": True})
    assert "expected numbers above 0, found factor 8.0, low_freq_factor True" in refusal(tmp_path / "llama")
    change_config(tmp_path / "llama", rope_scaling=STRETCHED | {"high_freq_factor": 1.0})
    assert "low below high" in refusal(tmp_path / "llama")
    change_config(tmp_path / "llama", rope_scaling=STRETCHED)
    assert "rope_stretch RotaryStretch" in refusal(tmp_path / "llama", LLAMA)


def test_an_unknown_architecture_gets_a_suggestion(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama")
    change_config(tmp_path / "hf", model_type="lama")
    assert "model_type 'lama' is not an architecture of phalanx" in refusal(tmp_path / "hf")
    assert "Did you mean 'llama'?" in refusal(tmp_path / "hf")


@pytest.mark.parametrize("value", [5, True, {"LlamaForCausalLM": 1}, ["LlamaModel"], [5]])
def test_architectures_that_are_none_are_refused(value: Any) -> None:
    values = {"model_type": "llama", **hf_models.LLAMA, "architectures": value}
    found = [flaw for flaw in read_config(values, "tiny")[1] if "config.json: architectures: " in flaw.message]
    assert len(found) == 1
    assert "LlamaForCausalLM" in found[0].hint or value == [5]


@pytest.mark.parametrize(
    "value",
    [5, -1, 0.5, True, "x", [], ["x"], {}, {"a": 1}, float("nan"), float("inf"), pytest.param(10**400, id="huge")],
)
def test_no_value_of_a_config_is_an_internal_error(value: Any) -> None:
    more = {
        "llama": (hf_models.LLAMA, ["rms_norm_eps", "hidden_act", "rope_scaling", "sliding_window"]),
        "mixtral": (hf_models.MIXTRAL, ["head_dim", "tie_word_embeddings", "initializer_range"]),
        "gpt2": (hf_models.GPT2, ["n_inner", "activation_function", "quantization_config"]),
    }
    for kind, (sizes, keys) in more.items():
        assert not read_config(sizes | {"model_type": kind}, "tiny")[1]
        for key in ("model_type", "architectures", *sizes, *keys):
            values, _ = read_config(sizes | {"model_type": kind, key: value}, "tiny")
            assert all(math.isfinite(one) for one in values.values() if isinstance(one, float))


@pytest.mark.parametrize(("said", "coefficient"), [({}, 0.001), ({"router_aux_loss_coef": 0.02}, 0.02)])
def test_the_balance_of_experts_comes_along(said: dict[str, Any], coefficient: float) -> None:
    """Of 3 layers with 2 experts per token; where the file says nothing it is transformers' own default."""
    from transformers import MixtralConfig

    assert said or MixtralConfig().router_aux_loss_coef == coefficient
    values, flaws = read_config(hf_models.MIXTRAL | said | {"model_type": "mixtral"}, "tiny")
    assert not flaws
    assert values["moe"]["balance_weight"] == pytest.approx(coefficient * 2 / 3)
    off, _ = read_config(hf_models.MIXTRAL | {"model_type": "mixtral", "router_aux_loss_coef": 0}, "tiny")
    assert off["moe"]["balance_weight"] == 0


@pytest.mark.parametrize("value", [-0.1, True, "x", None, [], float("nan"), float("inf")])
def test_a_balance_that_is_no_number_is_refused(value: Any) -> None:
    document = hf_models.MIXTRAL | {"model_type": "mixtral", "router_aux_loss_coef": value}
    _, (flaw,) = read_config(document, "tiny")
    assert "router_aux_loss_coef: expected a number from 0" in flaw.message


@pytest.mark.parametrize("name", [5, None, ["a"], {}, ""])
def test_an_index_of_names_that_are_none_is_refused(tmp_path: Path, name: Any) -> None:
    hf_models.make(tmp_path / "hf", "llama", shard="20KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(document))
    assert "model.safetensors.index.json" in refusal(tmp_path / "hf")


def test_pickles_are_refused(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    assert "phalanx loads no pickle" in refusal(tmp_path / "hf")


def test_cut_off_and_missing_files_are_told(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama", shard="20KB")
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-4])
    files[1].unlink()
    told = refusal(tmp_path / "hf")
    assert "it is cut off or damaged" in told
    assert f"files of model.safetensors.index.json are missing: {files[1].name}" in told


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_files_that_cannot_be_read_hide_nothing_of_the_others(tmp_path: Path, kind: str) -> None:
    """What they hold is unknown, by the index, and not called missing; all else is judged."""
    from safetensors.torch import load_file, save_file

    hf_models.make(tmp_path / "hf", kind, shard="20KB")
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 4
    tensors = load_file(files[0])
    gone, bent = sorted(tensors)[:2]
    tensors["nobody.weight"] = tensors.pop(gone)
    tensors[bent] = torch.ones(3, 1)
    save_file(tensors, files[0])
    files[1].write_bytes(b"\0" * 9)
    files[2].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-4])
    told = refusal(tmp_path / "hf")
    assert "has 6 problems" in told, told
    assert f"{files[1].name} cannot be used" in told
    assert f"files of model.safetensors.index.json are missing: {files[2].name}" in told
    assert f"{files[3].name} cannot be used: it has " in told
    assert f"1 tensor is missing: {gone}" in told
    assert "1 tensor is not in the model: nobody.weight" in told
    assert f"1 tensor is of another shape: {bent} is [3, 1]" in told


@pytest.mark.parametrize("content", [b"\0" * 9, b"\2\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a": 3}'])
def test_of_a_single_file_that_cannot_be_read_nothing_is_called_missing(tmp_path: Path, content: bytes) -> None:
    hf_models.make(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "model.safetensors").write_bytes(content)
    told = refusal(tmp_path / "hf")
    assert "model.safetensors cannot be used" in told
    assert "problems" not in told


def test_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama")
    other = dataclasses.replace(model_of(tmp_path / "hf"), layers=2, norm_eps=1e-3, seq=16)
    told = refusal(tmp_path / "hf", other)
    assert "layers 3 in the folder, 2 here" in told
    assert "norm_eps" in told
    assert "seq" not in told  # shorter sequences are the user's choice
    assert "model.layers.2.input_layernorm.weight" in told


def test_weights_that_have_changed_since_the_submit_are_noticed(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama")
    model = model_of(tmp_path / "hf")
    weights = digested(find(str(tmp_path / "hf")), model)
    assert set(weights.files) == {"config.json", "model.safetensors"}
    verify(weights)
    file = tmp_path / "hf" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    check(weights, model)  # its shape is as before
    verify(weights, 0, 2)  # the share of a rank: config.json
    with pytest.raises(StorageError, match=r"have changed since the job was submitted: model\.safetensors"):
        verify(weights, 1, 2)


def test_what_is_no_place_of_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There are no weights at"):
        find(str(tmp_path / "nothing"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "request.json").write_text("{}")
    with pytest.raises(NotFound, match="has no checkpoint"):
        find(str(tmp_path / "run"))
