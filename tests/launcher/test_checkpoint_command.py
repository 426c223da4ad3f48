"""``phalanx checkpoint``: lists, verifies and exports from the run directory alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.checkpoint import fence
from jobs.checkpoint.fence import Branch
from jobs.checkpoint.layout import Token
from launcher.cli import main
from tests.support.checkpoints import flip_bit, write_checkpoint
from tests.support.runs import make_run

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", *words])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 4 and 8, and a manifest of step 12 that was cut short."""
    store = make_run(tmp_path, "one")
    for step in (4, 8):
        write_checkpoint(store.paths.checkpoint_dir, step=step)
    cut = write_checkpoint(store.paths.checkpoint_dir, step=12)
    cut.write_bytes(cut.read_bytes()[:-20])
    return store.paths.root


def test_ls_is_newest_first_and_names_what_is_damaged(tmp_path: Path, run: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("ls", "one", "-C", str(tmp_path), "--json")
    document = json.loads(out)
    assert code == 0
    assert [row["step"] for row in document["checkpoints"]] == [8, 4]
    assert [Path(row["path"]).parent.name for row in document["damaged"]] == ["step-00000012"]
    code, out, _ = invoke("ls", str(run))
    assert code == 0
    assert out.splitlines()[1].split()[0] == "8"
    assert "damaged:" in out


def test_what_does_not_count_is_shown_with_the_reason(tmp_path: Path, invoke: Invoke) -> None:
    """Of the first gang the run went on from step 8; the second has left something of which the third had nothing."""
    store = make_run(tmp_path, "one")
    root = store.paths.checkpoint_dir
    for step, token in ((4, (1, 1)), (8, (1, 1)), (12, (1, 1)), (10, (1, 2)), (11, (2, 3))):
        write_checkpoint(root, step=step, token=token)
    fence.raise_fence(root, Token(2, 3), owner="a controller")
    fence.begin(root, Branch(epoch=2, attempt=3, history=((8, 1, 1),), passed=((10, 1, 2),)))
    code, out, _ = invoke("ls", "one", "-C", str(tmp_path), "--json")
    document = json.loads(out)
    assert code == 0
    assert [(row["step"], row["counts"]) for row in document["checkpoints"]] == [(11, True), (8, True), (4, True)]
    assert [(row["step"], row["counts"], row["reason"]) for row in document["superseded"]] == [
        (10, False, "it could not be had when e0002-a0003 began, which has gone on from an older one"),
        (12, False, "e0001-a0001 was replaced: the run has gone on from its step 8"),
    ]
    text = invoke("ls", str(store.paths.root))[1].splitlines()
    assert [line.split()[0] for line in text[1:]] == ["11", "8", "4", "10", "12"]
    assert text[-1].endswith("no      e0001-a0001 was replaced: the run has gone on from its step 8")
    flip_bit(next((root / "step-00000012").rglob("shard-00001.safetensors")), -5)
    code, out, _ = invoke("verify", str(store.paths.root), "--all")
    assert code == 0
    lines = out.splitlines()
    assert lines[:3] == [f"step {step}: whole" for step in (11, 8, 4)]
    assert lines[3].startswith("step 10: whole (does not count: it could not be had when e0002-a0003 began")
    assert lines[4].startswith("step 12: ")
    assert "shard-00001" in lines[4]


def test_without_a_branch_of_the_newest_gang_nothing_is_said_against_anybody(tmp_path: Path, invoke: Invoke) -> None:
    store = make_run(tmp_path, "one")
    for token in ((1, 1), (1, 2)):
        write_checkpoint(store.paths.checkpoint_dir, step=4, token=token)
    document = json.loads(invoke("ls", str(store.paths.root), "--json")[1])
    assert document["superseded"] == []


def test_verify_reads_every_byte(tmp_path: Path, run: Path, invoke: Invoke) -> None:
    assert invoke("verify", str(run), "--step", "8")[:2] == (0, "step 8: whole\n")
    shard = next((run / "checkpoints" / "step-00000008").rglob("shard-00001.safetensors"))
    flip_bit(shard, -5)
    code, out, _ = invoke("verify", str(run), "--step", "8")
    assert code == 7
    assert "shard-00001" in out
    code, out, _ = invoke("verify", "one", "-C", str(tmp_path), "--all", "--json")
    document = json.loads(out)
    assert (code, document["whole"]) == (7, False)
    assert [bool(row["problems"]) for row in document["checkpoints"]] == [True, False, True]


def test_a_step_that_is_not_there(run: Path, invoke: Invoke) -> None:
    code, _, err = invoke("verify", str(run), "--step", "5")
    assert code == 5
    assert "It has the steps 8, 4." in err
    code, _, err = invoke("verify", str(run), "--step", "5", "--all")
    assert code == 2


def test_export_of_what_is_no_model_names_the_reason(tmp_path: Path, run: Path, invoke: Invoke) -> None:
    (tmp_path / "there").mkdir()
    code, _, err = invoke("export", str(run), "--to", str(tmp_path / "there"))
    assert code == 2
    assert "exists already" in err


def test_universal_export_has_the_settings_with_which_the_run_learns(tmp_path: Path, invoke: Invoke) -> None:
    """The rate is that of the step to come; nothing is as it is by default."""
    import torch

    from tests.support.checkpoints import write_model_checkpoint
    from tests.support.jobspecs import GPT

    schedule = ["train.steps=20", "train.lr=0.002", "train.min_lr=0.0005", "train.warmup_steps=4"]
    adam = ["train.beta1=0.85", "train.beta2=0.97", "train.eps=1e-6", "train.weight_decay=0.03"]
    store = make_run(tmp_path, "three", words=["experiment=quickstart", "tracking=none", *schedule, *adam])
    write_model_checkpoint(store.paths.checkpoint_dir, GPT, step=11)
    target = tmp_path / "universal"
    code, _, err = invoke("export", str(store.paths.root), "--to", str(target), "--format", "universal")
    assert code == 0, err
    written = torch.load(target / "global_step11" / "zero" / "optimizer_state.pt")
    cosine = (1 + math.cos(math.pi * (12 - 4 + 1) / (20 - 4 + 1))) / 2
    expected = {"lr": 0.0005 + 0.0015 * cosine, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.03}
    for groups in (written["param_groups"], written["optimizer_state_dict"]["param_groups"]):
        (found,) = groups
        assert {key: pytest.approx(value) for key, value in expected.items()} == {key: found[key] for key in expected}


def test_export_writes_a_folder(tmp_path: Path, invoke: Invoke) -> None:
    from tests.support.checkpoints import write_model_checkpoint
    from tests.support.jobspecs import GPT

    store = make_run(tmp_path, "two")
    write_model_checkpoint(store.paths.checkpoint_dir, GPT, step=3)
    code, out, _ = invoke(
        "export", "two", "-C", str(tmp_path), "--to", str(tmp_path / "hf"), "--dtype", "bf16", "--json"
    )
    document = json.loads(out)
    assert code == 0
    assert (document["step"], document["bytes"]) == (3, 2 * GPT.parameters)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
