"""What ranks read of prepared data: sample ``i`` of the run, sample ``i`` of the validation, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from jobs.data import tokenizer as bpe
from jobs.data.mixture import Interleaving
from jobs.data.order import SampleOrder
from jobs.data.shards import TRAIN, VALID, Tokens, broken, read_source
from jobs.data.spelling import Plain
from jobs.data.store import TOKENIZER, TokenStore, file_digest
from jobs.spec import DataSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer


class Samples(Protocol):
    """Samples and the tokenizer that made them."""

    def sample(self, seed: int, index: int) -> npt.NDArray[np.int64]:
        """Sample ``index`` (from 0) of the global order under ``seed``, shape [seq + 1]."""

    def validation(self) -> Validation | None:
        """What is not trained on; None if there is no such part."""

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``."""

    def decode(self, tokens: list[int]) -> str:
        """Text of ``tokens``."""


class Validation(Protocol):
    """Samples that are not trained on."""

    count: int

    def sample(self, seed: int, index: int) -> npt.NDArray[np.int64]:
        """Sample ``index`` (from 0, below ``count``)."""


def open_samples(data: DataSpec, seq: int) -> Samples:
    """The samples of prepared data.

    Raises:
        StorageError: A store is missing or damaged, or holds something else than ``data`` says.
        ConfigError: It is shorter than one sequence.
    """
    return Mixture(data, seq) if data.mixed else TokenStore(data, seq)


class Mixture:
    """Samples of a prepared mixture: which source and which window of it sample ``i`` is, is a closed form.

    Args:
        data: A prepared mixture (:func:`jobs.data.blend.prepare_mixture`).
        seq: Tokens per sequence.
        side: ``train`` or ``valid``.

    Attributes:
        count: How many samples there are before one is repeated (``valid`` only means something by it).
    """

    def __init__(self, data: DataSpec, seq: int, side: str = TRAIN) -> None:
        self._data, self._seq, self._side = data, seq, side
        self._sources: list[Tokens] = []
        for source in data.sources:
            folder = Path(source.store)
            meta = read_source(folder)
            if (meta.digest, meta.vocab) != (source.digest, data.vocab):
                raise broken(folder, f"it holds tokens {meta.digest[:12]}, the run was made with {source.digest[:12]}")
            self._tokenizer_digest = meta.tokenizer_digest
            self._sources.append(Tokens(folder, meta, side))
        self.windows = [max(0, (tokens.count - 1) // seq) for tokens in self._sources]
        weights = [
            source.share if windows > 0 else 0 for source, windows in zip(data.sources, self.windows, strict=True)
        ]
        self._turns = Interleaving(weights) if any(weights) else None
        self.count = self._turns.until_repeated(self.windows) if self._turns else 0

    def locate(self, seed: int, index: int) -> tuple[int, int, int]:
        """Source, epoch of the source (from 0) and window of sample ``index``."""
        assert self._turns is not None
        source, before = self._turns.locate(index)
        salt = f"{self._side} {source}"
        order = SampleOrder(windows=self.windows[source], seed=seed, salt=salt)
        return source, *order.locate(before)

    def sample(self, seed: int, index: int) -> npt.NDArray[np.int64]:
        """See :class:`Samples`."""
        source, _, window = self.locate(seed, index)
        start = window * self._seq
        return self._sources[source].slice(start, start + self._seq + 1)

    def validation(self) -> Mixture | None:
        """See :class:`Samples`."""
        if not self._data.validation:
            return None
        other = Mixture(self._data, self._seq, VALID)
        return other if other.count else None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the mixture; raises StorageError when its file is not what it was."""
        folder = Path(self._data.store)
        try:
            if file_digest(folder / TOKENIZER) != self._tokenizer_digest:
                raise broken(folder, f"{TOKENIZER} was changed")
        except OSError as error:
            raise broken(folder, str(error)) from error
        return bpe.read_tokenizer(folder / TOKENIZER)

    def encode(self, text: str) -> list[int]:
        """See :class:`Samples`."""
        return Plain(self.tokenizer()).encode(text)

    def decode(self, tokens: list[int]) -> str:
        """See :class:`Samples`."""
        return str(self.tokenizer().decode(tokens))
