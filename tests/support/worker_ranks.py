"""The real worker as ranks of a test gang, optionally with a fault in its arithmetic that an oracle must notice."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from jobs import worker
from jobs.checkpoint.reader import Reader
from jobs.data import TokenStore
from jobs.spec import RankEnv


def work(env: RankEnv, *, attempt: int, resume_from: str = "", slots: int = 2, sabotage: str = "") -> int:
    """Run :func:`jobs.worker.main`; reports go to ``attempts/<n>/reports-<rank>.jsonl``.

    Args:
        env: This rank.
        attempt: Number of the attempt.
        resume_from: Manifest to restore.
        slots: Ranks per node.
        sabotage: ``shifted batch``: every sample is the next one. ``flipped bit``: the lowest bit of one restored
            weight is flipped, after the checkpoint was verified. Empty for none.
    """
    if sabotage == "shifted batch":
        _shift_samples()
    elif sabotage == "flipped bit":
        _flip_a_bit()
    _record_samples(Path(env.run_dir, "attempts", str(attempt), f"samples-{env.rank}.txt"))
    path = Path(env.run_dir, "attempts", str(attempt), f"reports-{env.rank}.jsonl")
    env = dataclasses.replace(
        env,
        attempt=attempt,
        resume_from=resume_from,
        local_rank=env.rank % slots,
        local_world_size=slots,
        node_rank=env.rank // slots,
        report_fd=os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    )
    os.environ.update(env.variables())
    return worker.main()


def _record_samples(path: Path) -> None:
    """Write down the index of every sample that this rank reads, one a line."""
    original = TokenStore.sample

    def sample(self: TokenStore, seed: int, index: int) -> Any:
        with path.open("a") as file:
            file.write(f"{index}\n")
        return original(self, seed, index)

    TokenStore.sample = sample  # type: ignore[method-assign]


def _shift_samples() -> None:
    original = TokenStore.sample

    def sample(self: TokenStore, seed: int, index: int) -> Any:
        return original(self, seed, index + 1)

    TokenStore.sample = sample  # type: ignore[method-assign]


def _flip_a_bit() -> None:
    original = Reader.read_slice

    def read_slice(self: Reader, wanted: Any, kind: str, out: Any) -> None:
        original(self, wanted, kind, out)
        if wanted.name == "blocks.0.mlp.up.weight" and kind == "master" and wanted.start == 0:
            out.view(np.uint32)[0] ^= 1

    Reader.read_slice = read_slice  # type: ignore[method-assign]
