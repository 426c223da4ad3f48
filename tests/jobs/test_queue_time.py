"""How long a rank was ready to run and had no core: a real one, on one core with another that computes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from jobs.own_time import OwnTime
from jobs.queue_time import QueueTime

CROWDED = """
import os, subprocess, sys, time
from jobs.own_time import OwnTime
from jobs.queue_time import QueueTime
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]

def spin(used_s):
    began = time.thread_time()
    while time.thread_time() - began < used_s:
        pass

try:
    clock, counter = OwnTime(), QueueTime()
    before = counter.seconds()
    clock.begin()
    spin(0.15)
    clock.wait(lambda: spin(0.15))
    own_s, _ = clock.end()
    print(own_s, clock.queued_s, counter.seconds() - before)
    clock.begin()
    time.sleep(0.2)
    own_s, _ = clock.end()
    print(own_s, clock.queued_s, 0)
finally:
    for other in others:
        other.kill()
"""


def test_waiting_for_a_core_is_told_apart_from_computing_and_from_sleeping() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", CROWDED], env=environment, capture_output=True, text=True, check=True)
    first, second = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    own_s, queued_s, all_s = first
    assert own_s / 3 < queued_s < own_s, "two others wanted the same core"
    assert queued_s < 0.75 * all_s, "not what it queued for while it waited for other ranks"
    assert second[1] < second[0] / 2, "who sleeps does not wait for a core: a rank that is slow by itself stays so"


def test_a_kernel_that_does_not_count_leaves_it_at_nothing(tmp_path: Path) -> None:
    assert QueueTime(str(tmp_path / "nothing")).seconds() == 0.0
    (tmp_path / "odd").write_text("no numbers")
    assert QueueTime(str(tmp_path / "odd")).seconds() == 0.0


def test_on_a_device_nothing_is_counted() -> None:
    class Event:
        def record(self) -> None:
            self.at = time.perf_counter()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            return None

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1000

    clock = OwnTime(Event)
    clock.begin()
    clock.wait(lambda: time.sleep(0.01))
    clock.end()
    assert clock.queued_s == 0.0


def test_a_counter_that_is_gone_holds_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        QueueTime().seconds()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
