"""All that is wrong with a run, told at once: its values, its plan and its data. Nothing is written.

Each of these is judged by a module of its own. Here they are asked in one go, so that whoever has mended one mistake
does not meet the next only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs import weights
from launcher import build
from launcher.config import Draft, draft, sound
from launcher.data_checks import data_spec
from launcher.schema import Config
from strategies.errors import ConfigError, PhalanxError, PlanInfeasible, Violation

MOST_BYTES = 256 << 20
"""Text that is read only to tell what else is wrong; of more, what its files say from outside is told."""


def examined(overrides: Sequence[str], *, data: bool = True) -> Config:
    """The configuration that these overrides describe, if nothing is wrong with its values.

    Args:
        overrides: Words in Hydra's grammar.
        data: Where something is wrong, look at the data, too.

    Raises:
        ConfigError: Something is wrong with them; what is wrong with plan and data is told with it.
    """
    found = draft(overrides)
    more = _beside(found, data=data) if found.problems else []
    if not more:
        return sound(found)
    raise everything([*map(str, found.problems), *more])


def with_data(broken: PlanInfeasible, config: Config) -> PhalanxError:
    """A plan that is refused, with what is wrong with the data of its run.

    Args:
        broken: Why it is refused.
        config: Settled, and nothing is wrong with its values.
    """
    data = _of_data(config, vocab=config.model.vocab)
    return everything([*(str(one) for one in broken.violations or [broken.what]), *data]) if data else broken


def everything(lines: Sequence[str]) -> ConfigError:
    """All that is wrong as one error."""
    told = "\n".join(f"  - {line}" for line in lines)
    return ConfigError(f"The run has {len(lines)} problems:\n{told}", hint="Nothing was written.")


def _beside(found: Draft, *, data: bool) -> list[str]:
    """What is wrong with the plan and the data of a run with whose values something is wrong already."""
    if found.config is None:
        return []
    lines = [str(one) for one in _of_plan(found.config)] if found.model_known else []
    if data:
        settled = build.settle(found.config, name="run", cwd=Path.cwd())
        told = any(one.key.startswith(("data.sources", "data.path")) for one in found.problems)
        lines += _of_data(settled, vocab=settled.model.vocab if found.model_known else 0, formed=told)
    return lines


def _of_plan(config: Config) -> tuple[Violation, ...]:
    if config.strategy.auto:
        return ()  # it is yet to be found
    try:
        return build.outline(config).violations
    except PhalanxError:  # the size of the cluster is not known, or is among what is wrong with the values
        return ()


def _of_data(config: Config, *, vocab: int, formed: bool = False) -> list[str]:
    """What is wrong with the data.

    Args:
        config: Settled.
        vocab: Tokens of the model; 0 if that is not known.
        formed: What is wrong with the form of the sources is told already.
    """
    if config.job.infers:
        return _of_questions(config, vocab)
    if config.job.kind != "pretrain":
        return []
    spec = data_spec(config)
    if not spec.mixed:
        return of_text(config, vocab=vocab)
    from jobs.data.blend import flaws

    try:
        seq = config.model.seq if vocab else 0
        return flaws(spec, vocab, most_bytes=MOST_BYTES, seq=seq, form=not formed)
    except PhalanxError as error:  # a library is missing, or a disk is bad
        return [error.what]


def of_text(config: Config, *, vocab: int) -> list[str]:
    """What is wrong with data that are no mixture, before they are read.

    Args:
        config: Settled.
        vocab: Tokens of the model; 0 if that is not known.
    """
    from jobs.data.tokenizer import vocab_flaw

    found = [flaw] if (flaw := vocab_flaw(vocab) if vocab else "") else []
    path = config.data.path
    if config.data.kind == "text" and path and not Path(path).exists():
        found.append(f"data.path: there is no such file or folder: {path}")
    return found


def _of_questions(config: Config, vocab: int) -> list[str]:
    """What is wrong with the files and the tokenizer of a job that only computes."""
    from jobs.inference.rows import flaws, told

    asked = build.inference_spec(config)
    assert asked is not None, "it only computes"
    try:
        source = weights.find(config.job.weights) if config.job.weights else None
    except PhalanxError:  # told already
        source = None
    return told(flaws(asked, source, vocab, stop=config.job.kind == "generate"))
