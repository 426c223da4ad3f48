"""The import laws of the project, in fresh interpreters and on the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("strategies", "jobs", "launcher")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ONE_PLACE = {
    "ray": "launcher/ray_backend.py",
    "hydra": "launcher/config.py",
    "omegaconf": "launcher/config.py",
    "deepspeed": "jobs/engine",
}
MAX_LINES = 400
TOP_LEVEL = {"strategies", "jobs", "launcher", "conf", "tests"}


def imports(path: Path) -> set[str]:
    """Top-level names that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "strategies")], ids=relative)
def test_strategies_use_the_standard_library_only(path: Path) -> None:
    assert imports(path) <= set(sys.stdlib_module_names) | {"strategies"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "jobs")], ids=relative)
def test_jobs_do_not_know_the_launcher(path: Path) -> None:
    assert not imports(path) & {"launcher", "ray", "hydra", "omegaconf"}


@pytest.mark.parametrize("name", sorted(ONE_PLACE))
def test_heavy_imports_have_one_place(name: str) -> None:
    places = [relative(path) for path in SOURCES if name in imports(path)]
    assert places
    assert all(place == ONE_PLACE[name] or place.startswith(ONE_PLACE[name] + "/") for place in places)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_modules_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES, "a module this long hides a concept: find it"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "every module says what it is for"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_that_is_loaded_is_a_pickle(path: Path) -> None:
    loads = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "marshal.loads"}
    if relative(path) != "jobs/checkpoint/universal.py":  # DeepSpeed's format, written for others
        loads.add("torch.save")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in loads
            keywords = {k.arg: k.value for k in node.keywords}
            assert "allow_pickle" not in keywords
    assert not imports(path) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def test_top_level_is_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {name for name in folders if not name.startswith(".")} <= TOP_LEVEL


LIGHT = {
    "help": ["--help"],
    "plan": ["plan", "experiment=quickstart"],
    "status": ["status", "--json"],
}
PROBE = """
import json, sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "ray", "deepspeed", "wandb", "tokenizers", "numpy"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Closed())
from launcher.cli import main
sys.argv = ["phalanx", *json.loads(sys.argv[1])]
code = 0
try:
    main()
except SystemExit as exit:
    code = exit.code or 0
sys.exit(code)
"""


@pytest.mark.parametrize("verb", sorted(LIGHT))
def test_reading_verbs_run_without_torch_ray_and_deepspeed(verb: str, tmp_path: Path) -> None:
    import json

    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(LIGHT[verb])],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
