"""What a run has learnt, evaluated and continued from its checkpoint as a person does it, under another plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import cli

MACHINE = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2", "cluster.spares=0", "tracking=none")
ONE = ("strategy.dp=1",)
EXPERTS = ("model.moe={experts: 4, top_k: 2, ffn: 32, capacity_factor: 1.25}",)


def results(folder: Path, name: str, *words: str) -> dict[str, Any]:
    done = cli.phalanx("submit", *MACHINE, f"run.dir={folder / 'runs'}", f"run.name={name}", *words, cwd=folder)
    assert done.code == 0, done.err
    return dict(json.loads((folder / "runs" / name / "results.json").read_text()))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", [(), EXPERTS], ids=["dense", "experts"])
def test_a_run_is_evaluated_and_continued_under_another_plan(tmp_path: Path, model: tuple[str, ...]) -> None:
    done = cli.phalanx(*cli.tiny(tmp_path, "trained", "train.lr=1e-2", *model), cwd=tmp_path)
    assert done.code == 0, done.err
    weights = f"job.weights={tmp_path / 'runs' / 'trained'}"
    text = tmp_path / "held-out.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x * {i} + 3" for i in range(5000, 5020)))
    evaluate = ("job=evaluate", weights, f"job.text={text}", "train.global_batch=8")
    generate = ("job=generate", weights, "job.prompt=def f", "job.tokens=12", "train.global_batch=1")
    one = results(tmp_path, "evaluate-1", *evaluate, *ONE)
    split = results(tmp_path, "evaluate-4", *evaluate, *cli.TP2_PP2, "strategy.micro_batch=4")
    assert split["text"] == pytest.approx(one["text"], rel=1e-5)
    assert one["text"]["perplexity"] < 0.5 * 300, "it has learnt something of 300 tokens"
    for number, how in enumerate(((), ("job.temperature=0.8", "job.top_k=20"))):
        texts = [
            results(tmp_path, f"generate-{number}-{len(plan)}", *generate, *how, *plan)["texts"][0]["text"]
            for plan in (ONE, cli.TP2_PP2)
        ]
        assert texts[0] == texts[1]
        assert texts[0]
