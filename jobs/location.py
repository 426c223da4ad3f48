"""Where things lie: a path of a file system, or an address in an object store. Pure: nothing is opened here."""

from __future__ import annotations

from functools import total_ordering
from pathlib import Path
from typing import TypeVar

from strategies.errors import ConfigError, did_you_mean

# What makes a commit exclusive in each kind of store. A store that is not listed has no rule, hence no checkpoints.
COMMIT_RULES = {
    "s3": "PUT with If-None-Match: *",
    "s3a": "PUT with If-None-Match: *",
    "gs": "PUT with ifGenerationMatch=0",
    "gcs": "PUT with ifGenerationMatch=0",
    "abfs": "PUT with If-None-Match: *",
    "abfss": "PUT with If-None-Match: *",
    "az": "PUT with If-None-Match: *",
}


@total_ordering
class Url:
    """An address in an object store, with what a path offers for names: ``/``, ``name``, ``parent``.

    It is no ``os.PathLike``: nothing can take it for a file of this machine by mistake.

    Args:
        text: ``SCHEME://BUCKET[/KEY]``.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("/")

    @property
    def scheme(self) -> str:
        """What stands before ``://``."""
        return self._text.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self._text.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """All but the last part."""
        return Url(self._text.rpartition("/")[0])

    def absolute(self) -> Url:
        """Itself, as with paths."""
        return self

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self._text}/{name}")

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Url({self._text!r})"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Url) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._text < other._text if isinstance(other, Url) else NotImplemented


Location = Path | Url
L = TypeVar("L", Path, Url, Path | Url)
"""Paths give paths, addresses give addresses."""


def locate(where: str | Location) -> Location:
    """A path or an address from what somebody has written; ``file://`` means a path.

    Raises:
        ConfigError: There is no commit rule for that kind of store, it names no bucket, or it carries credentials.
    """
    if not isinstance(where, str):
        return where
    scheme, separator, rest = where.partition("://")
    if not separator:
        return Path(where)
    if scheme == "file":
        return Path(rest)
    if scheme not in COMMIT_RULES:
        hint = did_you_mean(scheme, list(COMMIT_RULES)) or "Mount it, and give the path."
        kinds = ", ".join(f"{name}://" for name in COMMIT_RULES)
        raise ConfigError(
            f"Checkpoints cannot be kept at {scheme}:// addresses.",
            why=f"nothing is known there that lets just one of two writers create a file; it is for {kinds}",
            hint=hint,
        )
    bucket = rest.partition("/")[0]
    if ":" in bucket.rpartition("@")[0] or "?" in rest:
        raise ConfigError(
            f"The {scheme}:// address carries credentials or options.",
            hint="Give them in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL).",
        )
    if not bucket:
        raise ConfigError(f"'{where}' names no bucket.", hint=f"{scheme}://BUCKET/PREFIX")
    return Url(where)
