"""First code of a rank's process when it is not forked from warm memory; also the calls that tie a child to its parent.

Runs in two ways, and therefore imports nothing but the standard library at the top:

- ``python -I -S .../child.py PARENT CWD --exec ARGV...``: becomes the user's command, without our packages in sight.
- ``python -P -m launcher.host.child PARENT CWD --target MODULE:FUNCTION``: calls one of our own entry points.

In both, the kernel kills the process when its parent dies, so that no rank outlives its node's supervision.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

RANK_PID = "PHALANX_RANK_PID"
"""Environment variable with the process id of the rank, by which the processes that it starts are known as its own."""

EXIT_CANNOT_START = 127
"""Exit code of a rank whose command or entry point could not be started (the shell's code for it)."""


def _prctl(option: int, value: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def die_with_parent(signum: int, parent: int) -> None:
    """Ask the kernel to send ``signum`` to this process when the thread that made it ends.

    Args:
        signum: The signal.
        parent: Process id of the parent; when it is gone already the process ends here and now.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(EXIT_CANNOT_START)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, instead of leaving that to process 1."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_name(name: str) -> None:
    """Name of the process as ``ps`` and ``top`` show it; 15 characters are kept."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def resolve(target: str) -> Callable[[], Any]:
    """Import ``module:function`` and return the function."""
    module, _, function = target.partition(":")
    found: Callable[[], Any] = getattr(importlib.import_module(module), function)
    return found


def run(target: str) -> None:
    """Call ``module:function`` as the main program of this process and end the process with its exit code.

    Leaves by ``os._exit`` after the exit handlers: tearing the interpreter down would touch, and so copy, every page
    that is shared with the pool.
    """
    code: Any = 1
    try:
        code = resolve(target)()
    except SystemExit as request:
        code = request.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    _leave(code)


def _leave(code: Any) -> None:
    status = code if isinstance(code, int) else int(code is not None)
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 1
    os._exit(status & 0xFF)


def main(argv: list[str]) -> None:
    """Entry point; see the module's docstring."""
    parent, cwd, mode, *rest = argv
    die_with_parent(signal.SIGKILL, int(parent))
    os.environ[RANK_PID] = str(os.getpid())
    try:
        os.chdir(cwd)
        if mode == "--exec":
            os.execvp(rest[0], rest)
    except OSError as error:
        print(f"cannot start {rest[0]!r} in {cwd}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(EXIT_CANNOT_START)
    run(rest[0])


if __name__ == "__main__":
    main(sys.argv[1:])
