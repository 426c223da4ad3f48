"""A gang that only computes: DeepSpeed's groups and device, no engine and no optimizer."""

from __future__ import annotations

import torch

from jobs.build_time import BuildTime
from jobs.checkpoint.gang import agree
from jobs.distributed import Grid
from jobs.engine import assembly, process
from jobs.forward import Forward
from jobs.models.packing import Documents
from jobs.spec import JobSpec, RankEnv
from jobs.weights import open_weights, verify
from strategies.errors import ConfigError, StorageError

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def join(job: JobSpec, env: RankEnv, took: BuildTime) -> Grid:
    """Join the gang. Collective.

    Args:
        job: What it computes.
        env: This rank.
        took: Learns how long it took.
    """
    process.join(env, deterministic=job.train.deterministic, took=took)
    with took.watching(lazy=process.connects_late()):
        return assembly.grid_of(job.plan)


def load(job: JobSpec, env: RankEnv, grid: Grid) -> Forward:
    """Read this rank's part of the model. Collective.

    Raises:
        ConfigError: The weights are not those of the model.
        CorruptCheckpoint: They are damaged; on every rank.
        StorageError: They cannot be read, or are others than at the submit; on every rank.
    """
    asked = job.inference
    assert job.initial is not None, "the configuration was checked"
    assert asked is not None, "it is a job that only computes"
    error: Exception | None = None
    try:
        verify(job.initial, env.rank, env.world_size)
        device, dtype = torch.device(process.device()), _TYPES[job.train.precision]
        source = open_weights(job.initial, job.model, env.rank)
        documents = Documents(asked.end) if asked.packing and asked.end is not None else None
        forward = Forward(
            job.model, source, grid, stages=job.plan.stages, device=device, dtype=dtype, documents=documents
        )
    except (StorageError, ConfigError) as caught:
        error = caught
    agree(error)
    return forward
