"""Data made ready before a run starts: here, or on the nodes of its cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.spec import DataSpec
from launcher import build, pretrained
from launcher.data_checks import data_spec
from launcher.follow import Screen
from launcher.ray_client import is_dashboard
from launcher.render import count, plural, table
from launcher.request import LaunchRequest
from launcher.schema import Config

if TYPE_CHECKING:
    from jobs.data.work import Runner


def prepare_data(config: Config, request: LaunchRequest, screen: Screen) -> LaunchRequest:
    """The request with its data prepared; a script brings its own.

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

    spec, root, progress = data_spec(config), Path(config.data.cache), _Progress(screen)
    model = request.job.model
    if not spec.mixed:
        data = prepare(spec, root, model.vocab, progress, seq=model.seq)
        return replace(request, job=replace(request.job, data=data))
    samples = request.job.schedule().trained(request.job.train.steps + 1)
    runner = _runner(config, screen)
    data = prepare_mixture(spec, root, model.vocab, progress, seq=model.seq, samples=samples, runner=runner)
    screen.say(mixture_text(data, samples, model.seq))
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
    return f"{head}\n{table(('SOURCE', 'DOCUMENTS', 'TOKENS', 'WEIGHT', 'EPOCHS'), rows, right=range(1, 5))}"
