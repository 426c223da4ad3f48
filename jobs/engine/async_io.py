"""DeepSpeed's op for state on disks: compiled ahead of runs, loaded by ranks (:mod:`jobs.disks` says why)."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils import cpp_extension

from jobs.disks import BUILD, NEEDS, ROOT, comes_with_deepspeed, op_folder, require_op, seal
from strategies.errors import ConfigError

_OPS = ("pin_memory", "async_io")  # the second calls the first


def build() -> Path:
    """Compile the op, unless it is there; a few minutes. Returns the folder that it is in.

    Raises:
        ConfigError: This machine lacks what it takes.
    """
    folder = op_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, unlike torch's
        if not seal(folder).is_file():
            for name in _OPS:
                (folder / name / "lock").unlink(missing_ok=True)  # torch's, of a build that was killed
            _compile(folder)
            seal(folder).touch()
    return folder


def _compile(folder: Path) -> None:
    what = "DeepSpeed's op for state on disks (async_io) cannot be compiled here."
    with _compiling_in(folder):
        if not cpp_extension.is_ninja_available():
            raise ConfigError(what, why="ninja is missing", hint="pip install ninja")
        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            why = "a program that calls io_submit, of libaio, could not be compiled and linked"
            hint = f"Install {NEEDS}, or set CFLAGS and LDFLAGS to where libaio is; then {BUILD} again."
            raise ConfigError(what, why=why, hint=hint)
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError) as error:
            raise ConfigError(what, why=str(error)[-2000:], hint=f"It takes {NEEDS}.") from error


@contextmanager
def _compiling_in(folder: Path) -> Iterator[None]:
    """Extensions go into a folder; the tools beside this Python (ninja) count, also if nobody has activated it."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    before = {name: os.environ.get(name) for name in (ROOT, "PATH")}
    os.environ |= {ROOT: str(folder), "PATH": path}
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            os.environ.update({} if value is None else {name: value})


def load() -> None:
    """Give DeepSpeed the compiled op, so that it compiles nothing itself.

    Raises:
        ConfigError: It has not been compiled on this node, or cannot be loaded.
    """
    require_op()
    if comes_with_deepspeed():
        return
    folder = op_folder()
    try:
        for name, builder in zip(_OPS, (PinMemoryBuilder, AsyncIOBuilder), strict=True):
            OpBuilder._loaded_ops[name] = _import(folder, name)
            builder().load()  # of pin_memory: its symbols to the other
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"DeepSpeed's op for state on disks (async_io) cannot be loaded on {os.uname().nodename}.",
            why=str(error),
            hint=f"Delete {folder}, then {BUILD}; it takes {NEEDS}.",
        ) from error


def _import(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / name / f"{name}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
