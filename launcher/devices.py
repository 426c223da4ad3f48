"""What an error says of a device: that it is gone, that it has failed, or that a link between devices has. Pure.

The texts are those of CUDA, HIP, NCCL and of the driver (Xid), as torch, Triton and DeepSpeed pass them on. What is the
program's own fault on any device (an assertion on the device, an argument that is refused, a kernel that was not built
for it) is no fault of the device; want of memory is not either, and is not asked about here.
"""

from __future__ import annotations

import enum
import re


class Trouble(enum.Enum):
    """What is wrong."""

    GONE = "gone"  # or cannot be taken: on this node nobody will do better
    FAULT = "fault"
    LINK = "link"  # between devices or nodes, and nothing says that the other end is gone


# (Not "device-side assert" alone: torch advises to compile with such assertions whenever a device fails.)
_MISUSE = re.compile(
    r"assert triggered|ErrorAssert\b"
    r"|invalid (argument|value|configuration|device function|resource handle|device context)"
    r"|no kernel image|misaligned address|not supported|too many resources requested|captur|unsupported toolchain"
    r"|STATUS_(INVALID_VALUE|NOT_SUPPORTED|ARCH_MISMATCH)|not compiled with",
    re.IGNORECASE,
)
_GONE = re.compile(
    r"no (CUDA|ROCm)-capable device|No (CUDA|HIP) GPUs are available|invalid device ordinal|fallen off the bus"
    r"|(GPU|device) is lost|unable to determine the device handle|system not yet initialized"
    r"|driver version is insufficient|unsupported display driver|(cuda|hip)Error(NoDevice|InvalidDevice\b)",
    re.IGNORECASE,
)
_FAULT = re.compile(
    r"(CUDA|HIP)( runtime)? (error|failure)|Triton Error|(cuda|hip)Error[A-Z]|uncorrectable (ECC|NVLink)|\bXid\b"
    r"|unspecified launch failure|illegal memory access|memory access fault by GPU|unhandled (cuda|hip) error"
    r"|CU(BLAS|DNN|SPARSE|FFT)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)",
    re.IGNORECASE,
)
# What a broken device says, and just as well a kernel that reads where it must not.
_EITHER = re.compile(
    r"illegal (memory access|instruction|address)|unspecified launch failure|memory access fault by GPU"
    r"|STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|(cuda|hip)ErrorLaunchFailure|(cuda|hip)ErrorIllegal\w+",
    re.IGNORECASE,
)
_THE_DEVICES = re.compile(r"uncorrectable|\bECC\b|\bXid\b|NVLink", re.IGNORECASE)
_LINK = re.compile(r"unhandled system error|ncclSystemError", re.IGNORECASE)
_OTHER_END = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|by (remote )?peer|remote process|ncclRemoteError"
    r"|timed? ?out",
    re.IGNORECASE,
)
_TAKING = re.compile(r"\bset_device\(")  # the call, in a traceback
_ABORTED = re.compile(r"terminated? (called after throwing|with exception)", re.IGNORECASE)


def trouble(kind: str, message: str, trace: str = "") -> Trouble | None:
    """What an error says of a device; None if it speaks of none, or of a mistake of the program.

    Args:
        kind: Name of the exception's class.
        message: What it says.
        trace: Its traceback, if there is one.
    """
    if _MISUSE.search(message):
        return None
    if _GONE.search(message) or _TAKING.search(trace):
        return Trouble.GONE
    if kind == "AcceleratorError" or _FAULT.search(message):
        return Trouble.FAULT
    return Trouble.LINK if _LINK.search(message) and not _OTHER_END.search(message) else None


def ambiguous(message: str) -> str:
    """The words of an error that a mistake of the program may have caused just as well as a device; "" for none.

    Which of the two it was shows when it happens again. (The line that reports it is chance: kernels run behind it.)
    """
    found = None if _THE_DEVICES.search(message) else _EITHER.search(message)
    return found[0].lower() if found else ""


def last_words(tail: str) -> str:
    """What an aborted process has said of the exception that nobody caught, as NCCL's watchdog does; "" if nothing.

    Args:
        tail: The end of its log.
    """
    begun = [found.start() for found in _ABORTED.finditer(tail)]
    return tail[begun[-1] :] if begun else ""
