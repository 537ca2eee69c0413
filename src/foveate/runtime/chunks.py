"""Chunks: a function over many rows, a part at a time, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def in_chunks(run: Callable[..., Tensor], step: int, *tensors: Tensor) -> Iterator[Tensor]:
    """The results of ``run`` on rows of ``tensors``, ``step`` at a time; half as many where memory does not suffice.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    start = 0
    while start < len(tensors[0]):
        try:
            yield run(*(tensor[start : start + step] for tensor in tensors))
        except torch.OutOfMemoryError:
            if step == 1:
                raise
            step = max(1, step // 2)
            continue
        start += step
