"""``phalanx plan``: what would run, whether it can, how long it takes and what it costs. Starts nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.common import json_option, overrides_argument, print_json, say
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launcher.build import Outline
    from launcher.schema import Config
    from strategies.plan import ParallelPlan
    from strategies.search import SearchResult
    from strategies.specs import ClusterSpec

SCHEMA_VERSION = 1


class _File(click.Path):
    """A path that has a name; ``-`` is none, because nothing here is read from or written to a pipe."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("", "-"):
            self.fail(f"the name of a file is needed, found '{value}'.", param, ctx)
        return super().convert(value, param, ctx)


@click.command(
    "plan",
    short_help="Show what would run, and whether it can.",
    epilog="""
    \b
    Examples:
    phalanx plan model=gpt_tiny strategy.tp=2 strategy.pp=2 train.global_batch=16
    phalanx plan model=gpt3_175b cluster=a100_80 strategy=auto train.precision=bf16 train.global_batch=1536
    phalanx plan --validate runs.csv
    """,
)
@json_option
@click.option("--explain", is_flag=True, help="Add the arithmetic of every predicted number.")
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="With strategy=auto: rank the best K plans (5).")
@click.option("--why", metavar="KEYS", help="With strategy=auto: why not this plan? For example --why tp=4,pp=3.")
@click.option("--report", type=_File(path_type=Path), metavar="FILE", help="Write it all as one page of HTML.")
@click.option("--validate", type=_File(path_type=Path), metavar="CSV", help="Predict measured runs and compare.")
@click.option("--deepspeed", is_flag=True, help="Print DeepSpeed's configuration, and nothing else.")
@click.option("--rehearse", is_flag=True, help="Show what submit --rehearse would run, as a difference, and no more.")
@click.option("--connect", is_flag=True, help="Ask an existing cluster for its size (else the configuration says it).")
@overrides_argument
@click.pass_context
def command(ctx: click.Context, /, overrides: tuple[str, ...], **options: Any) -> None:
    """Show what would run: plan, broken rules, placement; where the cluster's hardware is known, also memory, seconds
    per step, failures, finish and cost.

    OVERRIDES are in Hydra's grammar: model=llama_tiny strategy.tp=2 ++train.lr=1e-3; strategy=auto searches for the
    best plan. Exit code 3 if the plan breaks a rule or does not fit. --explain and --report also name the best one.

    --validate reads the columns of launcher/calibration/published_runs.csv; rows without flash attention and with a
    zero_stage above 0 are taken for Megatron-DeepSpeed.
    """
    _refuse_contradictions(options, overrides)
    if options["validate"]:
        _validate(options["validate"], as_json=options["as_json"])
        return
    if options["report"]:
        from launcher.report import require_place

        require_place(options["report"])
    from launcher import build
    from launcher.examination import examined

    config = examined(overrides)
    if options["rehearse"]:
        _rehearse(config, as_json=options["as_json"])
        return
    cluster = None
    if options["connect"]:
        from launcher.launch import measured

        cluster = measured(config)
    result = _searched(config, cluster, options, ctx)
    sketch = build.outline(config, cluster, plan=_chosen(result))
    _require_hardware(config, sketch, options)
    build.require_asked(config, sketch)  # submit would refuse what does not fit
    ranking = _ranking(config, result, options["top"]) if result else None
    document = plan_document(
        config, sketch, explain=options["explain"], report=bool(options["report"]), searched=ranking
    )
    _report(options["report"], document, sketch)
    _show(document, sketch, options)
    if cannot(document):
        ctx.exit(3)


def _show(document: Mapping[str, Any], sketch: Outline, options: Mapping[str, Any]) -> None:
    """Print what was asked for."""
    if options["as_json"]:
        print_json(dict(document))
    elif options["deepspeed"]:
        click.echo(json.dumps(document["deepspeed"], indent=2))
    else:
        import datetime

        from launcher.render_plan import plan_text

        click.echo(plan_text(document, sketch.plan, sketch.cluster, datetime.datetime.now(datetime.UTC).date()))


def _searched(
    config: Config, cluster: ClusterSpec | None, options: Mapping[str, Any], ctx: click.Context
) -> SearchResult | None:
    """The search behind ``strategy=auto``; None without. Ends the command where only one plan is asked about."""
    if not config.strategy.auto:
        if options["top"] or options["why"] is not None:
            name = "top" if options["top"] else "why"
            raise click.UsageError(f"--{name} is about the search: add strategy=auto.", ctx)
        return None
    from launcher.auto import TOP, searched, why_document

    if options["why"] is not None:
        document = why_document(config, _fields(options["why"]), machine=cluster)
        if options["as_json"]:
            print_json({"schema_version": SCHEMA_VERSION, "why": document})
        else:
            from launcher.render_search import why_text

            click.echo(why_text(document))
        ctx.exit(0)
    return searched(config, top=max(options["top"] or TOP, TOP), machine=cluster)  # submit chooses from as many


def _chosen(result: SearchResult | None) -> ParallelPlan | None:
    from launcher.auto import chosen

    return chosen(result) if result else None


def _ranking(config: Config, result: SearchResult, top: int | None) -> dict[str, Any]:
    from launcher.auto import TOP, auto_document

    return auto_document(config, top=top or TOP, result=result)


def _fields(text: str) -> dict[str, str]:
    """``tp=4,pp=3`` as a mapping; commas in brackets do not separate.

    Raises:
        ConfigError: A part is no KEY=VALUE, or a key or value makes no sense, or comes twice; all are named.
    """
    from launcher.auto import parse_fields

    fields: dict[str, str] = {}
    wrong = []
    for part in re.split(r",(?![^\[]*\])", text):
        name, equals, value = part.strip().removeprefix("strategy.").partition("=")
        if not (name and equals and value):
            wrong.append(f"KEY=VALUE,KEY=VALUE is expected, found '{part.strip()}'")
        elif name in fields:
            wrong.append(f"{name} is given twice, {name}={fields[name]} and {name}={value}")
        else:
            fields[name] = value
    parse_fields(fields, wrong)
    return fields


def _refuse_contradictions(options: Mapping[str, Any], overrides: tuple[str, ...]) -> None:
    """Raise UsageError for options that make no sense together."""
    given = [
        name
        for name in ("explain", "top", "why", "report", "deepspeed", "connect", "rehearse")
        if options[name] not in (None, False)
    ]
    if options["rehearse"] and given != ["rehearse"]:
        raise click.UsageError(f"--rehearse shows a difference only; it goes without --{given[0]}.")
    if options["validate"] and (given or overrides):
        others = [*(f"--{name}" for name in given), *overrides]
        raise click.UsageError(f"--validate takes models and machines from its file; it goes without {others[0]}.")
    if options["deepspeed"]:
        for name in ("explain", "top", "why"):
            if options[name] not in (None, False):
                raise click.UsageError(f"--deepspeed prints nothing else; it goes without --{name}.")
    if options["top"] and options["why"] is not None:
        raise click.UsageError("--top ranks plans, --why explains one: give one of them.")


def _rehearse(config: Config, *, as_json: bool) -> None:
    from launcher import build
    from launcher.drill.miniature import announcement, difference, miniature
    from launcher.host.accelerator import devices

    toy = miniature(config, devices(os.environ))
    faults = build.resolved_faults(toy.config, build.outline(toy.config))
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "rehearsal": difference(toy, faults)})
    else:
        click.echo(announcement(toy, faults))


def _validate(path: Path, *, as_json: bool) -> None:
    from launcher.calibration.validate import validate
    from launcher.calibration.validation_text import validation_text

    document = validate(path)
    if as_json:
        print_json(document)
    else:
        click.echo(validation_text(document))


def _report(path: Path | None, document: Mapping[str, Any], sketch: Outline) -> None:
    """Write the page; a plan that breaks rules has none."""
    if path is None:
        return
    if document["estimate"] is None:
        say("There is no report: a plan that breaks rules has no estimate.")
        return
    from launcher.report import write_report

    write_report(path, document, sketch.plan, sketch.cluster)
    say(f"The report is in {path}.")


def _require_hardware(config: Config, sketch: Outline, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if something is asked for that only an estimate has, and there can be none."""
    asked = [f"--{name}" for name in ("explain", "report") if options[name]]
    if not asked:
        return
    if config.job.kind != "pretrain":
        brings = "a script brings its own" if config.job.kind == "script" else "nothing is trained here"
        raise ConfigError(f"{asked[0]} is about training plans; {brings}.")
    if sketch.cluster.hardware is None:
        raise ConfigError(
            f"{asked[0]} needs an estimate, and the cluster '{sketch.cluster.name}' says nothing about its hardware.",
            hint="phalanx cluster probe measures it; cluster=a100_80 and others come with figures",
        )


def cannot(document: Mapping[str, Any]) -> bool:
    """Whether the plan is refused: a rule is broken, or it does not fit.

    A plan that can be modelled but not run is no mistake where there is something to model it with.
    """
    from strategies.capabilities import MODELLED_ONLY

    modelled = document["estimate"] is not None
    return any(not modelled or one["rule"] not in MODELLED_ONLY for one in document["violations"])


def plan_document(
    config: Config,
    sketch: Outline,
    *,
    explain: bool = False,
    report: bool = False,
    searched: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The plan as a document; the parts that need a legal split, or hardware figures, are null without.

    Args:
        config: The configuration.
        sketch: Its outline.
        explain: With the arithmetic of the estimate.
        report: With what only the report draws.
        searched: The search that the plan came from.
    """
    from launcher.build import outline_deepspeed
    from launcher.cautions import cautions
    from launcher.data_checks import absent, sources_outline
    from strategies import memory
    from strategies.codec import to_json

    model, plan = sketch.model, sketch.plan
    split = config.job.kind != "script" and len(plan.stages) == plan.pp and sum(plan.stages) == model.layers
    trains = split and config.job.kind == "pretrain"
    stages = memory.model_state_bytes(model, plan, config.train.precision) if trains else None
    violations = to_json(sketch.violations)
    estimate = _estimate(config, sketch, explain=explain, report=report, searched=searched)
    if estimate is not None and not estimate["fits"]:
        from launcher.estimation import memory_violation

        violations = [*violations, memory_violation(estimate, plan)]
    return {
        "schema_version": SCHEMA_VERSION,
        "job": config.job.kind,
        "plan": to_json(plan),
        "violations": violations,
        "model": to_json(model),
        "parameters": model.parameters,
        "parameters_per_stage": list(memory.stage_parameters(model, plan)) if split else None,
        "parameters_per_rank": list(memory.rank_parameters(model, plan)) if split else None,
        "memory": [{"stage": i, **kinds} for i, kinds in enumerate(stages)] if stages is not None else None,
        "precision": config.train.precision,
        "batch": to_json(sketch.batch),
        "sources": sources_outline(config),
        "absent_data": absent(config),
        "warnings": list(cautions(config, sketch.model)),
        "cluster": to_json(sketch.cluster),
        "estimate": estimate,
        "search": searched,
        "deepspeed": outline_deepspeed(config, plan),
    }


def _estimate(
    config: Config, sketch: Outline, *, explain: bool, report: bool, searched: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """What the planner predicts; None without hardware figures, and for plans that make no sense.

    The search for the best plan takes a second or two, so that it has to be asked for.
    """
    from launcher.build import workload

    work = workload(config, sketch)
    if work is None or sketch.broken:
        return None
    from launcher.estimation import estimated

    return estimated(work, sketch.plan, explain=explain, report=report, searched=searched, objective=config.objective)
