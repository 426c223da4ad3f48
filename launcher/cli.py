"""The command line. One small module per verb under :mod:`launcher.commands`, imported when its verb is typed.

Exit codes: 0 ok, 1 internal error, 2 usage or invalid configuration, 3 plan infeasible, 4 cluster unreachable or
authentication, 5 not found, 6 resume refused, 7 storage; following a run: 100 it failed, 103 it was cancelled;
a drill: 104 failed, 105 incomplete; 130 interrupted (Ctrl-C, or a signal that ends it).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import click

from launcher.commands.groups import Nearest
from strategies.errors import Interrupted, PhalanxError, PlanInfeasible, StorageError

SCHEMA_VERSION = 1
VERBS = ("plan", "submit", "resume", "status", "logs", "cancel", "checkpoint", "cluster", "drill", "completion")


class Verbs(Nearest):
    """Finds a verb's module by its name, so that typing one verb loads only that one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every verb, in the order of use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, or None."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"launcher.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Try it: phalanx submit experiment=quickstart",
)
@click.version_option(package_name="phalanx", prog_name="phalanx")
def cli() -> None:
    """Plan, launch and keep alive large training jobs: the ranks close when one of them falls.

    \b
    phalanx plan strategy.tp=2 strategy.pp=2      what would run, and whether it can
    phalanx submit experiment=quickstart          run it, and watch
    phalanx resume latest                         go on with a run that ended early
    """


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``phalanx``: runs a verb and exits with its code; errors are text, never a traceback."""
    words = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in words and "--help" not in words
    try:
        code = cli.main(words, prog_name="phalanx", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        code = 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        code = 2
    except click.ClickException as error:
        code = _report(_click_error(error), as_json)
    except PhalanxError as error:
        code = _report(_phalanx_error(error), as_json)
    except (KeyboardInterrupt, click.Abort):
        code = _report(_phalanx_error(Interrupted("Interrupted.")), as_json)
    except Exception as error:
        code = _report(_unexpected(error), as_json)
    sys.exit(code if isinstance(code, int) else 0)


# What a system refuses is no mistake of ours: no space, no permission, a disk that fails.
_REFUSED = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE}
)


def _unexpected(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return _system_error(error)
    return _internal_error(error)


def _system_error(error: OSError) -> dict[str, Any]:
    if error.filename is None:
        _silence_stdout()
    what = "the output cannot be written." if error.filename is None else f"{error.filename} cannot be read or written."
    hint = "Free space or mend the permissions, then try again."
    return _phalanx_error(StorageError(what, why=error.strerror or str(error), hint=hint))


def _click_error(error: click.ClickException) -> dict[str, Any]:
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "phalanx"
    return {
        "kind": "UsageError",
        "message": error.format_message(),
        "why": "",
        "hint": f"{command} --help",
        "exit_code": error.exit_code if error.exit_code != 1 else 2,
    }


def _phalanx_error(error: PhalanxError) -> dict[str, Any]:
    document: dict[str, Any] = {
        "kind": type(error).__name__,
        "message": error.what,
        "why": error.why,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    if error.problems:
        document["problems"] = list(error.problems)
    if isinstance(error, PlanInfeasible):
        document["violations"] = [
            {"rule": one.rule, "message": one.message, "hint": one.hint} for one in error.violations
        ]
    return document | {"text": str(error)}


def _internal_error(error: Exception) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    where = ""
    with contextlib.suppress(OSError):
        fd, where = tempfile.mkstemp(prefix="phalanx-error-", suffix=".txt")
        with os.fdopen(fd, "w") as file:
            file.write(text)
    if os.environ.get("PHALANX_DEBUG"):
        click.echo(text, err=True)
    return {
        "kind": "InternalError",
        "message": f"Internal error: {type(error).__name__}: {error}",
        "why": "this is a bug of phalanx, not a mistake of yours",
        "hint": f"Report it with {where} (PHALANX_DEBUG=1 prints it)." if where else "Report it.",
        "exit_code": 1,
    }


def _report(document: dict[str, Any], as_json: bool) -> int:
    text = document.pop("text", None)
    if text is None:
        text = str(PhalanxError(document["message"], why=document["why"], hint=document["hint"]))
    with contextlib.suppress(OSError):  # nobody hears it: the code says it
        click.echo(text if document["kind"] == "Interrupted" else f"error: {text}", err=True)
    if as_json:
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "error": document}, indent=2))
            sys.stdout.flush()
    return int(document["exit_code"])


def _silence_stdout() -> None:
    """Nothing more can be written to stdout: keep the interpreter from complaining about it at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
