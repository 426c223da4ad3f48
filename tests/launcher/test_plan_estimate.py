"""``phalanx plan`` where the hardware is known: estimate, exit codes, report, arithmetic, contradictions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main

Invoke = Callable[..., tuple[int, str, str]]
GPT3 = ["model=gpt3_175b", "cluster=a100_80", "train.precision=bf16", "train.global_batch=1536", "train.tokens=300e9"]
FITS = [*GPT3, "strategy.tp=8", "strategy.pp=8", "strategy.recompute=full"]
TOO_LARGE = [*GPT3, "strategy.tp=8", "strategy.pp=1", "strategy.recompute=full"]
MODELLED = [*FITS, "strategy.schedule=interleaved", "strategy.vpp=2"]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Calls ``phalanx plan`` in this process; returns exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def numbers(value: Any) -> list[float]:
    """Every number in a document."""
    if isinstance(value, dict):
        return [one for item in value.values() for one in numbers(item)]
    if isinstance(value, list):
        return [one for item in value for one in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_packed_documents_take_memory(invoke: Invoke) -> None:
    peaks = []
    for packing in ("false", "true"):
        code, out, _ = invoke("--json", "--explain", *FITS, "data=text", "data.path=x", f"data.packing={packing}")
        assert code == 0
        estimate = json.loads(out)["estimate"]
        peaks.append(estimate["memory"]["peak_bytes"])
        told = next(term for term in estimate["arithmetic"]["memory"] if term["kind"] == "activations")
        assert ("masks of documents" in told["formula"]) == (packing == "true")
    assert peaks[1] >= peaks[0] + 3 * 2048**2


def test_experts_that_nothing_keeps_evenly_loaded_are_warned_of(invoke: Invoke) -> None:
    words = ["model=moe_tiny", "cluster=process", "model.moe.balance_weight=0", "model.moe.z_weight=0"]
    code, out, _ = invoke(*words)
    assert code == 0
    assert "warning: nothing keeps the experts evenly loaded" in out
    assert len(json.loads(invoke("--json", *words)[1])["warnings"]) == 1
    assert "evenly loaded" not in invoke(*words[:2])[1]
    assert "evenly loaded" not in invoke(*words[:3])[1]
    assert "evenly loaded" not in invoke(*words, "model.moe.experts=1", "model.moe.top_k=1")[1]


def test_estimate_of_a_plan_that_fits(invoke: Invoke) -> None:
    code, out, _ = invoke("--json", *FITS)
    assert code == 0
    estimate = json.loads(out)["estimate"]
    assert estimate["fits"]
    assert estimate["runnable"]
    assert sum(estimate["time"]["kinds_s"].values()) == pytest.approx(estimate["time"]["step_s"])
    assert estimate["time"]["low_s"] <= estimate["time"]["step_s"] <= estimate["time"]["high_s"]
    for stage in estimate["memory"]["stages"]:
        kinds = [value for kind, value in stage.items() if kind.endswith("_bytes") and kind != "total_bytes"]
        assert sum(kinds) == pytest.approx(stage["total_bytes"])
    assert estimate["memory"]["peak_bytes"] == max(stage["total_bytes"] for stage in estimate["memory"]["stages"])
    failures = estimate["failures"]
    assert failures["goodput"] + sum(failures["lost"].values()) == pytest.approx(1.0, abs=1e-6)
    assert [one["restart_s"] for one in failures["sweep"]] == [1.0, 30.0, 120.0, 600.0]
    assert failures["days_fault_free"] <= failures["days_50"] <= failures["days_90"]
    assert failures["cost_50_usd"] <= failures["cost_90_usd"]
    assert all(math.isfinite(one) for one in numbers(estimate))
    losses = [one["nodes_lost"] for one in estimate["ladder"]]
    assert losses == sorted(losses)
    assert losses[0] == 1
    assert all(one["throughput"] <= 1 for one in estimate["ladder"])


def test_text_says_the_same(invoke: Invoke) -> None:
    code, out, _ = invoke(*FITS)
    assert code == 0
    for word in ("forecast:", "it fits", "one step:", "bottleneck:", "what would help most", "goodput:", "finish:"):
        assert word in out
    assert max(len(line) for line in out.splitlines()) <= 130
    assert out.rstrip().endswith("phalanx submit with the same overrides and cluster.address=IP:PORT starts it.")
    assert "strategy=auto finds the best" in out
    assert invoke(*FITS, "cluster.address=10.0.0.1:6379")[1].rstrip().endswith("with the same overrides starts it.")


def test_plan_that_does_not_fit(invoke: Invoke) -> None:
    code, out, _ = invoke("--json", *TOO_LARGE)
    assert code == 3
    document = json.loads(out)
    assert [one["rule"] for one in document["violations"]] == ["memory_fits"]
    assert "strategy." in document["violations"][0]["hint"]
    assert document["estimate"]["ladder"] == []
    code, out, _ = invoke(*TOO_LARGE)
    assert code == 3
    assert "memory_fits: " in out
    assert "This plan can run" not in out


def test_plan_that_can_only_be_modelled_is_no_mistake(invoke: Invoke) -> None:
    code, out, _ = invoke(*MODELLED)
    assert code == 0
    assert "can be modelled only" in out
    document = json.loads(invoke("--json", *MODELLED)[1])
    assert not document["estimate"]["runnable"]
    assert [one["rule"] for one in document["violations"]] == ["combination_runs"]
    assert invoke(*MODELLED, "cluster.hardware=null")[0] == 3


def test_broken_rules_leave_no_estimate(invoke: Invoke) -> None:
    code, out, _ = invoke("--json", *FITS, "strategy.tp=7")
    assert code == 3
    assert json.loads(out)["estimate"] is None


def test_arithmetic_on_demand(invoke: Invoke) -> None:
    assert "arithmetic" not in json.loads(invoke("--json", *FITS)[1])["estimate"]
    arithmetic = json.loads(invoke("--json", "--explain", *FITS)[1])["estimate"]["arithmetic"]
    estimate = json.loads(invoke("--json", *FITS)[1])["estimate"]
    assert {term["kind"] for term in arithmetic["memory"]} <= {
        name.removesuffix("_bytes") for name in estimate["memory"]["stages"][0]
    }
    assert {term["kind"] for term in arithmetic["time"]} >= set(estimate["time"]["kinds_s"])
    assert "seconds of one step:" in invoke("--explain", *FITS)[1]


def test_report(invoke: Invoke, tmp_path: Path) -> None:
    target = tmp_path / "plan.html"
    code, out, err = invoke("--report", str(target), "experiment=quickstart")
    assert code == 0
    assert "This plan can run" in out
    assert str(target) in err
    assert target.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--report", "nowhere/plan.html"], 7, "there is no folder"),
        (["--report", "."], 7, "is a folder"),
        (["--explain", "cluster.hardware=null"], 2, "says nothing about its hardware"),
        (["--report", "x.html", "job=script", "job.command=x"], 2, "a script brings its own"),
        (["--validate", "x.csv", "model=gpt_tiny"], 2, "goes without model=gpt_tiny"),
        (["--validate", "x.csv", "--top", "3"], 2, "goes without --top"),
        (["--validate", "x.csv"], 2, "x.csv"),
        (["--deepspeed", "--explain"], 2, "goes without --explain"),
        (["strategy=auto", "--top", "3", "--why", "tp=2"], 2, "give one of them"),
        (["--top", "0"], 2, "--top"),
        (["--top", "3"], 2, "strategy=auto"),
        (["--why", "tp=2"], 2, "strategy=auto"),
        (["--why", ""], 2, "strategy=auto"),
        (["strategy=auto", "--why", ""], 2, "KEY=VALUE,KEY=VALUE is expected, found ''"),
        (["strategy=auto", "--why", "tp=4,tp=8"], 2, "tp is given twice, tp=4 and tp=8"),
        (["strategy=auto", "--top", "3", "--why", ""], 2, "give one of them"),
        (["--deepspeed", "--why", ""], 2, "goes without --why"),
        (["--validate", "x.csv", "--why", ""], 2, "goes without --why"),
        (["--report", ""], 2, "the name of a file is needed"),
        (["--report", "-"], 2, "the name of a file is needed, found '-'"),
        (["--validate", ""], 2, "the name of a file is needed"),
    ],
)
def test_contradictions_and_bad_places(
    words: list[str], code: int, says: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = invoke(*words)
    assert (found, out) == (code, "")
    assert says in err
    assert list(tmp_path.iterdir()) == []


AUTO = ["strategy=auto", "train.global_batch=16"]


def test_search_is_ranked_and_adds_up(invoke: Invoke) -> None:
    code, out, _ = invoke("--json", "--top", "3", *AUTO)
    assert code == 0
    document = json.loads(out)
    search = document["search"]
    assert len(search["ranked"]) == 3
    assert search["best_runnable"]["plan"] == document["plan"]
    parts = [search["evaluated"], *search["pruned"].values(), *search["rejected"].values()]
    assert sum(parts) == search["space"]
    code, out, _ = invoke("--top", "3", *AUTO)
    assert code == 0
    assert "best plans by tokens per second that survive failures" in out
    assert "why the next best lost" in out
    assert "All about it: phalanx plan strategy=default" in out


def test_one_plan_of_the_search_is_explained(invoke: Invoke) -> None:
    code, out, _ = invoke("--json", "--why", "strategy.tp=2, pp=2", *AUTO)
    assert code == 0
    assert json.loads(out)["why"]["asked"] == {"tp": 2, "pp": 2}
    code, out, _ = invoke("--why", "tp=2,stages=[2,2]", *AUTO)
    assert code == 0
    assert "the best plan" in out
    code, _, err = invoke("--why", "tp", *AUTO)
    assert code == 2
    assert "KEY=VALUE" in err
    code, _, err = invoke("--why", "tp=4,pp=foo,zz=2,dp", *AUTO)
    assert code == 2
    assert all(word in err for word in ("pp=foo", "'zz'", "found 'dp'"))
    code, _, err = invoke("--why", "tq=2", *AUTO)
    assert code == 2
    assert "tp" in err


def test_the_best_plan_of_a_search_that_can_only_be_modelled_is_told_apart(invoke: Invoke) -> None:
    words = ["strategy=auto", "model=llama2_7b", "model.embed_norm=true", "cluster=a100_80", "train.precision=bf16"]
    code, out, _ = invoke(*words)
    assert code == 0
    assert "This plan can be modelled only" in out
    assert "All about it: phalanx plan strategy=default" in out


SMALL = ["model=gpt2_small", "cluster=a100_80", "cluster.nodes=1", "train.precision=bf16", "train.global_batch=64"]
SLOW = [*SMALL, "strategy.pp=4", "strategy.recompute=full"]


def test_what_beats_a_plan_is_said(invoke: Invoke, tmp_path: Path) -> None:
    assert json.loads(invoke("--json", *SLOW)[1])["estimate"]["best"] is None  # a search has to be asked for
    code, out, _ = invoke("--json", "--explain", *SLOW, "objective=time")
    assert code == 0
    estimate = json.loads(out)["estimate"]
    best = estimate["best"]
    assert best["runnable"]
    assert best["better"] > 0.1
    assert best["better"] == pytest.approx(estimate["time"]["step_s"] / best["step_s"] - 1)
    modelled = invoke("--explain", *SLOW, "strategy.schedule=interleaved", "strategy.vpp=3")[1]
    assert "compared with all plans, modelled ones too, with gradients in fp32)" in modelled
    again = invoke("--explain", *SMALL, *best["overrides"], "objective=time")[1]
    assert "no other plan is more than 1 % better in seconds per step without failures" in again


@pytest.mark.parametrize("objective", ["goodput", "memory"])
def test_there_is_one_best_plan_wherever_it_is_named(invoke: Invoke, tmp_path: Path, objective: str) -> None:
    one_best(invoke, tmp_path, [*SLOW, f"objective={objective}"])


@pytest.mark.full
@pytest.mark.parametrize("experiment", ["gpt3_175b", "gpt4_1800b", "llama3_405b"])
def test_there_is_one_best_plan_of_the_large_experiments(invoke: Invoke, tmp_path: Path, experiment: str) -> None:
    one_best(invoke, tmp_path, [f"experiment={experiment}"])


def one_best(invoke: Invoke, folder: Path, words: list[str]) -> None:
    """The line beside a plan, its page in both places, and the search for a plan say the same."""
    target = folder / "plan.html"
    code, out, _ = invoke("--json", "--report", str(target), *words)
    assert code == 0
    estimate, html = json.loads(out)["estimate"], target.read_text()
    best, search = estimate["best"], estimate["search"]
    assert best["plan"]["sp"] == 1 or any(one.startswith("sp=") for one in best["warnings"])
    assert search["best"]["plan"] == best["plan"]
    assert f"Beaten by {best['plan_text']} (" in html
    assert re.search(rf"Best by [a-z ]*: {re.escape(best['plan_text'])}\.", html)
    assert f"beaten by {best['plan_text']} (" in invoke("--explain", *words)[1]
    given = [word for word in words if not word.startswith("strategy.")]
    found = json.loads(invoke("--json", *given, "strategy=auto")[1])["search"]
    assert found["best_runnable"]["plan"] == best["plan"]


def test_report_of_a_search(invoke: Invoke, tmp_path: Path) -> None:
    target = tmp_path / "plan.html"
    code, out, _ = invoke("--json", "--report", str(target), *AUTO)
    assert code == 0
    search = json.loads(out)["estimate"]["search"]
    assert search["space"] == search["evaluated"] + search["pruned"] + search["rejected"]
    assert len(search["points"]) > 100
    assert f"{search['space']:,} plans" in target.read_text()


def test_ladder_of_a_schedule_that_needs_whole_rounds(invoke: Invoke) -> None:
    words = [*FITS, "strategy.schedule=interleaved", "strategy.vpp=3"]
    rungs = json.loads(invoke("--json", *words)[1])["estimate"]["ladder"]
    assert len(rungs) >= 3
    assert all(one["plan"] for one in rungs)
    assert [one["throughput"] for one in rungs] == sorted((one["throughput"] for one in rungs), reverse=True)
