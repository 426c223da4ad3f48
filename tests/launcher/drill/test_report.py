"""The table, the proof under it and the verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launcher.config import compose
from launcher.drill import report
from launcher.drill.case import Aim, Case
from launcher.drill.catalogue import CATALOGUE, named
from launcher.drill.changes import changes_text
from launcher.drill.compare import Comparison
from launcher.drill.evidence import Evidence
from launcher.drill.report import Result
from launcher.drill.toy import shrink
from strategies.errors import DrillFailed, DrillIncomplete
from tests.support.golden import assert_golden

AIM = Aim(rank=3, node=1, other=0, step=8)
SAME = Comparison(identical=True, worst=0.0)
ROUNDED = Comparison(first=7, worst=3.2e-7, weights=0.04)
OTHER = Comparison(first=9, worst=0.02, weights=31.0)
KILLED = "SIGKILL of controller 12 in RUN"
DEAD = Comparison(problem="the run failed: all 16 restarts are used")


def evidence(
    *,
    fired: bool = True,
    proof: str = 'rank_kill@rank=3,step=8; log: "rank 3 on node1 was ended by signal 9"',
    lost: int = 1,
    resumes: int = 0,
    smaller: bool = False,
    broken: tuple[str, ...] = (),
    detected_s: float | None = 0.01,
    within_s: float | None = 2.0,
    most: int | None = 1,
) -> Evidence:
    return Evidence(
        fired=fired,
        proof=proof,
        detected_s=detected_s,
        within_s=within_s,
        recovered_s=0.62,
        steps_lost=lost,
        most_lost=most,
        resumes=resumes,
        smaller=smaller,
        broken=broken,
    )


def case(name: str) -> Case:
    found = named(name)
    assert found is not None
    return found


def judged(name: str, found: Evidence, compared: Comparison, problem: str = "") -> Result:
    return report.judge(name, case(name), AIM, found, compared, problem=problem, precision="fp32")


def results() -> list[Result]:
    return [
        judged("rank_sigkill", evidence(), SAME),
        judged("no_spare_left", evidence(smaller=True, lost=2, most=2, detected_s=3.4, within_s=7.0), ROUNDED),
        judged("controller_kill_run", evidence(resumes=1, lost=0, within_s=None, proof=KILLED), SAME),
        judged("partition", evidence(), OTHER),
        judged("gil_hold", evidence(fired=False, proof="no proof of rank_spin.rank-3.step-8"), SAME),
        judged("two_nodes", evidence(), DEAD),
        Result(name="disk_full", case=case("disk_full"), aim=AIM, verdict="skipped", why="needs root"),
    ]


def test_table() -> None:
    assert_golden("drill.txt", report.render(results()))


def test_catalogue() -> None:
    assert_golden("drill-list.txt", report.catalogue_text(CATALOGUE))
    listed = report.catalogue_document(CATALOGUE)["faults"]
    assert [one["name"] for one in listed] == [one.name for one in CATALOGUE]


def test_what_was_shrunk_is_a_difference() -> None:
    assert_golden("drill-shrunk.txt", changes_text(shrink(compose(["experiment=gpt4_1800b"])).changes))


def test_a_fault_that_did_not_fire_is_a_failure_even_if_the_run_is_right() -> None:
    assert [one.verdict for one in results()] == ["ok", "ok", "ok", "failed", "failed", "failed", "skipped"]


def test_rounding_is_no_excuse_on_the_same_plan() -> None:
    assert judged("rank_sigkill", evidence(), ROUNDED).verdict == "failed"
    assert judged("no_spare_left", evidence(smaller=True), OTHER).verdict == "failed"
    assert judged("node_kill", evidence(smaller=True), ROUNDED).verdict == "failed"  # it had a spare


@pytest.mark.parametrize("name", ["no_spare_left", "spare_dies_first"])
def test_where_a_smaller_plan_must_take_over_it_has_to(name: str) -> None:
    assert judged(name, evidence(smaller=True, most=2), ROUNDED).verdict == "ok"
    same = judged(name, evidence(most=2), ROUNDED)
    assert same.why.startswith("not bit-identical: first at step 7, weights 0.04 x what rounding explains; ")
    assert (
        judged(name, evidence(most=2), SAME).why == "it went on with the same plan, and a smaller one was to take over"
    )


def test_what_was_promised_and_not_kept_is_a_failure() -> None:
    late = judged("straggler", evidence(broken=("named after 21 steps, and must be within 20",), lost=0), SAME)
    assert (late.verdict, late.why) == ("failed", "named after 21 steps, and must be within 20")
    unread = Comparison(first=7, worst=3.2e-7, unread="'run' has no checkpoint of step 20.")
    found = judged("no_spare_left", evidence(smaller=True, most=2), unread)
    assert (found.verdict, found.why) == (
        "failed",
        "not within rounding: first at step 7, the weights cannot be compared: 'run' has no checkpoint of step 20.",
    )


def test_a_fault_that_is_known_late_is_a_failure_even_if_the_run_is_right() -> None:
    late = judged("rank_sigstop", evidence(detected_s=14.2, within_s=9.0), SAME)
    assert (late.verdict, late.why) == ("failed", "known after 14.2 s, and must be within 9.0 s")
    assert judged("rank_sigstop", evidence(detected_s=8.9, within_s=9.0), SAME).verdict == "ok"
    assert judged("nan_gradient", evidence(detected_s=14.2, within_s=None), SAME).verdict == "ok"


def test_a_fault_that_costs_too_many_steps_is_a_failure_even_if_the_run_is_right() -> None:
    costly = judged("node_kill", evidence(lost=3, most=1), SAME)
    assert (costly.verdict, costly.why) == ("failed", "it has cost 3 steps, and may cost 1 at most")
    assert judged("node_kill", evidence(lost=3, most=3), SAME).verdict == "ok"
    assert judged("flipped_bit", evidence(lost=4, most=None), SAME).verdict == "ok"
    assert judged("straggler", evidence(lost=1, most=0), SAME).verdict == "failed"


def test_what_is_left_over_is_a_failure() -> None:
    assert judged("rank_sigkill", evidence(), SAME, "processes of the run were left: 7 python").verdict == "failed"


def test_verdict(tmp_path: Path) -> None:
    some = results()
    assert report.verdict(some[:3], tmp_path) is None
    assert isinstance(report.verdict([some[0], some[-1]], tmp_path), DrillIncomplete)
    failed = report.verdict(some, tmp_path)
    assert isinstance(failed, DrillFailed)
    assert "partition, gil_hold, two_nodes" in str(failed)


def test_document_is_strict_json() -> None:
    spoiled = judged("no_spare_left", evidence(smaller=True), Comparison(worst=math.inf, weights=math.inf))
    some = [*results(), spoiled]
    found = report.document(some, folder="/runs/drill-1", plan="TP2 x PP2", changes=(), seed=7)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["summary"] == {"ok": 3, "failed": 4, "skipped": 1}
    assert again["faults"][-1]["comparison"]["weights"] is None
    assert again["faults"][0]["comparison"]["identical"] is True
