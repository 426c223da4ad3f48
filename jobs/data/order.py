"""Which window of the corpus is sample ``i``: a pure function of (seed, index), with O(1) seek.

The order is the concatenation of epochs of the corpus; within one epoch every window comes up exactly once, in an order
drawn from a keyed permutation that needs no table: a balanced Feistel network over the next power of four, walked
until it lands inside the domain (cycle-walking keeps it a bijection; fewer than four walks on average).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

ROUNDS = 6


class Permutation:
    """A bijection of ``range(size)``, chosen by ``key``.

    Args:
        size: Number of elements, at least 1.
        key: Chooses the permutation; every distinct key gives an independent one.
    """

    def __init__(self, size: int, key: bytes) -> None:
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._key = hashlib.blake2b(key, digest_size=32).digest()

    def __call__(self, position: int) -> int:
        """Image of ``position``."""
        if not 0 <= position < self._size:
            raise IndexError(f"position {position} is outside range({self._size})")
        image = self._feistel(position)
        while image >= self._size:
            image = self._feistel(image)
        return image

    def _feistel(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for number in range(ROUNDS):
            block = number.to_bytes(1, "little") + right.to_bytes(8, "little")
            mixed = hashlib.blake2b(block, digest_size=8, key=self._key).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & self._mask)
        return left << self._half_bits | right


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOrder:
    """Maps the index of a sample to a window of the corpus.

    Attributes:
        windows: Number of windows in the corpus, at least 1.
        seed: Seed of the run.
        salt: Tells the orders of several sources of one run apart; empty for the only one.
    """

    windows: int
    seed: int
    salt: str = ""

    def locate(self, index: int) -> tuple[int, int]:
        """Epoch of the corpus (from 0) and window of sample ``index`` (from 0)."""
        epoch, position = divmod(index, self.windows)
        key = f"phalanx order|{self.seed}|{epoch}{self.salt and '|'}{self.salt}".encode()
        return epoch, Permutation(self.windows, key)(position)
