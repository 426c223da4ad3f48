"""The part of the configuration that says where the text comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        path: File or folder; every node sees it under this path where the work is spread over a cluster.
        name: What it is called; null means the last part of ``path``.
        kind: ``text`` (a file is a document), ``jsonl`` (also ``.gz`` and ``.zst``), ``parquet``, ``arrow`` (a Hugging
            Face dataset as ``save_to_disk`` leaves it), ``stdlib``; of a folder ``text`` is every file, the others are
            the files of that kind. ``auto`` goes by the names of the files, which have to be of one kind.
        field: Field of a record that holds the text.
        config: Configuration of a dataset as it lies on the Hugging Face hub: one that its card names, or the folder
            below ``path`` that its splits are in; null means the card's default, or the only one.
        split: Split of such a dataset, or ``all`` of it; null means ``train``.
        weight: Share of the run's tokens, in proportion to the weights of the others.
        epochs: Instead of a weight: how many times its tokens are seen in the whole run. If no source has a weight,
            nothing can fill or give way to make that exact: the epochs are proportions then, and the run says so.
    """

    path: str | None = None
    name: str | None = None
    kind: str = "auto"
    field: str = "text"
    config: str | None = None
    split: str | None = None
    weight: float | None = None
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the text comes from.

    Attributes:
        kind: ``stdlib``: the source of Python's standard library on this machine. ``text``: files of the user.
            ``mixture``: ``sources``.
        path: File or folder of text (``text`` only).
        cache: Folder of prepared token stores, shared like ``run.dir``; null means ``<run.dir>/.data``.
        sources: What a mixture is made of.
        tokenizer: A ``tokenizer.json``; null trains a byte-pair tokenizer of ``model.vocab`` tokens on the text.
        end_token: The special token of ``tokenizer`` that ends a document; null means the one that the files beside it
            name (``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json``, ``config.json``),
            or else one by a usual name.
        validation: Part of the documents that is kept from training, for ``train.eval_every``: chosen by the documents
            themselves.
        packing: No token sees another document than its own, and positions start anew with each.
        workers: Processes that tokenize a mixture on this machine; null means one per processor.
    """

    kind: Literal["stdlib", "text", "mixture"]
    path: str | None = None
    cache: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    tokenizer: str | None = None
    end_token: str | None = None
    validation: float = 0.0
    packing: bool = False
    workers: int | None = None

    @property
    def mixed(self) -> bool:
        """Whether it is prepared as a mixture is."""
        return bool(self.kind == "mixture" or self.tokenizer or self.validation)
