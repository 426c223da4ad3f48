"""``python -m jobs.engine``: compile what DeepSpeed needs compiled to keep state on disks (strategy.offload_path)."""

from __future__ import annotations

import sys

from jobs.engine.async_io import build
from strategies.errors import PhalanxError


def main() -> int:
    """Compile; tells the folder, or what is missing."""
    try:
        print(f"async_io is compiled in {build()}")
    except PhalanxError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
