"""Imports, ahead of time and once per node, what a rank would import: the memory that ranks are forked from.

Imports only. The process that calls this must stay at one thread and must not touch a device, so nothing here may
compute: one parallel region would start the threads that make forking unsafe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Iterator, Sequence

MODULES = (
    "jobs.engine",
    "jobs.worker",
    "jobs.stages.pretrain",
    "jobs.checkpoint.save",
    "jobs.checkpoint.restore",
)
"""What a rank of our own imports; most of the rest follows from these."""

LAZY = ("torch.profiler._cupti_monitor", "numpy.ma")
"""What torch imports at the first step and numpy in a restore; another version of them may not have it."""

S3 = "s3fs"
"""What reads from an S3 store; an extra that need not be installed."""

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


def warm() -> None:
    """Import everything."""
    _warm(LAZY)


def warm_s3() -> None:
    """Import everything, and what ranks restore with from an S3 store."""
    _warm((*LAZY, S3))


def _warm(optional: Sequence[str]) -> None:
    """Import what every rank needs, and what need not be there.

    Without the garbage collector: imports leave little garbage, and looking for it among all that they make is up to a
    quarter of their time. The pool collects once, when all of it is there.
    """
    gc.disable()
    try:
        with _nothing_compiled():
            _import_all(optional)
    finally:
        gc.enable()


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Let ``torch.compile`` do nothing meanwhile.

    DeepSpeed compiles a function of an optimizer that we never use when it is imported, for which torch imports its
    whole compiler: a third of the warm-up, and a tenth of the memory that every rank is forked with.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        os.environ.pop(_NO_COMPILER)
        if before is not None:
            os.environ[_NO_COMPILER] = before


def _import_all(optional: Sequence[str]) -> None:
    for module in MODULES:
        importlib.import_module(module)
    for module in optional:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
