"""A run on a mixture, as a person submits it: packed, validated, struck, and the same as one that was neither."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support import cli

pytestmark = pytest.mark.timeout(400)
PP2 = ("cluster.nodes=1", "cluster.slots_per_node=2", "cluster.spares=0", "strategy.tp=1", "strategy.pp=2")


def words(folder: Path, name: str, *more: str) -> tuple[str, ...]:
    """A submit of the tiny model on two sources."""
    for source, number in (("crawl", 900), ("wiki", 60)):
        lines = (json.dumps({"text": f"{source} {index}: {index * index} is a square."}) for index in range(number))
        (folder / f"{source}.jsonl").write_text("\n".join(lines))
    sources = f"[{{path: {folder}/crawl.jsonl, weight: 1}}, {{path: {folder}/wiki.jsonl, epochs: 0.5}}]"
    run = (f"run.dir={folder / 'runs'}", f"run.name={name}")
    data = ("data=mixture", f"data.sources={sources}", "data.validation=0.1", "data.packing=true")
    return ("submit", "--json", *cli.PROCESSES, *cli.TINY, *PP2, *run, *data, *more)


def test_a_run_that_is_struck_and_validated_is_the_one_that_is_neither(tmp_path: Path) -> None:
    fault = 'faults=["rank_kill@rank=1,step=7"]'
    struck = cli.phalanx(*words(tmp_path, "struck", "train.eval_every=4", fault), cwd=tmp_path)
    assert struck.code == 0, struck.err
    for told in ("data: tokenizing", "data: 2 sources", "crawl ", "wiki ", "EPOCHS"):
        assert told in struck.err
    assert " 0.50" in struck.err, "the table says how many times a source is seen"
    plain = cli.phalanx(*words(tmp_path, "plain"), cwd=tmp_path)
    assert plain.code == 0, plain.err
    runs = [cli.store(tmp_path, name) for name in ("struck", "plain")]
    digests = [json.loads((run.paths.root / "final.json").read_text())["weights_digest"] for run in runs]
    assert digests[0] == digests[1]
    assert cli.curve(runs[0]) == cli.curve(runs[1])
    lines = {int(line["step"]): line for line in runs[0].metrics()}
    assert [step for step, line in sorted(lines.items()) if "eval" in line] == [4, 8, 12]
    found = [lines[step]["eval"] for step in (4, 8, 12)]
    assert all(one["perplexity"] == pytest.approx(math.exp(one["loss"])) for one in found)
    assert found[0]["loss"] > found[2]["loss"], "it learns"
    assert all(0 <= line["data_s"] < line["seconds"] for line in lines.values())
    assert not any("eval" in line for line in runs[1].metrics())


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    sources = f"data.sources=[{{path: {tmp_path}/gone, weight: 1}}, {{path: {tmp_path}/a.txt, weight: 2}}]"
    (tmp_path / "a.txt").write_text(" \n")
    fixed = (f"run.dir={tmp_path / 'runs'}", *cli.PROCESSES, *cli.TINY, *PP2)
    done = cli.phalanx("submit", *fixed, "data=mixture", sources, cwd=tmp_path)
    assert done.code == 2
    assert "The data have 2 problems" in done.err
    assert "gone: there is no such file or folder" in done.err
    assert "a: has weight 2, but no documents" in done.err
    wrong = "data.sources=[{path: a, kind: jsnl, weight: -1}, {path: b, weight: 1, epochs: 1}]"
    done = cli.phalanx("submit", *fixed, "data=mixture", wrong, "train.eval_every=2", cwd=tmp_path)
    assert done.code == 2
    for told in (
        "data.sources[0].kind: not a known value: 'jsnl'",
        "Did you mean 'jsonl'?",
        "data.sources[0].weight: expected 0 or more, found -1",
        "data.sources[1].weight: a source has a weight or a number of epochs, both are given",
        "train.eval_every: there is nothing to validate with",
    ):
        assert told in done.err
    assert not (tmp_path / "runs").exists()
