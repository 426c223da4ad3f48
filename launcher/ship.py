"""Copies code into the run directory: our packages to ``code``, a script's project to ``user``.

What runs on a cluster imports our packages from the run's copy, so that neither editing the sources nor another version
of phalanx on a node changes a run on its way. A resume renews the copy when the run has ended and the client's version
is another; as long as ranks or agents may live, they keep what they started from. (``cluster=process`` runs from
where phalanx is installed.) The two copies never share a path: a user's folder named ``jobs`` shadows nothing and is
shadowed by nothing.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from strategies.errors import ConfigError, StorageError

PACKAGES = ("strategies", "jobs", "launcher", "conf")
_SKIPPED_NAMES = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        ".venv",
        "venv",
        "node_modules",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
    }
)
_MB = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipment:
    """What would be copied of a project.

    Attributes:
        root: Folder of the project.
        files: Paths relative to ``root``, sorted.
        bytes: Their total size.
        largest: Largest top-level entries: (name, bytes), largest first.
    """

    root: Path
    files: tuple[Path, ...]
    bytes: int
    largest: tuple[tuple[str, int], ...]


def ship_code(target: Path) -> None:
    """Copy our own packages; a copy that is already there stays.

    Raises:
        StorageError: The run directory cannot be written.
    """
    if target.exists():
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    with _storage_errors(target):
        _copy_packages(aside)
        os.replace(aside, target)


def renew_code(target: Path) -> bool:
    """Put this version of our packages in the place of an earlier copy; returns whether that was necessary.

    Raises:
        StorageError: The run directory cannot be written.
    """
    if same_code(target):
        return False
    aside, before = (target.with_name(f".{target.name}.{word}.{os.getpid()}") for word in ("new", "old"))
    with _storage_errors(target):
        try:
            _copy_packages(aside)
            if target.exists():
                os.replace(target, before)
            os.replace(aside, target)
        finally:
            for left in (aside, before):
                shutil.rmtree(left, ignore_errors=True)
    return True


def same_code(copy: Path) -> bool:
    """Whether a copy of our packages is file by file what this process runs from."""
    source = Path(__file__).resolve().parents[1]
    ours, theirs = _package_files(source), _package_files(copy)
    return ours == theirs and all(filecmp.cmp(source / file, copy / file, shallow=False) for file in ours)


def _package_files(root: Path) -> set[Path]:
    found = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    return {path.relative_to(root) for path in found if path.parent.name != "__pycache__"}


def _copy_packages(target: Path) -> None:
    """Copy what is compiled, too: several processes of a node begin at once, and each would compile what it imports."""
    source = Path(__file__).resolve().parents[1]
    for package in PACKAGES:
        shutil.copytree(source / package, target / package, ignore=_other_pythons)


def _other_pythons(folder: str, names: list[str]) -> set[str]:
    """What another Python has compiled. (Ours stays valid: it names the time of its source, which a copy keeps.)"""
    tag = str(sys.implementation.cache_tag)
    return {name for name in names if name.endswith(".pyc") and f".{tag}." not in name}


def survey(root: Path, *, limit_mb: int) -> Shipment:
    """List what belongs to a project: everything but version control, caches, virtual environments and run folders.

    Args:
        root: Folder of the project.
        limit_mb: Largest total size, in MB.

    Raises:
        ConfigError: The folder is missing or the project is too large; the largest parts are named.
    """
    if not root.is_dir():
        raise ConfigError(
            f"job.workdir: {root} is not a folder.", hint="Give the folder of the script: job.workdir=DIR."
        )
    files: list[Path] = []
    sizes: dict[str, int] = {}
    for path in _walk(root):
        relative = path.relative_to(root)
        files.append(relative)
        sizes[relative.parts[0]] = sizes.get(relative.parts[0], 0) + path.lstat().st_size
    total = sum(sizes.values())
    largest = tuple(sorted(sizes.items(), key=lambda item: -item[1])[:8])
    if total > limit_mb * _MB:
        rows = "\n".join(f"  {size / _MB:10.1f} MB  {name}" for name, size in largest)
        raise ConfigError(
            f"The project {root} has {total / _MB:.0f} MB, job.ship_limit_mb is {limit_mb}:\n{rows}",
            hint="Choose a smaller job.workdir, or raise job.ship_limit_mb. Data need not be shipped: give its path.",
        )
    return Shipment(root=root, files=tuple(sorted(files)), bytes=total, largest=largest)


def ship_project(shipment: Shipment, target: Path) -> None:
    """Copy a project, all or nothing. Symbolic links stay links.

    Raises:
        StorageError: A file cannot be read, or the run directory cannot be written.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    with _storage_errors(target):
        aside.mkdir(parents=True)
        for file in shipment.files:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(shipment.root / file, aside / file, follow_symlinks=False)
        os.replace(aside, target)


def changed_files(shipment: Shipment, copy: Path) -> list[str]:
    """Files of a project that differ from an earlier copy of it, new ones included."""
    changed = []
    for file in shipment.files:
        ours, theirs = shipment.root / file, copy / file
        if not theirs.exists() or not filecmp.cmp(ours, theirs, shallow=False):
            changed.append(str(file))
    return changed


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = sorted(name for name in names if name not in _SKIPPED_NAMES and not _is_run(here / name))
        yield from (here / name for name in files if (here / name).is_symlink() or (here / name).is_file())


def _is_run(folder: Path) -> bool:
    """A run directory, or a virtual environment of any name."""
    return (folder / "request.json").is_file() or (folder / "pyvenv.cfg").is_file()


@contextlib.contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Cannot copy code to {target}.", why=str(error), hint="Free space or mend permissions, then try again."
        ) from error
