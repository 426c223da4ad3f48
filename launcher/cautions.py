"""What is legal and can run, and is most likely not what was meant. Pure."""

from __future__ import annotations

from launcher.request import LaunchRequest
from launcher.schema import Config
from strategies.specs import ModelSpec

_UNBALANCED = (
    "nothing keeps the experts evenly loaded: model.moe.balance_weight and model.moe.z_weight are 0, so training may "
    "end with a few of the {experts} experts doing all the work. Switch Transformer takes "
    "model.moe.balance_weight=0.01, ST-MoE model.moe.z_weight=0.001"
)


def cautions(config: Config, model: ModelSpec) -> tuple[str, ...]:
    """Sentences for those who plan or submit a run; none where nothing is trained.

    Args:
        config: The configuration.
        model: Its model.
    """
    if config.job.kind != "pretrain" or model.moe is None:
        return ()
    moe = model.moe
    if moe.experts > 1 and moe.balance_weight == 0 and moe.z_weight == 0:
        return (_UNBALANCED.format(experts=moe.experts),)
    return ()


def crowding(request: LaunchRequest, cores: int, *, devices: bool) -> tuple[str, ...]:
    """What is to be said where ranks that train on processors have to take turns: the planner gives each its own.

    Args:
        request: The run.
        cores: Processors of this machine that this process may use.
        devices: Whether every rank computes on a device of its own instead.
    """
    cluster, ranks = request.cluster, request.job.plan.world_size
    here = cluster.kind in ("local", "process") and cluster.device == "CPU" and not devices
    if request.job.kind != "pretrain" or not here or ranks <= cores:
        return ()
    whose = f"the {cores} cores" if cores > 1 else "the only core"
    longer = f"a step takes about {ranks / cores:.1f} times as long as predicted"
    return (f"{ranks} ranks share {whose} of this machine: {longer}",)
