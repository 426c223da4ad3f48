"""Text from the final weights of a run: the whole model on one process, read from the committed checkpoint."""

from __future__ import annotations

from jobs.data import Samples
from jobs.forward import Forward
from jobs.inference.generation import Sampling, generate
from jobs.location import Location
from jobs.models.packing import Documents
from jobs.spec import JobSpec, WeightsSpec
from jobs.weights import open_weights

TEMPERATURE = 0.7
TOP_K = 40


def sample(job: JobSpec, manifest: Location, store: Samples) -> str:
    """Continue the job's prompt by ``train.sample_tokens`` tokens; a pure function of job and checkpoint.

    Raises:
        CorruptCheckpoint: The checkpoint is damaged.
        StorageError: It or the tokenizer cannot be read.
    """
    prompt = job.train.sample_prompt
    how = Sampling(temperature=TEMPERATURE, top_k=TOP_K, seed=job.train.seed)
    tokens = store.encode(prompt) or [job.data.end_id]
    ((found, _),) = generate(load(job, manifest), [tokens], [prompt], count=job.train.sample_tokens, how=how)
    return store.decode(found)


def load(job: JobSpec, manifest: Location) -> Forward:
    """The model of a checkpoint as one rank, in fp32 on the CPU."""
    documents = Documents(job.data.end_id) if job.data.packing else None
    weights = WeightsSpec(kind="checkpoint", path=str(manifest))
    return Forward(job.model, open_weights(weights, job.model), documents=documents)
