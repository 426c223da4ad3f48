"""What is made of a device that fails: whose fault it is, what it is charged to, and where the ranks go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import recovery
from launcher.attempts import Fall
from launcher.exclusion import AGAINST_THE_NODE, after_failure
from launcher.recovery import BUDGET_OF, Action, Failure, FailureKind
from launcher.request import RecoverySpec
from launcher.run import EventKind, Run, RunState
from tests.support.stage import Stage

K = FailureKind
# What torch adds to every error of a device, also where nothing was asserted.
ADVICE = (
    "\nSearch for `{}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
TAKING = '  File "jobs/engine/process.py", line 44, in join\n    accelerator.set_device(env.local_rank)\n'
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}\nLast error:\n{}"


def cuda(text: str, name: str = "cudaErrorUnknown") -> str:
    return f"CUDA error: {text}{ADVICE.format(name)}"


TEXTS = [
    ("AcceleratorError", cuda("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"), K.DEVICE_FAULT),
    ("AcceleratorError", cuda("unspecified launch failure", "cudaErrorLaunchFailure"), K.DEVICE_FAULT),
    ("AcceleratorError", cuda("an illegal memory access was encountered"), K.DEVICE_FAULT),
    ("AcceleratorError", "something that nobody has seen yet", K.DEVICE_FAULT),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`", K.DEVICE_FAULT),
    ("RuntimeError", "HIP error: unspecified launch failure", K.DEVICE_FAULT),
    ("RuntimeError", "Triton Error [CUDA]: an illegal memory access was encountered", K.DEVICE_FAULT),
    ("DistBackendError", NCCL.format("unhandled cuda error", "Cuda failure 719 'unspecified'"), K.DEVICE_FAULT),
    ("RuntimeError", "NVRM: Xid (PCI:0000:3b:00): 63, row remapping", K.DEVICE_FAULT),
    ("AcceleratorError", cuda("no CUDA-capable device is detected", "cudaErrorNoDevice"), K.DEVICE_LOST),
    ("AcceleratorError", cuda("invalid device ordinal", "cudaErrorInvalidDevice"), K.DEVICE_LOST),
    ("RuntimeError", "No CUDA GPUs are available", K.DEVICE_LOST),
    ("RuntimeError", "No HIP GPUs are available", K.DEVICE_LOST),
    ("RuntimeError", "Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", K.DEVICE_LOST),
    ("DistBackendError", NCCL.format("unhandled system error", "ncclSystemError: device error."), K.LINK_FAULT),
    ("DistBackendError", NCCL.format("unhandled system error", "Connection closed by remote peer"), K.SECONDARY),
    ("DistBackendError", NCCL.format("remote process exited or there was a network error", ""), K.SECONDARY),
    ("AcceleratorError", cuda("device-side assert triggered", "cudaErrorAssert"), K.RANK_ERROR),
    ("AcceleratorError", cuda("invalid argument", "cudaErrorInvalidValue"), K.RANK_ERROR),
    ("AcceleratorError", cuda("no kernel image is available for execution on the device"), K.RANK_ERROR),
    ("AcceleratorError", cuda("out of memory", "cudaErrorMemoryAllocation"), K.OUT_OF_MEMORY),
    ("DistBackendError", NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'"), K.OUT_OF_MEMORY),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", K.OUT_OF_MEMORY),
    ("AssertionError", "Torch not compiled with CUDA enabled", K.RANK_ERROR),
    ("ConfigError", "CUDA error: that is what the text of a refusal may say", K.BAD_CONFIG),
    ("ValueError", "the device of a sample", K.RANK_ERROR),
]


EITHER = ("unspecified launch failure", "illegal memory access", "STATUS_EXECUTION_FAILED")


@pytest.mark.parametrize(("kind", "message", "expected"), TEXTS)
@pytest.mark.parametrize("how", ["told", "logged"])
def test_what_a_text_says_of_a_device(how: str, kind: str, message: str, expected: FailureKind) -> None:
    report = {"type": kind, "message": message, "traceback": f"Traceback ...\n{kind}: {message}", "step": 4}
    name = kind if kind == "ConfigError" else f"torch.{kind}"
    line = f"Traceback (most recent call last):\n  File x\n{name}: {message}"
    data = {"rank": 2, "code": 1, "signal": None, "log_tail": line}
    found = recovery.classify_exit(data, node="b", when=1.0, error=report if how == "told" else None)
    of_the_program = expected in (K.RANK_ERROR, K.OUT_OF_MEMORY, K.BAD_CONFIG)
    if how == "logged" and (of_the_program or "Last error" in message):
        return  # an exit without a report has a kind of its own, and only the first line of what was said
    assert found.kind is expected
    either = expected is K.DEVICE_FAULT and any(words in message for words in EITHER)
    assert bool(found.signature) is (of_the_program or either)
    assert message.splitlines()[0] in found.detail


@pytest.mark.parametrize("kind", [K.DEVICE_LOST, K.DEVICE_FAULT, K.LINK_FAULT])
def test_a_device_is_hardware_and_counts_against_its_node(kind: FailureKind) -> None:
    assert BUDGET_OF[kind] == "hardware"
    assert kind in AGAINST_THE_NODE


def test_a_device_that_cannot_be_taken_is_as_good_as_gone() -> None:
    report = {"type": "AcceleratorError", "message": cuda("unknown error"), "traceback": TAKING, "step": 0}
    found = recovery.classify_exit({"rank": 2, "code": 1}, node="b", when=1.0, error=report)
    assert found.kind is K.DEVICE_LOST


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("CUDA error: uncorrectable ECC error encountered", K.DEVICE_FAULT),
        ("NCCL error: remote process exited or there was a network error", K.SECONDARY),
        ("something else", K.RANK_KILLED),
    ],
)
def test_what_the_watchdog_says_when_it_aborts_a_rank(said: str, expected: FailureKind) -> None:
    before = "step 3\nCUDA error: an old warning"
    tail = f"{before}\nterminate called after throwing an instance of 'c10::Error'\n  what(): {said}"
    data = {"rank": 2, "code": None, "signal": 6, "log_tail": tail}
    assert recovery.classify_exit(data, node="b", when=1.0, error=None).kind is expected
    silent = {**data, "log_tail": before}
    assert recovery.classify_exit(silent, node="b", when=1.0, error=None).kind is K.RANK_KILLED


@pytest.mark.parametrize("other", [K.HANG, K.RANK_KILLED, K.RANK_ERROR, K.SECONDARY, K.LINK_FAULT])
def test_a_device_explains_what_others_make_of_it(other: FailureKind) -> None:
    device = Failure(kind=K.DEVICE_FAULT, time=2.0, node="b", rank=2)
    assert recovery.culprit([Failure(kind=other, time=1.0, node="a"), device]) is device


@pytest.mark.parametrize("cause", [K.NODE_LOST, K.PARTITIONED, K.RANK_KILLED, K.RANK_ERROR, K.OUT_OF_MEMORY])
def test_a_link_that_fails_explains_only_peers(cause: FailureKind) -> None:
    """The end of a peer looks like that, too."""
    link = Failure(kind=K.LINK_FAULT, time=1.0, node="a")
    first = Failure(kind=cause, time=2.0, node="b")
    assert recovery.culprit([link, first]) is first
    assert recovery.culprit([Failure(kind=K.SECONDARY, time=0.0), link]) is link


# --- which node is left out ---------------------------------------------------------------------------------------


def fallen(*falls: tuple[K, float, str]) -> Run:
    return Run(failures=tuple(Fall(kind=kind.value, time=time, node=node) for kind, time, node in falls))


def test_a_node_without_its_device_is_left_out_at_once_where_another_stands_by() -> None:
    once, twice = fallen((K.DEVICE_LOST, 1.0, "b")), fallen((K.DEVICE_LOST, 1.0, "b"), (K.DEVICE_LOST, 9.0, "b"))
    never = RecoverySpec(exclude_after=None)
    for spec in (RecoverySpec(), never):
        found = after_failure(once, spec, spare=True)
        assert found is not None
        assert (found.node, found.until) == ("b", 1.0 + spec.exclude_for_s)
        assert after_failure(once, spec, spare=False) is None  # it may only have been busy
        assert after_failure(twice, spec, spare=False) is not None
    assert after_failure(fallen((K.DEVICE_LOST, 1.0, "a"), (K.DEVICE_LOST, 9.0, "b")), never, spare=False) is None
    assert after_failure(fallen((K.DEVICE_LOST, 1.0, "b"), (K.RANK_ERROR, 2.0, "b")), never, spare=True) is None


def test_the_third_fault_of_a_device_excludes_its_node() -> None:
    falls = [(K.DEVICE_FAULT, 1.0, "b"), (K.RANK_KILLED, 2.0, "b"), (K.DEVICE_FAULT, 3.0, "b")]
    assert after_failure(fallen(*falls[:2]), RecoverySpec()) is None
    assert after_failure(fallen(*falls), RecoverySpec()) is not None


# --- the controller -----------------------------------------------------------------------------------------------


def start_ranks(stage: Stage, *, train: bool) -> tuple[int, dict[str, list[int]]]:
    """The next attempt, up to its first step or to just before it: its number, and where its ranks are."""
    if train:
        stage.start()
    else:
        stage.turn(2)
    _, attempt, placement = [call for call in stage.gang.calls if call[0] == "spawn"][-1]
    if not train:
        for node, ranks in placement.items():
            stage.gang.say("spawned", node, attempt=attempt, ranks=[{"rank": r, "pid": r} for r in ranks])
        stage.turn()
    return attempt, placement


def fail(
    stage: Stage, attempt: int, nodes: dict[str, list[int]], node: str, kind: str, message: str, **at: Any
) -> None:
    rank = nodes[node][0]
    fields = {"type": kind, "message": message, "traceback": f"Traceback ...\n{kind}: {message}", "step": 0, **at}
    stage.report(node, "error", attempt, rank=rank, **fields)
    stage.gang.say("exit", node, rank=rank, attempt=attempt, code=1, signal=None, log_tail="")
    stage.turn()
    for other in nodes:
        stage.gang.say("killed", other, attempt=attempt)
    stage.turn()


def actions(stage: Stage) -> list[Action]:
    return [Action(event.data["action"]) for event in stage.store.events() if event.kind is EventKind.DECISION]


def test_a_dead_device_costs_its_node_and_not_the_run(tmp_path: Path) -> None:
    """It fails at step 4, the ranks start again on its node, and there the device is gone: the spare takes over."""
    stage = Stage(tmp_path)
    attempt, nodes = start_ranks(stage, train=True)
    fail(stage, attempt, nodes, "b", "AcceleratorError", cuda("uncorrectable ECC error encountered"), step=4)
    attempt, nodes = start_ranks(stage, train=False)
    assert nodes == {"a": [0, 1], "b": [2, 3]}
    fail(stage, attempt, nodes, "b", "AcceleratorError", cuda("no CUDA-capable device is detected"))
    attempt, nodes = start_ranks(stage, train=True)
    assert nodes == {"a": [0, 1], "c": [2, 3]}
    run = stage.store.run()
    assert run.state is RunState.RUNNING
    assert [fall.kind for fall in run.failures] == ["device_fault", "device_lost"]
    assert set(run.excluded) == {"b"}
    decided = [event.data for event in stage.store.events() if event.kind is EventKind.DECISION]
    assert [one["action"] for one in decided] == ["restart", "restart", "swap"]
    assert [one["delay_s"] for one in decided] == [0.0, 0.0, 0.0]  # another node is no reason to wait


def test_without_a_spare_a_node_whose_device_stays_gone_is_left_out_for_a_smaller_plan(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=("a", "b"), shrink_after_s=1.0, backoff_s=0.0)
    attempt, nodes = start_ranks(stage, train=True)
    for _ in range(2):
        fail(stage, attempt, nodes, "b", "RuntimeError", "No CUDA GPUs are available")
        stage.turn(10)
        attempt, nodes = start_ranks(stage, train=False)
    assert set(nodes) == {"a"}
    assert not stage.state().terminal
    assert Action.SHRINK in actions(stage)


ILLEGAL = cuda("an illegal memory access was encountered", "cudaErrorIllegalAddress")


def test_a_kernel_that_reads_where_it_must_not_ends_the_run_once_another_node_has_said_the_same(tmp_path: Path) -> None:
    """Twice at step 4 on one node: it is left out. Then at step 4 on the spare: it is no device."""
    stage = Stage(tmp_path, backoff_s=0.0)
    for number, node in enumerate(("b", "b", "c"), start=1):
        attempt, nodes = start_ranks(stage, train=True)
        assert (attempt, node in nodes) == (number, True)
        trace = f"Traceback ...\n  File x.py, line {number}, in wherever_it_was_noticed"
        fail(stage, attempt, nodes, node, "AcceleratorError", ILLEGAL, step=4, traceback=trace)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert run.reason.startswith("the same error at the same step 3 times, on 2 nodes, so it is no device's: rank ")
    assert "CUDA_LAUNCH_BLOCKING=1" in run.reason
    assert set(run.excluded) == {"b"}
    assert [fall.kind for fall in run.failures] == ["device_fault"] * 3


def test_it_ends_at_once_where_two_nodes_have_said_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path, backoff_s=0.0)
    for node in "ab":
        attempt, nodes = start_ranks(stage, train=True)
        fail(stage, attempt, nodes, node, "AcceleratorError", ILLEGAL, step=4)
    assert stage.state() is RunState.FAILED
    assert "2 times, on 2 nodes" in stage.store.run().reason


def test_without_another_node_it_is_tried_once_more_and_no_oftener(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=("a", "b"), backoff_s=0.0, shrink_after_s=1e6)
    for _ in range(3):
        assert not stage.state().terminal
        stage.clock.now += 400.0
        attempt, nodes = start_ranks(stage, train=True)
        node = "b" if "b" in nodes else "a"
        fail(stage, attempt, nodes, node, "RuntimeError", "CUDA error: unspecified launch failure", step=4)
    assert stage.state() is RunState.FAILED
    assert "the same error at the same step 3 times" in stage.store.run().reason


@pytest.mark.parametrize("message", [ILLEGAL, cuda("uncorrectable ECC error encountered"), "CUDA error: Xid 63"])
def test_a_device_that_fails_now_and_then_costs_its_node_and_not_the_run(tmp_path: Path, message: str) -> None:
    stage = Stage(tmp_path, backoff_s=0.0)
    for step in (4, 7, 9):
        attempt, nodes = start_ranks(stage, train=True)
        fail(stage, attempt, nodes, "b", "AcceleratorError", message, step=step)
    run = stage.store.run()
    assert not run.state.terminal
    assert set(run.excluded) == {"b"}


def test_an_error_of_the_hardware_itself_is_never_put_down_to_the_program(tmp_path: Path) -> None:
    """Twice at one step is chance, or a device."""
    stage = Stage(tmp_path, backoff_s=0.0)
    for node in "ab":
        attempt, nodes = start_ranks(stage, train=True)
        fail(stage, attempt, nodes, node, "AcceleratorError", cuda("uncorrectable ECC error encountered"), step=4)
    assert not stage.state().terminal


def test_an_error_before_the_first_step_is_tried_on_another_node_once(tmp_path: Path) -> None:
    """The code's error comes there, too, and that is the end; the node's does not."""
    stage = Stage(tmp_path, backoff_s=0.0)
    for number in (1, 2):
        attempt, nodes = start_ranks(stage, train=False)
        assert (attempt, set(nodes)) == (number, {"a", "b"})
        fail(stage, attempt, nodes, "b", "OSError", "libcuda.so.1: cannot open shared object file")
    attempt, nodes = start_ranks(stage, train=False)
    assert (attempt, set(nodes)) == (3, {"a", "c"})
    (excluded,) = [event.data for event in stage.store.events() if event.kind is EventKind.NODE_EXCLUDED]
    assert "2 times before the first step" in excluded["reason"]
    fail(stage, attempt, nodes, "c", "OSError", "libcuda.so.1: cannot open shared object file")
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "the same error at the same step 3 times" in run.reason


@pytest.mark.parametrize(("nodes", "where"), [(("a", "b"), ("b", "b")), (("a", "b", "c"), ("b", "a"))])
def test_without_another_node_and_after_two_of_them_it_is_the_codes(
    tmp_path: Path, nodes: tuple[str, ...], where: tuple[str, str]
) -> None:
    stage = Stage(tmp_path, nodes=nodes, backoff_s=0.0)
    for node in where:
        attempt, placed = start_ranks(stage, train=False)
        fail(stage, attempt, placed, node, "ImportError", "no module named so")
    assert stage.store.run().state is RunState.FAILED
    assert EventKind.NODE_EXCLUDED not in stage.kinds()
