"""The longest sequence that fits: one rank, and four ranks of Ulysses, each with the same room for a step.

Every rank may allocate 192 MiB on top of what its process and engine take (``RLIMIT_DATA``); the sequence grows until a
step no longer fits. Attention on the CPU keeps no scores, so what a step needs grows with the tokens of a rank.

``python -m pytest tests/benchmarks/test_long_sequences.py -m full -s``
"""

from __future__ import annotations

import dataclasses
import re
from itertools import count
from typing import Any

import pytest

from strategies.codec import to_json
from tests.benchmarks.stats import Musts
from tests.support.gang import GangFailed, WarmPool
from tests.support.jobspecs import LLAMA, make_job, make_plan

ROOM_BYTES = 192 << 20
FIRST = 1024
MODEL = dataclasses.replace(LLAMA, layers=4, hidden=128, heads=4, ffn=512, vocab=1024)
OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|bad_alloc|MemoryError|Cannot allocate memory")


def longest(pool: WarmPool, degrees: dict[str, Any]) -> tuple[int, float]:
    """Tokens of the longest sequence that fits (of 1,024 x 2^k and 1.5 times that), and the loss of the shortest."""
    best, loss = 0, 0.0
    for number in count():
        seq = FIRST * 2 ** (number // 2) * (3 if number % 2 else 2) // 2
        model = dataclasses.replace(MODEL, seq=seq)
        job = make_job(model, make_plan(model, 1, **degrees), global_batch=1)
        try:
            ranks = pool.run(
                "tests.support.limited_ranks:train_within",
                world_size=job.plan.world_size,
                arguments={"job": to_json(job), "room_bytes": ROOM_BYTES},
                timeout_s=300,
            )
        except GangFailed as failure:
            if OUT_OF_MEMORY.search(str(failure)):
                return best, loss
            raise
        best, loss = seq, loss or float(ranks[0]["loss"])
    raise AssertionError("sequences do not end")


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_four_ranks_hold_a_sequence_that_one_cannot(musts: Musts) -> None:
    with WarmPool() as pool:
        alone, loss = longest(pool, {})
        together, same = longest(pool, {"sp": 4})
    assert alone >= FIRST
    assert same == pytest.approx(loss, rel=1e-5), "not the same training"
    print(f"\nlongest sequence with {ROOM_BYTES >> 20} MiB of room per rank")
    print(f"  one rank                {alone:6d} tokens")
    print(f"  four ranks of Ulysses   {together:6d} tokens")
    musts.hold("four ranks / one rank, at best 4", together / alone, ">", 1, ".2f")
