"""How long a step stands still for a checkpoint: ``make bench`` prints the ratios; time is not asserted."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from jobs.spec import CheckpointSpec
from launcher.host.environment import large_copies
from strategies.codec import to_json
from strategies.specs import ModelSpec
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


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero_stage", [1, 0])
def test_stall_at_100_m_parameters(zero_stage: int, tmp_path: Path) -> None:
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
    print(f"stall of a copy to memory {took['kept_s']:.4f} s: {took['kept_s'] / step_s:.2%} of a step (must: <= 3.5 %)")
    print(f"  a step beside one {took['beside_s']:.2f} s, alone {step_s:.2f} s")
    disk_s = took["saved_s"]
    print(f"stall of a disk checkpoint {disk_s:.4f} s: {disk_s / memcpy_s:.3f} x memcpy (must: <= 1.3)")
    times = took["deepspeed_s"] / disk_s
    print(f"DeepSpeed's save_checkpoint {took['deepspeed_s']:.2f} s: {times:.0f} x ours (must: >= 20)")
    assert took["bytes"] == pytest.approx(100e6 * 12, rel=0.02)
