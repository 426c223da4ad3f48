"""What the launcher tells a rank: the job (the same for every rank and attempt) and the rank's own environment.

The job is written once per attempt to ``<run dir>/attempts/<n>/job.json``; the rank variables travel in the
environment under the names that torchrun users know, plus ``PHALANX_*``. No torch, no ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from strategies.codec import from_json
from strategies.deepspeed_config import deepspeed_config
from strategies.errors import StorageError
from strategies.plan import ParallelPlan
from strategies.schedule import SampleSchedule, Skip, full_batches
from strategies.specs import BatchSpec, ModelSpec, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """How the model is trained.

    Attributes:
        steps: Optimizer steps of the whole run.
        seed: Seed of initial weights and of the order of samples.
        lr: Peak learning rate.
        min_lr: Learning rate at the last step (cosine decay).
        warmup_steps: Steps of linear warm-up; where the batch grows, full batches.
        precision: Arithmetic of forward and backward.
        clip: Largest global gradient norm; 0 switches clipping off.
        beta1: Adam, decay of the first moment.
        beta2: Adam, decay of the second moment.
        eps: Adam, epsilon.
        weight_decay: AdamW decay, on every parameter.
        deterministic: Refuse kernels whose result depends on scheduling (matters on CUDA).
        spike_sigmas: A loss this many standard deviations above its running median is a blow-up
            (:mod:`jobs.numerics`); 0: only what is not finite.
        eval_every: Steps between evaluations on the validation part of the data; 0 for none.
        eval_batches: Global batches of one evaluation, as far as there are so many.
        sample_tokens: Tokens of text generated from the final weights; 0 for none.
        sample_prompt: What the generated text continues.
    """

    steps: int
    seed: int = 0
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 0
    precision: Precision = "fp32"
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    deterministic: bool = True
    spike_sigmas: float = 10.0
    eval_every: int = 0
    eval_batches: int = 4
    sample_tokens: int = 0
    sample_prompt: str = "def "


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One source of a mixture; the fields from ``store`` on are filled when it is prepared.

    Attributes:
        path: File or folder; empty for ``stdlib``.
        name: What people call it; unique in the mixture.
        kind: How documents lie in it: one of :data:`jobs.data.kinds.KINDS`.
        field: Where the text of a record is (``jsonl``, ``parquet``, ``arrow``).
        config, split: Which part of a dataset's folder is meant (:mod:`jobs.data.layout`); empty for the usual ones.
        weight: Share of the run's tokens, in proportion to the other weights; None where ``epochs`` says it.
        epochs: How many times its tokens are seen in the whole run; None where ``weight`` says it.
        store: Folder of its prepared shards.
        digest: Digest of its tokens.
        share: Its part of all samples, of :data:`jobs.data.mixture.SHARES`.
        documents, tokens: How many of it are trained on.
    """

    path: str = ""
    name: str = ""
    kind: str = "auto"
    field: str = "text"
    config: str = ""
    split: str = ""
    weight: float | None = None
    epochs: float | None = None
    store: str = ""
    digest: str = ""
    share: int = 0
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Where the samples come from.

    Attributes:
        kind: ``stdlib``: Python's standard library; ``text``: files of the user; ``mixture``: ``sources``.
        path: File or folder (``text`` only).
        store: Folder of the prepared token store (of a mixture: of its tokenizer), on the shared file system.
        digest: Digest of the prepared tokens; ranks refuse a store that does not carry it.
        vocab: Vocabulary of the tokenizer.
        sources: What a mixture is made of. Any other kind has one source, itself, once it needs one of the following.
        tokenizer: A ``tokenizer.json`` (``mixture``); empty trains one.
        end_token: Which of its tokens ends a document; empty: the one that the files beside it name.
        validation: Part of the documents that is not trained on but validated with.
        packing: No token sees another document than its own, and positions start anew with each.
        end_id: The token that ends a document.
    """

    kind: Literal["stdlib", "text", "mixture"]
    path: str = ""
    store: str = ""
    digest: str = ""
    vocab: int = 0
    sources: tuple[SourceSpec, ...] = ()
    tokenizer: str = ""
    end_token: str = ""
    validation: float = 0.0
    packing: bool = False
    end_id: int = 0

    @property
    def mixed(self) -> bool:
        """Whether it is prepared as a mixture is: shard by shard, with a part for validation."""
        return bool(self.kind == "mixture" or self.tokenizer or self.validation)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """When checkpoints are made and how many stay.

    Attributes:
        every: Steps between checkpoints on disk; 0 leaves only the one after the last step.
        memory_every: Steps between checkpoints in memory; 0 for none.
        memory_share: Largest share of the time that those may take: where they would take more, there are more steps
            between them. 0: whatever they take.
        keep: Number of newest committed checkpoints kept.
        url: Where else than in the run directory they are kept, for example ``s3://BUCKET/PREFIX``, or a folder; each
            run has a folder of its name there. Credentials come from the environment.
        patience_s: For how long the last one of a run is tried again where it cannot be written, before the run fails.
            Training goes on beside an earlier one that fails, and the next one due is another try.
    """

    every: int = 10
    memory_every: int = 0
    memory_share: float = 0.0
    keep: int = 3
    url: str | None = None
    patience_s: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsSpec:
    """Weights that a job takes from elsewhere (:mod:`jobs.weights`).

    Attributes:
        kind: ``hf``: a Hugging Face folder. ``checkpoint``: a committed checkpoint.
        path: The folder, or the manifest.
        run: The run directory that the manifest was found through; empty where it was named itself.
        files: SHA-256 of what it consists of, by name; empty until they are recorded.
    """

    kind: Literal["hf", "checkpoint"]
    path: str
    run: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceSpec:
    """What is asked of a model that is not trained. Paths are absolute; empty for none.

    Attributes:
        text: Texts whose perplexity is measured.
        choices: Multiple-choice questions.
        shots: So many questions stand solved before each of the others.
        prompts: File of prompts to continue.
        prompt: A prompt to continue.
        tokens: Most tokens that are added to each prompt.
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Draw among so many most likely tokens; 0: among all.
        top_p: Draw among the most likely tokens that have this probability together.
        tokenizer: The ``tokenizer.json``.
        start: The token that begins a document; None for none.
        end: The token that ends one; None for none.
        packing: The model was trained with documents apart (:attr:`DataSpec.packing`), so it computes with them apart.
        rows: File of the prepared rows; empty until prepared.
        digest: SHA-256 of that file.
        count: Number of rows.
    """

    text: str = ""
    choices: str = ""
    shots: int = 0
    prompts: str = ""
    prompt: str = ""
    tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    tokenizer: str = ""
    start: int | None = None
    end: int | None = None
    packing: bool = False
    rows: str = ""
    digest: str = ""
    count: int = 0


JobKind = Literal["pretrain", "script", "evaluate", "generate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """Everything that all ranks of a job agree on.

    Attributes:
        run_id: Name of the run, unique in its parent folder.
        kind: ``pretrain``: our own worker trains; ``evaluate``, ``generate``: it only computes; ``script``: a command
            of the user.
        model: The model (``pretrain``).
        plan: The plan.
        batch: The global batch.
        train: The recipe.
        data: The samples.
        checkpoint: The checkpoint policy.
        deepspeed: DeepSpeed's config dictionary.
        skips: All samples that the run passes over; what a checkpoint records of them must agree.
        faults: Faults to inject, in the grammar of :mod:`jobs.faults`, all resolved (no ``random``).
        command: Command line of a ``script`` job.
        workdir: Folder in which a ``script`` job starts.
        initial: The weights that the job begins with; None: drawn from the seed.
        inference: What is asked of the model (``evaluate``, ``generate``).
        version: Version of this document.
    """

    run_id: str
    kind: JobKind
    model: ModelSpec
    plan: ParallelPlan
    batch: BatchSpec
    train: TrainSpec
    data: DataSpec
    checkpoint: CheckpointSpec
    deepspeed: Mapping[str, Any]
    skips: tuple[Skip, ...] = ()
    faults: tuple[str, ...] = ()
    command: str = ""
    workdir: str = ""
    initial: WeightsSpec | None = None
    inference: InferenceSpec | None = None
    version: int = 1

    @property
    def infers(self) -> bool:
        """Whether it only computes: its steps are batches, and it keeps results, not weights."""
        return self.kind in ("evaluate", "generate")

    def schedule(self) -> SampleSchedule:
        """Which samples each step consumes, from the first step on."""
        return SampleSchedule.of(self.batch, self.skips)

    def skipping(self, skips: tuple[Skip, ...]) -> JobSpec:
        """The same job, passing over more samples."""
        return replace(self, skips=(*self.skips, *skips))

    def under(self, plan: ParallelPlan) -> JobSpec:
        """The same job under another plan, with the DeepSpeed configuration that goes with it."""
        if plan == self.plan:
            return self
        return replace(
            self, plan=plan, deepspeed=engine_config(plan, self.train, self.batch) if self.kind == "pretrain" else {}
        )


def engine_config(plan: ParallelPlan, train: TrainSpec, batch: BatchSpec) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe for batches of samples under a plan."""
    return deepspeed_config(
        plan=plan,
        precision=train.precision,
        clip=train.clip,
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_steps,
        steps=full_batches(batch, train.steps),
        min_lr=train.min_lr,
    )


def read_job(path: Path) -> JobSpec:
    """The job of an attempt; raises StorageError."""
    try:
        return from_json(JobSpec, json.loads(path.read_text(encoding="utf-8")), where="job.json")
    except (OSError, ValueError) as error:
        raise StorageError(
            f"The job cannot be read: {path}.",
            why=str(error),
            hint="Check that the run directory is on a file system that all nodes share.",
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnv:
    """One rank's view of its gang; :meth:`variables` and :meth:`read` are inverse.

    Attributes:
        rank: Global rank.
        local_rank: Index of the rank's slot on its node.
        world_size: Number of ranks.
        local_world_size: Number of ranks on this node.
        node_rank: Index of the node in the gang.
        master_addr: Address of the rendezvous store (rank 0's node).
        master_port: Port of the rendezvous store.
        run_id: Name of the run.
        run_dir: Run directory, on the shared file system.
        epoch: Incarnation of the controller that launched this attempt.
        attempt: Incarnation of the gang.
        resume_from: Checkpoint to restore: path of its manifest (``pretrain``) or folder (``script``); empty for none.
        report_fd: File descriptor to write reports to (:mod:`jobs.report`); -1 for none.
        store_fd: Listening socket for the rendezvous store, already bound (rank 0 only); -1 for none.
        order_fd: Where the agent's word to leave is read (:mod:`jobs.orders`); -1 for none.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    master_addr: str
    master_port: int
    run_id: str
    run_dir: str
    epoch: int
    attempt: int
    resume_from: str = ""
    report_fd: int = -1
    store_fd: int = -1
    order_fd: int = -1

    @property
    def checkpoint_dir(self) -> str:
        """Folder of all checkpoints of the run."""
        return os.path.join(self.run_dir, "checkpoints")

    @property
    def job_path(self) -> str:
        """File of the attempt's :class:`JobSpec`."""
        return os.path.join(self.run_dir, "attempts", str(self.attempt), "job.json")

    def variables(self) -> dict[str, str]:
        """The environment variables that carry this view to the rank's process."""
        return (
            {name: str(getattr(self, field)) for field, name in _VARIABLES.items()}
            | {"PHALANX_CKPT_DIR": self.checkpoint_dir}
            | self.own(rank=self.rank, local_rank=self.local_rank, node_rank=self.node_rank)
        )

    @staticmethod
    def own(*, rank: int, local_rank: int, node_rank: int) -> dict[str, str]:
        """The variables in which the ranks of one attempt differ; all others are the same for all of them."""
        node = str(node_rank)
        return {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "NODE_RANK": node, "GROUP_RANK": node}

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> RankEnv:
        """Read the view back; raises ``KeyError`` outside a rank's process."""
        kinds = cls.__annotations__
        raw = {field: environ[name] for field, name in _VARIABLES.items()}
        values: dict[str, Any] = {field: int(text) if kinds[field] == "int" else text for field, text in raw.items()}
        return cls(**values)


_VARIABLES = {
    "rank": "RANK",
    "local_rank": "LOCAL_RANK",
    "world_size": "WORLD_SIZE",
    "local_world_size": "LOCAL_WORLD_SIZE",
    "node_rank": "NODE_RANK",
    "master_addr": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
    "run_id": "PHALANX_RUN_ID",
    "run_dir": "PHALANX_RUN_DIR",
    "epoch": "PHALANX_EPOCH",
    "attempt": "PHALANX_ATTEMPT",
    "resume_from": "PHALANX_RESUME_FROM",
    "report_fd": "PHALANX_REPORT_FD",
    "store_fd": "PHALANX_STORE_FD",
    "order_fd": "PHALANX_ORDER_FD",
}
