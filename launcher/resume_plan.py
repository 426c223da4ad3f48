"""What a resume would do, worked out before anything is touched: the new request, the difference, and the words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from jobs.spec import JobSpec
from launcher import build, examination, launch, lineage, origin, progress, proposal, render, resume_checks
from launcher.config import redraft
from launcher.data_checks import data_spec, unprepared
from launcher.describe import plan_line
from launcher.findings import Findings, common
from launcher.follow import Screen
from launcher.lock import controlled
from launcher.preparation import prepare_data, require_validation
from launcher.request import LaunchRequest
from launcher.resume_data import kept_end, other_data
from launcher.resume_diff import Change, compare
from launcher.run import Run, RunState
from launcher.schema import Config
from launcher.ship import Shipment, changed_files
from launcher.store import RunStore
from strategies.codec import to_json
from strategies.errors import ConfigError, ResumeRefused, StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePlan:
    """A resume that has not happened yet.

    Attributes:
        name: The run.
        config: The new configuration.
        request: The new request.
        changes: Every field that changes.
        shipment: The script's project, if it has changed and must be copied again.
        overrides: What the user typed now.
        text: All of this for people.
    """

    name: str
    config: Config
    request: LaunchRequest
    changes: Sequence[Change]
    shipment: Shipment | None
    overrides: tuple[str, ...]
    text: str

    def refuse(self) -> None:
        """Stop if a change would make another run of it.

        Raises:
            ResumeRefused: Every such change is named.
        """
        wrong = [change for change in self.changes if change.verdict == "refused"]
        if wrong:
            reasons = "; ".join(f"{change.field}: {change.reason}" for change in wrong)
            raise ResumeRefused(
                f"Resuming '{self.name}' with these changes is refused.",
                why=reasons,
                hint="Leave them out, or phalanx submit a new run.",
            )


def prepare(
    store: RunStore,
    overrides: Sequence[str],
    say: Callable[[str], None],
    *,
    moved: bool = False,
    clock_was_ahead: bool = False,
) -> ResumePlan:
    """Work out a resume.

    Args:
        store: The run.
        overrides: What the user typed after RUN.
        say: Told about the preparation of data.
        moved: The run directory was moved on purpose.
        clock_was_ahead: The clock here is right, and the one of the log was ahead.

    Raises:
        ResumeRefused: The run has succeeded, a live controller owns it, it was moved, its checkpoints are another
            run's, or clocks disagree.
        StorageError: None of its checkpoints can be used.
        PlanInfeasible: The new plan breaks rules.
    """
    run, before = store.run(), store.request()
    _check_free(store, run)
    found = Findings()
    checked = found.of(lambda: resume_checks.check(store, run, before, moved=moved, clock_was_ahead=clock_was_ahead))
    words = tuple(dict.fromkeys([*before.overrides, *overrides]))
    config, after = _renewed(store, before, words, overrides, found)
    after, shipment = _with_project(config, store.paths, before, after)
    script = after.job.kind == "script"
    marked = after.job.kind != "pretrain"
    point, _ = origin.newest(store.paths, rejected=run.found_damaged, script=marked, known=lineage.of(run))
    changes = compare(before, after, step=point.step)
    text = render.resume_text(
        name=store.name,
        state=run.state.value if run.state.terminal else f"{run.state.value}, orphaned",
        attempt=len(run.attempts) + 1,
        step=point.step,
        steps=None if script else after.job.train.steps,
        sample=None if script else next_sample(after.job.skipping(run.skips), point.step),
        source=point.path,
        plan=_arrow(plan_line(before, run), plan_line(after)),
        nodes=_arrow(_nodes(before), _nodes(after)),
        changes=changes,
        live=_live_steps(store, run),
    )
    notes = [f"passed over, damaged: {one}" for one in checked or ()]
    if notes:
        notes.append(f"note: all steps after {point.step} are done anew. To go on from what is damaged, mend it first.")
    notes += _unvalidated(after)
    text = "\n".join([text, *notes])
    return ResumePlan(
        name=store.name,
        config=config,
        request=after,
        changes=changes,
        shipment=shipment,
        overrides=tuple(overrides),
        text=text,
    )


def _renewed(
    store: RunStore, before: LaunchRequest, words: tuple[str, ...], overrides: Sequence[str], found: Findings
) -> tuple[Config, LaunchRequest]:
    """The new configuration, and the new request with its data.

    Raises:
        PhalanxError: Something is wrong with them, or was found before; all of it is told.
    """
    drafted = found.of(lambda: redraft(store.paths.config, overrides))
    if drafted is None:
        raise found.error()
    readings = [_settled(one, store) for one in drafted.readings]
    if drafted.problems:
        more = [*common(readings, examination.of_plan), *common(readings, lambda one: _of_data(one, before))]
        examination.refuse(drafted, [*found.lines, *more])
    (config,) = readings
    after = found.of(lambda: _request(config, before, words, overrides))
    if found:
        found.note(_of_data(config, before))
        found.refuse()
    assert after is not None, "nothing is wrong"
    return config, _with_data(config, before, after)


def _settled(config: Config, store: RunStore) -> Config:
    here = store.paths.root.absolute()
    return build.settle(replace(config, run=replace(config.run, dir=str(here.parent))), name=here.name, cwd=Path.cwd())


def _of_data(config: Config, before: LaunchRequest) -> list[str]:
    """What is wrong with the data, where they are others than those that the run has prepared."""
    same = unprepared(data_spec(config)) == unprepared(before.job.data)
    return [] if same and config.job.kind == before.job.kind else examination.of_data([config])


def next_sample(job: JobSpec, step: int) -> int:
    """Index of the first sample after ``step`` steps."""
    return job.schedule().first_index(step + 1)


def propose(store: RunStore, planned: ResumePlan) -> dict[str, Any]:
    """Lay the new request aside; whoever wins control of the run puts it in place.

    Returns:
        The wish to continue, for :func:`launcher.launch.run`.

    Raises:
        StorageError: It cannot be written.
    """
    wish: dict[str, Any] = {"overrides": list(planned.overrides), "changes": to_json(list(planned.changes))}
    if not planned.changes:
        return wish
    config, overrides = launch.config_files(planned.config, planned.request.overrides)
    name = proposal.propose(store, planned.request, config=config, overrides=overrides, shipment=planned.shipment)
    return wish | {"request": name}


def _check_free(store: RunStore, run: Run) -> None:
    if run.state is RunState.SUCCEEDED:
        raise ResumeRefused(
            f"'{store.name}' has succeeded at step {run.step}: there is nothing to go on with.",
            hint="phalanx submit starts a new run.",
        )
    if controlled(store.paths):
        raise ResumeRefused(
            f"'{store.name}' has a live controller: it needs no resume.",
            hint=f"phalanx logs {store.name} -f follows it, phalanx cancel {store.name} ends it.",
        )


def _live_steps(store: RunStore, run: Run) -> int | None:
    """Last step of a gang that may still live; None when the last attempt has ended."""
    if run.attempt is None or run.attempt.ended is not None or run.state.terminal:
        return None
    return max(run.attempt.last_step, int(progress.last_metric(store.paths).get("step", 0)))


def _with_data(config: Config, before: LaunchRequest, after: LaunchRequest) -> LaunchRequest:
    """The prepared data: those of the run as long as nothing about them changes and they are still there.

    Raises:
        ConfigError: There is nothing to validate with, which is asked for only now; or the data are refused.
        StorageError: They cannot be read.
    """
    old, new = before.job, after.job
    if old.inference is not None and new.inference is not None:  # its rows, and how many batches they make
        made = {name: getattr(old.inference, name) for name in ("tokenizer", "start", "end", "rows", "digest", "count")}
        job = replace(new, inference=replace(new.inference, **made), train=replace(new.train, steps=old.train.steps))
        return replace(after, job=job)
    same = new.kind == old.kind and unprepared(new.data) == unprepared(old.data)
    there = all(Path(store).is_dir() for store in (old.data.store, *(one.store for one in old.data.sources)))
    if same and new.model.vocab == old.model.vocab and (new.kind == "script" or there):
        if new.train.eval_every and new.train.eval_every != old.train.eval_every:
            require_validation(old.data, new.model.seq)
        return replace(after, job=replace(new, data=old.data))
    if new.model != old.model or new.kind != old.kind:
        return replace(after, job=replace(new, data=old.data))  # refused anyway: do not tokenize for it
    if there and not same:
        return replace(after, job=replace(new, data=other_data(old.data, new.data)))
    with launch.closing(_Quiet()) as screen:
        return prepare_data(config, after, screen, end_id=kept_end(old.data, new.data))


def _unvalidated(request: LaunchRequest) -> list[str]:
    """What is to be said of a run that has always been asked to validate, and has nothing to do it with."""
    if request.job.kind != "pretrain" or not request.job.train.eval_every:
        return []
    try:
        require_validation(request.job.data, request.job.model.seq)
    except ConfigError as error:
        return [f"note: {error.what} {error.why} train.eval_every=0 does without."]
    except StorageError:  # the ranks say what is wrong with a store
        pass
    return []


def _request(config: Config, before: LaunchRequest, words: tuple[str, ...], fresh: Sequence[str]) -> LaunchRequest:
    """The new request. The weights that the run began with stay those that were recorded, whatever became of them."""
    if any(word.lstrip("+~").startswith(("train.init_from", "job.weights")) for word in fresh):
        return build.build_request(config, words, launch.measured(config))
    plain = replace(config, train=replace(config.train, init_from=None), job=replace(config.job, weights=None))
    after = build.build_request(plain, words, launch.measured(config))
    return replace(after, job=replace(after.job, initial=before.job.initial))


class _Quiet(Screen):
    """Preparing data again is quick when the store is there, and then not worth a word."""

    def __init__(self) -> None:
        import sys

        super().__init__(sys.stderr)

    def say(self, text: str) -> None:
        """Nothing."""


def _with_project(
    config: Config, paths: RunPaths, before: LaunchRequest, after: LaunchRequest
) -> tuple[LaunchRequest, Shipment | None]:
    """A script's project: the copy of the last attempt if nothing has changed, else a new copy beside it."""
    if after.job.kind != "script" or before.job.kind != "script":
        return after, None
    if not Path(config.job.workdir).is_dir():
        return replace(after, job=replace(after.job, workdir=before.job.workdir)), None
    shipment = launch.project(config)
    copy = paths.root / Path(before.job.workdir).name
    if shipment is None or not changed_files(shipment, copy):
        return replace(after, job=replace(after.job, workdir=str(copy))), None
    number = 2
    while (paths.root / f"user-{number}").exists():
        number += 1
    return replace(after, job=replace(after.job, workdir=str(paths.root / f"user-{number}"))), shipment


def _nodes(request: LaunchRequest) -> str:
    cluster = request.cluster
    spares = f" + {render.plural(cluster.spares, 'spare')}" if cluster.spares else ""
    return f"{render.plural(cluster.nodes, 'node')} x {render.plural(cluster.slots_per_node, 'slot')}{spares}"


def _arrow(before: str, after: str) -> str:
    return after if before == after else f"{before} -> {after}"
