"""The section ``job`` of the configuration; a part of :mod:`launcher.schema`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.spec import JobKind


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """What the ranks do.

    Attributes:
        kind: ``pretrain``: our own worker trains. ``evaluate``, ``generate``: it computes with a model that exists.
            ``script``: a command of the user on every rank.
        command: Command line of a ``script`` job; starts in a copy of ``workdir``.
        workdir: Folder of the user's project (``script`` only), copied into the run directory.
        ship_limit_mb: Largest project that is copied, in MB.
        weights: The model (``evaluate``, ``generate``): a Hugging Face folder, a run directory (its newest checkpoint),
            or a manifest; the section ``model`` follows from it.
        tokenizer: Its ``tokenizer.json``; null means the one beside the weights.
        text: Texts whose perplexity is measured (``evaluate``): a text file, a jsonl file (key ``text``), a folder.
        choices: Multiple-choice questions (``evaluate``): jsonl with ``question``, ``choices`` and ``answer``.
        shots: The first so many questions stand solved before each of the others.
        prompt: A prompt to continue (``generate``).
        prompts: File of prompts to continue (``generate``): one per line, or jsonl (key ``prompt``).
        tokens: Most tokens that are added to each prompt; a text may end before.
        temperature: Logits are divided by it; 0 takes the most likely token. Draws follow from ``train.seed``.
        top_k: Draw among so many most likely tokens; 0: among all.
        top_p: Draw among the most likely tokens that have this probability together.
    """

    kind: JobKind
    command: str | None = None
    workdir: str = "."
    ship_limit_mb: int = 200
    weights: str | None = None
    tokenizer: str | None = None
    text: str | None = None
    choices: str | None = None
    shots: int = 0
    prompt: str | None = None
    prompts: str | None = None
    tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def infers(self) -> bool:
        """Whether it computes with a model that exists."""
        return self.kind in ("evaluate", "generate")
