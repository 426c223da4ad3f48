"""The environment of the processes that an agent starts: import paths, threads, devices, network interfaces."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

import launcher
from launcher.host import accelerator, dealing
from launcher.host.accelerator import ACCELERATOR
from launcher.host.process import MARK

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")

# One thread per rank unless somebody asks for more, on every node alike: the number of threads decides the order of
# sums, so a rank that moves to a node with more cores must not change it.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

_TUNABLES = "GLIBC_TUNABLES"
_STREAMING = "glibc.cpu.x86_non_temporal_threshold"
_STREAMING_BYTES = 1 << 20


def packages_root() -> Path:
    """The folder that holds the running copy of our packages."""
    return Path(str(launcher.__file__)).resolve().parents[1]


def interface_of(address: str) -> str:
    """Name of the network interface that carries ``address``; empty when none does."""
    wanted = socket.gethostbyname(address) if ":" not in address else address
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == wanted for entry in addresses):
            return str(name)
    return "lo" if wanted.startswith("127.") else ""


def large_copies(given: Mapping[str, str]) -> dict[str, str]:
    """A variable that lets copies of a MB go past the cache, as glibc does only from about half of its size on.

    A snapshot copies tensor by tensor, and nobody reads the copy soon: through the cache every line of it is fetched
    first, which makes the copy up to twice as long. Read when a process starts; where it means nothing it is ignored.

    Args:
        given: Environment of whoever starts the process; tunables that it sets stay as they are.
    """
    present = given.get(_TUNABLES, "")
    if _STREAMING in present:
        return {_TUNABLES: present}
    return {_TUNABLES: ":".join(filter(None, [present, f"{_STREAMING}={_STREAMING_BYTES:#x}"]))}


class Environments:
    """Makes environments of pool and ranks.

    Args:
        base: The agent's own environment.
        address: The address that the agent is bound to.
        extra: Variables that the owner of the agent adds for every process.
    """

    def __init__(self, base: Mapping[str, str], *, address: str, extra: Mapping[str, str] | None = None) -> None:
        given = dict(base) | dict(extra or {})
        self._dealt = dealing.read(given.pop(dealing.DEALT, ""))
        common = {"PATH": _with_our_python(given.get("PATH", "")), "PHALANX_AGENT_PID": str(os.getpid())}
        if not accelerator.has_driver():
            common[ACCELERATOR] = given.get(ACCELERATOR, accelerator.CPU)
        defaults = dict.fromkeys(_THREAD_VARIABLES, "1") | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        interface = interface_of(address)
        if interface:
            defaults |= dict.fromkeys(_INTERFACE_VARIABLES, interface)
        self._plain = defaults | given | common
        self._user_path = _without_ours(given.get("PYTHONPATH", ""))
        self._copies = large_copies(given)
        # Of our own processes only: a script may have another Python, and in it a torch for other devices.
        self._device = {ACCELERATOR: accelerator.accelerator_of(given)}

    def _ours(self) -> dict[str, str]:
        root = str(packages_root())
        return {"PYTHONPATH": os.pathsep.join(filter(None, [root, self._user_path]))} | self._device

    def pool(self, mark: str) -> dict[str, str]:
        """For the warm pool: no contact with a device (torch asks NVML, if anything at all), one thread."""
        quiet = dict.fromkeys(_THREAD_VARIABLES, "1") | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        return self._plain | quiet | self._copies | self._ours() | {MARK: mark}

    def rank(self, variables: Mapping[str, str], *, ours: bool, mark: str) -> dict[str, str]:
        """For a rank.

        Args:
            variables: What the controller sent; wins over what the node has.
            ours: Our packages can be imported (not for a user's script).
            mark: Mark of the process.
        """
        path = self._ours() if ours else {"PYTHONPATH": self._user_path}
        dealt = dict(self._dealt(variables.get("NODE_RANK", "")))
        environment = self._plain | path | dealt | dict(variables) | {MARK: mark}
        environment["PATH"] = _with_our_python(environment["PATH"])
        if ours:
            environment |= path | self._copies
        if not environment["PYTHONPATH"]:
            del environment["PYTHONPATH"]
        return environment


def _with_our_python(path: str) -> str:
    """Puts the folder of the running interpreter first, so that ``python`` means the same everywhere."""
    first = os.path.dirname(sys.executable)
    rest = [entry for entry in (path or os.defpath).split(os.pathsep) if entry and entry != first]
    return os.pathsep.join([first, *rest])


def _without_ours(python_path: str) -> str:
    root = str(packages_root())
    kept = [entry for entry in python_path.split(os.pathsep) if entry and os.path.realpath(entry) != root]
    return os.pathsep.join(kept)
