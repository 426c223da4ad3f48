"""The weights that training begins with, where they are not drawn from the seed: read into the live optimizer state.

Every rank reads the slices that its share of the masters is made of, under any plan, and nothing else; 16-bit weights
are the masters' rounding. The moments stay zero and the first step is step 1: it is a new run that begins here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jobs.checkpoint.fragments import access, of_owners
from jobs.checkpoint.gang import agree, rank_and_world
from jobs.spec import JobSpec
from jobs.weights import open_weights, verify
from strategies.errors import ConfigError, StorageError


def initialise(engine: Any, job: JobSpec) -> None:
    """Give a fresh engine the weights that the job begins with, if it names any. Collective.

    Args:
        engine: A :class:`jobs.engine.Engine`.
        job: The job.

    Raises:
        ConfigError: The weights are not those of the job's model; on every rank.
        CorruptCheckpoint: They are damaged; on every rank.
        StorageError: They cannot be read, or are others than at the submit; on every rank.
    """
    if job.initial is None:
        return
    error: Exception | None = None
    optimizer = access(engine.ds)
    try:
        rank, world = rank_and_world()
        verify(job.initial, rank, world)
        source = open_weights(job.initial, job.model, rank)
        with torch.no_grad():
            fragments = [fragment for fragment in optimizer.fragments() if fragment.slice.elements]
            for owners in optimizer.resident(write=True):
                for fragment in of_owners(fragments, owners):
                    values = np.empty(fragment.slice.elements, dtype=np.float32)
                    source.read_slice(fragment.slice, values)
                    master = optimizer.view(fragment, "master")
                    assert master is not None
                    master.copy_(torch.from_numpy(values))
    except (StorageError, ConfigError) as caught:
        error = caught
    agree(error)  # before the collectives of publishing, in which a failed rank would be waited for
    with torch.no_grad():
        optimizer.publish()
