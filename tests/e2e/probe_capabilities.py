"""Trains two steps per combination of a plan through the engine and writes down what happened.

``make capabilities`` (``python -m tests.e2e.probe_capabilities --write``) rewrites ``strategies/capability_table.py``;
do it for a new DeepSpeed. Some 40 minutes on two cores: small gangs of at most 8 ranks, forked from warm processes.
What has been seen is kept in a state file, so a probe that was stopped goes on where it was; another DeepSpeed or torch
starts anew. Refused combinations are tried, too: the reason in the table is DeepSpeed's own. What our engine does not
build has our reason, behind ``phalanx:``. What this machine cannot try (state on disks, where DeepSpeed's op for it is
not compiled and cannot be; fp16) stays as it was, if the former table is of the same DeepSpeed, else ``untried``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from jobs.disks import is_compiled
from strategies import capabilities, capability_table
from strategies.capabilities import AXES, Key, Outcome
from strategies.codec import to_json
from strategies.plan import GradDtype, ParallelPlan, Recompute, Schedule
from strategies.rules import check
from strategies.specs import BatchSpec, ModelSpec, MoeSpec, Precision
from tests.support.capability_files import State, TableFile
from tests.support.direct_io import no_direct_io, no_locked_memory
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
TABLE = Path(capability_table.__file__)

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
"""By ZeRO stage. DeepSpeed's others train, but take disks for host memory and leave parameters where they are, silently
(:mod:`tests.e2e.test_offload` asks them): a row would say that what was asked for runs."""

DISKS = "@nvme"

DEEPSPEED_SAYS = frozenset({"zero_with_pipeline", "mixed_precision_needs_zero"})
"""Rules that tell what DeepSpeed refuses: it is asked all the same, and has the word."""

_LOCKED_BYTES = 64 << 20  # what a rank of the widest model locks with state on disks, and some
_ERROR = re.compile(r"\b(\w*(?:Error|Exception)): (.+)$")


def combinations() -> Iterator[Key]:
    """Every row of the table: states without recomputation, then activations in fp32."""
    for key in _degrees():
        for zero, (precision, grad) in product(OFFLOADS, PRECISIONS):
            plain = key._replace(zero_stage=zero, precision=precision, grad_dtype=grad)
            yield plain
            if grad == "fp32" and not _hopeless(plain):
                yield from (plain._replace(offload=offload) for offload in OFFLOADS[zero])
    yield from _meetings()
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    for key in _degrees():
        for zero, recompute, split in product((0, 1, 2, 3), recomputes, (False, True)):
            found = key._replace(zero_stage=zero, recompute=recompute, sequence_parallel=split)
            if found != found.rows[0] and not _hopeless(found) and not (split and not key.tp):
                yield found


def _meetings() -> Iterator[Key]:
    """Every state with full recomputation, alone, with a split sequence, and in a pipeline: what else is inferred."""
    for key in _degrees():
        if key.degrees in (".....", "T....", ".P..."):
            for zero, (precision, grad) in product(OFFLOADS, PRECISIONS):
                offloads = ("none", *OFFLOADS[zero]) if grad == "fp32" else ("none",)
                for offload in offloads:
                    found = key._replace(zero_stage=zero, precision=precision, grad_dtype=grad, offload=offload)
                    found = found._replace(recompute="full", sequence_parallel=key.tp)
                    if len(found.rows) > 1 and found not in found.rows and not _hopeless(found):
                        yield found


def _hopeless(key: Key) -> bool:
    """A pipeline has no ZeRO-2 and 3: their plain rows say so, and no recomputation or offload mends it."""
    return key.pp and key.zero_stage >= 2


def _degrees() -> Iterator[Key]:
    """All degrees; :func:`plan_of` makes them fit on 8 ranks, but for some with cp, which have no ranks."""
    plain: dict[str, Any] = {"zero_stage": 0, "precision": "fp32", "grad_dtype": "fp32", "recompute": "none"}
    schedules: dict[bool, tuple[Schedule, ...]] = {False: ("1f1b",), True: ("1f1b", "dualpipev")}
    for degrees in product((False, True), repeat=len(AXES)):
        axes: dict[str, Any] = dict(zip(AXES, degrees, strict=True))
        key = Key(**axes, **plain)
        yield from (key._replace(schedule=schedule) for schedule in schedules[key.pp])


def model_of(key: Key) -> ModelSpec:
    """States are probed with the GPT-3 flavour, activations with Llama's."""
    plain = WIDE if DISKS in key.offload else GPT
    model = plain if key == key.rows[0] else LLAMA
    return replace(model, moe=EXPERTS) if key.ep else model


def plan_of(key: Key, disks: str = "/nowhere") -> ParallelPlan:
    """The smallest plan of a combination: experts are spread, and state is cut, over two replicas.

    Where those would be more than 8 ranks, over the two that share a sequence, which are replicas to DeepSpeed.
    """
    offload, _, place = key.offload.partition("@")
    others = 2 ** (key.tp + key.pp + key.sp + key.cp)
    return make_plan(
        model_of(key),
        BATCH,
        dp=2 if 2 * others <= MOST_RANKS else 1,
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
    """Probe with ``jobs`` gangs at a time; ``seen`` is told of each, one after the other; ends after ``limit_s``.

    Ctrl-C ends it once the rows under way are done.
    """
    waiting: queue.SimpleQueue[Key] = queue.SimpleQueue()
    for key in keys:
        waiting.put(key)
    lock, deadline, over = threading.Lock(), time.monotonic() + limit_s, threading.Event()

    def work() -> None:
        with WarmPool() as pool, contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline and not over.is_set():
                key = waiting.get_nowait()
                found = probe(pool, key)
                with lock:
                    seen(key, found)

    # Waits for futures, not in Thread.join: in Python 3.11 a join that Ctrl-C interrupts takes its thread for ended.
    with ThreadPoolExecutor(jobs) as gangs:
        lanes = []
        try:
            lanes += [gangs.submit(work) for _ in range(jobs)]
            wait(lanes, return_when=FIRST_EXCEPTION)
        finally:
            over.set()
            wait(lanes)
    for lane in lanes:
        lane.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What cannot be tried here.

    Attributes:
        no_disks: Why there can be no state on disks; empty if there can.
        no_fp16: Why there is no arithmetic in fp16; empty if there is.
    """

    no_disks: str = ""
    no_fp16: str = ""

    def lacks(self, key: Key) -> str:
        """Why a combination cannot be tried here; empty if it can, or takes no ranks."""
        reasons = self.no_disks if DISKS in key.offload else "", self.no_fp16 if key.precision == "fp16" else ""
        return next((reason for reason in reasons if reason and not unbuilt(key)), "")


def this_machine() -> Machine:
    """What can be tried here, with DeepSpeed's op for state on disks compiled if that is possible."""
    no_disks = compile_op() or no_direct_io(Path(tempfile.gettempdir())) or no_locked_memory(_LOCKED_BYTES)
    return Machine(no_disks=no_disks, no_fp16="" if computes_fp16() else "this CPU does not compute in fp16")


def computes_fp16() -> bool:
    """Whether what ranks compute on has arithmetic in fp16."""
    import torch

    cpu = os.environ.get("DS_ACCELERATOR", "cpu") == "cpu"
    return not cpu or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def compile_op() -> str:
    """Compile DeepSpeed's op for state on disks unless it is there; why that is not possible, empty if it is."""
    if is_compiled():
        return ""
    print("compiling DeepSpeed's op for state on disks, async_io: a few minutes", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "jobs.engine"], capture_output=True, text=True, check=False)
    print((done.stdout + done.stderr).strip(), file=sys.stderr, flush=True)
    if done.returncode == 0:
        return ""
    why = re.search(r"why: +(.+)", done.stderr)
    return _clean(f"async_io cannot be compiled: {why[1] if why else done.stderr.strip()[-80:]}")


def choose(
    arguments: argparse.Namespace, seen: Mapping[Key, Outcome], wanted: Sequence[Key], machine: Machine
) -> list[Key]:
    """What to try now, the plain ones first."""
    part, _, parts = arguments.share.partition("/")
    left = [key for key in wanted if re.search(arguments.only, key.name)] if arguments.only else wanted
    left = [key for key in left if (arguments.only or key not in seen) and not machine.lacks(key)]
    plain_first = sorted(left, key=lambda key: key.ep + key.sp + key.cp + key.sequence_parallel)
    return plain_first[int(part) - 1 :: int(parts)]


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--table", type=Path, default=TABLE, help="the module that has it")
    parser.add_argument("--state", type=Path, default=STATE, help="where what has been seen is kept")
    parser.add_argument("--jobs", type=int, default=2, help="gangs at a time")
    parser.add_argument("--partly", action="store_true", help="write what has been seen, also if combinations are left")
    parser.add_argument("--only", default="", help="regular expression: try again rows like it, keep the others")
    parser.add_argument("--share", default="1/1", help="K/N: only every N-th combination, from the K-th on")
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="stop after so many seconds, to go on later"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Probe everything; see the module's text."""
    arguments, machine = parsed(words), this_machine()
    state, wanted, begin = State(arguments.state), list(combinations()), time.monotonic()
    left = choose(arguments, state.table, wanted, machine)
    done = 0

    def seen(key: Key, found: Outcome) -> None:
        nonlocal done
        state.add(key, found)
        done += 1
        rest_s = (time.monotonic() - begin) / done * (len(left) - done)
        said = f"{found.engine} {found.optimizer}" if found.runs else found.reason
        print(f"{done}/{len(left)}, {rest_s:.0f} s left: {key.name}: {said}", file=sys.stderr, flush=True)

    probe_all(left, seen, jobs=arguments.jobs, limit_s=arguments.limit_s)
    known = TableFile(arguments.table).of_this_deepspeed() if arguments.only else state.table
    return finish(arguments, known | {key: state.table[key] for key in left if key in state.table}, wanted, machine)


def finish(arguments: argparse.Namespace, seen: Mapping[Key, Outcome], wanted: Sequence[Key], machine: Machine) -> int:
    """Write or print the table; returns the exit code, 1 when combinations are left that can be tried here."""
    file = TableFile(arguments.table)
    table = {key: seen[key] for key in wanted if key in seen}
    table |= _not_here([key for key in wanted if key not in table], file.of_this_deepspeed(), machine)
    if len(table) < len(wanted):
        print(f"{len(wanted) - len(table)} of {len(wanted)} combinations are left: run this again", file=sys.stderr)
        if not arguments.partly:
            return 1
    if arguments.write:
        file.write(table)
    else:
        print(capabilities.format_table(table), end="")
    return 0


def _not_here(left: Sequence[Key], former: Mapping[Key, Outcome], machine: Machine) -> dict[Key, Outcome]:
    """What this machine cannot try: what the former table of the same DeepSpeed has, else that it was not tried."""
    reasons = {key: reason for key in left if (reason := machine.lacks(key))}
    table = {
        key: former[key] if key in former and former[key].tried else Outcome(runs=False, reason=reason, tried=False)
        for key, reason in reasons.items()
    }
    for reason in dict.fromkeys(reasons.values()):
        rows = [table[key] for key, one in reasons.items() if one == reason]
        kept = sum(row.tried for row in rows)
        words = f"{kept} stay as the former table of this DeepSpeed has them, {len(rows) - kept} are untried"
        print(f"{len(rows)} combinations cannot be tried here ({reason}): {words}", file=sys.stderr)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
