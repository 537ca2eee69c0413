"""How far two results agree, in one phrase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate import maps
from foveate.metrics.sanity import spearman


def as_maps(result: Any) -> Tensor:
    """Maps ``[B,h,w]`` on the CPU from a tensor or array ``[B,1,h,w]`` or ``[B,h,w]``."""
    found = torch.as_tensor(np.asarray(result) if isinstance(result, np.ndarray) else result).detach().float().cpu()
    return found.mean(1) if found.ndim == 4 else found


def maps_agree(ours: Any, theirs: Any) -> str:
    """The largest difference of maps scaled to [0, 1]."""
    return f"maps differ by at most {float(_differences(ours, theirs).max()):.1g}"


def each_agrees(names: Sequence[str]) -> Callable[[Any, Any], str]:
    """The same for maps of several methods, one after the other: those that differ are named."""

    def phrase(ours: Any, theirs: Any) -> str:
        worst = _differences(ours, theirs).view(len(names), -1).amax(1).tolist()
        same = [w for w in worst if w < 1e-3]
        other = [f"{name} by {w:.1g}" for name, w in zip(names, worst, strict=True) if w >= 1e-3]
        text = f"{len(same)} of {len(names)} maps differ by at most {max(same):.1g}" if same else "no map is the same"
        return ", ".join([text, *other])

    return phrase


def _differences(ours: Any, theirs: Any) -> Tensor:
    """The largest difference of each map, scaled to [0, 1], ``[B]``."""
    a, b = (maps.scale(as_maps(result), "range") for result in (ours, theirs))
    if a.shape != b.shape:
        b = maps.upsample(b, (a.shape[-2], a.shape[-1]))
    return (a - b).abs().amax((1, 2))


def ranks_agree(ours: Any, theirs: Any) -> str:
    """Rank correlation of maps, for what draws its own random numbers or is defined a little differently."""
    a, b = as_maps(ours), as_maps(theirs)
    if a.shape != b.shape:
        b = maps.upsample(b, (a.shape[-2], a.shape[-1]))
    return f"rank correlation {float(spearman(a, b).median()):.3f}"


def numbers_agree(ours: Any, theirs: Any) -> str:
    """The largest difference of numbers, which both give in the same order."""
    a, b = (np.asarray(result, dtype=float).ravel() for result in (ours, theirs))
    return f"values differ by at most {np.abs(a - b).max():.2g}"
