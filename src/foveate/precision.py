"""Precision: in what changed images run, and whether this machine is quick at it."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch

from foveate.errors import FoveateError

Precision = Literal["fp32", "bf16"]
CPU = torch.device("cpu")
# What processors say that multiply bf16, or widen it, by themselves.
_INSTRUCTIONS = {
    "x86_64": ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2"),
    "arm64": ("bf16", "sve_bf16"),
    "aarch64": ("bf16", "sve_bf16"),
}


def check_precision(precision: str, what: str = "precision") -> Precision:
    """The precision, if it is one.

    Raises:
        FoveateError: it is none.
    """
    if precision not in get_args(Precision):
        raise FoveateError(f"{what} {precision!r} is unknown: use fp32 or bf16")
    return precision  # type: ignore[return-value]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast on devices of a kind casts to here; None where it is off, or not known there."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def casting(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to a type on devices of a kind; nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(kind, dtype)


def uncast(kind: str) -> AbstractContextManager[Any]:
    """No autocast on devices of a kind, for what is computed around a model."""
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


def has_bf16(device: torch.device = CPU) -> bool | None:
    """Whether a device has instructions for bf16; None where torch does not tell: an older torch, other devices.

    One that has none computes in bf16 nevertheless, by widening every number.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if device.type != "cpu" or capabilities is None:
        return None
    able = capabilities()
    names = _INSTRUCTIONS.get(str(able.get("architecture")))
    return None if names is None else any(able.get(name) for name in names)


@cache
def warn_if_slow(device: torch.device) -> None:
    """Warn, once in a run, where bf16 is asked for on a device that has no instructions for it."""
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))  # of several processes
    if first and has_bf16(device) is False:
        name = "GPU" if device.type == "cuda" else "processor"
        warnings.warn(
            f"this {name} has no bf16 instructions, so that precision bf16 is likely to be slower than fp32, with some "
            "networks many times: leave it out",
            stacklevel=2,
        )
