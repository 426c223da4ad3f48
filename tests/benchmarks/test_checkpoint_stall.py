"""How long a step stands still for a checkpoint: ``make bench`` prints the ratios, beside what they must be."""

from __future__ import annotations

import dataclasses
import os
import statistics
from pathlib import Path

import pytest

from jobs.spec import CheckpointSpec
from launcher.host.environment import large_copies
from strategies.codec import to_json
from strategies.specs import ModelSpec
from tests.benchmarks.stats import Musts, interval, repeats
from tests.support.gang import WarmPool
from tests.support.jobspecs import make_job, make_plan
from tests.support.persisters import Node

M100 = ModelSpec(
    name="100m",
    flavour="gpt3",
    layers=12,
    hidden=768,
    heads=12,
    kv_heads=12,
    ffn=3072,
    vocab=19200,
    seq=1024,
    tied=True,
)


REUSE = "glibc.malloc.mmap_threshold=0x100000000:glibc.malloc.trim_threshold=0x1000000000"
"""Memory that a step gives back stays with the process, in both halves of a pair; ranks of a run do not have this.
Without it the kernel clears hundreds of thousands of pages in every step of a large model on CPUs, for seconds that
differ from step to step by more than a copy can cost."""


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero_stage", [1, 0])
def test_stall_at_100_m_parameters(zero_stage: int, tmp_path: Path, musts: Musts) -> None:
    """One rank: fp32 master and two moments, 2,048 tokens a step. ZeRO-1 keeps them flat, ZeRO-0 one by one."""
    job = make_job(M100, make_plan(M100, 2, micro_batch=1, zero_stage=zero_stage), global_batch=2)
    job = dataclasses.replace(job, checkpoint=CheckpointSpec(memory_every=1, keep=9))
    node = Node(tmp_path)
    try:
        with WarmPool(large_copies(os.environ)) as pool:  # as an agent starts its pool
            arguments = {"job": to_json(job), "persister": node.path, "steps": 3, "tries": 9}
            (took,) = pool.run(
                "tests.support.stall_ranks:stalls",
                world_size=1,
                arguments=arguments,
                timeout_s=800,
                run_dir=str(tmp_path),
            )
    finally:
        node.close()
    memcpy_s, step_s = took["memcpy_s"], took["step_s"]
    print(f"\nZeRO-{zero_stage}, {took['bytes'] / 1e9:.2f} GB: bare memcpy {memcpy_s:.3f} s")
    print(f"the copy itself {took['copy_s']:.3f} s: {took['copy_s'] / memcpy_s:.2f} x memcpy")
    print(f"stall of a copy to memory {took['kept_s']:.4f} s")
    musts.hold("stall of a copy to memory / a step", took["kept_s"] / step_s, "<=", 0.035, ".2%")
    print(f"  a step beside one {took['beside_s']:.2f} s, alone {step_s:.2f} s")
    disk_s = took["saved_s"]
    print(f"stall of a disk checkpoint {disk_s:.4f} s, DeepSpeed's save_checkpoint {took['deepspeed_s']:.2f} s")
    musts.hold("stall of a disk checkpoint / memcpy", disk_s / memcpy_s, "<=", 1.3)
    musts.hold("stall of a disk checkpoint / save_checkpoint", disk_s / took["deepspeed_s"], "<=", 1 / 20)
    assert took["bytes"] == pytest.approx(100e6 * 12, rel=0.02)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_beside_a_copy(ranks: int, tmp_path: Path, musts: Musts) -> None:
    """2,048 tokens a step, and the state goes into memory at every step: of one rank, which leaves a core of two to its
    persister, and of two ranks on two nodes, each with the replica of the other.

    The nodes are processes of one machine: with two, what the persisters do takes its cores from the ranks, as it does
    on no machine with more cores than ranks. So a whole step is held to its bound with one, standing still with both.
    """
    job = make_job(M100, make_plan(M100, 2, micro_batch=2 // ranks, dp=ranks, zero_stage=1), global_batch=2)
    job = dataclasses.replace(job, checkpoint=CheckpointSpec(memory_every=1, keep=9))
    nodes = [Node(tmp_path, name) for name in "ab"[:ranks]]
    try:
        with WarmPool(large_copies({"GLIBC_TUNABLES": REUSE})) as pool:
            arguments = {"job": to_json(job), "persisters": [node.path for node in nodes]}
            took = pool.run(
                "tests.support.stall_ranks:beside",
                world_size=ranks,
                arguments=arguments | {"pairs": repeats(10), "block": 2},
                timeout_s=1700,
                run_dir=str(tmp_path),
            )
    finally:
        for node in nodes:
            node.close()
    size = sum(rank["bytes"][0] for rank in took)
    share = max(sum(rank["stalled"]) / sum(rank["beside"]) for rank in took)
    ratios = [beside / alone for beside, alone in zip(took[0]["beside"], took[0]["alone"], strict=True)]
    low, high = interval(ratios)
    print(f"\n{size / 1e9:.2f} GB on {ranks} nodes at every step; {len(ratios)} pairs")
    alone_s = statistics.median(took[0]["alone"]) / 2
    print(f"  a step alone {alone_s:.2f} s; a step beside it / alone {low:.3f} to {high:.3f} (95 % interval)")
    musts.hold("standing still for it / the step", share, "<=", 0.035, ".2%")
    middle = statistics.median(ratios)
    if ranks == 1:
        musts.hold("a step beside it / a step alone, median", middle, "<=", 1.035)
    else:
        print(f"  a step beside it / a step alone, on shared cores: median {middle:.3f}")
    assert size == pytest.approx(100e6 * 12, rel=0.02)
