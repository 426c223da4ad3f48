"""Which source sample ``i`` of a mixture comes from: a closed form with exact counts over every prefix.

The sources are the leaves of a binary tree. At each node the first ``n`` samples are split between its two halves: the
left one gets ``n`` times its part of the weight, rounded. So the number of samples of every source among the first
``n`` is known without looking at any of them, sample ``i`` is found by one walk from the root, and no count is ever
further from its weight than the roundings on the way to its leaf: less than one and a half samples. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.spec import SourceSpec
from strategies.errors import did_you_mean

SHARES = 10**12
"""What the shares of all sources sum to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    """A part of the tree: one source (``source`` >= 0), or two halves."""

    weight: int
    source: int = -1
    left: _Node | None = None
    right: _Node | None = None

    def first(self, count: int) -> int:
        """How many of the first ``count`` samples go to the left half."""
        assert self.left is not None
        return (2 * count * self.left.weight + self.weight) // (2 * self.weight)


class Interleaving:
    """The order in which sources take turns.

    Args:
        weights: Whole numbers, not all zero; a source of weight 0 has no turns.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = tuple(weights)
        heap = [
            (weight, source, _Node(weight=weight, source=source)) for source, weight in enumerate(weights) if weight
        ]
        heapq.heapify(heap)
        while len(heap) > 1:  # as in Huffman's code: heavy sources are near the root
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            node = _Node(weight=light[0] + heavy[0], left=heavy[2], right=light[2])
            heapq.heappush(heap, (node.weight, min(light[1], heavy[1]), node))
        self._root = heap[0][2]

    def locate(self, index: int) -> tuple[int, int]:
        """The source of sample ``index`` (from 0), and how many samples of that source came before it."""
        node = self._root
        while node.left is not None and node.right is not None:
            before = node.first(index)
            goes_left = node.first(index + 1) > before
            node, index = (node.left, before) if goes_left else (node.right, index - before)
        return node.source, index

    def counts(self, index: int) -> list[int]:
        """How many of the first ``index`` samples each source has."""
        found = [0] * len(self.weights)
        todo = [(self._root, index)]
        while todo:
            node, count = todo.pop()
            if node.left is None or node.right is None:
                found[node.source] = count
                continue
            left = node.first(count)
            todo += [(node.left, left), (node.right, count - left)]
        return found

    def until_repeated(self, windows: Sequence[int]) -> int:
        """How many samples there are before a source would need a window a second time: not one fewer, not one more."""
        total = sum(self.weights)
        used = [(number, weight) for number, weight in zip(windows, self.weights, strict=True) if weight]
        low, high = 0, min((number + 2) * total // weight for number, weight in used) + 1
        while high - low > 1:  # counts never fall, and none is further than 1.5 from its weight: it is in between
            middle = (low + high) // 2
            fits = all(count <= number for count, number in zip(self.counts(middle), windows, strict=True))
            low, high = (middle, high) if fits else (low, middle)
        return low


def form_problems(sources: Sequence[SourceSpec], kinds: Sequence[str]) -> list[tuple[int, str, str, str]]:
    """What is wrong with a list of sources before any file is looked at: (source, key, message, hint) each."""
    found: list[tuple[int, str, str, str]] = []
    names: dict[str, int] = {}
    for number, source in enumerate(sources):
        if source.kind not in kinds:
            found.append((number, "kind", f"not a known value: {source.kind!r}", did_you_mean(source.kind, kinds)))
        if not source.path and source.kind != "stdlib":
            found.append((number, "path", "missing", "Give a file or a folder."))
        if source.name in names:
            message = f"source {names[source.name]} is called {source.name!r}, too"
            found.append((number, "name", message, "Give each a name of its own."))
        names.setdefault(source.name, number)
        found += [(number, *one) for one in _amount_problems(source)]
    positive = [source for source in sources if (source.weight or 0) > 0 or (source.epochs or 0) > 0]
    if sources and not positive and not any("0 or more" in one[2] for one in found):
        found.append((0, "weight", "all weights are zero", "Give one source a weight above 0."))
    return found


def _amount_problems(source: SourceSpec) -> list[tuple[str, str, str]]:
    found = [
        (key, f"expected 0 or more, found {value!r}", "0 leaves the source out.")
        for key, value in (("weight", source.weight), ("epochs", source.epochs))
        if value is not None and not 0 <= value < float("inf")
    ]
    if (source.weight is None) == (source.epochs is None):
        both = "both are given" if source.weight is not None else "neither is given"
        found.append(("weight", f"a source has a weight or a number of epochs, {both}", "Give one of the two."))
    return found


def shares(sources: Sequence[SourceSpec], windows: Sequence[int], samples: int) -> tuple[list[int], str]:
    """Parts of all samples, of :data:`SHARES`.

    Sources with ``epochs`` get what makes up so many of them in the whole run; the others share the rest by weight. If
    all have epochs, those are proportions, as weights are, only of the sources' own lengths.

    Args:
        sources: Their form is right.
        windows: Windows of each.
        samples: Samples of the whole run.

    Returns:
        The shares, and what is wrong with them ("" for nothing).
    """
    wanted = [(source.epochs or 0.0) * number for source, number in zip(sources, windows, strict=True)]
    weights = [source.weight or 0.0 for source in sources]
    asked, total = sum(wanted), sum(weights)
    if not total:
        return _whole([one / asked for one in wanted]), ""
    if problem := beyond(sources, windows, samples):
        return [], problem
    rest = (samples - asked) / samples
    return _whole([one / samples + rest * weight / total for one, weight in zip(wanted, weights, strict=True)]), ""


def beyond(sources: Sequence[SourceSpec], windows: Sequence[int], samples: int) -> str:
    """What is wrong with epochs that leave nothing of a run of ``samples`` samples for weights; "" for nothing."""
    asked = sum((source.epochs or 0.0) * number for source, number in zip(sources, windows, strict=True))
    if asked < samples or not any(source.weight for source in sources):
        return ""
    told = ", ".join(
        f"{source.name} {source.epochs:g} x {number}"
        for source, number in zip(sources, windows, strict=True)
        if source.epochs
    )
    return f"the epochs ask for {asked:.0f} samples ({told}), the run has {samples}: nothing is left for weights"


def _whole(parts: Sequence[float]) -> list[int]:
    """Parts of 1 as parts of :data:`SHARES` that sum to it; what rounding leaves goes to the largest."""
    found = [round(part * SHARES) for part in parts]
    found[found.index(max(found))] += SHARES - sum(found)
    return found
