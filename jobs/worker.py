"""One rank: read the job, build the engine, run the stage, and say how it ended.

Exit codes: 0 done; 1 an unexpected error; :data:`CORRUPT_EXIT_CODE` the checkpoint to restore is damaged (restart from
an older one); :data:`BLOW_UP_EXIT_CODE` training has blown up (restart from before it, without the samples that did
it); any other error of :mod:`strategies.errors` its own number (7 for storage). SIGTERM ends a rank at once, as a shell
sees it with 128 + 15: there is nothing to save that the newest checkpoint does not hold.

torch and deepspeed are imported only once the process can report and be stopped; in a warm pool they are there already.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn, TypeGuard

from jobs.checkpoint.errors import AbsentFile, CorruptCheckpoint
from jobs.faults import FaultInjector
from jobs.numerics import BlowUp
from jobs.report import Reporter
from jobs.spec import RankEnv, read_job
from strategies.errors import ConfigError, PhalanxError

CORRUPT_EXIT_CODE = 76
BLOW_UP_EXIT_CODE = 77


class StepCounter:
    """The step that the rank is at, for the report of an error."""

    def __init__(self) -> None:
        self.step = 0


def main() -> int:
    """Be one rank, as the environment says.

    Returns:
        0. Every failure ends the process with its own exit code, without the exit handlers: they would wait for the
        other ranks.
    """
    try:
        env = RankEnv.read(os.environ)
    except KeyError as missing:
        print(f"jobs.worker is started by a host agent: {missing} is not set in the environment.", file=sys.stderr)
        return ConfigError.exit_code
    _set_signals()
    reporter = Reporter(env.report_fd)
    reporter.send("started", pid=os.getpid())
    counter = StepCounter()
    try:
        _run(env, reporter, counter)
    except Exception as error:
        _fail(error, reporter, counter.step)
    return 0


def _run(env: RankEnv, reporter: Reporter, counter: StepCounter) -> None:
    job = read_job(Path(env.job_path))
    hooks = FaultInjector(job.faults, env, reporter)
    if job.infers:
        from jobs.stages.inference import run

        run(job=job, env=env, reporter=reporter, hooks=hooks, counter=counter)
        return
    from jobs.engine import Engine
    from jobs.stages.pretrain import Pretrain

    engine = Engine.build(job, env)
    reporter.send("built", **engine.built)
    Pretrain(job=job, env=env, engine=engine, reporter=reporter, hooks=hooks, counter=counter).run()
    engine.close()


def _set_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the kernel's own: works inside a blocked collective, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's; ranks end when the launcher says so
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)  # "where do you hang?"


def _fail(error: Exception, reporter: Reporter, step: int) -> NoReturn:
    code = exit_code(error)
    if damaged(error):
        reporter.send("rejected", path=error.path, reason=error.reason)
    if isinstance(error, BlowUp):
        reporter.send("blow_up", step=error.step, why=error.why, samples=error.samples)
    reporter.send(
        "error",
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        step=step,
        exit_code=code,
    )
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def damaged(error: Exception) -> TypeGuard[CorruptCheckpoint]:
    """Whether a checkpoint is proved to be damaged. A file that is not here may be there for others."""
    return isinstance(error, CorruptCheckpoint) and not isinstance(error, AbsentFile)


def exit_code(error: Exception) -> int:
    """Exit code of a rank that ends with ``error``."""
    if damaged(error):
        return CORRUPT_EXIT_CODE
    if isinstance(error, BlowUp):
        return BLOW_UP_EXIT_CODE
    return error.exit_code if isinstance(error, PhalanxError) else 1


if __name__ == "__main__":
    sys.exit(main())
