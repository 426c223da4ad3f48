"""A rank without torch: does what its environment tells it, so that tests of the launcher run in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

from jobs.orders import Orders
from jobs.report import Reporter
from jobs.spec import RankEnv


def warm() -> None:
    """Warms nothing up."""


def warm_fails() -> None:
    """A warm-up that raises."""
    raise ImportError("no such wonder")


def warm_dies() -> None:
    """A warm-up that takes its process with it."""
    os.kill(os.getpid(), signal.SIGKILL)


def warm_forever() -> None:
    """A warm-up that does not end."""
    time.sleep(3600)


def warm_starts_a_thread() -> None:
    """A warm-up after which forking is unsafe."""
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def main() -> int:
    """Run the comma-separated verbs of ``FAKE``, or of ``FAKE_<rank>`` when there is one, one after the other."""
    env = RankEnv.read(os.environ)
    reporter = Reporter(env.report_fd)
    reporter.send("started", pid=os.getpid())
    print(f"rank {env.rank} runs", flush=True)
    for verb in os.environ.get(f"FAKE_{env.rank}", os.environ.get("FAKE", "done")).split(","):
        name, _, value = verb.partition("=")
        _do(name, value, env, reporter)
    return 0


def _do(name: str, value: str, env: RankEnv, reporter: Reporter) -> None:
    if name == "step":
        reporter.send("step", step=int(value))
    elif name == "steps":
        for step in range(1, 10**9):
            reporter.send("step", step=step)
            time.sleep(float(value))
    elif name == "wait":
        time.sleep(float(value or 3600))
    elif name == "obey":
        while not Orders(env.order_fd).leaves_after(int(value)):
            time.sleep(0.01)
    elif name == "exit":
        sys.exit(int(value))
    elif name == "raise":
        reporter.send("error", type="ValueError", message=value, traceback="", step=3, exit_code=1)
        raise ValueError(value)
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "eat":
        eaten = [b"x" * (8 << 20) for _ in range(int(value) // 8)]
        reporter.send("step", step=len(eaten))
    elif name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif name == "daemon":
        # A process in a session of its own, as the helpers of other libraries are.
        subprocess.Popen(["sleep", "3600"], start_new_session=True)
    elif name == "print":
        print(value, flush=True)
    elif name == "write":  # to a file system that may be frozen
        with open(value, "w") as file:
            file.write("x")
    elif name == "flood":
        os.write(env.report_fd, b"x" * int(value))
    elif name == "forge":
        reporter.send(value, code=0)
    elif name == "look":
        print(json.dumps(_what_i_see()), flush=True)
    elif name == "done":
        reporter.send("done", step=0)


_SEEN = frozenset(
    {"MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "GLOO_SOCKET_IFNAME", "PATH", "PHALANX_AGENT_PID"}
    | {"DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"}
    | {f"PHALANX_{name}_FD" for name in ("REPORT", "ORDER", "STORE")}
)
"""Not all: an exit carries no more than the end of a log."""


def _what_i_see() -> dict[str, object]:
    return {
        "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")),
        "env": {name: os.environ[name] for name in sorted(_SEEN & os.environ.keys())},
        "path": sys.path,
        "cwd": os.getcwd(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "pid": os.getpid(),
        "stdin": os.readlink("/proc/self/fd/0"),
    }
