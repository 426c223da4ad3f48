"""The log-likelihood of rows under a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jobs.forward import Forward
from jobs.inference.rows import Row
from jobs.parallel.vocabulary import IGNORE


def losses_of(forward: Forward, rows: Sequence[Row]) -> list[float] | None:
    """Negative log-likelihood of what counts in each row; None before the last stage. Collective within a replica."""
    longest = max(len(row.tokens) for row in rows) - 1
    tokens = torch.zeros((len(rows), longest), dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    for index, row in enumerate(rows):
        line, length = torch.tensor(row.tokens), len(row.tokens) - 1
        tokens[index, :length] = line[:-1]
        targets[index, row.begin - 1 : length] = line[row.begin :]
    losses = forward.losses(tokens, targets)
    return None if losses is None else [float(value) for value in losses.double().sum(dim=1).cpu()]
