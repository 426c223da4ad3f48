"""Real ranks out of a real warm pool: they fork safely, import nothing more, and train."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs.data import prepare
from jobs.spec import CheckpointSpec, DataSpec
from launcher.host.environment import Environments, packages_root
from strategies.codec import to_json
from tests.support.agents import agents_in
from tests.support.gpunode import entering, needs_namespaces
from tests.support.jobspecs import GPT, make_job, make_plan

pytestmark = pytest.mark.timeout(240)
MODEL = dataclasses.replace(GPT, layers=2, hidden=32, ffn=64, vocab=320, seq=32)
PLAN = make_plan(MODEL, 4, tp=2, pp=2, zero_stage=1)


def test_forked_ranks_import_nothing_and_train(tmp_path: Path) -> None:
    """The first start and the restart; on a node that was there and on a spare; with one thread and with two."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("faults.py", "worker.py", "spec.py"):
        shutil.copy(packages_root() / "jobs" / name, corpus)
    data = prepare(DataSpec(kind="text", path=str(corpus)), tmp_path / "stores", MODEL.vocab, seq=MODEL.seq)
    job = dataclasses.replace(
        make_job(MODEL, PLAN, global_batch=4, steps=3), data=data, checkpoint=CheckpointSpec(every=2)
    )
    with agents_in(tmp_path) as agents:
        for number in (1, 2):
            agents.paths.attempt(number).mkdir(parents=True)
            agents.paths.job(number).write_text(json.dumps(to_json(job)))
        for node in ("n0", "n1"):
            agents.start(node, warm="jobs.warm:warm", target="tests.support.importprobe:main")
        watcher = agents.watch("n0", "n1")
        for node in ("n0", "n1"):
            watcher.until(lambda o, node=node: o.kind == "pool" and o.node == node and o.data["state"] == "ready")  # type: ignore[misc]
        placements = {"n0": [0, 1, 2, 3]}, {"n0": [0, 1], "n1": [2, 3]}  # n1 stands by at first
        for attempt, placement in enumerate(placements, start=1):
            began = time.time()
            watcher.spawn(attempt, placement, OMP_NUM_THREADS=str(attempt))
            for rank in range(4):
                ended = watcher.until_kind("exit", rank=rank, attempt=attempt)
                assert ended.data["code"] == 0, ended.data["log_tail"]
            first = watcher.report("step", rank=0, attempt=attempt).time - began
            print(f"attempt {attempt}: {first:.2f} s to the report of a step, {time.time() - began:.2f} s in all")
            said = [json.loads((agents.paths.root / f"imports-{rank}.json").read_text()) for rank in range(4)]
            # DeepSpeed tries the compiler of every node for its optional ops, by way of distutils
            assert [name for one in said for name in one["modules"] if not name.startswith("distutils.")] == []
            assert [one["threads"] for one in said] == [attempt] * 4
        assert "fresh" not in {o.data["state"] for o in watcher.seen if o.kind == "pool"}


PROBE = """
import importlib.util
import os
import sys
import torch

def forbidden(name):  # one function for each name: torch._dynamo tells functions apart by their identity
    def refuse(*args, **kwargs):
        raise SystemExit(f"the warm-up has called {name} of CUDA")
    return refuse

for name in ("_lazy_init", "init", "current_device", "set_device", "get_device_properties", "get_device_name",
             "get_device_capability", "mem_get_info", "memory_allocated", "synchronize", "current_stream",
             "default_stream", "manual_seed", "get_rng_state"):
    assert hasattr(torch.cuda, name), name
    setattr(torch.cuda, name, forbidden(name))
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_setDevice", "_cuda_getDevice", "_cuda_getCurrentRawStream"):
    # a build without CUDA has none, and must not seem to have but on a node with devices
    if hasattr(torch._C, name) or os.environ["DS_ACCELERATOR"] == "cuda":
        setattr(torch._C, name, forbidden(name))

from jobs import warm
from launcher.host.pool import unsafe_to_fork
getattr(warm, sys.argv[1])()
assert sys.argv[1] == "warm" or warm.S3 in sys.modules or not importlib.util.find_spec(warm.S3)
if unsafe_to_fork():
    sys.exit(unsafe_to_fork())
"""

ON_A_GPU_NODE = (
    PROBE
    + """
from deepspeed.accelerator import cuda_accelerator, get_accelerator

def asked():
    return "/dev/nvidiactl" in (os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                                if os.path.islink(f"/proc/self/fd/{fd}"))

assert get_accelerator().device_name() == "cuda"
assert (cuda_accelerator.pynvml is not None) == (sys.argv[2] != "")
assert torch.cuda.is_available() and torch.cuda.device_count() == 2 and asked(), "NVML is asked, CUDA is not"
assert unsafe_to_fork() == ""
for name in ("nvidia-uvm", "nvidia1"):
    with open(f"/dev/{name}"):
        assert unsafe_to_fork() == f"the pool has opened /dev/{name}"
"""
)

DECIDE = """
import json, os
from launcher.host.environment import Environments
print(json.dumps(Environments(os.environ, address="127.0.0.1").pool("test.0")))
"""


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr[-2000:] if done.returncode else "") == (0, "")
    return done.stdout


@pytest.mark.full
def test_the_warm_up_starts_no_thread_and_asks_no_device(tmp_path: Path) -> None:
    environment = Environments(os.environ, address="127.0.0.1", extra={"DS_ACCELERATOR": "cpu"}).pool("test.0")
    run([sys.executable, "-P", "-c", PROBE, "warm_s3"], environment, tmp_path)


@needs_namespaces
@pytest.mark.parametrize("installed", [pytest.param("", marks=pytest.mark.full, id="without"), "nvidia-ml-py"])
def test_a_pool_with_devices_may_fork(installed: str, tmp_path: Path) -> None:
    """As an agent starts it there: nothing is set that production does not set."""
    enter = entering(tmp_path)
    path = os.pathsep.join([str(packages_root()), str(tmp_path)] if installed else [str(packages_root())])
    base = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    given = base | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": path}
    environment = json.loads(run([*enter, sys.executable, "-P", "-c", DECIDE], given, tmp_path))
    assert environment["DS_ACCELERATOR"] == "cuda"
    run([*enter, sys.executable, "-P", "-c", ON_A_GPU_NODE, "warm", installed], environment, tmp_path)
