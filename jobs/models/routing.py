"""Which experts a token visits, and what keeps them evenly loaded: functions of the router's outputs.

Everything is computed **per sequence**: the capacity of an expert counts the tokens of one sequence, and the auxiliary
losses are one number per sequence (the sequence-wise balance loss of DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
So neither depends on the micro-batch, the number of replicas or on what else happens to be in the batch, and every plan
trains the same model. The mean over the sequences of the global batch weighs like the token loss: each sequence once,
rows of padding not at all. Where ranks each have a part of a sequence, they count together, and the part of a loss that
each has is what its own tokens add to it. Of several documents in a sequence each has the room that it has alone, so
that what becomes of its tokens does not depend on the others; the losses are still one number per sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from jobs.models.packing import Layout
from jobs.parallel.region import gather_sequence, own_part
from jobs.parallel.ulysses import SequenceRanks
from strategies.specs import MoeSpec


class Choice(NamedTuple):
    """What the router has decided, for sequences of tokens.

    Attributes:
        experts: ``[b, s, k]`` numbers of the experts that each token visits, best first.
        weights: ``[b, s, k]`` what the output of each is multiplied with, fp32.
        shares: ``[b, s, experts]`` scores of all experts, scaled to sum 1 per token, fp32.
        kept: ``[b, s, k]`` whether the expert has room for the token; None when all have.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor
    kept: torch.Tensor | None


ALONE = SequenceRanks()


def choose(
    logits: torch.Tensor, moe: MoeSpec, length: int = 0, ranks: SequenceRanks = ALONE, layout: Layout | None = None
) -> Choice:
    """Route tokens. Collective among ``ranks`` where experts have little room.

    Args:
        logits: ``[b, s, experts]``, fp32.
        moe: What to do with them.
        length: Tokens of a whole sequence, for which experts have room; 0: these are whole. A row that only begins one,
            or that is padded to the length of another, is routed as it is alone.
        ranks: Those that have the other tokens of the same sequences.
        layout: How documents lie in whole sequences, each of which is then routed as it is alone; None for one in each.
    """
    weights, experts, shares = _softmax(logits, moe) if moe.routing == "softmax" else _sigmoid(logits, moe)
    room = capacity(moe, length or logits.shape[1] * ranks.size)
    if room is None:
        return Choice(experts, weights, shares, None)
    return Choice(experts, weights, shares, within(experts, moe.experts, room, ranks, layout))


def _softmax(logits: torch.Tensor, moe: MoeSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and experts of the visits, and the shares of all experts."""
    shares = logits.softmax(dim=-1)
    weights, experts = shares.topk(moe.top_k, dim=-1)
    if moe.normalize and moe.top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts, shares


def _sigmoid(logits: torch.Tensor, moe: MoeSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same; as logarithms, because scores may be too small for a number, all of a token's at once, too."""
    logs = F.logsigmoid(logits)
    experts = logits.topk(moe.top_k, dim=-1).indices
    best = logs.gather(-1, experts)
    weights = best.softmax(dim=-1) if moe.normalize and moe.top_k > 1 else best.exp()
    return weights, experts, logs.softmax(dim=-1)


def capacity(moe: MoeSpec, tokens: int) -> int | None:
    """Tokens that an expert takes from a sequence of ``tokens``; None for all."""
    if moe.capacity_factor <= 0:
        return None
    return max(1, math.ceil(moe.capacity_factor * moe.top_k * tokens / moe.experts))


def within(
    experts: torch.Tensor, count: int, room: int, ranks: SequenceRanks = ALONE, layout: Layout | None = None
) -> torch.Tensor:
    """Whom each of ``count`` experts takes when it has ``room`` tokens per document: ``[b, s, k]``, true if taken.

    The first ones in the document, so that no token's fate depends on tokens after it, or on other documents.
    """
    if layout is not None:
        return _within_documents(experts, count, room, ranks, layout)
    choices = experts.flatten(1)
    order = F.one_hot(choices, count).cumsum(dim=1) + ranks.before(visits(experts, count)).unsqueeze(1)
    place = order.gather(-1, choices.unsqueeze(-1)).view_as(experts)  # from 1, in the order of arrival
    return place <= room


def _within_documents(
    experts: torch.Tensor, count: int, room: int, ranks: SequenceRanks, layout: Layout
) -> torch.Tensor:
    """The same where documents lie in a sequence: a document may begin on one rank and end on another."""
    whole = experts if ranks.group is None else gather_sequence(experts, ranks.group)
    choices, tries = whole.flatten(1), whole.shape[2]
    arriving = F.one_hot(choices, count)
    earlier = (arriving.cumsum(dim=1) - arriving).flatten(1)  # visits before each, to every expert
    place = torch.arange(whole.shape[1], device=whole.device)
    first = ((place - layout.positions) * tries).repeat_interleave(tries, dim=1)  # of the same document
    own = torch.arange(choices.shape[1], device=whole.device)
    before = earlier.gather(1, own * count + choices) - earlier.gather(1, first * count + choices)
    kept = (before < room).view_as(whole)
    return kept if ranks.group is None else own_part(kept, ranks.group)


def visits(experts: torch.Tensor, count: int, kept: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens of each sequence visit each expert: ``[b, count]``; only those that are ``kept``, if given."""
    chosen = F.one_hot(experts.flatten(1), count)
    if kept is not None:
        chosen = chosen * kept.flatten(1).unsqueeze(-1)
    return chosen.sum(dim=1)


def balance_loss(choice: Choice, ranks: SequenceRanks = ALONE) -> torch.Tensor:
    """``[b]``: experts x sum over experts of (share of the visits) x (mean score); 1 when the load is even.

    Dropped visits count: what was wanted is what the router shall learn from. Of this rank's tokens it is their part of
    that, with the visits of all; collective among ``ranks``.
    """
    count = choice.shares.shape[-1]
    wanted = ranks.total(visits(choice.experts, count)).to(choice.shares.dtype)
    share = wanted / (choice.experts.shape[1] * choice.experts.shape[2] * ranks.size)
    return count * (share * choice.shares.mean(dim=1)).sum(dim=-1) / ranks.size


def z_loss(logits: torch.Tensor, ranks: SequenceRanks = ALONE) -> torch.Tensor:
    """``[b]``: mean over tokens of the squared log of the sum of exponentials (ST-MoE, arXiv 2202.08906, eq. 5).

    Of this rank's tokens it is their part of that.
    """
    return logits.logsumexp(dim=-1).square().mean(dim=1) / ranks.size
