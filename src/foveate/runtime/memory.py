"""Memory: the peak of what a piece of work takes, and what the process keeps of what was freed."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)
ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
_state = {"kept": False}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_memory() -> bool:
    """Let the process keep the memory that tensors free, for the next ones, until it ends; whether it does.

    glibc gives large blocks back to the system, which clears them anew, page by page, for the next layer: a batch of 32
    spends 40 % of its time on that in a ResNet-50, two thirds in a MobileNet-V2, nothing in a SqueezeNet. Once asked for,
    it holds for all that the main thread does, and the process does not shrink below its peak, except where memory is
    measured (:func:`peak`). The command line does this; a library does not decide it for a process that is not its own.

    Returns:
        False, and nothing is changed, where there is no ``mallopt`` (outside Linux with glibc), or where the environment
        says how memory is to be had: one of :data:`ENVIRONMENT`, or ``glibc.malloc`` in ``GLIBC_TUNABLES``.
    """
    asked = any(name in os.environ for name in ENVIRONMENT) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not _state["kept"] and not asked and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        _state["kept"] = bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
    return _state["kept"]


def kept() -> bool:
    """Whether this process keeps what it frees (:func:`keep_memory`)."""
    return _state["kept"]


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], float]]:
    """Within, a function that says how many MB were taken at the most beyond what was taken before.

    Of the GPU's memory, or of the process on Linux; NaN where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again without a trace
        RESET.write_text("5", encoding="ascii")
        resident = _status("VmRSS")
    except (OSError, KeyError, AttributeError):
        yield lambda: float("nan")
        return
    yield lambda: max(0.0, _status("VmHWM") - resident)


def _status(name: str) -> float:
    """A line of the process's status, in MB."""
    lines = dict(
        line.split(":", 1) for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines() if ":" in line
    )
    return float(lines[name].split()[0]) / 1024
