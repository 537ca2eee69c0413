"""Memory: the peak of what a piece of work takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], float]]:
    """Within, a function that says how many MB were taken at the most beyond what was taken before.

    Of the GPU's memory, or of the process on Linux; not a number where the system does not tell.
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
