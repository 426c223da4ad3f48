"""config.json and :class:`ModelSpec`, both ways: what transformers calls the sizes, and what of it phalanx can be.

Reading it finds every problem at once: an architecture that is not known, a size that is missing, a feature that our
models do not have and that would silently change every logit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from jobs.hf.names import require_layout
from strategies.codec import to_json
from strategies.errors import did_you_mean
from strategies.specs import ModelSpec, MoeSpec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of ours, in order
_AUX_LOSS = 0.001  # what transformers takes for Mixtral where the file does not say it
_MISTRAL_WINDOW = 4096  # likewise, of Mistral
_WINDOWED = ("mistral", "mixtral")
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flaw:
    """One thing that is wrong with a folder.

    Attributes:
        message: What, with the file or the tensor.
        hint: What would be right; may be empty.
    """

    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}".strip() if self.hint else f"{self.message}."


def config_of(model: ModelSpec) -> dict[str, Any]:
    """What config.json says of a model.

    Raises:
        ConfigError: transformers has no such model.
    """
    require_layout(model)
    return _llama_config(model) if model.flavour == "llama" else _gpt2_config(model)


def _gpt2_config(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab,
        "n_positions": model.learned_positions,
        "n_embd": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _llama_config(model: ModelSpec) -> dict[str, Any]:
    common = {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.seq,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if model.rope_stretch is not None:
        names = zip(_STRETCH, to_json(model.rope_stretch).values(), strict=True)
        common["rope_scaling"] = {"rope_type": "llama3", **dict(names)}
    if model.moe is None:
        own: dict[str, Any] = {"intermediate_size": model.ffn, "attention_bias": False, "mlp_bias": False}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | common | own
    own = {
        "intermediate_size": model.moe.ffn,
        "num_local_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "router_aux_loss_coef": pooled_weight(model.moe, model.layers),
        "sliding_window": None,
    }
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | common | own


def pooled_weight(moe: MoeSpec, layers: int) -> float:
    """``router_aux_loss_coef`` of transformers that weighs as ``balance_weight`` does here.

    Ours is a sum over the layers, each of which gives 1 when its experts are evenly loaded. Theirs takes all layers as
    one, which gives ``top_k``, because the visits of a token are not divided by their number.
    """
    return moe.balance_weight * layers / moe.top_k


def _summed_weight(coefficient: float, top_k: int, layers: int) -> float:
    """The other way round: ``balance_weight`` that weighs as a ``router_aux_loss_coef``."""
    try:
        return coefficient * (top_k / layers)
    except OverflowError:  # of sizes that no model has; rules refuse it
        return math.inf


def read_config(document: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[Flaw]]:
    """The model that a config.json describes.

    Args:
        document: What the file says.
        name: What the model shall be called.

    Returns:
        Values by the field names of :class:`ModelSpec` (``moe`` as a mapping) and no problems, or all problems.
    """
    kind = document.get("model_type")
    readers = {"llama": _read_llama, "mistral": _read_mistral, "mixtral": _read_mixtral, "gpt2": _read_gpt2}
    reader = readers.get(str(kind))
    if reader is None:
        hint = did_you_mean(str(kind), ARCHITECTURES)
        return {}, [Flaw(message=f"config.json: model_type {kind!r} is not an architecture of phalanx", hint=hint)]
    look = _Look(document)
    values = reader(look)
    wanted, named = ARCHITECTURES[str(kind)], document.get("architectures") or []
    if not isinstance(named, list):
        look.refuse("architectures", f"expected a list of names, found {named!r}", f'["{wanted}"]')
    elif named and wanted not in named:
        look.refuse("architectures", f"{named} is not a language model", did_you_mean(str(named[0]), [wanted]))
    if document.get("quantization_config"):
        look.refuse("quantization_config", "quantized weights cannot be trained on", "Take the unquantized model.")
    return {"name": name} | values, look.flaws


def _is_positive(value: Any) -> TypeGuard[float]:
    """Whether it is a number above 0 that a float can hold; JSON as Python reads it knows NaN and Infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


class _Look:
    """Reads values and collects what is wrong with them."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self.flaws: list[Flaw] = []

    def refuse(self, key: str, why: str, hint: str = "") -> None:
        """Note a problem."""
        self.flaws.append(Flaw(message=f"config.json: {key}: {why}", hint=hint))

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._document.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, "missing" if value is None else f"expected a whole number from 1, found {value!r}")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self._document.get(key, default)
        if not _is_positive(value):
            self.refuse(key, f"expected a number above 0, found {value!r}")
            return default
        return float(value)

    def weight(self, key: str, default: float) -> float:
        """A number from 0."""
        value = self._document.get(key, default)
        if not _is_positive(value) and (isinstance(value, bool) or value != 0):
            self.refuse(key, f"expected a number from 0, found {value!r}")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Yes or no."""
        value = self._document.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"expected true or false, found {value!r}")
        return bool(value)

    def must(self, key: str, holds: Callable[[Any], bool], default: Any, why: str) -> None:
        """Refuse a feature that our models do not have."""
        value = self._document.get(key, default)
        if not holds(value):
            self.refuse(key, f"{value!r} is not implemented: {why}")

    def window(self, default: int | None) -> int | None:
        """How many tokens attention looks at, itself included; None for all of them."""
        value = self._document.get("sliding_window", default)
        return None if value is None else self.size("sliding_window", default)

    def rotary(self) -> dict[str, Any]:
        """How positions turn: said by itself, or in ``rope_parameters`` as transformers 5 writes it."""
        rope = self._document.get("rope_parameters") or self._document.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            self.refuse("rope_parameters", f"expected a mapping, found {rope!r}")
            rope = {}
        return {"rope_theta": self._rotary_base(rope), "rope_stretch": self._stretch(rope)}

    def _stretch(self, rope: Mapping[str, Any]) -> dict[str, Any] | None:
        """Frequencies that slow down (Llama 3.1); None for plain ones."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            self.refuse("rope scaling", f"{kind!r} is not implemented", "Known: default, llama3.")
            return None
        found = [rope.get(name) for name in _STRETCH]
        numbers = [one for one in found if _is_positive(one)]
        if len(numbers) < len(found):
            told = ", ".join(f"{name} {value!r}" for name, value in zip(_STRETCH, found, strict=True))
            self.refuse("rope scaling", f"expected numbers above 0, found {told}")
            return None
        factor, low, high, original = numbers
        if factor < 1 or high <= low:
            self.refuse("rope scaling", f"expected a factor from 1 and low below high, found {factor}, {low}, {high}")
            return None
        return {"factor": float(factor), "low": float(low), "high": float(high), "original": int(original)}

    def _rotary_base(self, rope: Mapping[str, Any]) -> float:
        if rope.get("partial_rotary_factor", self._document.get("partial_rotary_factor", 1.0)) != 1.0:
            self.refuse("partial_rotary_factor", "is not implemented: the whole head turns")
        theta = rope.get("rope_theta", self._document.get("rope_theta", 10000.0))
        if not _is_positive(theta):
            self.refuse("rope_theta", f"expected a number above 0, found {theta!r}")
            return 10000.0
        return float(theta)


def _read_gpt2(look: _Look) -> dict[str, Any]:
    hidden, heads, rows = look.size("n_embd"), look.size("n_head"), look.size("n_positions")
    look.must("activation_function", lambda act: act in _TANH_GELU, "gelu_new", "GELU in its tanh form only")
    look.must("scale_attn_weights", lambda on: on is True, True, "scores are scaled by the width of a head")
    look.must("scale_attn_by_inverse_layer_idx", lambda on: not on, False, "scores are scaled equally in every block")
    look.must("add_cross_attention", lambda on: not on, False, "there is no encoder")
    return {
        "flavour": "gpt3",
        "layers": look.size("n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "ffn": look.size("n_inner", 4 * hidden),
        "vocab": look.size("vocab_size"),
        "seq": rows,
        "tied": look.flag("tie_word_embeddings", True),
        "norm_eps": look.number("layer_norm_epsilon", 1e-5),
        "init_std": look.number("initializer_range", 0.02),
    }


def window_of(document: Mapping[str, Any]) -> int | None:
    """How many tokens the attention of a folder's model looks at, itself included; None for all.

    Where sequences are no longer than that, it is the attention of our models.
    """
    default = _MISTRAL_WINDOW if document.get("model_type") == "mistral" else None
    return None if document.get("model_type") not in _WINDOWED else _Look(document).window(default)


def _read_llama(look: _Look) -> dict[str, Any]:
    look.must("sliding_window", lambda window: window is None, None, "attention sees the whole sequence")
    look.must("attention_bias", lambda on: not on, False, "the projections of attention have no biases")
    look.must("mlp_bias", lambda on: not on, False, "the feed-forward block has no biases")
    return _rotary(look, eps=1e-6) | {"ffn": look.size("intermediate_size")}


def _read_mistral(look: _Look) -> dict[str, Any]:
    """A Llama whose attention may look no further back than a window."""
    values = _rotary(look, eps=1e-6) | {"ffn": look.size("intermediate_size")}
    return values | {"seq": min(values["seq"], look.window(_MISTRAL_WINDOW) or values["seq"])}


def _read_mixtral(look: _Look) -> dict[str, Any]:
    inner = look.size("intermediate_size")
    experts, top_k = look.size("num_local_experts"), look.size("num_experts_per_tok")
    if top_k > experts:
        look.refuse("num_experts_per_tok", f"{top_k} of {experts} experts", f"At most {experts}.")
    if top_k == 1:
        look.refuse("num_experts_per_tok", "1 is not implemented: a single expert counts whole there")
    look.must("router_jitter_noise", lambda noise: not noise, 0.0, "routers see what they are given")
    coefficient = look.weight("router_aux_loss_coef", _AUX_LOSS)
    values = _rotary(look, eps=1e-5)
    balance = _summed_weight(coefficient, top_k, values["layers"])
    moe = {"experts": experts, "top_k": top_k, "ffn": inner, "balance_weight": balance}
    return values | {"ffn": inner, "moe": moe, "seq": min(values["seq"], look.window(None) or values["seq"])}


def _rotary(look: _Look, *, eps: float) -> dict[str, Any]:
    """What Llama, Mistral and Mixtral share; ``eps`` of the norms where the file does not say it."""
    look.must("hidden_act", lambda act: act in ("silu", "swish"), "silu", "SwiGLU only")
    hidden, heads = look.size("hidden_size"), look.size("num_attention_heads")
    width = look.size("head_dim", max(1, hidden // heads))
    return {
        "flavour": "llama",
        "layers": look.size("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": look.size("num_key_value_heads", heads),
        "vocab": look.size("vocab_size"),
        "seq": look.size("max_position_embeddings"),
        "tied": look.flag("tie_word_embeddings", False),
        "norm_eps": look.number("rms_norm_eps", eps),
        "init_std": look.number("initializer_range", 0.02),
        **look.rotary(),
        "head_width": 0 if width * heads == hidden else width,
    }
