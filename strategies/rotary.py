"""How rotary positions reach beyond the sequences that a model was trained on."""

from __future__ import annotations

NARROWEST = 4
"""Narrowest head whose slowest frequency can be slowed: with one pair of numbers there is only the fastest."""


def scaled_base(theta: float, factor: float, width: int) -> float:
    """Base of the frequencies for sequences ``factor`` times as long: ``theta * factor^(d / (d - 2))``.

    NTK-aware scaling (bloc97, 2023; Peng et al., YaRN, arXiv 2309.00071, section 3.1): the slowest frequency,
    ``theta^(-(d - 2) / d)``, slows by the factor, so that the longest new distance turns it as far as the longest old
    one did; the fastest stays as it is, so that neighbours are told apart as before.

    Args:
        theta: Base that the model was trained with.
        factor: New sequence length over the old one; 1 changes nothing.
        width: Width of one head, ``d``.
    """
    return theta if factor == 1.0 or width < NARROWEST else theta * factor ** (width / (width - 2))
