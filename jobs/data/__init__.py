"""From a corpus to samples: tokenizer, token store on disk, and the deterministic global order of samples.

``prepare`` runs once, where a run is submitted; ``TokenStore`` runs in every rank. Importing this package needs
neither numpy nor tokenizers; calling into it does.
"""

from jobs.data.build import prepare
from jobs.data.order import Permutation, SampleOrder
from jobs.data.store import StoreMeta, TokenStore

__all__ = ["Permutation", "SampleOrder", "StoreMeta", "TokenStore", "prepare"]
