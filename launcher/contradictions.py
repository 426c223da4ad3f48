"""What no single value of a configuration shows: values that cannot be meant together."""

from __future__ import annotations

from jobs.location import locate
from launcher import pretrained
from launcher.data_checks import data_problems
from launcher.schema import Config
from launcher.typed import Problem
from strategies.errors import ConfigError

LONGEST_NAME = 128  # characters of the name of a run; file systems take 255 bytes, and other names are made of it


def contradictions(config: Config) -> list[Problem]:
    """What no single value shows."""
    found: list[Problem] = []
    name = config.run.name
    if name is not None and (not name or name[0] in ".-" or not all(c.isalnum() or c in "._-" for c in name)):
        found.append(
            Problem(key="run.name", message=f"{name!r} is no name: letters, digits and ._- only, no leading . or -")
        )
    elif name is not None and len(name) > LONGEST_NAME:
        message = f"{len(name)} characters are too many for the name of a folder and what is made of it"
        found.append(Problem(key="run.name", message=message, hint=f"Use at most {LONGEST_NAME}."))
    if name == "latest":
        found.append(Problem(key="run.name", message="'latest' stands for the newest run", hint="Choose another name."))
    found += data_problems(config)
    if config.job.kind == "script" and not (config.job.command or "").strip():
        found.append(Problem(key="job.command", message="missing", hint="job=script job.command='python train.py'"))
    if config.job.kind == "script" and config.faults:
        found.append(
            Problem(key="faults", message="are injected by our own worker, not into scripts", hint="Use faults=[].")
        )
    if config.job.kind == "script" and config.checkpoint.url:
        message = "a script writes its checkpoints itself, to $PHALANX_CKPT_DIR in the run directory"
        found.append(Problem(key="checkpoint.url", message=message, hint="Leave it out."))
    found += _store_problems(config)
    found += pretrained.contradictions(config)
    found += _rotary_contradictions(config)
    if config.strategy.auto and config.job.kind == "script":
        message = "a script brings its own parallelism: there is nothing to choose"
        found.append(Problem(key="strategy.auto", message=message, hint="Use strategy=default."))
    found += _strategy_contradictions(config)
    if config.cluster.kind != "existing":
        found += [
            Problem(key=f"cluster.{key}", message="must be given for a cluster that phalanx starts")
            for key in ("nodes", "slots_per_node")
            if getattr(config.cluster, key) is None
        ]
    return found


def _store_problems(config: Config) -> list[Problem]:
    """What is wrong with the place of the checkpoints, before anybody asks there."""
    try:
        locate(config.checkpoint.url or "")
    except ConfigError as error:
        why = f" ({error.why})" if error.why else ""
        return [Problem(key="checkpoint.url", message=error.what.rstrip(".") + why, hint=error.hint)]
    return []


def _rotary_contradictions(config: Config) -> list[Problem]:
    model, stretch, found = config.model, config.model.rope_stretch, list[Problem]()
    if model.rope_scaling != 1 and model.flavour != "llama":
        message = f"flavour {model.flavour} has learned positions, which reach no further than model.seq"
        found.append(Problem(key="model.rope_scaling", message=message, hint="Use 1, or a model of flavour llama."))
    if stretch is not None and model.flavour != "llama":
        message = f"flavour {model.flavour} has no rotary positions"
        found.append(Problem(key="model.rope_stretch", message=message, hint="Use null, or a model of flavour llama."))
    elif stretch is not None and stretch.high <= stretch.low:
        message = f"{stretch.high:g} is not above low, {stretch.low:g}"
        found.append(Problem(key="model.rope_stretch.high", message=message, hint="Llama 3.1 has low 1 and high 4."))
    return found


def _strategy_contradictions(config: Config) -> list[Problem]:
    ask, found = config.strategy, []
    if ask.auto:
        given = [key for key in ("balance", "offload_path") if getattr(ask, key) is not None]
        message = "is not the planner's to choose"
        found += [Problem(key=f"strategy.{key}", message=message, hint="Leave it out, or auto.") for key in given]
    elif ask.balance is not None and ask.stages is not None:
        message = f"{ask.balance} and strategy.stages={list(ask.stages)} both say how blocks are spread"
        found.append(Problem(key="strategy.balance", message=message, hint="Give one of them."))
    if ask.offload_path and ask.offload in (None, "none"):
        hint = "strategy.offload=optimizer, or optimizer+params with strategy.zero_stage=3"
        found.append(Problem(key="strategy.offload_path", message="nothing is offloaded to it", hint=hint))
    return found
