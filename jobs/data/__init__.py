"""From text to samples: sources, tokenizer, token stores on disk, and the deterministic global order of samples.

:func:`prepare` (one corpus in one file) and :func:`prepare_mixture` (any number of sources in shards) run once, where a
run is submitted; :func:`open_samples` runs in every rank. Importing this package needs neither numpy nor tokenizers;
calling into it does.
"""

from jobs.data.blend import prepare_mixture
from jobs.data.build import prepare
from jobs.data.order import Permutation, SampleOrder
from jobs.data.samples import Samples, open_samples
from jobs.data.store import StoreMeta, TokenStore

__all__ = [
    "Permutation",
    "SampleOrder",
    "Samples",
    "StoreMeta",
    "TokenStore",
    "open_samples",
    "prepare",
    "prepare_mixture",
]
