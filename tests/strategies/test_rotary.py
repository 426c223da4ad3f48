"""The base of rotary frequencies for longer sequences."""

from __future__ import annotations

import pytest

from strategies.rotary import scaled_base


@pytest.mark.parametrize("width", [4, 16, 64, 128])
@pytest.mark.parametrize("factor", [1.5, 4.0, 8.0])
def test_the_slowest_frequency_slows_by_the_factor_and_the_fastest_stays(width: int, factor: float) -> None:
    theta = scaled_base(10000.0, factor, width)
    assert theta ** (-(width - 2) / width) == pytest.approx(10000.0 ** (-(width - 2) / width) / factor)
    assert theta > 10000.0


def test_nothing_changes_without_a_factor_or_with_a_single_pair() -> None:
    assert scaled_base(10000.0, 1.0, 64) == scaled_base(10000.0, 4.0, 2) == 10000.0
