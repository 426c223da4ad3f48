"""Checkpoints that do not depend on the plan that wrote them, and that exist only once their manifest does.

On disk::

    checkpoints/
        step-00000010/
            e0001-a0002/                       one token (epoch, attempt): one writer, fenced from all others
                shard-00003.safetensors        slices of rank 3: fp32 master weights and both Adam moments
                shard-00003.json               size and digest of the shard, written once the shard is durable
            e0001-a0002.manifest.json          the commit: created exclusively, after everything above is durable
        fences/                                which gangs may commit no more, and what counts (jobs.checkpoint.fence)

The folder may as well be a prefix of an object store (:mod:`jobs.checkpoint.storage`), where ``run.json`` says whose
checkpoints these are (:mod:`jobs.checkpoint.claim`). A shard whose data have not changed since an earlier checkpoint
holds the state of its rank alone; the manifest says in which earlier shard the data are.

What is called from outside (all other names are internal)::

    jobs.checkpoint.manifest   newest, survey, list_checkpoints, damaged, absent, verify        pure, no numpy
    jobs.checkpoint.retention  prune                                                            pure, no numpy
    jobs.checkpoint.fence      raise_fence, begin, current, in_order, Branch                    pure, no numpy
    jobs.checkpoint.reader     Reader                                                           numpy
    jobs.checkpoint.digest     weights_digest                                                   numpy
    jobs.checkpoint.save       save, snapshot, persist                                          torch, collective
    jobs.checkpoint.keeping    Saver                                                            pure, no numpy
    jobs.checkpoint.saver      BehindSaver                                                      torch, collective
    jobs.checkpoint.direct     DirectSaver                                                      torch, collective
    jobs.checkpoint.memory     names and records of the memory tier                             pure, no numpy
    jobs.checkpoint.restore    restore                                                          torch, collective
    jobs.checkpoint.gang       gang_weights_digest                                              torch, collective

This module imports neither torch nor numpy, so that the controller can list and verify checkpoints without them.
Only the fp32 masters are stored: 16-bit weights are their rounding, and are made again from them on restore.
"""

from jobs.checkpoint.errors import CheckpointConflict, CorruptCheckpoint
from jobs.checkpoint.manifest import (
    Checkpoint,
    Manifest,
    absent,
    damaged,
    list_checkpoints,
    newest,
    read_manifest,
    survey,
    verify,
)
from jobs.checkpoint.retention import prune

__all__ = [
    "Checkpoint",
    "CheckpointConflict",
    "CorruptCheckpoint",
    "Manifest",
    "absent",
    "damaged",
    "list_checkpoints",
    "newest",
    "prune",
    "read_manifest",
    "survey",
    "verify",
]
