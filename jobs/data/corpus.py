"""The text itself: which files belong to a corpus, their digest, and their content in bounded pieces."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.spec import DataSpec
from strategies.errors import ConfigError, StorageError

PIECE_BYTES = 1 << 20
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
GENERATED = frozenset({"encodings", "pydoc_data"})  # of the standard library: tables that a program wrote


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One file of the corpus.

    Attributes:
        path: Where it is.
        size: Its length, in bytes.
    """

    path: Path
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The files of a corpus, in the order in which they are tokenized.

    Attributes:
        where: What the user called it, for messages.
        documents: The text files, ordered by relative path; empty ones are left out.
        skipped: Number of files left out because they hold NUL bytes, hence are not text.
        digest: SHA-256 over relative paths and contents.
    """

    where: str
    documents: tuple[Document, ...]
    skipped: int
    digest: str

    @property
    def size(self) -> int:
        """Length of all documents, in bytes."""
        return sum(document.size for document in self.documents)


def scan(data: DataSpec, progress: Callable[[float], None] = lambda fraction: None) -> Corpus:
    """Find and digest the files of a corpus.

    Args:
        data: The corpus.
        progress: Told the fraction read so far, 0 to 1.

    Raises:
        ConfigError: No path is given, or the corpus holds no text.
        StorageError: A file or folder cannot be read.
    """
    where, root, paths = _find(data)
    digest = hashlib.sha256()
    documents: list[Document] = []
    skipped = 0
    for number, path in enumerate(paths):
        progress(number / len(paths))
        content = _digest_file(path)
        if content is None:
            skipped += 1
        elif content[0]:
            name = str(path.relative_to(root)) if path != root else path.name
            digest.update(os.fsencode(f"{len(name)}:{name}:") + content[1])
            documents.append(Document(path=path, size=content[0]))
    if not documents:
        binary = f"; {skipped} of them hold NUL bytes, hence are not text" if skipped else ""
        raise ConfigError(
            f"The corpus {where} is empty.",
            why=f"{len(paths)} files were found{binary}.",
            hint="Point data.path at a text file or at a folder of text files, or use data=stdlib.",
        )
    return Corpus(where=where, documents=tuple(documents), skipped=skipped, digest=digest.hexdigest())


def _find(data: DataSpec) -> tuple[str, Path, list[Path]]:
    if data.kind == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return (
            f"of Python's standard library in {root}",
            root,
            walk(root, suffix=".py", skipped=SKIPPED_FOLDERS | GENERATED),
        )
    if not data.path:
        raise ConfigError("data=text needs a path.", hint="Add data.path=FILE_OR_DIR.")
    root = Path(data.path).expanduser().absolute()
    if not root.exists():
        raise _unreadable(root, "there is no such file or folder")
    return str(root), root, walk(root) if root.is_dir() else [root]


def walk(root: Path, suffix: str = "", skipped: frozenset[str] = SKIPPED_FOLDERS) -> list[Path]:
    """Files below a folder, ordered by relative path; hidden ones and :data:`SKIPPED_FOLDERS` are left out.

    Raises:
        StorageError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or root), error.strerror or str(error))

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        found += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _digest_file(path: Path) -> tuple[int, bytes] | None:
    """Size and digest of a file; None when it is binary."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(PIECE_BYTES):
                if b"\0" in block:
                    return None
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return size, digest.digest()


def pieces(document: Document) -> Iterator[str]:
    """Content of a document as text of about :data:`PIECE_BYTES` each, cut after a line where there is one.

    Bytes that are not UTF-8 become U+FFFD.

    Raises:
        StorageError: The file cannot be read.
    """
    rest = b""
    try:
        with document.path.open("rb") as file:
            while block := file.read(PIECE_BYTES):
                rest += block
                if len(block) == PIECE_BYTES:
                    cut = rest.rfind(b"\n") + 1 or character_start(rest)
                    yield rest[:cut].decode("utf-8", "replace")
                    rest = rest[cut:]
    except OSError as error:
        raise _unreadable(document.path, error.strerror or str(error)) from error
    if rest:
        yield rest.decode("utf-8", "replace")


def character_start(data: bytes) -> int:
    """The last place, at most three bytes before the end, at which no UTF-8 character is cut in two."""
    for back in range(1, min(4, len(data))):
        byte = data[-back]
        if byte >= 0xC0:  # a leading byte so close to the end may lack its rest
            return len(data) - back
        if byte < 0x80:
            break
    return len(data)


def _unreadable(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"The corpus cannot be read: {path}.",
        why=f"{reason[:1].lower()}{reason[1:]}.",
        hint="Check data.path and the permissions of its files.",
    )
