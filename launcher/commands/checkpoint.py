"""``phalanx checkpoint``: what a run has saved, whether it is whole, and how to take it elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.common import dir_option, find, interruptible, json_option, print_json, run_argument, say, split
from launcher.commands.groups import Nearest

if TYPE_CHECKING:
    from jobs.checkpoint import Checkpoint
    from jobs.checkpoint.export import Exported
    from jobs.checkpoint.superseded import Superseded
    from launcher.store import RunStore

SCHEMA_VERSION = 1
_REPORT_EVERY_S = 1.0


@click.group(
    "checkpoint",
    cls=Nearest,
    short_help="List, verify and export what a run has saved.",
    epilog="Example: phalanx checkpoint export latest --to my-model",
)
def command() -> None:
    """List, verify and export the checkpoints of a run. Reads only; a live run may go on meanwhile."""


def step_option(function: Any) -> Any:
    """Adds ``--step``."""
    return click.option("--step", type=int, help="Which checkpoint, by its step (default: the newest).")(function)


@command.command("ls", short_help="What is committed, newest first.")
@json_option
@dir_option
@run_argument
def ls(as_json: bool, folder: str | None, words: tuple[str, ...]) -> None:
    """List the committed checkpoints of RUN, newest first, those that do not count, and manifests that are damaged."""
    from jobs.checkpoint import survey
    from jobs.checkpoint.superseded import superseded
    from launcher.render_checkpoint import checkpoints_text

    store = _store(words, folder)
    found, damaged = survey(store.paths.checkpoints)
    rows = [_row(one) for one in found]
    broken = [{"path": str(path), "reason": reason} for path, reason in damaged]
    aside = [_aside(one) for one in superseded(store.paths.checkpoints)]
    document = {"schema_version": SCHEMA_VERSION, "run": store.name, "checkpoints": rows, "superseded": aside}
    document["damaged"] = broken
    if as_json:
        print_json(document)
    elif rows or aside or broken:
        click.echo(checkpoints_text(document, time.time()))
    else:
        say(f"The run '{store.name}' has no checkpoint yet.")


@command.command("verify", short_help="Read every byte and compare digests.")
@json_option
@dir_option
@step_option
@click.option("--all", "every", is_flag=True, help="All checkpoints of the run.")
@run_argument
@click.pass_context
def verify(
    ctx: click.Context, as_json: bool, folder: str | None, step: int | None, every: bool, words: tuple[str, ...]
) -> None:
    """Read every byte of RUN's newest checkpoint and compare it with the digests. Exit code 7 if it is damaged.

    With --all also what does not count any more; that it is damaged makes no difference to the exit code.
    """
    from jobs.checkpoint import damaged
    from jobs.checkpoint import verify as problems_of
    from jobs.checkpoint.superseded import superseded

    if every and step is not None:
        raise click.UsageError("--all and --step exclude each other.")
    store = _store(words, folder)
    results = []
    for one in _picked(store, step) if not every else _all(store):
        say(f"step {one.step}: reading {one.bytes / 1e6:,.1f} MB")
        results.append(_row(one) | {"problems": problems_of(one.path, deep=True)})
    if every or step is None:
        results += [{"path": str(p), "problems": [reason]} for p, reason in damaged(store.paths.checkpoints)]
    bad = [row for row in results if row["problems"]]
    for old in superseded(store.paths.checkpoints) if every else []:
        results.append(_aside(old) | {"problems": problems_of(old.path, deep=True)})
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "run": store.name, "checkpoints": results, "whole": not bad})
    for row in results if not as_json else []:
        name = f"step {row['step']}" if "step" in row else row["path"]
        aside = f" (does not count: {row['reason']})" if "reason" in row else ""
        click.echo(f"{name}: {'; '.join(row['problems']) if row['problems'] else 'whole'}{aside}")
    if bad:
        ctx.exit(7)


@command.command("export", short_help="Write it as Hugging Face or DeepSpeed load it.")
@json_option
@dir_option
@step_option
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Type of the weights (hf; default: fp32).")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "universal"]),
    default="hf",
    help="For whom (default: hf).",
    show_choices=True,
)
@run_argument
def export_(
    as_json: bool, folder: str | None, step: int | None, target: Path, dtype: Any, kind: str, words: tuple[str, ...]
) -> None:
    """Write a checkpoint of RUN for others.

    hf: config.json, safetensors and tokenizer, which transformers loads. universal: DeepSpeed's universal checkpoint
    with both Adam moments, which an engine with {"checkpoint": {"load_universal": true}} loads at any degree of
    parallelism.

    Whatever plan wrote it: no conversion, no cluster, no GPU. The folder appears whole or not at all.
    """
    if kind == "universal" and dtype not in (None, "fp32"):
        raise click.UsageError("--dtype is for --format hf: a universal checkpoint holds fp32 masters.")
    dtype = dtype or "fp32"
    store = _store(words, folder)
    one = _picked(store, step)[0]
    with interruptible():
        done = _export(store, one, kind, target.absolute(), dtype)
    if as_json:
        print_json(
            {"schema_version": SCHEMA_VERSION, "run": store.name, "step": one.step, "path": str(done.path)}
            | {"files": done.files, "tensors": done.tensors, "bytes": done.bytes, "dtype": dtype, "format": kind}
        )
    else:
        say(f"{done.tensors} tensors, {done.bytes / 1e6:,.1f} MB in {dtype}, of step {one.step}: {done.path}")


def _export(store: RunStore, one: Checkpoint, kind: str, target: Path, dtype: Any) -> Exported:
    if kind == "hf":
        from jobs.checkpoint.export import export
        from jobs.hf.folder import TOKENIZER

        data = store.request().job.data
        if data.store and not (Path(data.store) / TOKENIZER).is_file():
            say(f"without a tokenizer: {data.store} is gone")
        return export(one.path, target, dtype=dtype, data=data if data.store else None, progress=_Progress())
    from jobs.checkpoint.universal import export_universal
    from strategies.deepspeed_config import learning_rate
    from strategies.schedule import full_batches

    train, batch = store.request().job.train, store.request().job.batch
    rate = learning_rate(
        full_batches(batch, one.step + 1),
        lr=train.lr,
        min_lr=train.min_lr,
        warmup_steps=train.warmup_steps,
        steps=full_batches(batch, train.steps),
    )
    learning = {
        "lr": rate,
        "betas": (train.beta1, train.beta2),
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }
    return export_universal(one.path, target, learning=learning, progress=_Progress())


class _Progress:
    """Says how far an export is, once a second."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _REPORT_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _REPORT_EVERY_S
            say(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB")


def _store(words: tuple[str, ...], folder: str | None) -> RunStore:
    ref, parent, _ = split(words, folder)
    return find(ref, parent)


def _all(store: RunStore) -> list[Checkpoint]:
    from jobs.checkpoint import list_checkpoints

    return list_checkpoints(store.paths.checkpoints)


def _picked(store: RunStore, step: int | None) -> list[Checkpoint]:
    """The checkpoint that is meant: the newest, or the newest of a step.

    Raises:
        NotFound: There is none.
    """
    from strategies.errors import NotFound

    found = _all(store)
    chosen = [one for one in found if step is None or one.step == step]
    if chosen:
        return chosen[:1]
    steps = ", ".join(str(number) for number in dict.fromkeys(one.step for one in found))
    what = f"The run '{store.name}' has no checkpoint" + (f" of step {step}." if step is not None else ".")
    raise NotFound(what, hint=f"It has the steps {steps}." if steps else "phalanx checkpoint ls shows what is there.")


def _row(one: Checkpoint) -> dict[str, Any]:
    return {
        "step": one.step,
        "epoch": one.token.epoch,
        "attempt": one.token.attempt,
        "time": one.time,
        "bytes": one.bytes,
        "written_bytes": one.written_bytes,
        "plan": one.plan.describe(),
        "path": str(one.path),
        "counts": True,
    }


def _aside(one: Superseded) -> dict[str, Any]:
    return {
        "step": one.step,
        "epoch": one.token.epoch,
        "attempt": one.token.attempt,
        "path": str(one.path),
        "counts": False,
        "reason": one.reason,
    }
