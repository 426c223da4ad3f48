"""Object stores in memory behind clients like those of Google and of Azure: what each is asked for and refuses.

The methods have the signatures of gcsfs 2026.10 and adlfs 2026.8, and of what those hand to their servers the
condition is kept. Without one both overwrite, as the servers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

Condition = Mapping[str, str]


class Server:
    """What is stored, and under which condition each object was asked to be stored."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, Condition]] = []
        self.broken = False  # it refuses what is only a part of an object

    def put(self, key: str, data: bytes, condition: Condition) -> None:
        """One request; both conditions say that there must be no such object."""
        self.asked.append((key, condition))
        if condition and key in self.objects:
            raise FileExistsError(key)
        self.objects[key] = data

    def part(self) -> None:
        """A part of a large object arrives."""
        if self.broken:
            raise OSError("the store has refused a part")


class Bucket(AbstractFileSystem):  # type: ignore[misc]
    """What both clients have in common.

    Args:
        server: Where it puts things.
        options: Of fsspec.
    """

    cachable = False
    protocol = ("gs", "gcs", "az", "abfs", "abfss")
    exclusive: ClassVar[Condition] = {}

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(**options)
        self.server = server

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        key = str(self._strip_protocol(path))
        if key not in self.server.objects:
            raise FileNotFoundError(path)
        return {"name": key, "size": len(self.server.objects[key]), "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self.server.objects[str(self.info(path)["name"])][start:end]

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> Upload:
        return Upload(self, path, mode, block_size or 1 << 20)


class Google(Bucket):
    """As gcsfs: ``mode="create"`` and ``"xb"`` become ``ifGenerationMatch=0``."""

    exclusive: ClassVar[Condition] = {"ifGenerationMatch": "0"}

    def pipe_file(
        self,
        path: str,
        data: bytes,
        metadata: Any = None,
        consistency: Any = None,
        content_type: str = "application/octet-stream",
        fixed_key_metadata: Any = None,
        chunksize: int = 50 * 2**20,
        mode: str = "overwrite",
    ) -> None:
        self.server.put(str(self._strip_protocol(path)), data, self.exclusive if mode == "create" else {})


class Azure(Bucket):
    """As adlfs: ``mode="create"`` and ``"xb"`` become ``If-None-Match: *``; a mode that it does not know, nothing."""

    exclusive: ClassVar[Condition] = {"If-None-Match": "*"}

    def pipe_file(
        self, path: str, value: bytes, overwrite: bool = True, max_concurrency: int | None = None, **kwargs: Any
    ) -> None:
        overwrite = overwrite and kwargs.pop("mode", "") != "create"
        self.server.put(str(self._strip_protocol(path)), value, {} if overwrite else self.exclusive)


class Upload(AbstractBufferedFile):  # type: ignore[misc]
    """A large object, in parts; as with adlfs, to discard it changes nothing, and to close it puts what has arrived."""

    def __init__(self, bucket: Bucket, path: str, mode: str, block_size: int) -> None:
        super().__init__(bucket, path, mode, block_size)
        self._arrived: list[bytes] = []

    def _initiate_upload(self) -> None:
        self._arrived = []

    def _upload_chunk(self, final: bool = False) -> bool:
        data = self.buffer.getvalue()
        self.fs.server.part()
        self._arrived.append(data)
        if final:
            condition = self.fs.exclusive if "x" in self.mode else {}
            self.fs.server.put(str(self.path), b"".join(self._arrived), condition)
        return True
