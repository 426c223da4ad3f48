"""The real worker as the target of a warm pool, which says at its end what it had to import itself."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from pathlib import Path

import torch

from jobs import worker


def main() -> int:
    """Run the worker; leave ``imports-<rank>.json`` in the run directory."""
    before, began = set(sys.modules), time.time()

    def tell() -> None:
        fresh = [name for name in sys.modules if name not in before]
        target = Path(os.environ["PHALANX_RUN_DIR"], f"imports-{os.environ['RANK']}.json")
        threads = torch.get_num_threads()
        said = {"modules": fresh, "threads": threads, "began": began, "seconds": time.time() - began}
        target.write_text(json.dumps(said))

    atexit.register(tell)
    return worker.main()
