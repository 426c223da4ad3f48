"""A tokenizer beside a model's weights, as transformers loads it. Standard library only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jobs.hf.folder import TOKENIZER

CONFIG = "tokenizer_config.json"


def write_tokenizer(source: Path, folder: Path, end_id: int) -> None:
    """Lay a tokenizer into the folder of a model.

    Args:
        source: A ``tokenizer.json``.
        folder: The folder.
        end_id: The token that ends a document, and begins one.

    Raises:
        OSError: Something cannot be read or written.
    """
    added = json.loads(source.read_text(encoding="utf-8")).get("added_tokens", ())
    ends = [one["content"] for one in added if one["id"] == end_id]
    named: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token"), ends[0]) if ends else {}
    shutil.copyfile(source, folder / TOKENIZER)
    document = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
