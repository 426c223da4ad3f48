"""The table of what runs: its format, what it says of the promised combinations, and whether it is still true."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from jobs import disks
from strategies.capabilities import AXES, Key, Outcome, format_table, key_of, look_up, outcome, parse_table, runnable
from strategies.capability_table import TABLE
from strategies.plan import Recompute, Schedule
from strategies.rules import check
from strategies.specs import BatchSpec
from tests.e2e import probe_capabilities
from tests.e2e.probe_capabilities import (
    BATCH,
    DISKS,
    MOST_RANKS,
    Machine,
    combinations,
    model_of,
    parsed,
    plan_of,
    unbuilt,
)
from tests.strategies.support import TINY, plan
from tests.support import direct_io
from tests.support.capability_files import State, TableFile, versions

WITH_ALL = Machine()
WITHOUT_OP = Machine(no_disks="async_io cannot be compiled: no libaio")
SEEN = Outcome(runs=True, engine="E", optimizer="O")


def test_the_table_is_what_the_writer_writes() -> None:
    assert format_table(parse_table(TABLE)) == TABLE.lstrip("\n")


def test_the_format_keeps_everything() -> None:
    recomputes: tuple[Recompute, ...] = ("none", "full")
    others: tuple[tuple[Schedule, str], ...] = (("1f1b", "none"), ("dualpipev", "optimizer@nvme"))
    keys = [
        Key(
            **degrees,
            zero_stage=1,
            precision="fp32",
            grad_dtype="fp32",
            recompute=recompute,
            sequence_parallel=split,
            schedule=schedule,
            offload=offload,
        )
        for degrees in (dict(zip(AXES, values, strict=True)) for values in product((False, True), repeat=len(AXES)))
        for recompute, split in product(recomputes, (False, True))
        for schedule, offload in others
    ]
    kinds = SEEN, Outcome(runs=False, reason="a reason: so"), Outcome(runs=False, reason="no op", tried=False)
    table = {key: kinds[i % 3] for i, key in enumerate(keys)}
    assert parse_table(format_table(table)) == table


def test_everything_that_the_issue_asks_for_runs() -> None:
    for tp, dp, recompute in product((1, 2), (1, 2), ("none", "selective", "full")):
        for pp, zero_stage in [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]:
            for precision in ("fp32", "bf16"):
                the_plan = plan(precision=precision, tp=tp, pp=pp, dp=dp, zero_stage=zero_stage, recompute=recompute)
                assert runnable(the_plan, precision, TINY) is None, the_plan
                found = outcome(the_plan, precision)
                assert found is not None
                assert found.engine == ("PipelineEngine" if pp > 1 else "DeepSpeedEngine")


def test_rules_and_table_agree_on_every_probed_combination() -> None:
    """What the rules allow has run; what DeepSpeed refused, a rule refuses first."""
    for key, found in parse_table(TABLE).items():
        the_plan, model = plan_of(key), model_of(key)
        assert key_of(the_plan, key.precision) == key
        batch = BatchSpec(global_batch=BATCH, seq=model.seq)
        broken = check(model=model, plan=the_plan, batch=batch, cluster=None, precision=key.precision, modelled=True)
        verdict = runnable(the_plan, key.precision, model)
        if found.reason.startswith("phalanx: "):
            assert unbuilt(key), key
        elif found.tried:
            refused = broken or (verdict is not None and verdict.rule == "combination_runs")
            assert (not refused) == found.runs, (key, broken, verdict)


def test_dualpipev_runs_with_every_state_that_1f1b_runs_with() -> None:
    """The search takes it for granted."""
    table = parse_table(TABLE)
    for key in (key for key in table if key.schedule == "dualpipev"):
        assert table[key].runs == table[key._replace(schedule="1f1b")].runs, key


def test_every_combination_has_been_tried() -> None:
    """Else ``make capabilities``: until then, what has not been tried does not run. Some machines cannot try some."""
    keys = list(combinations())
    assert len(keys) == len(set(keys))
    assert all(set(key.rows) <= set(keys) for key in keys)
    table = parse_table(TABLE)
    assert set(table) == set(keys)
    assert all(DISKS in key.offload or key.precision == "fp16" for key, found in table.items() if not found.tried)


def test_no_combination_is_left_out() -> None:
    """All degrees under each schedule that they have, with all ZeRO stages, precisions and offloads that there are."""
    precisions = {("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")}
    memory, disks = {"optimizer", "optimizer+params"}, {"optimizer@nvme", "optimizer+params@nvme"}
    offloads = {0: set[str](), 1: {"optimizer"}, 2: {"optimizer"}, 3: memory | disks}
    plain, moved = set(), set()
    for tp, pp, ep, sp, cp in product((False, True), repeat=5):
        for schedule, zero, (precision, grads) in product(("1f1b", "dualpipev")[: 1 + pp], range(4), precisions):
            state = (tp, pp, ep, sp, cp, schedule, zero, precision, grads)
            plain.add((*state, "none"))
            if grads == "fp32" and not (pp and zero >= 2):  # a pipeline has neither ZeRO-2 nor 3, offloaded or not
                moved |= {(*state, offload) for offload in offloads[zero]}
    assert len(plain) == (16 + 2 * 16) * 4 * 5
    names = ("tp", "pp", "ep", "sp", "cp", "schedule", "zero_stage", "precision", "grad_dtype", "offload")
    rows = (key for key in parse_table(TABLE) if key.recompute == "none" and not key.sequence_parallel)
    found = [tuple(getattr(key, name) for name in names) for key in rows]
    assert len(found) == len(set(found))
    assert set(found) == plain | moved


def test_all_degrees_are_among_them() -> None:
    """None is taken for another: with eight ranks, those that share a sequence are the replicas."""
    found = {tuple(getattr(key, axis) for axis in AXES): plan_of(key) for key in combinations()}
    assert set(found) == set(product((False, True), repeat=len(AXES)))
    assert all(one.world_size <= MOST_RANKS for one in found.values() if one.cp == 1)
    folded = found[True, True, True, True, False]
    assert (folded.dp, folded.sp, folded.ep) == (1, 2, 2)
    assert all(one.dp == 2 for degrees, one in found.items() if not degrees[4] and sum(degrees) - degrees[2] < 3)


def test_only_what_phalanx_does_not_build_has_its_reason() -> None:
    """ZeRO-3 with experts is DeepSpeed's to refuse."""
    for key, found in parse_table(TABLE).items():
        ours = key.cp or (key.ep and not key.pp and key.zero_stage == 0 and key.grad_dtype != "fp32")
        assert found.reason.startswith("phalanx: ") == ours, key
        if key.ep and key.zero_stage == 3 and not key.pp and not key.cp:
            assert found.reason.startswith("Native DeepSpeed MoE is not supported with ZeRO Stage 3"), key


def engine_of(key: Key) -> str:
    """The class of DeepSpeed that its version at hand trains with."""
    return {"1f1b": "PipelineEngine", "dualpipev": "DualPipeVEngine"}[key.schedule] if key.pp else "DeepSpeedEngine"


def optimizer_of(key: Key) -> str:
    """Likewise: the readers of state know these."""
    if key.zero_stage == 3:
        return "DeepSpeedZeroOptimizer_Stage3"
    if key.zero_stage > 0:
        bf16 = (key.zero_stage, key.precision, key.grad_dtype, key.offload) == (1, "bf16", "fp32", "none")
        return "BF16_Optimizer" if bf16 else "DeepSpeedZeroOptimizer"
    if key.precision == "fp32":
        return "AdamW"
    return "BF16_Optimizer" if key.precision == "bf16" and key.pp else "FP16_UnfusedOptimizer"


def test_each_row_names_its_engine_and_optimizer() -> None:
    for key, found in parse_table(TABLE).items():
        if found.runs:
            assert (found.engine, found.optimizer) == (engine_of(key), optimizer_of(key)), key


def test_what_is_inferred_says_so_and_is_right_where_it_was_tried() -> None:
    table = parse_table(TABLE)
    both = {key: found for key, found in table.items() if key not in key.rows}
    assert {key.degrees for key in both} == {".....", "T....", ".P..."}
    assert {key.offload for key in both} == {key.offload for key in table}
    for key, tried in both.items():
        inferred = look_up({row: table[row] for row in key.rows}, key)
        assert inferred is not None
        assert inferred.runs == tried.runs, key
        assert inferred.inferred_from[-1:] == (key.rows[1 if inferred.runs else -2].name,)
        assert look_up(table, key) == tried


def test_what_has_no_row_does_not_run_and_another_row_is_named() -> None:
    plain = plan(precision="bf16", tp=2, dp=2, zero_stage=1, recompute="full")
    found = outcome(plain, "bf16")
    assert found is not None
    assert found.inferred_from == ("1 bf16 fp32 none 1f1b | none | T....", "1 fp32 fp32 none 1f1b | full | T....")
    alone = outcome(replace(plain, recompute="none"), "bf16")
    assert alone is not None
    assert alone.inferred_from == ()
    never = replace(plain, grad_dtype="bf16", offload="optimizer")
    assert outcome(never, "bf16") is None
    violation = runnable(never, "bf16", TINY)
    assert violation is not None
    assert violation.message.endswith("does not run: it has never been tried")
    piped = plan(precision="bf16", tp=2, pp=2, zero_stage=2, recompute="selective")
    violation = runnable(piped, "bf16", TINY)
    assert violation is not None
    assert violation.message.endswith("parallelism (as in '2 bf16 fp32 none 1f1b | none | TP...')")


def test_the_probe_goes_on_where_it_was_and_starts_anew_for_another_deepspeed(tmp_path: Path) -> None:
    path, key = tmp_path / "state.jsonl", next(combinations())
    State(path).add(key, SEEN)
    assert State(path).table == {key: SEEN}
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first.replace('"deepspeed": "', '"deepspeed": "9'), *rest]) + "\n")
    assert State(path).table == {}


def test_some_rows_can_be_tried_again() -> None:
    wanted = list(combinations())
    state = dict.fromkeys(wanted, SEEN)
    assert probe_capabilities.choose(parsed([]), state, wanted, WITH_ALL) == []
    asked = parsed(["--only", r"optimizer@nvme 1f1b \| none \| T\.{4}"])
    found = probe_capabilities.choose(asked, state, wanted, WITH_ALL)
    assert {(key.tp, key.sp, key.zero_stage, key.offload) for key in found} == {(True, False, 3, "optimizer@nvme")}
    assert {key.precision for key in found} == {"fp32", "bf16", "fp16"}
    without_fp16 = probe_capabilities.choose(asked, state, wanted, Machine(no_fp16="no fp16"))
    assert {key.precision for key in without_fp16} == {"fp32", "bf16"}
    assert probe_capabilities.choose(asked, state, wanted, WITHOUT_OP) == []


class Command:
    """``make capabilities`` without ranks, on a machine that cannot compile the op.

    Attributes:
        compiled: The machine has the op all the same.
        fp16: It computes in fp16.
        tried: What the last one has tried.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.table = folder / "table.py"
        self.state = folder / "state.jsonl"
        self.compiled, self.fp16 = False, True
        self.tried: list[Key] = []
        patch.setattr(probe_capabilities, "is_compiled", lambda: self.compiled)
        patch.setattr(probe_capabilities, "computes_fp16", lambda: self.fp16)
        patch.setattr(probe_capabilities, "no_direct_io", lambda folder: "")
        patch.setattr(probe_capabilities, "no_locked_memory", lambda size: "")
        patch.setattr(probe_capabilities, "probe", self._probe)
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setenv("CC", "false")

    def _probe(self, _: object, key: Key) -> Outcome:
        self.tried.append(key)
        return Outcome(runs=False, reason="phalanx: not built") if unbuilt(key) else SEEN

    def __call__(self, *words: str) -> int:
        """Run it; returns the exit code."""
        self.tried.clear()
        return probe_capabilities.main(
            ["--write", "--table", str(self.table), "--state", str(self.state), "--jobs", "1", *words]
        )


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(tmp_path, monkeypatch)


def on_disks(key: Key) -> bool:
    return DISKS in key.offload and not unbuilt(key)


def test_one_command_writes_the_table_without_the_op(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """It tries to compile it, for real; here that cannot be. The rows say that they were not tried."""
    wanted = set(combinations())
    assert command() == 0
    assert set(command.tried) == {key for key in wanted if not on_disks(key)}
    file = TableFile(command.table)
    assert file.made_with == versions()
    assert set(file.rows) == wanted
    reason = "async_io cannot be compiled: a program that calls io_submit, of libaio, could not be compiled and linked"
    for key, found in file.rows.items():
        assert (found == Outcome(runs=False, reason=reason, tried=False)) == on_disks(key), key
    number = sum(map(on_disks, wanted))
    said = capsys.readouterr().err
    assert f"{number} combinations cannot be tried here ({reason})" in said
    assert f"0 stay as the former table of this DeepSpeed has them, {number} are untried" in said
    assert "apt-get install g++ libaio-dev" in said


def test_with_the_op_the_rows_are_tried_and_stay_for_this_deepspeed_alone(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.compiled = True
    assert command() == 0
    assert set(command.tried) == set(combinations())
    whole = command.table.read_text()
    assert all(found.tried for found in TableFile(command.table).rows.values())
    command.compiled = False
    monkeypatch.setattr(probe_capabilities, "compile_op", lambda: "no op")
    command.state.unlink()
    assert command() == 0
    assert command.table.read_text() == whole, "rows that cannot be tried here are kept"
    command.state.unlink()
    command.table.write_text(whole.replace('"deepspeed": "', '"deepspeed": "9'))
    assert command() == 0
    assert {key for key, found in TableFile(command.table).rows.items() if not found.tried} == set(
        filter(on_disks, combinations())
    )


def test_what_was_stopped_writes_nothing_and_rows_of_two_versions_do_not_mix(command: Command) -> None:
    command.compiled = True
    assert command("--limit-s", "0") == 1
    assert not command.table.exists()
    assert command() == 0
    whole = command.table.read_text()
    assert command() == 0
    assert command.tried == [], "it goes on where it was"
    assert command.table.read_text() == whole
    assert command("--only", r"^1 fp32 .*\| none \| T\.{4}") == 0
    assert 0 < len(command.tried) < 10
    assert command.table.read_text() == whole
    other = whole.replace('"deepspeed": "', '"deepspeed": "9')
    command.table.write_text(other)
    assert command("--only", r"^1 fp32 .*\| none \| T\.{4}") == 1
    assert command.table.read_text() == other


@pytest.mark.parametrize("lack", ["no_direct_io", "no_locked_memory", "fp16"])
def test_what_the_machine_lacks_is_no_refusal(command: Command, monkeypatch: pytest.MonkeyPatch, lack: str) -> None:
    command.compiled = True
    if lack == "fp16":
        command.fp16 = False
        reason = "this CPU does not compute in fp16"
    else:
        reason = "it cannot be here"
        monkeypatch.setattr(probe_capabilities, lack, lambda _: reason)
    assert command() == 0
    untried = {key: found for key, found in TableFile(command.table).rows.items() if not found.tried}
    assert {found.reason for found in untried.values()} == {reason}
    wanted = {key for key in combinations() if not unbuilt(key)}
    assert set(untried) == {key for key in wanted if (key.precision == "fp16" if lack == "fp16" else on_disks(key))}
    assert not set(untried) & set(command.tried)


def test_ctrl_c_ends_the_probe_once_the_rows_under_way_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = list(parse_table(TABLE))[:200]
    seen: list[Key] = []
    first: list[int] = []  # the gang that began first: its row is under way when the other has done three

    def see(key: Key, found: Outcome) -> None:
        seen.append(key)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # to the process: it interrupts the wait of the main thread

    def probe(pool: None, key: Key) -> Outcome:
        first.append(threading.get_ident())
        time.sleep(0.3 if threading.get_ident() == first[0] else 0.02)
        return Outcome(runs=True)

    monkeypatch.setattr(probe_capabilities, "WarmPool", contextlib.nullcontext)
    monkeypatch.setattr(probe_capabilities, "probe", probe)
    with pytest.raises(KeyboardInterrupt):
        probe_capabilities.probe_all(keys, see, jobs=2)
    done = len(seen)
    time.sleep(0.5)
    assert 4 <= len(seen) == done, "what was under way was waited for, and nobody goes on"


def test_whether_a_user_may_lock_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disks, "_may_lock_all", lambda: False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    assert direct_io.no_locked_memory(4 << 20) == ""
    assert "bytes of locked memory per rank" in direct_io.no_locked_memory(64 << 20)
    with pytest.raises(pytest.skip.Exception):
        direct_io.require_state_on_disks(tmp_path)
    assert list(tmp_path.iterdir()) == []
