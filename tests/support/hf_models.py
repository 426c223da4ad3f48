"""Tiny random Hugging Face models, made and judged by transformers itself."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 48,
    "layer_norm_epsilon": 1e-4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MIXTRAL: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "intermediate_size"},
    "intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def make(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Any:
    """Save a random model; returns it, in fp32.

    Args:
        folder: Where to.
        kind: ``llama``, ``mistral``, ``gpt2`` or ``mixtral``.
        dtype: Type of the saved weights.
        shard: Largest file.
        changes: Values of its config.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(5)
        if kind == "gpt2":
            model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | changes))
        elif kind == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes))
        elif kind == "mistral":
            model = transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA | changes))
        else:
            model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL | changes))
        with torch.no_grad():
            for parameter in model.parameters():  # also norms and biases, so that nothing is lost unnoticed
                parameter.copy_((parameter + torch.randn_like(parameter) * 0.15).to(dtype))
        saved = copy.deepcopy(model).to(dtype)  # a copy: the frequencies of the positions would be rounded, too
        saved.save_pretrained(folder, max_shard_size=shard)
        return model.eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes."""
    with torch.no_grad():
        out: torch.Tensor = model(tokens).logits
    return out


def tokens(vocab: int, rows: int, length: int) -> torch.Tensor:
    """Random tokens, always the same."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> Any:
    """The model of a folder, by transformers, in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()


def tokenizer(path: Path, vocab: int) -> None:
    """A byte-level tokenizer of at most ``vocab`` tokens, the first of which begins and ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["def f(x):\n    return x + 1\n" * 50, "x = 3 + 4\n" * 50], trainer)
    made.save(str(path))
