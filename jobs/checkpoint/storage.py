"""What a checkpoint needs of the place it is kept in: create-exclusive writes, ranges, lists, deletes. One seam.

===============  ==================================================================================================
kind             how a file comes to exist, whole and only once
===============  ==================================================================================================
POSIX            written aside, fsynced, linked to its name (fails if that exists, also over NFS), folder fsynced
object store     one conditional PUT (or conditional end of a multi-part upload); never a rename
===============  ==================================================================================================

Everything here raises ``OSError`` and only that, whatever the client library raises. Object stores are reached through
fsspec; credentials come from the environment and are never handled here. No torch, no numpy.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jobs.location import Location, Url
from strategies.errors import StorageError

Parts = Sequence[bytes | memoryview]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_CONNECT_S = 5.0
_ANSWER_S = 20.0  # a store that says nothing for so long will not
_TRIES = 3
_SLOWEST_BYTES_S = 1e6  # a store that takes less is as good as silent
_CONFLICT_TRIES = 4
_ONE_PUT_BYTES = 64 << 20
_PART_BYTES = 16 << 20
_MOST_PARTS = 9000  # S3 takes 10,000
_PROOF_BYTES = 1 << 20


class Storage(Protocol):
    """A place for checkpoints. Every method raises ``OSError``."""

    def create(self, where: Location, parts: Parts) -> int:
        """Write a new file, whole or not at all, durable but for its entry in its folder (:meth:`settle`).

        Returns:
            Its size in bytes.

        Raises:
            FileExistsError: There is one of that name; it is left as it is.
        """

    def read(self, where: Location, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop); fewer where the file ends before."""

    def size(self, where: Location) -> int:
        """Size of a file in bytes."""

    def sizes(self, folder: Location) -> dict[str, int]:
        """Name and size of every file in a folder; empty when there is no such folder."""

    def names(self, folder: Location) -> list[str]:
        """Names of the files and folders in a folder; empty when there is no such folder."""

    def delete(self, where: Location) -> None:
        """Delete a file; nothing happens when there is none."""

    def delete_tree(self, folder: Location) -> None:
        """Delete a folder and what is in it, as far as it lets itself be deleted."""

    def drop(self, folder: Location) -> None:
        """Delete a folder if it is empty."""

    def settle(self, *folders: Location) -> None:
        """Make the entries of folders durable."""


def storage_of(where: Location) -> Storage:
    """The storage that holds ``where``.

    Raises:
        StorageError: The package that reaches such a store is not installed.
    """
    return ObjectStorage(where.scheme) if isinstance(where, Url) else PosixStorage()


class PosixStorage:
    """Files of a (shared) file system."""

    def create(self, where: Location, parts: Parts) -> int:
        """See :class:`Storage`."""
        path = _path(where)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            fd = os.open(aside, _NEW, 0o644)
        except FileNotFoundError:
            _make(path.parent)
            fd = os.open(aside, _NEW, 0o644)
        try:
            try:
                for part in parts:
                    write_all(fd, memoryview(part).cast("B"))
                os.fsync(fd)
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
            link_new(aside, path)
        finally:
            os.unlink(aside)  # gives the space back on a full disk
        return size

    def read(self, where: Location, start: int = 0, stop: int | None = None) -> bytes:
        """See :class:`Storage`."""
        fd = os.open(_path(where), os.O_RDONLY)
        try:
            end = os.fstat(fd).st_size if stop is None else stop
            parts = []
            while start < end:
                part = os.pread(fd, end - start, start)
                if not part:
                    break
                parts.append(part)
                start += len(part)
        finally:
            os.close(fd)
        return b"".join(parts)

    def size(self, where: Location) -> int:
        """See :class:`Storage`."""
        return _path(where).stat().st_size

    def sizes(self, folder: Location) -> dict[str, int]:
        """See :class:`Storage`."""
        try:
            with os.scandir(_path(folder)) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def names(self, folder: Location) -> list[str]:
        """See :class:`Storage`."""
        try:
            return os.listdir(_path(folder))
        except (FileNotFoundError, NotADirectoryError):  # nothing written yet, or pruned while we look
            return []

    def delete(self, where: Location) -> None:
        """See :class:`Storage`."""
        _path(where).unlink(missing_ok=True)

    def delete_tree(self, folder: Location) -> None:
        """See :class:`Storage`."""
        shutil.rmtree(_path(folder), ignore_errors=True)

    def drop(self, folder: Location) -> None:
        """See :class:`Storage`."""
        with contextlib.suppress(OSError):  # something is in it
            _path(folder).rmdir()

    def settle(self, *folders: Location) -> None:
        """See :class:`Storage`."""
        for folder in folders:
            sync_dir(_path(folder))


class ObjectStorage:
    """Objects of a store, through fsspec. Listings are never cached: others write too.

    Args:
        scheme: What stands before ``://``.

    Raises:
        StorageError: The package that reaches such a store is not installed.
    """

    def __init__(self, scheme: str) -> None:
        import fsspec

        s3 = scheme in ("s3", "s3a")
        try:
            kind = fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise StorageError(
                f"This machine cannot reach {scheme}:// addresses.",
                why=str(error),
                hint="pip install 'phalanx[s3]' on every node." if s3 else "Install it on every node.",
            ) from error
        if s3:
            bounds = {"connect_timeout": _CONNECT_S, "read_timeout": _ANSWER_S, "retries": {"total_max_attempts": 1}}
            self._fs: Any = bounded(kind)(use_listings_cache=False, config_kwargs=bounds)
            self._fs.retries = _TRIES
        else:
            self._fs = kind(use_listings_cache=False)

    def create(self, where: Location, parts: Parts) -> int:
        """See :class:`Storage`."""
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(view.nbytes for view in views)
        for left in range(_CONFLICT_TRIES - 1, -1, -1):
            try:
                with _explained(where):
                    self._put(where, views, size)
                return size
            except FileExistsError:
                if not self._ours(where, views, size):
                    raise
                return size
            except OSError as error:
                if not left or _code(error) not in ("ConditionalRequestConflict", "409"):
                    raise
                time.sleep(0.2)  # two at once: one of them has won by now
        raise AssertionError("unreachable")

    def _put(self, where: Location, views: list[memoryview], size: int) -> None:
        if size <= _ONE_PUT_BYTES:
            self._fs.pipe_file(str(where), b"".join(views), mode="create")
            return
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        file = self._fs.open(str(where), "xb", block_size=part)
        try:
            for view in views:
                for at in range(0, view.nbytes, part):
                    file.write(view[at : at + part])
        except BaseException:
            try:
                file.discard()
            finally:
                file.closed = True  # it would end its upload when it is collected, of which a part is missing
            raise
        file.close()

    def _ours(self, where: Location, views: list[memoryview], size: int) -> bool:
        """Whether what is there is what we wrote: the answer to an earlier try of ours may have been lost.

        Shards begin with the digests of all that follows, manifests with who wrote them and when.
        """
        beginning = b"".join(views) if size <= _PROOF_BYTES else _first(views, _PROOF_BYTES)
        return self.size(where) == size and self.read(where, 0, _PROOF_BYTES) == beginning

    def read(self, where: Location, start: int = 0, stop: int | None = None) -> bytes:
        """See :class:`Storage`."""
        with _explained(where):
            try:
                data: bytes = self._fs.cat_file(str(where), start=start or None, end=stop)
            except OSError as error:
                if _code(error) not in ("InvalidRange", "416"):
                    raise
                data = b""  # it ends before
            return data

    def size(self, where: Location) -> int:
        """See :class:`Storage`."""
        with _explained(where):
            return int(self._fs.info(str(where))["size"])

    def sizes(self, folder: Location) -> dict[str, int]:
        """See :class:`Storage`."""
        return {_name(row): int(row["size"]) for row in self._list(folder) if row["type"] == "file"}

    def names(self, folder: Location) -> list[str]:
        """See :class:`Storage`."""
        return [name for name in map(_name, self._list(folder)) if name]

    def _list(self, folder: Location) -> list[dict[str, Any]]:
        try:
            with _explained(folder):
                rows: list[dict[str, Any]] = self._fs.ls(str(folder), detail=True)
        except FileNotFoundError:
            return []
        return rows

    def delete(self, where: Location) -> None:
        """See :class:`Storage`."""
        with contextlib.suppress(FileNotFoundError), _explained(where):
            self._fs.rm_file(str(where))

    def delete_tree(self, folder: Location) -> None:
        """See :class:`Storage`."""
        with contextlib.suppress(OSError), _explained(folder):
            self._fs.rm(str(folder), recursive=True)

    def drop(self, folder: Location) -> None:
        """See :class:`Storage`; a store has no empty folders."""

    def settle(self, *folders: Location) -> None:
        """See :class:`Storage`; what a store has accepted is durable."""


@functools.cache
def bounded(kind: type[Any]) -> type[Any]:
    """The S3 client, each call of which ends: it has no clock of its own while it waits to be told to send a body, or
    while nobody reads what it sends."""
    from fsspec.asyn import sync_wrapper

    async def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        body = options.get("Body")
        limit_s = _TRIES * _ANSWER_S + (len(body) if isinstance(body, bytes) else 0) / _SLOWEST_BYTES_S
        return await asyncio.wait_for(kind._call_s3(self, method, *arguments, **options), limit_s)

    return type(kind.__name__, (kind,), {"_call_s3": call, "call_s3": sync_wrapper(call)})


@contextlib.contextmanager
def _explained(where: Location) -> Iterator[None]:
    """Turn whatever a client library raises into an ``OSError`` that says what is wrong."""
    try:
        yield
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":  # not "nothing there yet"
            raise OSError(errno.ENODEV, f"there is no such bucket: {error}") from error
        raise
    except OSError as error:
        if str(error):
            raise
        raise _silent(error) from error
    except Exception as error:
        raise _silent(error) from error


def _silent(error: Exception) -> OSError:
    """What a client library raises when the store has not answered, or not as it should."""
    kind, text = type(error).__name__, str(error) or "no answer"
    return OSError(errno.ETIMEDOUT if "Timeout" in kind else errno.EIO, f"{kind}: {text}")


def _code(error: BaseException) -> str:
    """What the server calls the error; empty when it has not answered."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _name(row: dict[str, Any]) -> str:
    return str(row["name"]).rpartition("/")[2]


def _first(views: list[memoryview], count: int) -> bytes:
    data = bytearray()
    for view in views:
        data += view[: count - len(data)]
    return bytes(data)


def _make(folder: Path) -> None:
    """Make a folder and those above it, as far as they are missing; that they are there is durable then."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_dir(folder.parent)


def _path(where: Location) -> Path:
    assert isinstance(where, Path), "storage_of gave another storage for addresses"
    return where


def write_all(fd: int, data: memoryview) -> None:
    """Write all of ``data``; a single call may write less (and at most 2 GiB)."""
    while len(data):
        data = data[os.write(fd, data) :]


def link_new(aside: Path, path: Path) -> None:
    """Give a file that is complete its name, unless that is taken; a rename would overwrite.

    Raises:
        FileExistsError: The name is taken. Not so where the own link is in the way: an NFS client that heard no answer
            asks once more.
        OSError: The file system refuses.
    """
    try:
        os.link(aside, path)
    except FileExistsError:
        names = 1
        with contextlib.suppress(FileNotFoundError), open(aside, "rb") as file:  # opening asks the server again
            names = os.fstat(file.fileno()).st_nlink
        if names == 1:
            raise


def sync_dir(folder: Path) -> None:
    """Make the entries of a folder durable. Raises ``OSError``."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
