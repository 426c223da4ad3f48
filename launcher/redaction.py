"""What is recorded of the environment of a submission: versions and variables, without anybody's secrets."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

HIDDEN = "<redacted>"
_PACKAGES = ("phalanx", "torch", "deepspeed", "ray", "numpy", "safetensors", "tokenizers", "wandb", "hydra-core")
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS|PWD|AUTH|DSN|CREDENTIAL|COOKIE|PRIVATE|SIGNATURE|(^|_)(PAT|SAS|PIN|JWT|OTP)(_|$)",
    re.IGNORECASE,
)
_HARMLESS = frozenset({"PWD", "OLDPWD", "RAY_AUTH_MODE", "XAUTHORITY", "SSH_AUTH_SOCK"})
_USER_OF_URL = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@]+@")
# Tokens that tell by their beginning what they are: GitHub, GitLab, OpenAI, Hugging Face, Slack, AWS, JSON Web Tokens.
_TOKEN = re.compile(r"\b(gh[pousr]_|github_pat_|glpat-|sk-|hf_|xox[a-z]-|AKIA|eyJ)[A-Za-z0-9_.-]{8,}")


def environment() -> dict[str, Any]:
    """Versions and environment of this process, secrets redacted."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "environment": redacted(os.environ),
    }


def redacted(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables; hidden are the values of those with a secret's name, and secrets that other values show."""
    return {
        name: HIDDEN if name not in _HARMLESS and _SECRET.search(name) else _masked(value)
        for name, value in sorted(environ.items())
    }


def _masked(value: str) -> str:
    return _TOKEN.sub(HIDDEN, _USER_OF_URL.sub(rf"\1{HIDDEN}@", value))
