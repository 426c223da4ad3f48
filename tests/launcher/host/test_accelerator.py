"""Which devices a node has, told by files alone; and what every process that an agent starts is told of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.host import accelerator
from launcher.host.accelerator import ACCELERATOR, FAMILIES, Devices, Family, devices, in_contact
from launcher.host.environment import Environments

NVIDIA, AMD, HABANA, ASCEND = FAMILIES
CUDA = "CUDA_VISIBLE_DEVICES"
HIP = "HIP_VISIBLE_DEVICES"


def dev(root: Path, *files: str) -> Path:
    """A folder of device files."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def with_gpus(root: Path, count: int = 4) -> Path:
    gpus = [f"nvidia{number}" for number in range(count)]
    return dev(root, "null", "nvidiactl", "nvidia-uvm", "nvidia-caps/nvidia-cap1", *gpus)


def found(root: Path, **environment: str) -> Devices | None:
    return devices(environment, dev=root, usable=lambda family: True)


def ids(root: Path, **environment: str) -> tuple[str, ...]:
    seen = found(root, **environment)
    return seen.ids if seen is not None else ()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("null", "dri/renderD128"), None),
        (("nvidiactl",), None),  # a driver, and nothing that it drives
        (("nvidiactl", "nvidia3"), ("cuda", (CUDA,), ("0",))),  # a container is given one of them
        (("nvidiactl", "nvidia0", "nvidia1"), ("cuda", (CUDA,), ("0", "1"))),
        (("kfd", "dri/card0", "dri/renderD128", "dri/renderD129"), ("cuda", (HIP,), ("0", "1"))),
        (("accel/accel0", "accel/accel_controlD0"), ("hpu", ("HABANA_VISIBLE_MODULES",), ("0",))),
        (("davinci_manager", "davinci0", "davinci1"), ("npu", ("ASCEND_RT_VISIBLE_DEVICES",), ("0", "1"))),
    ],
)
def test_devices_are_told_by_their_files(
    tmp_path: Path, files: tuple[str, ...], expected: tuple[str, tuple[str, ...], tuple[str, ...]] | None
) -> None:
    seen = found(dev(tmp_path, *files))
    assert (seen and (seen.accelerator, seen.variables, seen.ids)) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2,3", ("2", "3")),
        (" 3 ,1", ("3", "1")),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("1,4,2", ("1",)),  # there are four: the fifth ends the list, as CUDA reads it
        ("1,1", ()),
        ("GPU-0a1b,GPU-77", ("GPU-0a1b", "GPU-77")),
        ("MIG-ab-cd", ("MIG-ab-cd",)),
    ],
)
def test_what_the_environment_hides_is_not_there(tmp_path: Path, given: str, expected: tuple[str, ...]) -> None:
    assert ids(with_gpus(tmp_path), CUDA_VISIBLE_DEVICES=given) == expected


def test_of_two_variables_both_choose_and_the_first_holds(tmp_path: Path) -> None:
    seen = found(dev(tmp_path, "kfd", *(f"dri/renderD{n}" for n in range(128, 136))), **{HIP: "4,5", CUDA: "0,1"})
    assert seen == Devices(accelerator="cuda", variables=(HIP, CUDA), ids=("4", "5"))


def test_the_cpu_may_be_wanted_and_a_device_asked_for(tmp_path: Path) -> None:
    root = with_gpus(tmp_path)
    assert ids(root, DS_ACCELERATOR="cpu") == ()
    assert ids(root, DS_ACCELERATOR="npu") == ()
    assert ids(root, DS_ACCELERATOR="cuda") == ("0", "1", "2", "3")


def test_a_torch_that_was_built_for_something_else_cannot_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('torch must not be imported for this')")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    head = "from typing import Optional\n__version__ = '2.13.0'\n"
    for family, cuda, hip in ((NVIDIA, "'12.8'", "None"), (AMD, "None", "'6.4'"), (None, "None", "None")):
        (package / "version.py").write_text(f"{head}cuda: Optional[str] = {cuda}\nhip: Optional[str] = {hip}\n")
        assert [one for one in (NVIDIA, AMD) if accelerator.runs_on(one)] == [one for one in (family,) if one]
    (package / "version.py").unlink()
    assert not accelerator.runs_on(NVIDIA)
    root = with_gpus(tmp_path / "dev")
    assert devices({}, dev=root) is None


def test_contact_is_told_from_a_question() -> None:
    contact = [
        "nvidia0",
        "nvidia15",
        "nvidia-uvm",
        "nvidia-uvm-tools",
        "kfd",
        "dri/renderD128",
        "accel/accel0",
        "davinci7",
    ]
    assert [name for name in contact if not in_contact(f"/dev/{name}")] == []
    for harmless in ("/dev/nvidiactl", "/dev/null", "/dev/shm/nvidia0", "/home/kfd", "socket:[1]"):
        assert not in_contact(harmless)


@pytest.mark.parametrize(
    ("given", "gpus", "pool", "script"),
    [
        ({}, True, "cuda", None),
        ({}, False, "cpu", "cpu"),
        ({ACCELERATOR: "cpu"}, True, "cpu", "cpu"),
        ({ACCELERATOR: "xpu"}, False, "xpu", "xpu"),
        ({CUDA: ""}, True, "cpu", None),
    ],
)
def test_our_processes_are_always_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    gpus: bool,
    pool: str,
    script: str | None,
) -> None:
    """DeepSpeed asks no driver then. A script has its own torch, perhaps, and is left alone where there are devices."""

    def usable(family: Family) -> bool:
        return True

    root = with_gpus(tmp_path) if gpus else tmp_path
    monkeypatch.setattr(accelerator, "has_driver", lambda: gpus)
    monkeypatch.setattr(accelerator, "devices", lambda environment: devices(environment, dev=root, usable=usable))
    made = Environments(given, address="127.0.0.1")
    assert made.pool("a.0")[ACCELERATOR] == pool
    assert made.pool("a.0")["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    assert made.rank({}, ours=True, mark="a.0")[ACCELERATOR] == pool
    assert made.rank({}, ours=False, mark="a.0").get(ACCELERATOR) == script
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in made.rank({}, ours=True, mark="a.0"), "a rank looks properly"
