"""Pretrained models in the configuration: ``model.from_hf`` fills in the sizes, ``train.init_from`` names the weights.

Here they are looked at (config.json and headers, manifests), so that everything that is wrong with them is told with
all other problems of the configuration, before anything is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import weights
from jobs.hf import folder as hf
from launcher import build
from launcher.request import LaunchRequest
from launcher.schema import Config
from launcher.typed import Problem
from strategies.errors import PhalanxError

# What config.json says nothing about: our models' defaults.
_PLAIN = {"gated": None, "position_rows": None, "embed_norm": False, "moe": None, "latent": None, "rope_theta": 10000.0}


def model_section(folder: str) -> tuple[dict[str, Any], list[Problem]]:
    """The section ``model`` that a folder's config.json amounts to, or everything that is wrong with it."""
    path = Path(folder).expanduser()
    values, flaws = hf.look(path)
    if flaws:
        return {}, [Problem(key="model.from_hf", message=f"{path}: {flaw.message}", hint=flaw.hint) for flaw in flaws]
    return _PLAIN | values | {"head_width": values.get("head_width") or None}, []


def problems(config: Config) -> list[Problem]:
    """What is wrong with the weights that training begins with."""
    key, given = "train.init_from", config.train.init_from
    if not given:
        return []
    if config.job.kind == "script":
        return [Problem(key=key, message="a script takes its weights itself", hint="Leave it out.")]
    model = build.model_spec(config)
    try:
        source = weights.find(expanded(given))
        if source.kind == "hf":
            _, flaws = hf.inspect(Path(source.path), model)
            return [Problem(key=key, message=f"{source.path}: {flaw.message}", hint=flaw.hint) for flaw in flaws]
        weights.check(source, model)
    except PhalanxError as error:
        why = f" ({error.why})" if error.why else ""
        return [Problem(key=key, message=error.what.rstrip(".") + why, hint=error.hint)]
    return []


def expanded(given: str) -> str:
    """The same place with ``~`` resolved."""
    prefix = "hf:" if given.startswith("hf:") else ""
    rest = given.removeprefix("hf:")
    return given if "://" in rest else f"{prefix}{Path(rest).expanduser()}"


def with_digests(request: LaunchRequest) -> LaunchRequest:
    """The request with the digests of the weights that its training begins with; reads all of a folder.

    Raises:
        ConfigError: They are not those of the model.
        StorageError: They cannot be read.
    """
    initial = request.job.initial
    if initial is None or initial.files:
        return request
    return replace(request, job=replace(request.job, initial=weights.digested(initial, request.job.model)))
