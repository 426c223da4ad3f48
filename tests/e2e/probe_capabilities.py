"""Trains two steps per combination of a plan through the engine and writes down what happened.

``make capabilities`` (``python -m tests.e2e.probe_capabilities --write``) rewrites ``strategies/capability_table.py``;
do it for a new DeepSpeed. Half an hour on two free cores: small gangs of at most 8 ranks, forked from warm processes.
What has been seen is kept in a state file, so a probe that was stopped goes on where it was; another DeepSpeed or torch
starts anew. Refused combinations are tried, too: the reason in the table is DeepSpeed's own. What our engine does not
build has our reason, behind ``phalanx:``.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from jobs.disks import BUILD, is_compiled
from strategies import capabilities, capability_table
from strategies.capabilities import AXES, Key, Outcome
from strategies.codec import from_json, to_json
from strategies.plan import GradDtype, ParallelPlan, Recompute, Schedule
from strategies.rules import check
from strategies.specs import BatchSpec, ModelSpec, MoeSpec, Precision
from tests.support.gang import GangFailed, WarmPool
from tests.support.jobspecs import make_job, make_plan

GPT = ModelSpec(
    name="probe", flavour="gpt3", layers=4, hidden=32, heads=4, kv_heads=4, ffn=64, vocab=64, seq=16, tied=True
)
LLAMA = ModelSpec(
    name="probe", flavour="llama", layers=4, hidden=32, heads=8, kv_heads=4, ffn=64, vocab=64, seq=16, tied=False
)
# Only what is 1 MB or more per rank leaves memory; here that are the two large matrices of a block, and all state.
WIDE = replace(GPT, layers=1, hidden=256, ffn=8192)
EXPERTS = MoeSpec(experts=4, top_k=2, ffn=64)
BATCH = 8  # sequences per step: two stages of DualPipeV need 4 micro-batches of each replica
STEPS = 2
MOST_RANKS = 8
STATE = Path(".capabilities.jsonl")

PRECISIONS: tuple[tuple[Precision, GradDtype], ...] = (
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("bf16", "fp32"),
    ("fp16", "fp16"),
    ("fp16", "fp32"),
)
OFFLOADS: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("optimizer",),
    2: ("optimizer",),
    3: ("optimizer", "optimizer+params", "optimizer@nvme", "optimizer+params@nvme"),
}
"""By ZeRO stage; DeepSpeed's other stages have no such switch (NVMe) or ignore it (parameters)."""

DISKS = "@nvme"

DEEPSPEED_SAYS = frozenset({"zero_with_pipeline", "mixed_precision_needs_zero"})
"""Rules that tell what DeepSpeed refuses: it is asked all the same, and has the word."""

_ERROR = re.compile(r"\b(\w*(?:Error|Exception)): (.+)$")


def combinations() -> Iterator[Key]:
    """Every row of the table: states without recomputation, then activations in fp32."""
    for key in _degrees():
        for zero, (precision, grad) in product(OFFLOADS, PRECISIONS):
            plain = key._replace(zero_stage=zero, precision=precision, grad_dtype=grad)
            yield plain
            if grad == "fp32" and not _hopeless(plain):
                yield from (plain._replace(offload=offload) for offload in OFFLOADS[zero])
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    for key in _degrees():
        for zero, recompute, split in product((0, 1, 2, 3), recomputes, (False, True)):
            found = key._replace(zero_stage=zero, recompute=recompute, sequence_parallel=split)
            if found != found.rows[0] and not _hopeless(found) and not (split and not key.tp):
                yield found


def _hopeless(key: Key) -> bool:
    """A pipeline has no ZeRO-2 and 3: their plain rows say so, and no recomputation or offload mends it."""
    return key.pp and key.zero_stage >= 2


def _degrees() -> Iterator[Key]:
    """What fits on 8 ranks with two replicas, which experts are spread over."""
    plain: dict[str, Any] = {"zero_stage": 0, "precision": "fp32", "grad_dtype": "fp32", "recompute": "none"}
    schedules: dict[bool, tuple[Schedule, ...]] = {False: ("1f1b",), True: ("1f1b", "dualpipev")}
    for degrees in product((False, True), repeat=len(AXES)):
        axes: dict[str, Any] = dict(zip(AXES, degrees, strict=True))
        key = Key(**axes, **plain)
        if 2 ** (1 + sum(degrees) - key.ep) <= MOST_RANKS:
            yield from (key._replace(schedule=schedule) for schedule in schedules[key.pp])


def model_of(key: Key) -> ModelSpec:
    """States are probed with the GPT-3 flavour, activations with Llama's."""
    plain = WIDE if DISKS in key.offload else GPT
    model = plain if key == key.rows[0] else LLAMA
    return replace(model, moe=EXPERTS) if key.ep else model


def plan_of(key: Key, disks: str = "/nowhere") -> ParallelPlan:
    """The smallest plan of a combination."""
    offload, _, place = key.offload.partition("@")
    return make_plan(
        model_of(key),
        BATCH,
        dp=2,
        **{axis: 1 + getattr(key, axis) for axis in AXES},
        zero_stage=key.zero_stage,
        grad_dtype=key.grad_dtype,
        recompute=key.recompute,
        sequence_parallel=key.sequence_parallel,
        schedule=key.schedule,
        offload=offload,
        offload_path=disks if place else "",
    )


def unbuilt(key: Key) -> str:
    """Why our engine does not try such a combination; empty if it does."""
    plan, model = plan_of(key), model_of(key)
    ours = capabilities.unbuilt(plan, key.precision, model)
    if ours is not None:
        return ours[0]
    batch = BatchSpec(global_batch=BATCH, seq=model.seq)
    broken = check(model=model, plan=plan, batch=batch, cluster=None, precision=key.precision, modelled=True)
    return next((one.message for one in broken if one.rule not in DEEPSPEED_SAYS), "")


def probe(pool: WarmPool, key: Key) -> Outcome:
    """Train one combination."""
    reason = unbuilt(key)
    if reason:
        return Outcome(runs=False, reason=f"phalanx: {_clean(reason)}")
    with tempfile.TemporaryDirectory() as disks:
        plan = plan_of(key, disks)
        job = make_job(model_of(key), plan, global_batch=BATCH, precision=key.precision, steps=STEPS)
        arguments: dict[str, Any] = {"job": to_json(job), "steps": STEPS}
        try:
            ranks = pool.run(
                "tests.support.ranks:train", world_size=plan.world_size, arguments=arguments, timeout_s=180
            )
        except GangFailed as failure:
            return Outcome(runs=False, reason=_reason(str(failure)))
    losses = [float.fromhex(loss) for loss in ranks[0]["loss"]]
    if not all(0 < loss < 20 for loss in losses):
        return Outcome(runs=False, reason=f"losses {losses}")
    return Outcome(runs=True, engine=ranks[0]["engine"], optimizer=ranks[0]["optimizer"])


def _reason(output: str) -> str:
    """The first error of the lowest rank, in DeepSpeed's words."""
    errors = [match for line in output.splitlines() if (match := _ERROR.search(line))]
    return _clean(errors[0].group(2) if errors else output.splitlines()[0])


def _clean(reason: str) -> str:
    return reason.replace("|", "/").strip()[:160]


def probe_all(
    keys: Sequence[Key], seen: Callable[[Key, Outcome], None], *, jobs: int, limit_s: float = float("inf")
) -> None:
    """Probe with ``jobs`` gangs at a time; ``seen`` is told of each, one after the other; ends after ``limit_s``."""
    waiting: queue.SimpleQueue[Key] = queue.SimpleQueue()
    for key in keys:
        waiting.put(key)
    lock, deadline = threading.Lock(), time.monotonic() + limit_s
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with WarmPool() as pool:
                while time.monotonic() < deadline and not failed:
                    key = waiting.get_nowait()
                    found = probe(pool, key)
                    with lock:
                        seen(key, found)
        except queue.Empty:
            return
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


class State:
    """What has been seen so far, on disk: one line of versions, then one line per combination."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: dict[Key, Outcome] = {}
        versions = {name: version(name) for name in ("deepspeed", "torch")}
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines or json.loads(lines[0]) != versions:
            path.write_text(json.dumps(versions) + "\n")
            return
        for line in lines[1:]:
            row = json.loads(line)
            self.table[Key(**row["key"])] = from_json(Outcome, row["outcome"])

    def add(self, key: Key, found: Outcome) -> None:
        """Keep one."""
        self.table[key] = found
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key._asdict(), "outcome": to_json(found)}) + "\n")


def write(table: Mapping[Key, Outcome]) -> None:
    """Replace the table in the source."""
    path = Path(capability_table.__file__)
    before, _, _ = path.read_text().partition('TABLE = """')
    path.write_text(f'{before}TABLE = """\n{capabilities.format_table(table)}"""  # noqa: E501\n')


def choose(arguments: argparse.Namespace, seen: Mapping[Key, Outcome], wanted: Sequence[Key]) -> list[Key]:
    """What to try now, the plain ones first."""
    part, _, parts = arguments.share.partition("/")
    left = [key for key in wanted if re.search(arguments.only, name_of(key))] if arguments.only else wanted
    left = [key for key in left if arguments.only or key not in seen]
    if not is_compiled():
        print(f"state on disks is left out: {BUILD} first", file=sys.stderr)
        left = [key for key in left if DISKS not in key.offload or unbuilt(key)]
    plain_first = sorted(left, key=lambda key: key.ep + key.sp + key.cp + key.sequence_parallel)
    return plain_first[int(part) - 1 :: int(parts)]


def name_of(key: Key) -> str:
    """A combination as the table has it: ZeRO stage, precision, gradients, offload, schedule | recompute | degrees."""
    line = capabilities.format_table({key: Outcome(runs=False)})
    return line.rpartition("|")[0].strip()


def main() -> int:
    """Probe everything; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite strategies/capability_table.py")
    parser.add_argument("--state", type=Path, default=STATE, help="where what has been seen is kept")
    parser.add_argument("--jobs", type=int, default=2, help="gangs at a time")
    parser.add_argument("--partly", action="store_true", help="write what has been seen, also if combinations are left")
    parser.add_argument("--only", default="", help="regular expression: try again rows like it, keep the others")
    parser.add_argument("--share", default="1/1", help="K/N: only every N-th combination, from the K-th on")
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="stop after so many seconds, to go on later"
    )
    arguments = parser.parse_args()
    state, wanted, begin = State(arguments.state), list(combinations()), time.monotonic()
    left = choose(arguments, state.table, wanted)
    done = 0

    def seen(key: Key, found: Outcome) -> None:
        nonlocal done
        state.add(key, found)
        done += 1
        rest_s = (time.monotonic() - begin) / done * (len(left) - done)
        words = f"{found.engine} {found.optimizer}" if found.runs else found.reason
        print(f"{done}/{len(left)}, {rest_s:.0f} s left: {name_of(key)}: {words}", file=sys.stderr, flush=True)

    probe_all(left, seen, jobs=arguments.jobs, limit_s=arguments.limit_s)
    known = capabilities.parse_table(capability_table.TABLE) if arguments.only else state.table
    return finish(arguments, known | {key: state.table[key] for key in left if key in state.table}, wanted)


def finish(arguments: argparse.Namespace, seen: Mapping[Key, Outcome], wanted: Sequence[Key]) -> int:
    """Write or print the table; returns the exit code, 1 when combinations are left."""
    table = {key: seen[key] for key in wanted if key in seen}
    if len(table) < len(wanted) and not arguments.only:
        print(f"{len(wanted) - len(table)} of {len(wanted)} combinations are left: run this again", file=sys.stderr)
        if not arguments.partly:
            return 1
    if arguments.write:
        write(table)
    else:
        print(capabilities.format_table(table), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
