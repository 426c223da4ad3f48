"""What is set once in a rank's process, before DeepSpeed makes anything; and what DeepSpeed imports late, early."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401
import io
import logging
import os
import warnings
from typing import Any

import deepspeed

# DeepSpeed and torch import these when an engine is built, which takes seconds. Here, a warm pool that imports this
# module pays for them once, and the ranks it forks start at once.
import deepspeed.comm.mori
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.muon.original_muon
import torch
import torch._dynamo
import torch.utils.cpp_extension
from deepspeed.accelerator import get_accelerator

from jobs import distributed
from jobs.build_time import BuildTime
from jobs.own_time import OwnTime
from jobs.spec import RankEnv


def join(env: RankEnv, *, deterministic: bool, took: BuildTime | None = None) -> OwnTime:
    """Meet the other ranks, with DeepSpeed ready to make engines. Collective.

    Args:
        env: This rank.
        deterministic: Refuse kernels whose result depends on scheduling.
        took: Learns how long it took.

    Returns:
        What sees how long this rank waits for others.
    """
    distributed.set_threads()
    _quiet()
    _make_deterministic(deterministic)
    took = took or BuildTime()
    accelerator = get_accelerator()
    with took.taking_device():
        _take_device(accelerator, env.local_rank)
    # Compiled on first use, about a minute, and a rank killed meanwhile leaves a lock that hangs every later start
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # assigned: a look at the original probes ops
    os.environ["LOCAL_RANK"] = str(env.local_rank)  # DeepSpeed reads it in several places
    with took.meeting():
        distributed.init_process_group(env, accelerator.communication_backend_name())
    immediate = accelerator.is_synchronized_device()
    own_time = OwnTime(
        None if immediate else lambda: accelerator.Event(enable_timing=True),
        set_device=lambda: accelerator.set_device(env.local_rank),
    )
    own_time.install()  # before DeepSpeed looks the functions up
    with silence():
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return own_time


def _take_device(accelerator: Any, local_rank: int) -> None:
    """Its context is made here, not by whatever happens to use it first."""
    accelerator.set_device(local_rank)
    torch.empty(1, device=accelerator.current_device_name())
    accelerator.synchronize()


def connects_late() -> bool:
    """Whether process groups of this device are connected by their first collective only (NCCL; gloo does at once)."""
    return not get_accelerator().is_synchronized_device()


def silence() -> contextlib.AbstractContextManager[object]:
    """Swallows what DeepSpeed prints of its topology."""
    return contextlib.redirect_stdout(io.StringIO())


def _quiet() -> None:
    """Keep what DeepSpeed says about itself out of the rank logs, where people look for their own errors."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # of collectives that DeepSpeed calls, once per call
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def _make_deterministic(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before CUDA's first matmul
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a costly debugging aid
    torch.use_deterministic_algorithms(deterministic)


def device() -> str:
    """Where this rank computes."""
    return str(get_accelerator().current_device_name())
