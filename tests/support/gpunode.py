"""A node that looks as if it had NVIDIA devices, as far as files can tell: for one command, in a namespace of its own.

``/dev`` has the devices' files, the installed torch says that it was built for CUDA, and there is a library in place of
NVIDIA's that answers torch's questions and, as theirs does, keeps ``/dev/nvidiactl`` open from the first one on. There
is no driver: whatever would compute fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.version

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("unshare", "gcc")),
    reason="mounts files in a namespace (root, unshare) and makes a library (gcc)",
)

DEVICES = 2

_NVML = """
#include <fcntl.h>
static int file = -1;
int nvmlInit_v2(void) {
    if (file < 0) file = open("/dev/nvidiactl", O_RDWR | O_CLOEXEC);
    return file < 0 ? 9 : 0;
}
int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlDeviceGetCount_v2(int *count) { *count = DEVICES; return 0; }
"""

_PYNVML = '''
"""What DeepSpeed calls of nvidia-ml-py when it is installed."""
import ctypes

class NVMLError(Exception):
    pass

def nvmlInit():
    if ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2():
        raise NVMLError
'''

_ENTER = """
set -e
mount -t tmpfs none "$1"
for file in null zero random urandom; do touch "$1/$file"; mount --bind "/dev/$file" "$1/$file"; done
mkdir "$1/shm"; mount --bind /dev/shm "$1/shm"
for file in nvidiactl nvidia-uvm $2; do touch "$1/$file"; done
mount --move "$1" /dev
mount --bind "$3" "$4"
shift 4
exec "$@"
"""


def entering(folder: Path) -> list[str]:
    """Command that runs the command after it on such a node.

    Args:
        folder: A fresh folder. The command finds the library when ``LD_LIBRARY_PATH`` is this folder, and with it in
            ``PYTHONPATH`` nvidia-ml-py, too.
    """
    (folder / "nvml.c").write_text(_NVML)
    (folder / "pynvml.py").write_text(_PYNVML)
    library = folder / "libnvidia-ml.so.1"
    source = [f"-DDEVICES={DEVICES}", str(folder / "nvml.c")]
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), *source], check=True)
    installed = Path(torch.version.__file__)
    version = folder / "version.py"
    version.write_text(installed.read_text() + "cuda: Optional[str] = '12.8'\nhip = None\n")
    (folder / "dev").mkdir()
    gpus = " ".join(f"nvidia{number}" for number in range(DEVICES))
    words = [str(folder / "dev"), gpus, str(version), str(installed)]
    return ["unshare", "--mount", "--propagation", "private", "bash", "-c", _ENTER, "enter", *words]
