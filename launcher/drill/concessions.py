"""What a rehearsal gives up so that it runs here: as little as possible, found by trying. Pure.

What can only be planned with (:mod:`strategies.capabilities`) cannot be rehearsed. Of all ways to give up something the
first one with the fewest concessions that breaks no rule is taken, so that whatever DeepSpeed runs is kept, and a new
capability is used the day the rules know it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from typing import Any

from launcher import build
from launcher.drill.changes import value_of, with_changes
from launcher.schema import Config
from strategies.errors import PlanInfeasible


@dataclass(frozen=True, kw_only=True, slots=True)
class Concession:
    """One thing that can be given up.

    Attributes:
        values: Dotted keys with their plain values.
        when: Only where these keys have these values.
    """

    values: Mapping[str, Any]
    when: Mapping[str, Any] = field(default_factory=dict)

    def concerns(self, config: Config) -> bool:
        """Whether there is something to give up."""
        if any(value_of(config, key) != value for key, value in self.when.items()):
            return False
        return any(value_of(config, key) != value for key, value in self.values.items())


CONCESSIONS = (
    Concession(values={"strategy.offload": "none"}),
    Concession(values={"strategy.sequence_parallel": False}),
    Concession(values={"strategy.schedule": "1f1b", "strategy.vpp": 1}),
    Concession(values={"strategy.recompute": "full"}, when={"strategy.recompute": "selective"}),
    Concession(values={"strategy.recompute": "none"}),
    Concession(values={"strategy.grad_dtype": "fp32"}),
    Concession(values={"train.precision": "bf16"}, when={"train.precision": "fp16"}),
    Concession(values={"train.precision": "bf16"}, when={"train.precision": "fp8"}),
    Concession(values={"model.embed_norm": False}),
    Concession(values={"model.gated": None}),
    Concession(values={"model.latent": None}),
    Concession(values={"strategy.zero_stage": 1}),
    Concession(values={"strategy.cp": 1}),
    Concession(values={"strategy.sp": 1}),
    Concession(values={"strategy.ep": 1}),
    Concession(values={"model.moe": None, "strategy.ep": 1}),
)
"""In the order in which they are given up, what is missed least first."""


def runnable(config: Config) -> tuple[Config, dict[str, str]]:
    """The configuration with as little as possible given up, and why, by key.

    Raises:
        PlanInfeasible: Nothing of this kind runs; the rules are those that the plainest one breaks.
    """
    possible = [one for one in CONCESSIONS if one.concerns(config)]
    for number in range(len(possible) + 1):
        for chosen in combinations(possible, number):
            found = _without(config, chosen)
            violations = build.outline(found).violations
            if not violations:
                return found, _reasons(config, chosen)
    raise PlanInfeasible(violations, what="No small plan of this kind runs:", hint="Rehearse a simpler one.")


def _without(config: Config, chosen: Sequence[Concession]) -> Config:
    return reduce(lambda left, one: with_changes(left, one.values), chosen, config)


def _reasons(config: Config, chosen: Sequence[Concession]) -> dict[str, str]:
    """What would be broken if just this one had not been given up."""
    found: dict[str, str] = {}
    for one in chosen:
        others = [other for other in chosen if other is not one]
        violations = build.outline(_without(config, others)).violations
        message = violations[0].message if violations else ""
        found |= dict.fromkeys(one.values, message)
    return found
