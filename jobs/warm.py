"""Imports, ahead of time and once per node, what a rank would import: the memory that ranks are forked from.

Imports only. The process that calls this must stay at one thread and must not touch a device, so nothing here may
compute: one parallel region would start the threads that make forking unsafe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

MODULES = (
    "jobs.engine",
    "jobs.worker",
    "jobs.stages.pretrain",
    "jobs.checkpoint.save",
    "jobs.checkpoint.restore",
)
"""What a rank of our own imports; most of the rest follows from these."""

LAZY = ("torch.profiler._cupti_monitor",)
"""What torch imports at the first step; another version of it may not have them."""


def warm() -> None:
    """Import everything.

    Without the garbage collector: imports leave little garbage, and looking for it among all that they make is up to a
    quarter of their time. The pool collects once, when all of it is there.
    """
    gc.disable()
    try:
        _import_all()
    finally:
        gc.enable()


def _import_all() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for module in LAZY:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
