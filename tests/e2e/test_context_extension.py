"""A second stage with longer sequences begins with the weights of the first, and goes on from its own checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.checkpoint import newest, read_manifest
from launcher.run import RunState
from launcher.store import RunStore
from strategies.rotary import scaled_base
from tests.support import cli

MODEL = ("model=llama_tiny", "model.layers=2", "model.hidden=64", "model.ffn=128", "model.vocab=300")
RECIPE = ("train.global_batch=4", "train.lr=3e-3", "tracking=none", "recovery.backoff_s=0.1")
MACHINE = ("cluster=process", "cluster.nodes=1", "cluster.slots_per_node=2")


def submit(folder: Path, name: str, *words: str) -> RunStore:
    fixed = (f"run.dir={folder / 'runs'}", f"run.name={name}", "data=text", cli.corpus(folder))
    done = cli.phalanx("submit", *MODEL, *RECIPE, *MACHINE, *fixed, *words, cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, name)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_from_256_to_1024_tokens(tmp_path: Path) -> None:
    first = submit(tmp_path, "short", "model.seq=256", "strategy.dp=2", "train.steps=40", "checkpoint.every=0")
    longer = ("model.seq=1024", "train.global_batch=2", "train.steps=4", "strategy.sp=2", "strategy.zero_stage=1")
    extended = ("model.rope_scaling=4", f"train.init_from={first.paths.root}")
    fault = ('faults=["rank_kill@rank=1,step=4"]', "checkpoint.every=2", "checkpoint.memory_every=0")
    second = submit(tmp_path, "long", *longer, *extended, *fault)
    fresh = submit(tmp_path, "fresh", *longer, "checkpoint.every=0")
    before, after, anew = (cli.curve(run) for run in (first, second, fresh))
    assert before[40][0] < before[1][0] - 2, "the first stage has learnt something"
    assert after[1][0] < before[40][0] + 0.3, "the second goes on where the first ended"
    assert after[4][0] < anew[4][0] - 1
    assert second.run().state is RunState.SUCCEEDED
    own = str(second.paths.checkpoints)
    assert [one.resume_from.startswith(own) for one in second.run().attempts] == [False, True]
    path = newest(second.paths.checkpoints)
    assert path is not None
    manifest = read_manifest(path)
    assert manifest.model.rope_theta == scaled_base(1e4, 4, 16)
    assert manifest.extra["initial"]["path"] == str(newest(first.paths.checkpoints))
