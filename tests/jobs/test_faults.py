"""Fault injection: the grammar and its errors, the seeded choice, and that real processes really die, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import faults
from jobs.faults import Fault, FaultInjector, InjectedFault, parse, resolve
from jobs.proctree import ancestors, descendants, kill_trees, processes
from jobs.report import LineBuffer, Reporter
from jobs.spec import RankEnv
from strategies.errors import ConfigError, StorageError

RUN: dict[str, Any] = {"seed": 0, "steps": 40, "checkpoint_every": 10, "nodes": 4, "world_size": 8}


# the grammar


def test_parse() -> None:
    assert parse(["rank_kill@rank=3,step=12", "node_kill@step=random,node=random,phase=step_end"]) == (
        Fault(kind="rank_kill", target=3, step=12),
        Fault(kind="node_kill", target=None, step=None, phase="step_end"),
    )
    assert parse(["rank_exit@rank=0,phase=restore"]) == (Fault(kind="rank_exit", target=0, step=0, phase="restore"),)
    assert parse([]) == ()


@pytest.mark.parametrize(
    "text",
    [
        "rank_kill@rank=3,step=12",
        "node_kill@node=random,step=random",
        "agent_kill@node=1,step=4,phase=checkpoint",
        "rank_error@rank=0,phase=restore",
    ],
)
def test_a_fault_prints_as_it_is_written(text: str) -> None:
    assert str(parse([text])[0]) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank_kil@rank=1,step=2", ["unknown kind 'rank_kil'", "Did you mean 'rank_kill'?"]),
        ("rank_kill", ["rank is missing", "step is missing"]),
        ("rank_kill@node=1,step=2", ["unknown key 'node'", "rank is missing"]),
        ("node_kill@node=1,stp=2", ["unknown key 'stp'", "Did you mean 'step'?", "step is missing"]),
        ("rank_kill@rank=-1,step=2", ["rank=-1 is not a whole number from 0"]),
        ("rank_kill@rank=1,step=0", ["step=0 is not a whole number from 1"]),
        ("rank_kill@rank=1,step=x", ["step=x is not a whole number from 1"]),
        ("rank_kill@rank=1,step=2,phase=step_ends", ["unknown phase 'step_ends'", "Did you mean 'step_end'?"]),
        ("rank_kill@rank=1,rank=2,step=2", ["rank is given twice"]),
        ("rank_kill@rank=1,step=2,phase=restore", ["phase=restore takes no step"]),
        ("nan_grad@rank=1,step=2,phase=step_end", ["nan_grad takes no phase"]),
        ("loss_spike@rank=1,phase=restore", ["loss_spike takes no phase"]),
        ("rank_deadlock@rank=1,step=2,phase=step_end", ["rank_deadlock takes no phase"]),
        ("", ["unknown kind ''"]),
    ],
)
def test_mistakes_are_explained(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([text])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["rank_kil@rank=1,step=2", "node_kill@node=0,step=3", "node_kill@rank=0"])
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(lines) == 4


# against a run


def test_resolve_leaves_exact_faults_alone() -> None:
    exact = ("rank_kill@rank=7,step=40", "node_kill@node=3,step=20,phase=shards_written")
    assert resolve(exact, **RUN) == exact


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank_kill@rank=8,step=2", "ranks 0 to 7"),
        ("node_kill@node=4,step=2", "nodes 0 to 3"),
        ("rank_kill@rank=1,step=41", "40 steps"),
        ("loss_spike@rank=3,step=20", "in the last stage are ranks 4 to 7"),
        ("loss_spike@rank=4,step=16", "before 16 losses were seen"),
        ("bad_update@rank=1,step=16", "before 16 losses were seen"),
        ("bad_update@rank=1,step=40", "40 steps, and it must show in one of them"),
        ("rank_kill@rank=1,step=14,phase=checkpoint", "the nearest: 10 or 20"),
    ],
)
def test_resolve_checks_ranges(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve([text], **RUN, pp=2)


def test_a_rank_that_is_alone_cannot_deadlock() -> None:
    alone = {**RUN, "world_size": 1, "nodes": 1}
    with pytest.raises(ConfigError, match="alone waits for nobody"):
        resolve(["rank_deadlock@rank=0,step=2"], **alone)


def test_a_random_spike_is_one_that_can_be_seen() -> None:
    drawn = set()
    for seed in range(300):
        (text,) = resolve(["loss_spike@rank=random,step=random"], **(RUN | {"seed": seed}), pp=2)
        drawn.add((parse([text])[0].target, parse([text])[0].step))
    assert {target for target, _ in drawn} == {4, 5, 6, 7}
    assert {step for _, step in drawn} == set(range(18, 41))
    late = [resolve(["bad_update@rank=0,step=random"], **(RUN | {"seed": seed}))[0] for seed in range(300)]
    assert {parse([text])[0].step for text in late} == set(range(18, 40)), "the next step has to show it"
    with pytest.raises(ConfigError, match="after the first 16 losses"):
        resolve(["loss_spike@rank=random,step=random"], **(RUN | {"steps": 12, "checkpoint_every": 3}))


def test_resolve_tells_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(["rank_kill@rank=8,step=41", "node_kill@node=4,step=2"], **RUN)
    assert str(caught.value).count("\n  - ") == 3


def test_random_lies_between_the_first_commit_and_the_end() -> None:
    drawn = set()
    for seed in range(300):
        (text,) = resolve(["node_kill@node=random,step=random"], **(RUN | {"seed": seed}))
        fault = parse([text])[0]
        drawn.add((fault.target, fault.step))
    assert {target for target, _ in drawn} == {0, 1, 2, 3}
    assert {step for _, step in drawn} == set(range(12, 41))


def test_random_is_a_function_of_the_seed() -> None:
    both = ["rank_kill@rank=random,step=random", "rank_kill@rank=random,step=random"]
    first = resolve(both, **RUN)
    assert resolve(both, **RUN) == first
    assert first[0] != first[1]
    assert any(resolve(both, **(RUN | {"seed": seed})) != first for seed in range(1, 4))


@pytest.mark.parametrize(("every", "expected"), [(10, {20, 30, 40}), (15, {30, 40}), (39, {40})])
def test_random_within_a_checkpoint_is_a_checkpoint(every: int, expected: set[int]) -> None:
    text = "rank_kill@rank=0,step=random,phase=shards_written"
    drawn = {parse(resolve([text], **(RUN | {"seed": s, "checkpoint_every": every})))[0].step for s in range(60)}
    assert drawn == expected


@pytest.mark.parametrize("every", [0, 40, 50])
def test_random_needs_a_commit_before_the_end(every: int) -> None:
    with pytest.raises(ConfigError, match=r"set checkpoint\.every to 20 or less"):
        resolve(["rank_kill@rank=0,step=random"], **(RUN | {"checkpoint_every": every}))


def test_random_takes_the_last_step_if_there_is_no_other() -> None:
    run = RUN | {"steps": 6, "checkpoint_every": 5}
    assert resolve(["rank_kill@rank=0,step=random"], **run) == ("rank_kill@rank=0,step=6",)


# carried out


def make_env(run: Path, rank: int = 0, *, slots: int = 2, attempt: int = 1) -> RankEnv:
    return RankEnv(
        rank=rank,
        local_rank=rank % slots,
        world_size=4,
        local_world_size=slots,
        node_rank=rank // slots,
        master_addr="127.0.0.1",
        master_port=1,
        run_id="run",
        run_dir=str(run),
        epoch=1,
        attempt=attempt,
    )


def test_an_error_is_raised_once_with_a_stable_message(tmp_path: Path) -> None:
    texts = ["rank_error@rank=1,step=3"]
    injector = FaultInjector(texts, make_env(tmp_path, 1), Reporter(-1))
    injector.step_begin(2)
    injector.step_end(3)
    with pytest.raises(InjectedFault, match=r"^injected fault: rank_error@rank=1,step=3$"):
        injector.step_begin(3)
    injector.step_begin(3)
    FaultInjector(texts, make_env(tmp_path, 1, attempt=2), Reporter(-1)).step_begin(3)
    proof = json.loads((tmp_path / "faults" / "rank_error.rank-1.step-3.json").read_text())
    assert {key: proof[key] for key in ("fault", "rank", "node_rank", "attempt", "step", "pid", "victims")} == {
        "fault": texts[0],
        "rank": 1,
        "node_rank": 0,
        "attempt": 1,
        "step": 3,
        "pid": os.getpid(),
        "victims": [os.getpid()],
    }
    assert [path.name for path in (tmp_path / "faults").iterdir()] == ["rank_error.rank-1.step-3.json"]


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    for rank in (0, 2, 3):
        FaultInjector(["rank_error@rank=1,step=3"], make_env(tmp_path, rank), Reporter(-1)).step_begin(3)
    for rank in (0, 1, 3):  # rank 2 is the lowest of node 1
        FaultInjector(["node_kill@node=1,step=3"], make_env(tmp_path, rank), Reporter(-1)).step_begin(3)
    assert not (tmp_path / "faults").exists()


def test_equal_faults_fire_one_after_the_other(tmp_path: Path) -> None:
    texts = ["rank_error@rank=0,step=3"] * 2
    for attempt in (1, 2):
        with pytest.raises(InjectedFault):
            FaultInjector(texts, make_env(tmp_path, attempt=attempt), Reporter(-1)).step_begin(3)
    FaultInjector(texts, make_env(tmp_path, attempt=3), Reporter(-1)).step_begin(3)
    assert len(list((tmp_path / "faults").iterdir())) == 2


def train(hooks: FaultInjector, module: torch.nn.Linear, step: int) -> tuple[float, bool]:
    """One step without an optimizer: the loss, and whether the gradients are finite."""
    hooks.step_begin(step)
    module.zero_grad()
    loss = module(torch.ones(4, 3)).square().mean()
    loss.backward()
    hooks.step_end(step)
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(loss.detach()), all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("kind", ["nan_grad", "loss_spike"])
def test_numbers_are_spoiled_in_one_step_on_one_rank(tmp_path: Path, kind: str) -> None:
    texts, module = [f"{kind}@rank=1,step=3"] * 2, torch.nn.Linear(3, 2)
    right = train(FaultInjector([], make_env(tmp_path, 1), Reporter(-1)), module, 1)
    seen = []
    for attempt, rank in ((1, 0), (1, 1), (2, 1), (3, 1)):
        hooks = FaultInjector(texts, make_env(tmp_path, rank, attempt=attempt), Reporter(-1))
        hooks.model_ready(module)
        assert train(hooks, module, 2) == right
        seen.append(train(hooks, module, 3))
        assert train(hooks, module, 4) == right
    assert seen[0] == seen[3] == right  # another rank; both have fired
    spoiled = (pytest.approx(right[0] * 1e4), True) if kind == "loss_spike" else (right[0], False)
    assert seen[1] == seen[2] == spoiled  # one at a time


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_one_update_on_one_rank_wrecks_the_weights_with_gradients_as_they_were(
    tmp_path: Path, kind: type[torch.optim.SGD] | type[torch.optim.AdamW]
) -> None:
    module = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(module.weight, 0.5)
    groups: list[dict[str, Any]] = [{"params": [module.weight]}, {"params": [module.bias], "lr": 2e-4}]
    optimizer = kind(groups, lr=1e-4)
    hooks = FaultInjector(["bad_update@rank=1,step=17"], make_env(tmp_path, 1), Reporter(-1))
    hooks.model_ready(module)
    moved = []
    for step in (16, 17, 18):
        hooks.step_begin(step)
        loss = module(torch.ones(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        before = module.weight.detach().clone()
        optimizer.step()
        hooks.step_end(step)
        moved.append(float((module.weight.detach() - before).abs().max()))
    assert moved[0] < 1e-3 < 0.5 < moved[1]
    assert moved[2] < 1e-3
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 2e-4]


@pytest.mark.parametrize(
    ("phase", "call"),
    [
        ("step_begin", lambda hooks: hooks.step_begin(4)),
        ("step_end", lambda hooks: hooks.step_end(4)),
        ("checkpoint", lambda hooks: hooks.checkpoint_begin(4)),
        ("shards_written", lambda hooks: hooks.checkpoint_shards_written(4)),
        ("restore", lambda hooks: hooks.restore_begin()),
    ],
)
def test_every_phase_is_reached_by_its_hook_only(tmp_path: Path, phase: str, call: Any) -> None:
    step = "" if phase == "restore" else "step=4,"
    injector = FaultInjector([f"rank_error@rank=0,{step}phase={phase}"], make_env(tmp_path), Reporter(-1))
    calls = [
        lambda: injector.step_begin(4),
        lambda: injector.step_end(4),
        lambda: injector.checkpoint_begin(4),
        lambda: injector.checkpoint_shards_written(4),
        injector.restore_begin,
    ]
    for number, other in enumerate(calls):
        if number != ["step_begin", "step_end", "checkpoint", "shards_written", "restore"].index(phase):
            other()
    with pytest.raises(InjectedFault):
        call(injector)
    assert injector.holds_commit(4) is (phase == "shards_written")
    assert not injector.holds_commit(5)


def test_a_proof_that_cannot_be_written_stops_the_fault(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="proof"):
        FaultInjector(["rank_kill@rank=0,step=1"], make_env(tmp_path), Reporter(-1)).step_begin(1)


def test_a_fault_on_an_unknown_agent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.AGENT_PID, raising=False)
    with pytest.raises(ConfigError, match="does not know its host agent"):
        FaultInjector(["node_kill@node=0,step=1"], make_env(tmp_path), Reporter(-1)).step_begin(1)


RANK = """
import os, sys
from jobs.faults import FaultInjector
from jobs.report import Reporter
from jobs.spec import RankEnv
def main(run, rank, fd, *texts):
    env = RankEnv(rank=rank, local_rank=rank % 2, world_size=4, local_world_size=2, node_rank=rank // 2, run_id="run",
                  master_addr="", master_port=1, run_dir=run, epoch=1, attempt=1, report_fd=fd)
    FaultInjector(texts, env, Reporter(fd)).step_begin(1)
"""


def run_rank(run: Path, text: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    read, write = os.pipe()
    code = f"{RANK}\nmain({str(run)!r}, 0, {write}, {text!r})\nprint('survived')"
    done = subprocess.run(
        [sys.executable, "-c", code], pass_fds=(write,), capture_output=True, text=True, timeout=30, check=False
    )
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return done, LineBuffer().feed(pipe.read())


def test_rank_kill_kills(tmp_path: Path) -> None:
    done, reports = run_rank(tmp_path, "rank_kill@rank=0,step=1")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    assert [(report["kind"], report["fault"]) for report in reports] == [("fault", "rank_kill@rank=0,step=1")]
    done, reports = run_rank(tmp_path, "rank_kill@rank=0,step=1")
    assert (done.returncode, done.stdout, reports) == (0, "survived\n", [])


def test_rank_exit_exits(tmp_path: Path) -> None:
    done, _ = run_rank(tmp_path, "rank_exit@rank=0,step=1")
    assert (done.returncode, done.stdout, done.stderr) == (17, "", "")


TREE = textwrap.dedent(
    """
    import os, subprocess, sys, time
    if sys.argv[1] == "top":          # a raylet, or a plain parent that must survive
        open("/proc/self/comm", "w").write(sys.argv[2])
        side = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        agent = subprocess.Popen([sys.executable, __file__, "agent", *sys.argv[3:]])
        print(os.getpid(), side.pid, agent.pid, flush=True)
    elif sys.argv[1] == "agent":
        os.environ["PHALANX_AGENT_PID"] = str(os.getpid())
        ranks = [subprocess.Popen([sys.executable, __file__, str(rank), *sys.argv[2:]]) for rank in (1, 0)]
    else:
        sys.path.insert(0, os.getcwd())
        open(os.path.join(sys.argv[2], "rank-" + sys.argv[1]), "w").write(str(os.getpid()))
        while not all(os.path.exists(os.path.join(sys.argv[2], "rank-" + rank)) for rank in "01"):
            time.sleep(0.05)
        exec(open(sys.argv[4]).read())
        main(sys.argv[2], int(sys.argv[1]), -1, sys.argv[3])
    time.sleep(100)
    """
)


def grow(tmp_path: Path, name: str, text: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A node: top process called ``name``, beside it a stranger, below it an agent with ranks 1 and 0."""
    script, rank = tmp_path / "tree.py", tmp_path / "rank.py"
    script.write_text(TREE)
    rank.write_text(RANK)
    run = tmp_path / "run"
    run.mkdir()
    top = subprocess.Popen(
        [sys.executable, str(script), "top", name, str(run), text, str(rank)], stdout=subprocess.PIPE, text=True
    )
    assert top.stdout is not None
    return top, [int(word) for word in top.stdout.readline().split()]


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def fell(tree: Path) -> list[int]:
    """Ids of the ranks that the tree started."""
    return [int((tree / "run" / f"rank-{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.timeout(90)
def test_node_kill_leaves_nothing_of_a_ray_node(tmp_path: Path) -> None:
    top, (raylet, side, agent) = grow(tmp_path, "raylet", "node_kill@node=0,step=1")
    assert top.wait(timeout=60) == -signal.SIGKILL
    everyone = {raylet, side, agent, *fell(tmp_path)}
    wait_until(lambda: not everyone & set(processes()), "everything under the raylet dies")
    proofs = list((tmp_path / "run" / "faults").iterdir())
    assert [path.name for path in proofs] == ["node_kill.node-0.step-1.json"]
    proof = json.loads(proofs[0].read_text())
    assert set(proof["victims"]) == everyone
    assert (proof["rank"], proof["pid"]) == (0, fell(tmp_path)[0])
    assert top.stdout is not None
    top.stdout.close()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("kind", ["node_kill", "agent_kill"])
def test_without_ray_the_node_is_the_agents_tree(tmp_path: Path, kind: str) -> None:
    top, (parent, side, agent) = grow(tmp_path, "bystander", f"{kind}@node=0,step=1")
    try:
        wait_until(lambda: agent not in processes(), "the agent dies")
        if kind == "node_kill":
            wait_until(lambda: not set(fell(tmp_path)) & set(processes()), "the ranks die")
        else:
            assert set(fell(tmp_path)) <= set(processes()), "only the agent is killed"
        assert {parent, side} <= set(processes()), "what is not of the node survives"
    finally:
        kill_trees([parent, *fell(tmp_path)])
        top.wait(timeout=10)
    assert top.stdout is not None
    top.stdout.close()


def test_a_process_knows_its_family() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants([os.getpid()])
        assert [process.pid for process in ancestors(child.pid)][:2] == [os.getpid(), os.getppid()]
        assert kill_trees([child.pid]) == {child.pid}
        assert child.wait(timeout=10) == -signal.SIGKILL
    assert kill_trees([child.pid]) == set()
