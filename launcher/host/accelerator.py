"""Which devices this node has. Found by its files: to ask a driver would be contact, after which nothing may be forked.

A device counts where it is there, the environment does not hide it, and the installed torch was built for it.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ACCELERATOR = "DS_ACCELERATOR"
"""DeepSpeed's variable. Without it DeepSpeed looks for devices when it is imported, and so makes contact with them."""

CPU = "cpu"
DEV = Path("/dev")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Devices that are driven alike.

    Attributes:
        accelerator: DeepSpeed's name.
        driver: File of the driver.
        device: Pattern of the devices' files, below ``/dev`` as all of them.
        contact: Pattern of the files that are open once a device is in use. NVML, which only asks what there is, opens
            ``/dev/nvidiactl``; CUDA opens the devices and ``/dev/nvidia-uvm``.
        visible: Variables that choose among the devices, the first that is set is the one that holds.
        build: What torch is built for (a name in ``torch/version.py``), or "".
        package: What teaches torch these devices, or "".
    """

    accelerator: str
    driver: str
    device: str
    contact: str
    visible: tuple[str, ...]
    build: str = ""
    package: str = ""


FAMILIES = (
    Family(
        accelerator="cuda",
        driver="nvidiactl",
        device=r"nvidia\d+",
        contact=r"nvidia\d+|nvidia-uvm.*",
        visible=("CUDA_VISIBLE_DEVICES",),
        build="cuda",
    ),
    Family(
        accelerator="cuda",
        driver="kfd",
        device=r"dri/renderD\d+",
        contact=r"kfd|dri/renderD\d+",
        visible=("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        build="hip",
    ),
    Family(
        accelerator="hpu",
        driver="accel",
        device=r"accel/accel\d+",
        contact=r"accel/.*",
        visible=("HABANA_VISIBLE_MODULES",),
        package="habana_frameworks",
    ),
    Family(
        accelerator="npu",
        driver="davinci_manager",
        device=r"davinci\d+",
        contact=r"davinci.*|devmm_svm|hisi_hdc",
        visible=("ASCEND_RT_VISIBLE_DEVICES",),
        package="torch_npu",
    ),
)

_CONTACT = re.compile(f"{DEV}/({'|'.join(family.contact for family in FAMILIES)})")

_NAMED = re.compile(r"(GPU|MIG)-\S+$")  # how NVIDIA names devices that are not numbered


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The devices of this node that may be used.

    Attributes:
        accelerator: DeepSpeed's name of them.
        variables: Those that choose among them here.
        ids: What the variables would say of each.
    """

    accelerator: str
    variables: tuple[str, ...]
    ids: tuple[str, ...]


def runs_on(family: Family) -> bool:
    """Whether the installed torch can use such devices; it is not imported for that."""
    if family.package:
        return importlib.util.find_spec(family.package) is not None
    torch = importlib.util.find_spec("torch")
    try:
        text = (Path(str(torch.origin)).parent / "version.py").read_text() if torch is not None else ""
    except OSError:
        return False
    return re.search(rf"^{family.build}\b[^=\n]*= *['\"]", text, re.MULTILINE) is not None


def has_driver(dev: Path = DEV) -> bool:
    """Whether this node has the driver of any kind of device."""
    return any((dev / family.driver).exists() for family in FAMILIES)


def devices(
    environment: Mapping[str, str], *, dev: Path = DEV, usable: Callable[[Family], bool] = runs_on
) -> Devices | None:
    """The devices of this node, or None: then ranks compute on the CPU.

    Args:
        environment: Of whoever starts the ranks; ``DS_ACCELERATOR=cpu`` in it wants none.
        dev: Folder of the device files.
        usable: Whether torch can use a family.
    """
    wanted = environment.get(ACCELERATOR)
    for family in FAMILIES:
        if (dev / family.driver).exists() and wanted in (None, "", family.accelerator):
            ids = _visible(family, _count(family, dev), environment)
            if ids and usable(family):
                chosen = tuple(name for name in family.visible if name in environment)
                return Devices(accelerator=family.accelerator, variables=chosen or family.visible[:1], ids=ids)
    return None


def accelerator_of(environment: Mapping[str, str]) -> str:
    """What DeepSpeed is to compute on here, in its own words."""
    found = devices(environment)
    return environment.get(ACCELERATOR) or (found.accelerator if found is not None else CPU)


def in_contact(file: str) -> bool:
    """Whether a process that has this file open is in contact with a device."""
    return _CONTACT.fullmatch(file) is not None


def _count(family: Family, dev: Path) -> int:
    folder, _, name = family.device.rpartition("/")
    try:
        return sum(re.fullmatch(name, file.name) is not None for file in (dev / folder).iterdir())
    except OSError:
        return 0


def _visible(family: Family, count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """What the environment leaves of ``count`` devices, as CUDA reads it: up to the first that is none."""
    given = next((environment[name] for name in family.visible if name in environment), None)
    if given is None:
        return tuple(map(str, range(count)))
    named = [word.strip() for word in given.split(",")]
    there = tuple(itertools.takewhile(lambda one: int(one) < count if one.isdecimal() else _NAMED.match(one), named))
    return there if len({*there}) == len(there) else ()
