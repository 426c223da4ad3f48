"""When is a gang held up, and what is made of the answers: without any process. Who it is: ``test_culprit.py``."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.course import Lane, Progress
from launcher.exclusion import after_failure
from launcher.hang import Standing
from launcher.hang_watch import ASK_S, EARLY_MARGIN_S, TURN_S, HangWatch, StepClock
from launcher.host import stacks
from launcher.host.stacks import main_stack
from launcher.observation import Observation
from launcher.recovery import FailureKind
from launcher.request import RecoverySpec
from launcher.run import Run
from strategies.plan import ParallelPlan
from tests.support.persisters import eventually

PLAN = ParallelPlan(tp=2, pp=2, zero_stage=1, stages=(1, 1), micro_batch=1, grad_accum=2)
LOOP = ["worker.py:main", "pretrain.py:run", "pretrain.py:_step"]


def stack(*inner: str) -> str:
    """A stack, innermost frame first, below the training loop's frames: ``file:function`` words, outermost first."""
    frames = [*LOOP, *inner]
    return "\n".join(f'File "/x/{w.partition(":")[0]}", line 7 in {w.partition(":")[2]}' for w in reversed(frames))


def came(number: int, *, waits: bool) -> dict[str, Any]:
    """What a rank has entered that came so far in the collectives of all."""
    lane = Lane(kind="all", group="0", ranks=((0, 3, 1),), entered=number, left=number - waits)
    return Progress(lanes=(lane,), waits=((0, number),) if waits else ()).to_json()


WAITS, MISSING = came(9, waits=True), came(8, waits=False)
TRAINING = "engine.py:train_step"
ALL_REDUCE = stack(TRAINING, "linear.py:forward", "torch/distributed/distributed_c10d.py:all_reduce")
RECEIVE = stack(TRAINING, "deepspeed/runtime/pipe/p2p.py:recv", "torch/distributed/distributed_c10d.py:recv")
LOADING = stack("jobs/data/samples.py:sample")


READING = """
Thread 0x01 (most recent call first):
  File "/x/jobs/data/samples.py", line 1 in sample
  File "/x/jobs/data/ahead.py", line 9 in _serve
Current thread 0x02 (most recent call first):
  File "/x/jobs/data/ahead.py", line 7 in take
  File "/x/jobs/worker.py", line 3 in main
"""


def test_the_training_thread_is_found_among_others() -> None:
    text = """noise
Thread 0x01 (most recent call first):
  File "/x/threading.py", line 1 in wait
Current thread 0x02 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2 in recv
  File "/x/jobs/worker.py", line 3 in main

more noise"""
    frames = main_stack(text).splitlines()
    assert [line.rsplit(" ", 1)[1] for line in frames] == ["recv", "main"]
    assert main_stack("nothing") == ""


def test_who_waits_for_what_is_read_ahead_stands_where_the_reader_does() -> None:
    assert [line.rsplit(" ", 1)[1] for line in main_stack(READING).splitlines()] == ["sample", "_serve", "take", "main"]
    elsewhere = main_stack(READING.replace("in take", "in close")).splitlines()
    assert [line.rsplit(" ", 1)[1] for line in elsewhere] == ["close", "main"]
    assert Standing(step=1, stack=main_stack(READING)).frames[0] == ("/x/jobs/data/samples.py", "sample")


READER_IN_THE_KERNEL = """
import os, sys, threading, time
opens = [(os.POSIX_SPAWN_OPEN, 9, sys.argv[1], os.O_RDONLY, 0)]
threading.Timer(0.3, os.posix_spawn, ("/bin/true", ["true"], {}), {"file_actions": opens}).start()
time.sleep(60)
"""  # the kernel holds who spawns, until the new process has opened its files: here a pipe that nobody writes to


def test_a_rank_whose_reader_the_kernel_holds_is_held(tmp_path: Path) -> None:
    pipe, log = tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, "-c", READER_IN_THE_KERNEL, str(pipe)]) as rank:
        try:
            assert eventually(lambda: "D" in stacks.states_of_tasks(rank.pid))
            asked = stacks.Question(rank=0, pid=rank.pid, log=log, offset=0)
            for text, state in ((READING, "D"), (READING.replace("in take", "in close"), "S")):
                log.write_text(text)
                assert eventually(lambda state=state: stacks.answer(asked, log.read_text())["state"] == state)
        finally:
            os.close(os.open(pipe, os.O_WRONLY))
            rank.kill()


# --- when ---------------------------------------------------------------------------------------------------------


def train(clock: StepClock, now: float, seconds: float, step: int, *, then: str = "step", world: int = 2) -> float:
    for rank in range(world):
        clock.note(rank, step, then, now + seconds)
    return now + seconds


def test_patience_follows_the_steps_that_were_seen() -> None:
    clock, now = StepClock(2, 100.0), 100.0
    assert clock.limit_s(300) == 300
    for step in range(1, 101):
        now = train(clock, now, 2.0 if step == 50 else 1.0, step)
    assert clock.limit_s(300) == pytest.approx(3 * 1.0 + 5.0)
    assert clock.silent_s(now + 3) == pytest.approx(3)


def test_a_save_is_no_step() -> None:
    clock, now = StepClock(2, 0.0), 0.0
    for step in range(1, 21):
        now = train(clock, now, 1.0, step)
    now = train(clock, now, 1.0, 21, then="save")
    assert clock.busy == "save"
    now += 500.0
    for rank in range(2):
        clock.note(rank, 21, "step", now)
    assert clock.busy == ""
    now = train(clock, now, 1.0, 22)
    assert clock.limit_s(300) == pytest.approx(3 * 1.0 + 5.0)


def test_ten_thousand_quiet_steps_raise_no_alarm() -> None:
    draw = random.Random(0)
    clock, now = StepClock(1, 0.0), 0.0
    for step in range(1, 10_001):
        seconds = draw.lognormvariate(0.0, 0.15)
        assert seconds < clock.limit_s(300)
        now = train(clock, now, seconds, step, world=1)


# --- a batch that grows -------------------------------------------------------------------------------------------


class Gang:
    """Ranks whose steps take a fixed time and as long again for every micro-batch."""

    def __init__(self, watch: HangWatch, plan: ParallelPlan = PLAN, *, each_s: float) -> None:
        self.watch, self.plan, self.each_s = watch, plan, each_s
        self.now, self.step, self.attempt = 100.0, 0, 0

    def seconds(self, micro_batches: int) -> float:
        return 0.5 + self.each_s * (micro_batches + self.plan.pp - 1)

    def begin(self, micro_batches: int, *, told_s: float = 0.0) -> None:
        self.attempt += 1
        say(self.watch, "report", 0, self.now, kind="training", step=self.step + 1, micro_batches=micro_batches)
        self.watch.begin(self.plan, self.now, told_s=told_s)

    def train(self, sizes: Sequence[int], then: int) -> None:
        """Steps of so many micro-batches, the first is under way; nobody asks where anybody stands meanwhile."""
        for size, ahead in zip(sizes, [*sizes[1:], then], strict=True):
            asked = AskedGang()
            end = self.now + self.seconds(size)
            for moment in (self.now, (self.now + end) / 2, end):
                assert self.watch.look(asked, self.attempt, 4, now=moment, wall=moment) is None
            assert asked.asked == [], f"step {self.step + 1} of {size} micro-batches is not over yet"
            self.now, self.step = end, self.step + 1
            for rank in range(self.plan.world_size):
                say(self.watch, "report", rank, end, kind="step", step=self.step, next="step", micro_batches=ahead)

    def patience_s(self) -> float:
        """How long the step under way may take until it is asked after."""
        asked, waited = AskedGang(), 0.0
        while not asked.asked:
            waited += 0.1
            self.watch.look(asked, self.attempt, 4, now=self.now + waited, wall=0.0)
        return waited + ASK_S


RAMP = [size for size in (1, 2, 4, 8, 16, 32, 64) for _ in range(30)]


@pytest.mark.parametrize("each_s", [0.01, 0.6])
@pytest.mark.parametrize("jump", [4, 40, 400])
def test_a_larger_batch_is_no_hang(jump: int, each_s: float) -> None:
    gang = Gang(HangWatch(first_s=60, save_s=900), each_s=each_s)
    gang.begin(1)
    gang.train([1] * 20, then=jump)
    gang.train([jump] * 20, then=jump)
    assert gang.patience_s() == pytest.approx(3 * gang.seconds(jump) + 5.0, abs=0.2)


@pytest.mark.parametrize("sizes", [[1, 1, 50], [1, 3, 9, 27, 81, 243], list(range(1, 80))])
def test_sizes_that_last_for_a_step_or_two(sizes: list[int]) -> None:
    """Also among the first steps of all, and with steps that are longer than the patience of the start."""
    gang = Gang(HangWatch(first_s=60, save_s=900), each_s=1.0)
    gang.begin(sizes[0])
    gang.train(sizes, then=sizes[-1])
    gang.train([sizes[-1]] * 10, then=sizes[-1])


@pytest.mark.parametrize("at", range(0, len(RAMP), 23))
def test_no_restart_forgets_how_far_the_batch_has_grown(at: int) -> None:
    """Each attempt falls in its first step, so none of them could learn anew."""
    gang = Gang(HangWatch(first_s=60, save_s=900), each_s=1.0)
    gang.begin(RAMP[0])
    gang.train(RAMP[: at + 1], then=RAMP[at])
    for _ in range(3):
        gang.watch.end()
        gang.begin(RAMP[at])
        gang.train([RAMP[at]], then=64)
    gang.train([64] * 8, then=64)


def test_after_a_restart_a_hang_of_a_long_step_is_still_found() -> None:
    gang = Gang(HangWatch(first_s=300, save_s=900), each_s=1.0)
    gang.begin(1)
    gang.train(RAMP, then=64)
    gang.watch.end()
    gang.begin(64)
    assert gang.patience_s() <= 3 * gang.seconds(64) + EARLY_MARGIN_S + 0.2


def test_steps_of_a_smaller_plan_are_longer_than_the_patience_of_the_start() -> None:
    gang = Gang(HangWatch(first_s=60, save_s=900), each_s=1.0)
    gang.begin(20)
    gang.train([20] * 10, then=20)
    gang.watch.end()
    half = ParallelPlan(tp=1, pp=2, zero_stage=1, stages=(1, 1), micro_batch=1, grad_accum=2)
    smaller = Gang(gang.watch, half, each_s=2.0)
    smaller.begin(60)
    smaller.train([60] * 6, then=60)


def test_a_controller_that_knows_nothing_goes_by_what_is_on_record() -> None:
    gang = Gang(HangWatch(first_s=60, save_s=900), each_s=10.0)
    gang.begin(9, told_s=gang.seconds(9))
    gang.train([9] * 6, then=9)


def test_a_gang_that_is_taken_over_tells_its_size_only_with_its_next_step() -> None:
    gang = Gang(HangWatch(first_s=60, save_s=900), each_s=1.0)
    gang.watch.begin(gang.plan, gang.now)
    gang.attempt, gang.step = 1, 40
    gang.train([8, 8, 8, 8, 8, 8, 40, 40], then=40)


WRITE = stack("jobs/checkpoint/save.py:_write_part", "jobs/checkpoint/shardfile.py:write_shard")
AGREE = stack("jobs/checkpoint/save.py:persist", "jobs/checkpoint/gang.py:agree", "torch/distributed/c10d.py:gather")


class AskedGang:
    def __init__(self) -> None:
        self.asked: list[int] = []
        self.in_doubt = False

    def dump(self, attempt: int) -> None:
        self.asked.append(attempt)


def say(watch: HangWatch, seen: str, rank: int, now: float, **data: object) -> None:
    fields: Mapping[str, object] = {"rank": rank, "attempt": 1, **data}
    node = f"node-{rank // 2}"
    watch.note(Observation(kind=seen, node=node, time=now, data=dict(fields)), now)  # type: ignore[arg-type]


def quiet(watch: HangWatch, steps: int) -> float:
    watch.begin(PLAN, 0.0)
    for step in range(1, steps + 1):
        for rank in range(4):
            say(watch, "report", rank, float(step), kind="step", step=step, next="step")
    return float(steps)


def test_a_hang_is_asked_about_and_then_named() -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    now = quiet(watch, 10)
    limit = 3 * 1.0 + 5.0
    assert watch.look(gang, 1, 4, now=now + limit - ASK_S - 0.1, wall=5000.0) is None
    assert gang.asked == []
    asked = now + limit - ASK_S + 0.1
    assert watch.look(gang, 1, 4, now=asked, wall=5000.0) is None
    assert gang.asked == [1]
    for rank in (0, 1, 2):
        say(watch, "stack", rank, asked, state="S", stack=ALL_REDUCE, progress=WAITS)
    assert watch.look(gang, 1, 4, now=now + limit, wall=5000.0) is None
    say(watch, "stack", 3, asked, state="T", stack="")
    assert watch.look(gang, 1, 4, now=now + limit - TURN_S - 0.1, wall=5000.0) is None
    found = watch.look(gang, 1, 4, now=now + limit - 0.05, wall=5000.0)
    assert found is not None, "it is known when the time is over, and not before"
    assert (found.kind, found.rank, found.node, found.step) == (FailureKind.HANG, 3, "node-1", 11)
    assert "rank 3 on node-1 (pipe 1, data 0, model 1) is stopped by a signal" in found.detail
    assert found.time == pytest.approx(5000.0 - limit + 0.05)


def test_the_first_steps_of_a_later_attempt_are_judged_by_those_of_the_first() -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    limit = 3 * 1.0 + EARLY_MARGIN_S
    watch.begin(PLAN, 0.0)
    assert watch.look(gang, 1, 4, now=limit + 1, wall=0.0) is None
    assert gang.asked == [], "nothing is known yet"
    now = quiet(watch, 10)
    watch.end()
    watch.begin(PLAN, now)
    assert watch.look(gang, 2, 4, now=now + limit - ASK_S - 0.1, wall=0.0) is None
    assert gang.asked == []
    watch.look(gang, 2, 4, now=now + limit, wall=0.0)
    assert gang.asked == [2]
    watch.begin(ParallelPlan(tp=2, pp=1, stages=(2,), micro_batch=1, grad_accum=2), now)
    watch.look(gang, 3, 2, now=now + limit, wall=0.0)
    assert gang.asked == [2], "another plan has another pace"


def test_a_step_that_comes_after_all_ends_the_alarm() -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    now = quiet(watch, 10) + 20
    watch.look(gang, 1, 4, now=now, wall=0.0)
    say(watch, "report", 0, now, kind="step", step=11, next="step")
    assert watch.look(gang, 1, 4, now=now + 4, wall=0.0) is None
    assert gang.asked == [1]


def test_a_rank_that_never_answers_is_not_waited_for() -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    now = quiet(watch, 10) + 20
    watch.look(gang, 1, 4, now=now, wall=0.0)
    for rank in (0, 2, 3):
        say(watch, "stack", rank, now, state="S", stack=RECEIVE, progress=WAITS)
    found = watch.look(gang, 1, 4, now=now + 3.1, wall=0.0)
    assert found is not None
    assert (found.rank, found.node) == (1, "node-0")


def saving(watch: HangWatch) -> float:
    now = quiet(watch, 10) + 1.0
    for rank in range(4):
        say(watch, "report", rank, now, kind="step", step=11, next="save")
    return now


def answers(watch: HangWatch, now: float, odd: str) -> None:
    for rank in range(4):
        told = {"stack": odd, "progress": MISSING} if rank == 2 else {"stack": AGREE, "progress": WAITS}
        say(watch, "stack", rank, now, state="S", **told)


def test_slow_storage_has_a_patience_of_its_own() -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    start = now = saving(watch)
    while now - start < 900:
        now += 20
        assert watch.look(gang, 1, 4, now=now, wall=0.0) is None
        answers(watch, now, WRITE)
        found = watch.look(gang, 1, 4, now=now + 1, wall=0.0)
        assert (found is None) == (now + 1 - start <= 900)
    assert len(gang.asked) == 45
    assert found is not None
    assert found.rank == 2
    assert "while saving a checkpoint" in found.detail


def test_a_rank_that_does_not_come_to_the_save_hangs() -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    now = saving(watch) + 20
    watch.look(gang, 1, 4, now=now, wall=0.0)
    answers(watch, now, LOADING)
    found = watch.look(gang, 1, 4, now=now + 1, wall=0.0)
    assert found is not None
    assert found.rank == 2


def test_a_hang_without_a_culprit_is_held_against_no_node() -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    now = quiet(watch, 10) + 20
    watch.look(gang, 1, 4, now=now, wall=0.0)
    for rank in range(4):
        say(watch, "stack", rank, now, state="S", stack=ALL_REDUCE, progress=WAITS)
    found = watch.look(gang, 1, 4, now=now + 1, wall=5000.0)
    assert found is not None
    assert (found.kind, found.rank, found.node) == (FailureKind.HANG, -1, "")
    assert "a link or a device, not a process, is stuck" in found.detail
    run = SimpleNamespace(failures=[found] * 3, excluded={}, attempt=None)
    assert after_failure(cast(Run, run), RecoverySpec(exclude_after=1)) is None
    blamed = SimpleNamespace(failures=[replace(found, node="node-1")] * 3, excluded={}, attempt=None)
    assert after_failure(cast(Run, blamed), RecoverySpec(exclude_after=1)) is not None


@pytest.mark.parametrize("told", [None, {}, {"lanes": [[]]}, {**WAITS, "waits": [[7, 1]]}, "x"])
def test_what_makes_no_sense_is_not_known(told: object) -> None:
    watch, gang = HangWatch(first_s=300, save_s=900), AskedGang()
    now = quiet(watch, 10) + 20
    watch.look(gang, 1, 4, now=now, wall=0.0)
    for rank in range(4):
        say(watch, "stack", rank, now, state="S", stack=ALL_REDUCE, progress=told)
    found = watch.look(gang, 1, 4, now=now + 1, wall=0.0)
    assert found is not None
    assert found.rank == -1
    assert "it is not known what 4 of 4 ranks have entered" in found.detail
