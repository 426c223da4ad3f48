"""What ranks of gangs with offloaded state run."""

from __future__ import annotations

from typing import Any

from jobs.engine import Engine
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json


def norm_of_nothing(env: RankEnv, job: dict[str, Any]) -> list[float | str]:
    """The norm of parameters of which none counts here, and where it is, while state lives where no rank can send from.

    On the CPU that is a device that does not exist; on others it is the host.
    """
    engine = Engine.build(from_json(JobSpec, job), env)
    optimizer = engine.ds.optimizer
    optimizer.device = "meta"
    norm = optimizer.complete_grad_norm_calculation_for_cpu_offload([])
    return [float(norm), norm.device.type, optimizer.device]
