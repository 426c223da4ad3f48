"""How this process authenticates to a Ray cluster, and what to tell the user when Ray does not do as it should."""

from __future__ import annotations

import os
from pathlib import Path

from strategies.errors import ClusterError

RAY = "ray[default]>=2.52,<2.61"
"""The versions that phalanx works with, as in pyproject.toml."""

_TOKEN_HINT = (
    "Give the cluster's token: RAY_AUTH_TOKEN=..., RAY_AUTH_TOKEN_PATH=FILE, or the file ~/.ray/auth_token; "
    "it must be the one that the cluster was started with."
)


def auth_environment(token_path: str | None = None) -> dict[str, str]:
    """The variables that make Ray's authentication mode explicit; left to itself, Ray guesses, and waits 20 s.

    Args:
        token_path: File with the token of a cluster of ours; None looks where Ray looks.
    """
    if token_path:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path}
    default = Path.home() / ".ray" / "auth_token"
    known = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or default.is_file()
    return {"RAY_AUTH_MODE": "token" if known else "disabled"}


def refused() -> ClusterError:
    """The cluster wants a token that we do not have."""
    given = auth_environment()["RAY_AUTH_MODE"] == "token"
    return ClusterError(
        "The Ray cluster refuses us: authentication failed.",
        why="the token is not the cluster's" if given else "it asks for a token and none was found",
        hint=_TOKEN_HINT,
    )


def unwell(error: BaseException) -> ClusterError:
    """A call to Ray has failed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ClusterError(
        "The Ray cluster does not answer as it should.",
        why=lines[0],
        hint="Check that the cluster is up (ray status), then: phalanx resume.",
    )


def no_head(address: str, error: BaseException) -> ClusterError:
    """Something listens there, but it is no Ray head."""
    return ClusterError(
        f"No Ray head answers at {address}.",
        why=(str(error).strip().splitlines() or [type(error).__name__])[0],
        hint="Check that cluster.address is the head's IP:PORT (6379 by default), and that the cluster is up.",
    )


def unknown_ray(version: str, missing: str) -> ClusterError:
    """Ray's insides are not those that we know."""
    return ClusterError(
        f"Ray {version} cannot be bound to 127.0.0.1 alone, so no local cluster is started.",
        why=f"it has no {missing}",
        hint=f"Install a version that phalanx was tested with: pip install '{RAY}'",
    )
