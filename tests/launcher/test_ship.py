"""What is copied into a run directory, and what is not."""

from __future__ import annotations

import contextlib
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.ray_map import code_in
from launcher.ship import changed_files, renew_code, same_code, ship_code, ship_project, survey
from strategies import errors
from strategies.errors import ConfigError, StorageError


def make_project(root: Path) -> None:
    files = [
        "train.py",
        "jobs/__init__.py",
        ".git/HEAD",
        "__pycache__/x.pyc",
        ".venv/bin/python",
        "runs/r1/request.json",
    ]
    for name in [*files, "runs/r1/request.json", "env/pyvenv.cfg", "runs/notes.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link.py").symlink_to("train.py")


def test_survey_leaves_out_what_is_no_source(tmp_path: Path) -> None:
    make_project(tmp_path)
    shipment = survey(tmp_path, limit_mb=1)
    assert [str(file) for file in shipment.files] == ["jobs/__init__.py", "link.py", "runs/notes.txt", "train.py"]


def test_too_large_a_project_names_its_largest_parts(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big.bin").write_bytes(b"x" * 1_500_000)
    (tmp_path / "train.py").write_text("")
    with pytest.raises(ConfigError, match=r"1\.5 MB  data") as caught:
        survey(tmp_path, limit_mb=1)
    assert "ship_limit_mb" in str(caught.value)
    with pytest.raises(ConfigError, match="is not a folder"):
        survey(tmp_path / "nope", limit_mb=1)


def test_project_is_copied_and_changes_are_found(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "run" / "user"
    make_project(source)
    shipment = survey(source, limit_mb=1)
    ship_project(shipment, target)
    assert (target / "link.py").is_symlink()
    assert (target / "jobs" / "__init__.py").read_text() == "jobs/__init__.py"
    assert not (target / ".git").exists()
    assert changed_files(shipment, target) == []
    (source / "train.py").write_text("other")
    (source / "new.py").write_text("")
    assert changed_files(survey(source, limit_mb=1), target) == ["link.py", "new.py", "train.py"]


def test_our_code_runs_from_its_copy(tmp_path: Path) -> None:
    ship_code(tmp_path / "code")
    ship_code(tmp_path / "code")  # a second time changes nothing
    program = "import launcher.config as c; print(c.conf_dir(), c.compose([]).model.name)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": str(tmp_path / "code")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "code" / "conf"), "gpt_tiny"]


def test_what_is_compiled_is_shipped_and_valid(tmp_path: Path) -> None:
    """Several processes of a node begin at once, and each would compile what it imports."""
    py_compile.compile(str(errors.__file__))  # as an import or an installation does
    ship_code(tmp_path / "code")
    show = "import importlib.util as u, strategies.errors as m; print(u.cache_from_source(m.__file__))"
    command = [sys.executable, "-B", "-v", "-P", "-c", show]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(tmp_path / "code")}, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"{done.stdout.strip()} matches" in done.stderr.replace("'", "")
    assert done.stdout.startswith(str(tmp_path))


def test_another_version_of_our_code_is_renewed(tmp_path: Path) -> None:
    code = tmp_path / "code"
    assert renew_code(code)
    assert not renew_code(code)
    (code / "jobs" / "__pycache__").mkdir(exist_ok=True)
    (code / "jobs" / "__pycache__" / "worker.cpython-311.pyc").write_bytes(b"")
    assert same_code(code)  # what Python leaves there is no other version
    (code / "jobs" / "worker.py").write_text("older")
    (code / "launcher" / "gone.py").write_text("no longer there")
    assert renew_code(code)
    assert same_code(code)
    assert not (code / "launcher" / "gone.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_unwritable_target_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot copy code"):
        ship_code(tmp_path / "file" / "code")


def test_the_code_of_a_preparation_leaves_nothing(tmp_path: Path) -> None:
    """Whatever is found wrong with the data that the nodes of a cluster look at."""
    root = tmp_path / "runs" / ".data"
    with contextlib.suppress(ConfigError), code_in(root) as code:
        assert (code / "jobs" / "worker.py").is_file()
        assert code.is_relative_to(root)
        raise ConfigError("no documents")
    assert not list(tmp_path.iterdir())
    with code_in(root) as code:
        (root / "store").mkdir()
        with code_in(root) as other:
            assert other != code, "two at once do not share theirs"
        assert code.is_dir()
    assert [path.name for path in root.iterdir()] == ["store"]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Nothing can be written to"), code_in(tmp_path / "file" / "cache"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "runs"]


def test_the_code_of_a_killed_preparation_goes_with_the_next(tmp_path: Path) -> None:
    program = "import os, sys, pathlib; from launcher.ray_map import code_in\n"
    program += "with code_in(pathlib.Path(sys.argv[1])): os._exit(0)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    (left,) = tmp_path.iterdir()
    with code_in(tmp_path):
        assert not left.exists()
    assert not list(tmp_path.iterdir())
