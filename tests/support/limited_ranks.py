"""A training step of ranks that may not allocate more than so many bytes on top of what their engine takes."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from jobs.engine import Engine
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.support.ranks import batches


def train_within(env: RankEnv, job: dict[str, Any], room_bytes: int) -> dict[str, float]:
    """Two steps; torch raises where the room is not enough.

    Args:
        env: This rank.
        job: The job.
        room_bytes: Private writable memory (``RLIMIT_DATA``) for activations, gradients and moments.

    Returns:
        The loss of the second step, and the largest resident size in bytes.
    """
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + room_bytes, resource.RLIM_INFINITY))
    for step in (1, 2):
        result = engine.train_step(step, batches(spec, step, engine.grid))
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    engine.close()
    return {"loss": result.loss, "peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _data_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return 1024 * int(line.split()[1])
