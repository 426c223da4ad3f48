"""All that is wrong with a run, told at once: its values, its plan and its data. Nothing is written.

Each of these is judged by a module of its own. Here they are asked in one go, so that whoever has mended one mistake
does not meet the next only then. Where values are wrong, plan and data are judged under every reading of them
(:mod:`launcher.readings`). What a submit needs besides is in :mod:`launcher.submission`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs import weights
from launcher import build
from launcher.config import Draft, draft, sound
from launcher.data_checks import data_spec
from launcher.findings import Findings, common, lines_of
from launcher.schema import Config
from strategies.errors import PhalanxError
from strategies.specs import ClusterSpec

MOST_BYTES = 256 << 20
"""Text that is read only to tell what else is wrong, of the smallest sources; of others, what is seen from outside."""

_SIZES = ((1, 8), (16, 1), (1024, 16))  # nodes and slots of clusters that differ much


def examined(overrides: Sequence[str]) -> Config:
    """The configuration that these overrides describe, if nothing is wrong with its values.

    Args:
        overrides: Words in Hydra's grammar.

    Raises:
        PhalanxError: Something is wrong with them; what is wrong with the plan is told with it.
    """
    found = draft(overrides)
    if found.problems:
        refuse(found, common(found.readings, of_plan))
    return sound(found)


def refuse(found: Draft, more: Sequence[str]) -> None:
    """Refuse a configuration whose values are wrong, with what else is.

    Raises:
        ConfigError: Always.
    """
    if not more:
        sound(found)
    findings = Findings()
    findings.note(found.problems)
    findings.note(more)
    findings.refuse()


def of_plan(config: Config, cluster: ClusterSpec | None = None) -> list[str]:
    """What is wrong with the plan of a run; on a cluster whose size nobody knows, what is on any.

    Args:
        config: Something may be wrong with it besides.
        cluster: What an existing cluster reported.
    """
    if config.strategy.auto:
        return []  # it is yet to be found
    machine, sizes = config.cluster, _SIZES if cluster is None and config.cluster.kind == "existing" else _SIZES[:1]
    filled = [
        replace(machine, nodes=machine.nodes or nodes, slots_per_node=machine.slots_per_node or slots)
        for nodes, slots in sizes
    ]
    return common(filled, lambda one: _of_plan(replace(config, cluster=one), cluster))


def _of_plan(config: Config, cluster: ClusterSpec | None) -> list[str]:
    try:
        return build.flaws(config, build.outline(config, cluster)).lines
    except PhalanxError as error:
        return lines_of(error)


def of_data(readings: Sequence[Config], *, formed: bool = False) -> list[str]:
    """What is wrong with the data of a run.

    Args:
        readings: What the configuration may be meant to be, settled.
        formed: What is wrong with the form of the sources is told already.
    """
    sizes = {(one.model.vocab, one.model.seq) for one in readings}
    vocab, seq = next(iter(sizes)) if len(sizes) == 1 else (0, 0)
    plain: list[Config] = []
    for one in readings:
        other = replace(readings[0], data=replace(one.data, validation=0.0, workers=None, packing=False), job=one.job)
        plain += [] if other in plain else [other]
    return common(plain, lambda one: _of_data(one, vocab, seq, formed=formed))


def _of_data(config: Config, vocab: int, seq: int, *, formed: bool) -> list[str]:
    if config.job.infers:
        return _of_questions(config, vocab)
    if config.job.kind != "pretrain":
        return []
    spec = data_spec(config)
    if not spec.mixed:
        return of_text(config, vocab=vocab)
    from jobs.data.blend import flaws

    try:
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
