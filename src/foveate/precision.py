"""Precision: in what changed images run, and whether this machine is quick at it."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal, get_args

import torch

from foveate.errors import FoveateError

Precision = Literal["fp32", "bf16"]
# What an x86 processor says that multiplies bf16, or widens it, by itself.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2")


def check_precision(precision: str, what: str = "precision") -> Precision:
    """The precision, if it is one.

    Raises:
        FoveateError: it is none.
    """
    if precision not in get_args(Precision):
        raise FoveateError(f"{what} {precision!r} is unknown: use fp32 or bf16")
    return precision  # type: ignore[return-value]


def has_bf16(kind: str = "cpu") -> bool | None:
    """Whether a kind of device has instructions for bf16; None where torch does not tell.

    Told are x86 processors (from torch 2.10 on, about) and CUDA devices; one that has none computes in bf16 nevertheless,
    by widening every number.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if kind != "cpu" or capabilities is None:
        return None
    able = capabilities()
    return any(able.get(name) for name in _INSTRUCTIONS) if able.get("architecture") == "x86_64" else None


@cache
def warn_if_slow(kind: str) -> None:
    """Warn, once in a process, where bf16 is asked for on a kind of device that has no instructions for it."""
    if has_bf16(kind) is False:
        device = "GPU" if kind == "cuda" else "processor"
        warnings.warn(
            f"this {device} has no bf16 instructions, so that precision bf16 is slower than fp32, with some networks many "
            "times: leave it out",
            stacklevel=2,
        )
