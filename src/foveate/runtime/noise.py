"""Noise: seeded draws that do not depend on the batch, on the chunk, or on what was drawn before."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_STEP = 1_000_003  # a prime, so that the seeds 0 and 1 do not share their draws


def generator(seed: int, number: int = 0) -> torch.Generator:
    """A generator for draw ``number`` of a seed."""
    return torch.Generator().manual_seed((seed * _STEP + number) & 0xFFFFFFFFFFFF)


def width(x: Tensor, share: float) -> Tensor:
    """Standard deviation of noise on each image: a share of its own range, ``share (max x - min x)``, ``[B,1,1,1]``."""
    return share * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))


def gaussian(seed: int, numbers: Iterable[int], shape: torch.Size, like: Tensor) -> Tensor:
    """Standard normal draws, one for each number, ``[n, *shape]``: the same for a number whatever is drawn beside it."""
    draws = [torch.randn(shape, generator=generator(seed, number)) for number in numbers]
    return torch.stack(draws).to(like)
