"""What a gang goes back to, as the log tells it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.checkpoint.fence import Branch
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.memory import Generation
from launcher import lineage
from launcher.attempts import Attempt
from launcher.run import Run

ROOT = Path("/runs/demo/checkpoints")


def disk(step: int, attempt: int, epoch: int = 1, root: Path = ROOT) -> str:
    return str(Place(root, step, Token(epoch, attempt)).manifest)


def memory(step: int, attempt: int, epoch: int = 1) -> str:
    return str(Generation(step, Token(epoch, attempt)))


def run(*points: str, epochs: Sequence[int] = ()) -> Run:
    attempts = [
        Attempt(
            number=number,
            epoch=epochs[number - 1] if epochs else 1,
            plan={},
            nodes=("a",),
            started=0.0,
            first_step=1,
            resume_from=point,
        )
        for number, point in enumerate(points, 1)
    ]
    return Run(attempts=tuple(attempts))


def test_states_have_names() -> None:
    assert lineage.state_of("") is None
    assert lineage.state_of(memory(7, 2)) == Generation(7, Token(1, 2))
    assert lineage.state_of(disk(8, 3, 2)) == Generation(8, Token(2, 3))
    assert lineage.state_of("s3://bucket/demo/step-00000008/e0002-a0003.manifest.json") == Generation(8, Token(2, 3))
    assert lineage.state_of("/runs/demo/checkpoints/12") is None


def test_the_newest_attempt_goes_back_to_the_beginning() -> None:
    assert lineage.of(Run()) is None
    assert lineage.of(run("")) == Branch(epoch=1, attempt=1)
    begun = run("", disk(90, 1), memory(95, 2), disk(90, 1), epochs=(1, 1, 2, 2))
    assert lineage.of(begun) == Branch(epoch=2, attempt=4, history=((90, 1, 1),))
    begun = run("", disk(90, 1), memory(95, 2), memory(97, 3, 2), epochs=(1, 1, 2, 2))
    assert lineage.of(begun) == Branch(epoch=2, attempt=4, history=((97, 2, 3), (95, 1, 2), (90, 1, 1)))


def test_a_run_directory_that_was_moved_has_the_same_history() -> None:
    elsewhere = disk(90, 1, root=Path("/elsewhere/checkpoints"))
    assert lineage.of(run("", elsewhere)) == lineage.of(run("", disk(90, 1)))


def test_what_comes_next_tells_of_those_that_have_left_something() -> None:
    begun = run("", disk(90, 1), memory(95, 2))
    branch = lineage.following(begun, Token(2, 4), memory(97, 3), kept={Token(1, 1)}, passed=(), finishing=True)
    assert branch == Branch(epoch=2, attempt=4, history=((97, 1, 3), (90, 1, 1)), finishing=True)
    branch = lineage.following(begun, Token(2, 4), "", kept={Token(1, 1)}, passed=[disk(90, 1)], finishing=True)
    assert branch == Branch(epoch=2, attempt=4, passed=((90, 1, 1),)), "there is nobody whose work would be finished"


def test_of_what_was_passed_over_only_the_better_is_remembered() -> None:
    begun = run("", disk(5, 1))
    passed = [disk(10, 1), disk(4, 1), memory(6, 2)]
    branch = lineage.following(begun, Token(1, 3), disk(5, 1), kept={Token(1, 1)}, passed=passed, finishing=False)
    assert branch.passed == ((10, 1, 1), (6, 1, 2))
    branch = lineage.following(begun, Token(1, 3), disk(8, 2), kept={Token(1, 1)}, passed=passed, finishing=False)
    assert branch.passed == ()
