"""What is legal and can run, and is most likely not what was meant. Pure."""

from __future__ import annotations

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
