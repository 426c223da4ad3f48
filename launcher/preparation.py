"""Data made ready before a run starts: here, or on the nodes of its cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.spec import DataSpec
from launcher import build, examination, findings, pretrained
from launcher.data_checks import data_spec
from launcher.follow import Screen
from launcher.ray_client import is_dashboard
from launcher.render import count, plural, table
from launcher.request import LaunchRequest
from launcher.schema import Config
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from jobs.data.work import Runner

_NOTICED = 0.01  # so much may a run be longer or shorter than the epochs of its sources ask for


def prepare_data(config: Config, request: LaunchRequest, screen: Screen, *, end_id: int | None = None) -> LaunchRequest:
    """The request with its data prepared; a script brings its own.

    Args:
        config: What is asked for.
        request: Made of it.
        screen: Told how far it is.
        end_id: The token that ends a document where data were prepared before; None finds it.

    Raises:
        ConfigError: Something is wrong with the sources or the tokenizer; all of it is told.
        StorageError: They cannot be read, or a store cannot be written.
    """
    if request.job.kind == "script":
        return request
    pretrained.check_asked(request)  # before all of the weights is read
    if request.job.initial is not None:
        screen.say(f"reading the weights: {request.job.initial.path}")
        request = pretrained.with_digests(request)
    assert config.data.cache is not None
    if request.job.infers:
        screen.say("reading what is asked")
        return pretrained.with_rows(request, Path(config.data.cache))
    from jobs.data import prepare, prepare_mixture
    from jobs.data.blend import ended
    from jobs.data.sources import held_out
    from jobs.data.surveying import named

    spec, root, progress = data_spec(config), Path(config.data.cache), _Progress(screen)
    model = request.job.model
    if not spec.mixed:
        if len(wrong := examination.of_text(config, vocab=model.vocab)) > 1:
            raise findings.everything(wrong)
        data = prepare(spec, root, model.vocab, progress, seq=model.seq)
        return replace(request, job=replace(request.job, data=data))
    samples = request.job.schedule().trained(request.job.train.steps + 1)
    runner = _runner(config, screen)
    data = prepare_mixture(
        spec, root, model.vocab, progress, seq=model.seq, samples=samples, runner=runner, end_id=end_id
    )
    for note in (*map(held_out, named(spec)), ended(spec, end_id)):
        if note:
            screen.say(f"data: {note}")
    screen.say(mixture_text(data, samples, model.seq))
    if request.job.train.eval_every:
        require_validation(data, model.seq)
    return replace(request, job=replace(request.job, data=data))


class _Progress:
    """Tells a screen how far the preparation is."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._shown: set[str] = set()

    def __call__(self, phase: str, fraction: float) -> None:
        if phase not in self._shown:
            self._shown.add(phase)
            if phase != "ready":
                self._screen.say(f"data: {phase}")
        filled = round(self._screen.bar * fraction)
        bar = f"[{'=' * filled}{' ' * (self._screen.bar - filled)}] " if self._screen.bar else ""
        self._screen.progress(f"data: {phase} {bar}{100 * fraction:.0f} %")


def _runner(config: Config, screen: Screen) -> Runner:
    """Where a mixture is worked on: on the nodes of a running cluster, or in processes here."""
    address = build.existing_address(config) if config.cluster.kind == "existing" else ""
    if address and not is_dashboard(address):
        from launcher.ray_map import OnRay

        return OnRay(address, Path(str(config.data.cache)))
    if address:
        screen.say("data: prepared on this machine; cluster.address=IP:PORT would spread the work over the cluster")
    from jobs.data.work import Processes

    return Processes(config.data.workers or 0)


def require_validation(data: DataSpec, seq: int) -> None:
    """Raise ConfigError where validation is asked for and there is not one sequence of it."""
    from jobs.data.samples import Mixture
    from jobs.data.shards import SIDES, VALID, read_source

    if Mixture(data, seq, VALID).count:
        return
    metas = [read_source(Path(source.store)) for source in data.sources]
    every = sum(meta.documents(side) for meta in metas for side in SIDES)
    kept = plural(sum(meta.documents(VALID) for meta in metas), "document")
    raise ConfigError(
        "train.eval_every: there is nothing to validate with.",
        why=f"data.validation={data.validation:g} keeps {kept} of {every} from training, of no source as much as a "
        f"sequence (model.seq={seq} needs {seq + 1} tokens).",
        hint="Raise data.validation, or leave train.eval_every out.",
    )


def mixture_text(data: DataSpec, samples: int, seq: int) -> str:
    """What a mixture is made of, and how many times each source is seen in a run of ``samples`` sequences."""
    from jobs.data.mixture import SHARES
    from jobs.data.shards import read_source

    rows = [
        (
            source.name,
            f"{source.documents:,}",
            count(source.tokens),
            f"{100 * source.share / SHARES:.2f} %",
            f"{source.share / SHARES * samples / ((source.tokens - 1) // seq):.2f}" if source.share else "-",
        )
        for source in data.sources
    ]
    metas = [read_source(Path(source.store)) for source in data.sources]
    empty, skipped = sum(meta.empty for meta in metas), sum(meta.skipped for meta in metas)
    left = [(empty, "empty document"), (skipped, "other file")]
    left_out = " and ".join(plural(number, word) for number, word in left if number)
    head = f"data: {plural(len(rows), 'source')}, {count(samples * seq)} tokens in the run"
    head += f", {left_out} left out" if left_out else ""
    shown = table(("SOURCE", "DOCUMENTS", "TOKENS", "WEIGHT", "EPOCHS"), rows, right=range(1, 5))
    return "\n".join([head, shown, *_notes(data, samples, seq)])


def _notes(data: DataSpec, samples: int, seq: int) -> Iterator[str]:
    """What the table does not show: how much there is to validate with, and epochs that the run does not have."""
    from jobs.data.samples import Mixture
    from jobs.data.shards import VALID

    if data.validation:
        held = Mixture(data, seq, VALID)
        none = [one.name for one, windows in zip(data.sources, held.windows, strict=True) if one.share and not windows]
        without = f", none of them of {', '.join(none)}" if none and held.count else ""
        yield f"to validate with: {plural(held.count, 'sequence')}{without}"
    asked = sum((one.epochs or 0) * ((one.tokens - 1) // seq) for one in data.sources)
    if not any(one.weight for one in data.sources) and abs(samples / asked - 1) > _NOTICED:
        yield (
            f"No source has a weight, so the epochs are proportions: they ask for {asked:,.0f} sequences, the run has "
            f"{samples:,}. A run of that length, or a weight for a source, has them as they are."
        )
