"""Text from a model, greedy or sampled: the same under any plan, because every draw has a seed of its own.

The noise of one draw is a function of (seed, prompt, position) alone; with it the choice is the largest of logit +
Gumbel noise, so that the rounding of another plan matters only where two tokens are as good as equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from jobs.forward import Forward
from jobs.models.init import seed_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Only among so many most likely ones; 0: among all.
        top_p: Only among the most likely ones that have this probability together.
        seed: Seed of the draws.
        end: The token that ends a text; None for none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    end: int | None = None


def draw(logits: torch.Tensor, how: Sampling, prompt: str, position: int) -> int:
    """The next token.

    Args:
        logits: ``[vocab]``.
        how: How to choose.
        prompt: The text that is continued.
        position: Number of the token that is chosen, from the beginning of the prompt.
    """
    wide = logits.double().cpu()
    if how.temperature == 0:
        return int(wide.argmax())
    scaled = wide / how.temperature
    order = torch.sort(scaled, descending=True, stable=True).indices
    kept = order[: how.top_k] if how.top_k else order
    if how.top_p < 1.0:
        shares = torch.softmax(scaled[kept], dim=-1)
        before = shares.cumsum(dim=-1) - shares
        kept = kept[before < how.top_p]  # the first always stays
    generator = torch.Generator().manual_seed(seed_of(how.seed, f"{position}/{prompt}"))
    uniform = torch.rand(len(wide), dtype=torch.float64, generator=generator).clamp_min(1e-300)
    noisy = scaled[kept] - torch.log(-torch.log(uniform[kept]))
    return int(kept[int(noisy.argmax())])


def generate(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    *,
    count: int,
    how: Sampling,
    done: Callable[[], None] = lambda: None,
) -> list[tuple[list[int], float]]:
    """Continue every prompt by ``count`` tokens, or until its text ends. Collective; equal on all ranks of a replica.

    Args:
        forward: The model.
        prompts: Tokens of each prompt, at least one.
        keys: What fixes the draws of each prompt.
        count: Most tokens to add; the model sees the last ``seq`` ones at a time. Where a text is longer it goes
            through all of those for every token, else through the newest alone.
        how: How to choose them.
        done: Called after every token.

    Returns:
        Of each prompt its tokens with the new ones, and the negative log-likelihood of those.
    """
    rows, reading = [list(prompt) for prompt in prompts], _Reading(forward, count)
    losses, ended = [0.0] * len(rows), [False] * len(rows)
    for _ in range(count):
        if all(ended) and forward.grid.ep == 1:  # replicas that share experts go through the model together
            break
        logits = reading.logits(rows)
        chosen = None if logits is None else _choose(logits, rows, keys, how)
        shared = forward.share(chosen, torch.empty((len(rows), 2), dtype=torch.float64)).cpu()
        for index, (token, loss) in enumerate(shared.tolist()):
            if not ended[index]:
                rows[index].append(int(token))
                losses[index] += loss
                ended[index] = int(token) == how.end
        done()
    return list(zip(rows, losses, strict=True))


class _Reading:
    """What the model says of rows that grow: it goes through what is new, as long as rows fit into its sequence."""

    def __init__(self, forward: Forward, count: int) -> None:
        self._forward, self._count = forward, count
        self._goes_on = False

    def logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Logits behind the end of every row, ``[rows, vocab]``; None before the last stage."""
        seq, longest = self._forward.model.seq, max(map(len, rows))
        windows = [row[-seq:] for row in rows]
        tokens = torch.zeros((len(rows), min(longest, seq)), dtype=torch.int64)
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = torch.tensor(window)
        ends = torch.tensor([len(window) - 1 for window in windows])
        if self._goes_on and longest <= seq:
            return self._forward.logits_after(tokens, ends)
        self._goes_on = self._forward.remembers and longest < seq
        return self._forward.logits_at(tokens, ends, room=min(seq, longest + self._count) if self._goes_on else 0)


def _choose(logits: torch.Tensor, rows: list[list[int]], keys: Sequence[str], how: Sampling) -> torch.Tensor:
    """``[rows, 2]``: the token of each row and its negative log-likelihood."""
    tokens = [draw(logits[index], how, keys[index], len(row)) for index, row in enumerate(rows)]
    losses = -torch.log_softmax(logits.double(), dim=-1)[torch.arange(len(rows)), torch.tensor(tokens)]
    return torch.stack([torch.tensor(tokens, dtype=torch.float64), losses.cpu()], dim=1)
