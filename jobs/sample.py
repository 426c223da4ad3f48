"""Text from the final weights: the whole model on one process, read from the committed checkpoint."""

from __future__ import annotations

import math
from typing import cast

import torch

from jobs.checkpoint.reader import Reader
from jobs.data import Samples
from jobs.distributed import Grid
from jobs.location import Location
from jobs.models.gpt import Decoder, Recipe
from jobs.parallel.meta import ParamMeta
from jobs.spec import JobSpec

TEMPERATURE = 0.7
TOP_K = 40


def generate(job: JobSpec, manifest: Location, store: Samples) -> str:
    """Continue the job's prompt by ``train.sample_tokens`` tokens; a pure function of job and checkpoint.

    Raises:
        CorruptCheckpoint: The checkpoint is damaged.
        StorageError: It or the tokenizer cannot be read.
    """
    model = load(job, manifest)
    tokens = store.encode(job.train.sample_prompt) or [job.data.end_id]
    generator = torch.Generator().manual_seed(job.train.seed)
    with torch.no_grad():
        for _ in range(job.train.sample_tokens):
            window = torch.tensor([tokens[-job.model.seq :]])
            tokens.append(_draw(model(window)[0, -1, : job.model.vocab], generator))
    return store.decode(tokens)


def load(job: JobSpec, manifest: Location) -> Decoder:
    """The model of a checkpoint as one rank, in fp32 on the CPU."""
    reader = Reader(manifest)
    model = Decoder(Recipe.of(job.model, Grid(), seed=job.train.seed, recompute="none"))
    for parameter in model.parameters():
        meta = cast(ParamMeta, parameter.phalanx)  # type: ignore[attr-defined]
        values = reader.read_flat(meta.name, "master", 0, math.prod(meta.shape))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values).view(meta.shape))
    return model.eval()


def _draw(logits: torch.Tensor, generator: torch.Generator) -> int:
    best = torch.topk(logits / TEMPERATURE, min(TOP_K, len(logits)))
    choice = torch.multinomial(torch.softmax(best.values, dim=-1), 1, generator=generator)
    return int(best.indices[choice])
