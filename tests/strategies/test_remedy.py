"""What a broken rule proposes is legal: somebody who follows it has not the same problem again, and no new one.

Proposals are read from the text that people see, and followed as people do: the values that were given are given again,
with the proposed one, and the rest of the plan is derived anew.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from strategies import rules
from strategies.capabilities import runnable
from strategies.errors import Violation
from strategies.plan import ParallelPlan
from strategies.ramp import Ramp
from strategies.resolve import resolve_plan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, MoeSpec, Precision
from tests.strategies.support import random_model

DERIVED = frozenset({"dp", "zero_stage", "stages", "grad_accum", "grad_dtype"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks for."""

    model: ModelSpec
    batch: BatchSpec
    cluster: ClusterSpec | None
    precision: Precision
    knobs: dict[str, Any] = field(default_factory=dict)

    def broken(self, *, modelled: bool = False) -> tuple[Violation, ...]:
        parts = {"model": self.model, "batch": self.batch, "cluster": self.cluster, "precision": self.precision}
        plan = self.plan()
        return rules.check(plan=plan, left_open=DERIVED - set(self.knobs), modelled=modelled, **parts)  # type: ignore[arg-type]

    def plan(self) -> ParallelPlan:
        return resolve_plan(self.model, self.batch, self.cluster, self.precision, **self.knobs)

    def with_(self, name: str, value: Any) -> Request:
        """The same with another value, by the name in a hint."""
        part, _, last = name.rpartition(".")
        if part == "moe":
            assert self.model.moe is not None
            return replace(self, model=replace(self.model, moe=replace(self.model.moe, **{last: value})))
        if part in ("model", "batch", "cluster"):
            return replace(self, **{part: replace(getattr(self, part), **{last: value})})
        if part == "ramp":
            assert self.batch.ramp is not None
            return replace(self, batch=replace(self.batch, ramp=replace(self.batch.ramp, **{last: value})))
        return replace(self, knobs=self.knobs | {last: value})


NAMES = {
    **{name: f"model.{name}" for name in ("heads", "kv_heads", "hidden", "head_width")},
    **{name: f"ramp.{name}" for name in ("start", "increment")},
    **{f"model.moe.{name}": f"moe.{name}" for name in ("top_k", "capacity_factor")},
    "train.global_batch": "batch.global_batch",
}


def proposals(hint: str) -> Iterator[list[tuple[str, Any]]]:
    """Every way to mend that a hint names: knobs with values, each way by itself."""
    for name, found, alike in re.findall(r"nearest legal ([\w.]+): (\d+(?: or \d+)*)( \(kv_heads alike\))?", hint):
        for value in found.split(" or "):
            yield [(NAMES.get(name, name), int(value)), *([("model.kv_heads", int(value))] if alike else [])]
    for name, value in re.findall(r"\b(dp|micro_batch) at most (\d+)", hint):
        yield [(name, int(value))]
    for value in re.findall(r"train\.global_batch of (\d+) or more", hint):
        yield [("batch.global_batch", int(value))]
    for value in re.findall(r"a ramp that starts at (\d+) or more", hint):
        yield [("ramp.start", int(value))]
    for value in re.findall(r"cluster\.nodes=(\d+)", hint):
        yield [("cluster.nodes", int(value))]
    for words in re.findall(r"strategy\.\w+=[^\s,;]+(?: strategy\.\w+=[^\s,;]+)*", re.sub(r"\[[^]]*\]", "", hint)):
        pairs = [word.removeprefix("strategy.").split("=") for word in words.split()]
        if all(value for _, value in pairs):
            yield [(name, _value(name, value)) for name, value in pairs]


def _value(name: str, word: str) -> Any:
    if name == "offload_path":
        return ""
    return {"false": False, "true": True}.get(word, int(word) if word.isdigit() else word)


def drawn(rng: random.Random) -> Request:
    """Mostly broken, in one or several ways."""
    model = random_model(rng)
    sizes = {
        "heads": rng.choice([model.heads] * 4 + [5]),
        "hidden": rng.choice([model.hidden] * 4 + [model.hidden + 1]),
    }
    if rng.random() < 0.5:
        top_k, ffn = rng.choice([1, 2, 2, 9]), rng.choice([24, 36])
        sizes["moe"] = MoeSpec(experts=rng.choice([4, 6, 8, 12]), top_k=top_k, ffn=ffn)  # type: ignore[assignment]
    seq = rng.choice([16, 24, 30, 60])
    model = replace(model, seq=seq, **sizes)  # type: ignore[arg-type]
    size = rng.choice([4, 6, 8, 16, 24])
    ramp = None
    if rng.random() < 0.4:
        ramp = Ramp(start=rng.choice([0, 1, 2, 4, size]), increment=rng.choice([1, 2, 3, 4]), samples=64)
    some = [1, 1, 1, 2, 3, 4]
    knobs: dict[str, Any] = {name: rng.choice(some) for name in ("tp", "pp", "ep", "sp", "micro_batch")}
    knobs["cp"] = rng.choice([1, 1, 1, 1, 2, 3])
    maybe = {
        "dp": rng.choice([1, 2, 3, 4, 5, 8]),
        "zero_stage": rng.randint(0, 3),
        "schedule": rng.choice(["1f1b", "dualpipev", "interleaved"]),
        "vpp": rng.choice([1, 1, 2, 3]),
        "grad_dtype": rng.choice(["fp32", "bf16"]),
        "offload": rng.choice(["none", "none", "optimizer", "optimizer+params"]),
        "sequence_parallel": rng.random() < 0.5,
        "offload_path": "/disk",
    }
    knobs |= {name: value for name, value in maybe.items() if rng.random() < (0.1 if name == "offload_path" else 0.4)}
    cluster = ClusterSpec(name="test", kind="local", nodes=rng.choice([1, 2, 4]), slots_per_node=rng.choice([2, 4, 8]))
    return Request(
        model=model,
        batch=BatchSpec(global_batch=size, seq=seq, ramp=ramp),
        cluster=rng.choice([cluster, cluster, None]),
        precision=rng.choice(["fp32", "bf16", "fp8"]),
        knobs=knobs,
    )


JUDGED = {"combination_runs", "combination_probed"}
"""What can only be modelled: their hints name what runs in general."""


def follow(request: Request, modelled: bool, tried: Counter[str]) -> None:
    """Every proposal for a request mends what it is for, and breaks nothing."""
    before = request.broken(modelled=modelled)
    verdict = None if modelled else runnable(request.plan(), request.precision, request.model)
    names = {one.rule for one in (*before, *([verdict] if verdict else []))}  # it is silent where a rule is broken
    for one in before:
        for way in proposals(one.hint) if one.rule not in JUDGED else ():
            changed = request
            for name, value in way:
                changed = changed.with_(name, value)
            after = {other.rule: str(other) for other in changed.broken(modelled=modelled)}
            assert one.rule not in after, (str(one), way, after[one.rule])
            assert not set(after) - names, (str(one), way, [after[name] for name in set(after) - names])
            tried.update(name for name, _ in way)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, 12))])
def test_what_a_rule_proposes_is_legal(part: int) -> None:
    tried: Counter[str] = Counter()
    for seed in range(150 * part, 150 * part + 150):
        rng = random.Random(seed)
        follow(drawn(rng), rng.random() < 0.3, tried)
    wanted = {"tp", "pp", "ep", "sp", "cp", "dp", "micro_batch", "ramp.start", "ramp.increment", "moe.top_k"}
    assert wanted <= set(tried), wanted - set(tried)
    assert min(tried[name] for name in wanted) >= 3, tried


def test_the_seed_of_an_illegal_proposal() -> None:
    """ep 5: 4 and 6 divide 12 experts, and neither divides dp 5."""
    model = replace(random_model(random.Random(0)), moe=MoeSpec(experts=12, top_k=2, ffn=24))
    request = Request(
        model=model, batch=BatchSpec(global_batch=16, seq=model.seq), cluster=None, precision="fp32", knobs={"dp": 5}
    )
    found = next(one for one in request.with_("ep", 5).broken() if one.rule == "experts_divisible_by_ep")
    assert found.hint == "nearest legal ep: 1"


def test_where_no_value_mends_it_the_hint_says_what_is_in_the_way() -> None:
    """sp 3 does not cut 4 heads; with sp 1 or 2 there are too few replicas for ep 3, and with sp 4 none divides 30."""
    model = replace(
        random_model(random.Random(0)), heads=4, kv_heads=4, hidden=64, ffn=96, moe=MoeSpec(experts=3, top_k=1, ffn=96)
    )
    request = Request(
        model=replace(model, seq=30),
        batch=BatchSpec(global_batch=16, seq=30),
        cluster=None,
        precision="fp32",
        knobs={"dp": 1, "sp": 3, "ep": 3},
    )
    found = next(one for one in request.broken(modelled=True) if one.rule == "heads_divisible_by_sp")
    assert found.hint == "no sp mends it by itself: 2 or 4 would break ep_divides_replicas, sequence_divisible"
