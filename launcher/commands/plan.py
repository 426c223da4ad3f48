"""``phalanx plan``: what would run, whether it can, and what every rank would hold. Starts and writes nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.common import json_option, overrides_argument, print_json

if TYPE_CHECKING:
    from launcher.build import Outline
    from launcher.schema import Config

SCHEMA_VERSION = 1


@click.command(
    "plan",
    short_help="Show what would run, and whether it can.",
    epilog="Example: phalanx plan model=gpt_tiny strategy.tp=2 strategy.pp=2 train.global_batch=16",
)
@json_option
@click.option("--deepspeed", is_flag=True, help="Print DeepSpeed's configuration, and nothing else.")
@click.option("--connect", is_flag=True, help="Ask an existing cluster for its size (else the configuration says it).")
@overrides_argument
@click.pass_context
def command(ctx: click.Context, as_json: bool, deepspeed: bool, connect: bool, overrides: tuple[str, ...]) -> None:
    """Show what would run: plan, broken rules, parameters, bytes per rank, placement.

    OVERRIDES are in Hydra's grammar: model=llama_tiny strategy.tp=2 ++train.lr=1e-3. Exit code 3 if it cannot run.
    """
    from launcher import build
    from launcher.config import compose

    config = compose(overrides)
    cluster = None
    if connect:
        from launcher.launch import measured

        cluster = measured(config)
    sketch = build.outline(config, cluster)
    if not sketch.violations:
        build.resolved_faults(config, sketch)  # submit would refuse what does not fit
    document = plan_document(config, sketch)
    if as_json:
        print_json(document)
    elif deepspeed:
        click.echo(json.dumps(document["deepspeed"], indent=2))
    else:
        from launcher.render_plan import plan_text

        click.echo(plan_text(document, sketch.plan, sketch.cluster))
    if sketch.violations:
        ctx.exit(3)


def plan_document(config: Config, sketch: Outline) -> dict[str, Any]:
    """The plan as a document; the parts that need a legal split are null without one."""
    from launcher.build import outline_deepspeed
    from strategies import memory
    from strategies.codec import to_json

    model, plan = sketch.model, sketch.plan
    split = config.job.kind == "pretrain" and len(plan.stages) == plan.pp and sum(plan.stages) == model.layers
    stages = memory.model_state_bytes(model, plan, config.train.precision) if split else None
    return {
        "schema_version": SCHEMA_VERSION,
        "job": config.job.kind,
        "plan": to_json(plan),
        "violations": to_json(sketch.violations),
        "model": to_json(model),
        "parameters": model.parameters,
        "parameters_per_stage": list(memory.stage_parameters(model, plan)) if split else None,
        "parameters_per_rank": list(memory.rank_parameters(model, plan)) if split else None,
        "memory": [{"stage": i, **kinds} for i, kinds in enumerate(stages)] if stages is not None else None,
        "precision": config.train.precision,
        "batch": to_json(sketch.batch),
        "cluster": to_json(sketch.cluster),
        "deepspeed": outline_deepspeed(config, plan),
    }
