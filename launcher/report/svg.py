"""A few shapes of SVG, escaped and rounded. Colours come from the page's style sheet by class name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]

CHARACTER = 6.4
"""Width of one character of 12 px text, in px: enough for the digits and letters that labels are made of."""


def number(value: float) -> str:
    """A coordinate with as many digits as a screen can show."""
    return f"{value:.1f}".removesuffix(".0")


class Svg:
    """A picture that grows shape by shape.

    Args:
        width: In px of its own coordinates; the page scales it.
        height: Likewise.
        label: What the picture shows, for those who cannot see it.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width = width
        self.height = height
        self._label = label
        self._shapes: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, css: str, *, tip: str = "", fill: str = "") -> None:
        """A rectangle; ``tip`` appears under the mouse, ``fill`` is for colours that no class has."""
        paint = f' style="fill:{escape(fill)}"' if fill else ""
        shape = f'<rect x="{number(x)}" y="{number(y)}" width="{number(max(0.0, width))}" height="{number(height)}"'
        self._shapes.append(f'{shape} class="{escape(css)}"{paint}>{_title(tip)}</rect>')

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        ends = " ".join(f'{k}="{number(v)}"' for k, v in zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True))
        self._shapes.append(f'<line {ends} class="{escape(css)}"/>')

    def dot(self, x: float, y: float, radius: float, css: str, *, tip: str = "") -> None:
        """A filled circle."""
        at = f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
        self._shapes.append(f'<circle {at} class="{escape(css)}">{_title(tip)}</circle>')

    def path(self, steps: Sequence[str], css: str) -> None:
        """Many shapes in one element."""
        if steps:
            self._shapes.append(f'<path d="{escape("".join(steps))}" class="{escape(css)}"/>')

    def text(self, x: float, y: float, words: str, css: str = "", *, anchor: Anchor = "start") -> None:
        """A line of text whose baseline is at ``y``."""
        extra = f' text-anchor="{anchor}"' if anchor != "start" else ""
        extra += f' class="{escape(css)}"' if css else ""
        self._shapes.append(f'<text x="{number(x)}" y="{number(y)}"{extra}>{escape(words)}</text>')

    def __str__(self) -> str:
        box = f'viewBox="0 0 {number(self.width)} {number(self.height)}"'
        return f'<svg {box} role="img" aria-label="{escape(self._label)}">{"".join(self._shapes)}</svg>'


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as steps of a path."""
    wide, high = number(width), number(height)
    return f"M{number(x)} {number(y)}h{wide}v{high}h-{wide}z"


def ticks(top: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to ``top`` or a little less, about ``about`` of them; steps of 1, 2 or 5 times 10^n."""
    if not top > 0 or not math.isfinite(top):
        return [0.0]
    rough = top / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [i * step for i in range(int(top / step * 1.0001) + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions of labels next to ``wanted`` (ascending) but at least ``gap`` apart, within bounds where possible."""
    placed: list[float] = []
    for at in wanted:
        placed.append(max(at, placed[-1] + gap if placed else low))
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed
