"""The recorded environment shows nobody's secrets."""

from __future__ import annotations

import pytest

from launcher.redaction import environment, redacted


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "ray_auth_token",
        "DB_PASSWORD",
        "PGPASSWORD",
        "REDIS_PASS",
        "MYSQL_PWD",
        "GH_PAT",
        "SENTRY_DSN",
        "BASIC_AUTH",
        "GOOGLE_CREDENTIALS",
        "SESSION_COOKIE",
        "AZURE_SAS",
    ],
)
def test_secret_names(name: str) -> None:
    assert redacted({name: "s3cret"}) == {name: "<redacted>"}


def test_secrets_inside_values() -> None:
    shown = redacted(
        {
            "PIP_INDEX_URL": "https://me:s3cret@pypi.example.org/simple",
            "GIT_REMOTE": "https://s3cret@github.com/me/it and https://github.com/other",
            "EXTRA_ARGS": "--login ghp_s3cretS3cretS3cret --n 1",
        }
    )
    assert "s3cret" not in str(shown)
    assert shown["PIP_INDEX_URL"] == "https://<redacted>@pypi.example.org/simple"
    assert shown["GIT_REMOTE"].endswith("https://github.com/other")
    assert shown["EXTRA_ARGS"] == "--login <redacted> --n 1"


def test_what_is_no_secret_stays() -> None:
    plain = {"PATH": "/usr/bin:/bin", "PWD": "/h", "HOME": "/h", "COMPAT": "1", "URL": "http://host:80/a@b"}
    assert redacted(plain) == dict(sorted(plain.items()))


def test_environment_names_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    document = environment()
    assert document["environment"]["MY_TOKEN"] == "<redacted>"
    assert "hydra-core" in document["packages"]
