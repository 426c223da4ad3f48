"""Pretrained models in the configuration: ``model.from_hf`` fills in the sizes, ``train.init_from`` names the weights.

Here they are looked at (config.json and headers, manifests), so that everything that is wrong with them is told with
all other problems of the configuration, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import weights
from jobs.hf import folder as hf
from jobs.spec import WeightsSpec
from launcher import build
from launcher.request import LaunchRequest
from launcher.schema import Config
from launcher.typed import Problem
from strategies.codec import to_json
from strategies.errors import PhalanxError

# What config.json says nothing about: our models' defaults.
_PLAIN = {
    "gated": None,
    "position_rows": None,
    "embed_norm": False,
    "moe": None,
    "latent": None,
    "rope_theta": 10000.0,
    "rope_scaling": 1.0,
    "rope_stretch": None,
}


def model_section(job: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The section ``model`` where it follows from a model that exists, or everything that is wrong with that one.

    Args:
        job: The section ``job``: what only computes takes its model from ``weights``.
        model: The section ``model``, which may name a folder (``from_hf``).

    Returns:
        Nothing where neither is given.
    """
    if job.get("kind") in ("evaluate", "generate"):
        return _section_of_weights(str(job["weights"])) if job.get("weights") else ({}, [])
    return _section_of_folder(str(model["from_hf"]), "model.from_hf") if model.get("from_hf") else ({}, [])


def _section_of_folder(folder: str, key: str) -> tuple[dict[str, Any], list[Problem]]:
    path = Path(folder.removeprefix("hf:")).expanduser()
    values, flaws = hf.look(path)
    if flaws:
        return {}, [Problem(key=key, message=f"{path}: {flaw.message}", hint=flaw.hint) for flaw in flaws]
    return _section(_PLAIN | values), []


def _section_of_weights(given: str) -> tuple[dict[str, Any], list[Problem]]:
    try:
        source = weights.find(expanded(given))
        if source.kind == "hf":
            return _section_of_folder(source.path, "job.weights")
        values = to_json(weights.model_of(source))
    except PhalanxError as error:
        return {}, [_told("job.weights", error)]
    return _section(values), []


def _section(values: dict[str, Any]) -> dict[str, Any]:
    """The section of a model that exists; its learned positions stay as they are where sequences are made shorter."""
    rows = values["position_rows"]
    if rows is None and values["flavour"] == "gpt3":
        rows = values["seq"]
    return values | {"head_width": values.get("head_width") or None, "position_rows": rows}


def checked(config: Config) -> tuple[Config, list[Problem]]:
    """The configuration with what follows from the weights that a job begins with, and what is wrong with them."""
    found = _problems(config)
    try:
        config, more = _with_tokenizer(config)
    except PhalanxError:  # there are no such weights, which is told already
        return config, found
    return config, found + more


def _problems(config: Config) -> list[Problem]:
    job = config.job
    key, given = ("job.weights", job.weights) if job.infers else ("train.init_from", config.train.init_from)
    if not given:
        return []
    if job.kind == "script":
        return [Problem(key=key, message="a script takes its weights itself", hint="Leave it out.")]
    model = build.model_spec(config)
    try:
        source = weights.find(expanded(given))
        if source.kind == "hf":
            _, flaws = hf.inspect(Path(source.path), model)
            found = [Problem(key=key, message=f"{source.path}: {flaw.message}", hint=flaw.hint) for flaw in flaws]
            there = hf.look(Path(source.path))[0].get("rope_theta")
            return found + _other_base(config, source, there)
        weights.check(source, model)
        return _other_base(config, source, weights.model_of(source).rope_theta)
    except PhalanxError as error:
        return [_told(key, error)]


def _with_tokenizer(config: Config) -> tuple[Config, list[Problem]]:
    """The configuration with the tokenizer of the weights, unless another is named.

    One that is trained here would give every token another number than the weights know. That goes for a run whose
    tokenizer is gone, too: nobody can tell whether the text is still what it was trained on.
    """
    given = config.train.init_from
    if not given or config.job.kind != "pretrain" or config.data.tokenizer:
        return config, []
    source = weights.find(expanded(given))
    path = weights.tokenizer_of(source)
    if path is not None:
        return replace(config, data=replace(config.data, tokenizer=str(path.absolute()))), []
    if source.kind == "hf" and not hf.is_folder(Path(source.path)):
        return config, []
    where = f"in {source.path}" if source.kind == "hf" else f"with the data of the run of {source.path}"
    message = f"missing: there is no {hf.TOKENIZER} {where}, and the weights know no other's tokens"
    return config, [Problem(key="data.tokenizer", message=message, hint="data.tokenizer=FILE")]


def _other_base(config: Config, source: WeightsSpec, there: float | None) -> list[Problem]:
    """Another rotary base than the weights' is meant only where the scale says so (``model.rope_scaling``).

    Args:
        config: Its model may have the base of the weights before scaling or, where they are scaled already, after it.
        source: The weights.
        there: Their base; None if they have none.
    """
    here = config.model.rope_theta
    if there is None or config.model.flavour != "llama" or there in (here, build.model_spec(config).rope_theta):
        return []
    message = f"{_exact(here)}, the weights in {source.path} were trained with {_exact(there)}"
    hint = f"model.rope_theta={_exact(there)}, and model.rope_scaling=FACTOR for longer sequences."
    return [Problem(key="model.rope_theta", message=message, hint=hint)]


def _exact(number: float) -> str:
    """As short as it can be said without another number being meant."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _told(key: str, error: PhalanxError) -> Problem:
    why = f" ({error.why})" if error.why else ""
    return Problem(key=key, message=error.what.rstrip(".") + why, hint=error.hint)


def contradictions(config: Config) -> list[Problem]:
    """What does not go together in a job that only computes."""
    job, found = config.job, []
    if not job.infers:
        return []
    missing = {"weights": "RUN or a Hugging Face folder"} if not job.weights else {}
    if job.kind == "evaluate" and not (job.text or job.choices):
        missing["text"] = "FILE, or job.choices=FILE.jsonl, or both"
    if job.kind == "generate" and not (job.prompt or job.prompts):
        missing["prompt"] = "TEXT, or job.prompts=FILE"
    found += [Problem(key=f"job.{key}", message="missing", hint=f"job.{key}={what}") for key, what in missing.items()]
    if config.train.init_from:
        found.append(Problem(key="train.init_from", message="nothing is trained here", hint="job.weights=PATH"))
    if config.checkpoint.url:
        message = "results are kept in the run directory"
        found.append(Problem(key="checkpoint.url", message=message, hint="Leave it out."))
    if config.strategy.auto:
        message = "the planner knows plans for training only"
        found.append(Problem(key="strategy.auto", message=message, hint="strategy.tp=.. strategy.pp=.. strategy.dp=.."))
    for axis in ("sp", "cp"):
        if (getattr(config.strategy, axis) or 1) > 1:
            message = f"a job of kind {job.kind} runs under tp, pp, dp and ep"
            found.append(Problem(key=f"strategy.{axis}", message=message, hint=f"strategy.{axis}=1"))
    for key, plain in (("schedule", (None, "1f1b")), ("sequence_parallel", (None, False))):
        if getattr(config.strategy, key) not in plain:
            found.append(Problem(key=f"strategy.{key}", message="is for training", hint="Leave it out."))
    return found


def expanded(given: str) -> str:
    """The same place with ``~`` resolved."""
    prefix = "hf:" if given.startswith("hf:") else ""
    rest = given.removeprefix("hf:")
    return given if "://" in rest else f"{prefix}{Path(rest).expanduser()}"


def check_asked(request: LaunchRequest) -> None:
    """Check what a job that only computes is asked: its files and its tokenizer, not the weights.

    Raises:
        ConfigError: Something is wrong; all of it is told.
        StorageError: A file cannot be read.
    """
    job = request.job
    if job.inference is not None and job.initial is not None:
        from jobs.inference.rows import require

        require(job.inference, job.initial, job.model, stop=job.kind == "generate")


def with_rows(request: LaunchRequest, cache: Path) -> LaunchRequest:
    """The request of a job that only computes with its rows prepared, and as many steps as they make batches.

    Raises:
        ConfigError: A file has bad lines, or the tokenizer does not fit the model.
        StorageError: A file cannot be read or written.
    """
    job = request.job
    if job.inference is None or job.initial is None:
        return request
    from jobs.inference.rows import prepare

    asked = prepare(job.inference, job.initial, job.model, cache, stop=job.kind == "generate")
    train = replace(job.train, steps=max(1, -(-asked.count // job.batch.global_batch)))
    return replace(request, job=replace(job, inference=asked, train=train))


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
