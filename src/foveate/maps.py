"""The algebra of maps: relu, scale, upsample, mask, blur, and what happens to a map that says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.batch import as_share
from foveate.errors import FoveateError

Scaling = Literal["range", "max", "none"]
AT_ONCE = 8  # maps of 224 x 224 that are upsampled and scaled together: more are no faster, and memory would grow with them
TOLERANCE = 1e-6  # a map whose range is below this share of its largest magnitude is constant: float32 noise, not signal


def is_constant(saliency: Tensor) -> Tensor:
    """Which maps of ``[B,h,w]`` are constant (zero included), ``[B]`` bool: ``max - min <= 1e-6 max|S|``."""
    high, low = saliency.amax((-2, -1)), saliency.amin((-2, -1))
    return (high - low) <= TOLERANCE * torch.maximum(high.abs(), low.abs())


def relu(saliency: Tensor) -> Tensor:
    """The positive part of a map, ``max(S, 0)``: evidence for the class."""
    return saliency.clamp(min=0)


def scale(saliency: Tensor, kind: Scaling = "range", constant: float = 0.0) -> Tensor:
    """Scale each map of ``[B,h,w]`` over its positions; differentiable, and never NaN.

    ``range``: ``(S - min S) / (max S - min S)``, into [0, 1] (Opti-CAM's normaliser); ``max``: ``S / max|S|``, into
    [-1, 1]; ``none``: as it is. A constant map becomes ``constant`` everywhere (Opti-CAM: n(0) = 0), and its gradient
    is exactly 0: the denominator is replaced before the division, not only the quotient after it.
    """
    if kind == "none":
        return saliency
    high = saliency.amax((-2, -1), keepdim=True)
    low = saliency.amin((-2, -1), keepdim=True)
    largest = torch.maximum(high.abs(), low.abs())
    if kind == "range":
        shifted, width = saliency - low, high - low
        flat = width <= TOLERANCE * largest
    elif kind == "max":
        shifted, width = saliency, largest
        flat = largest == 0
    else:
        raise FoveateError(f"scaling {kind!r} is unknown: use 'range', 'max' or 'none'")
    whole = torch.where(flat, torch.ones_like(width), width)
    if shifted.requires_grad:
        return (shifted / whole).masked_fill(flat, constant)
    own = kind == "range" and shifted.is_floating_point()
    return (shifted.div_(whole) if own else shifted / whole).masked_fill_(flat, constant)


def upsample(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of ``[B,h,w]`` to ``size`` (``align_corners=False``); the same map where sizes agree."""
    if tuple(saliency.shape[-2:]) == tuple(size):
        return saliency
    return F.interpolate(saliency[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def prepare(
    saliency: Tensor, size: tuple[int, int], *, positive: bool = True, scaling: Scaling = "range", constant: float = 0.0
) -> Tensor:
    """From a raw map ``S [B,h,w]`` to ``M [B,H,W]``: ``n(up(relu(S)))``, the order of Opti-CAM's masks.

    Args:
        positive: keep the positive part first, the ``h`` of the CAM papers; False keeps the sign.

    Raises:
        FoveateError: the map has the wrong shape or holds NaN or infinity.
    """
    check(saliency)
    if positive:
        saliency = relu(saliency)
    return scale(upsample(saliency, size), scaling, constant)


def check(saliency: Tensor) -> None:
    """Raise a FoveateError unless these are raw maps ``[B,h,w]`` of finite numbers."""
    if saliency.ndim != 3:
        raise FoveateError(f"a saliency map has shape [B,h,w], and this one has {list(saliency.shape)}")
    if not torch.isfinite(saliency).all():
        raise FoveateError("the saliency map holds NaN or infinity: look for such values in the weights and in the images")


def _grown(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    return scale(upsample(relu(saliency), size))


def prepare_all(raw: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """:func:`prepare` of many methods' maps that :func:`check` has passed, those of one shape together: ``{name: M}``."""
    alike: dict[object, list[str]] = {}
    for name, saliency in raw.items():
        alike.setdefault((saliency.shape, saliency.dtype, saliency.device), []).append(name)
    prepared: dict[str, Tensor] = {}
    for names in alike.values():
        count = len(raw[names[0]])
        step = max(1, AT_ONCE * 224 * 224 // max(1, count * size[0] * size[1]))
        for some in (names[start : start + step] for start in range(0, len(names), step)):
            if len(some) == 1:
                prepared[some[0]] = _grown(raw[some[0]], size)
            else:  # clones, for who keeps one map does not want to keep all
                together = _grown(torch.cat([raw[name] for name in some]), size).split(count)
                prepared.update((name, M.clone()) for name, M in zip(some, together, strict=True))
    return {name: prepared[name] for name in raw}


def apply_mask(x: Tensor, mask: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """Images seen through masks: ``x * M + baseline * (1 - M)``, black outside by default.

    Args:
        x: ``[B,C,H,W]`` in [0, 1]; black is 0 because normalisation is inside the model.
        mask: ``[B,H,W]`` in [0, 1].
        baseline: what is seen where the mask is 0: a number, or images ``[B,C,H,W]`` (a blur, say).
    """
    mask = mask.to(x.dtype)[:, None]
    masked = x * mask
    if isinstance(baseline, Tensor) or baseline != 0:
        masked = masked + baseline * (1 - mask)
    return masked


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``[B,...,H,W]`` with standard deviation ``sigma`` in pixels; separable, edges replicated."""
    if sigma <= 0:
        return x
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None])
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None, :])
    return flat.reshape(x.shape)


def grid_mask(mask: Tensor, like: Tensor, resize: Literal["nearest", "area"] = "area", empty: float = 0.0) -> Tensor:
    """A mask ``[B,H,W]`` on the grid of a map ``[...,h,w]``: ``[B,h,w]`` in [0, 1] and of the map's type.

    Args:
        resize: ``area``, the share of each cell that is inside, or ``nearest``, 0 or 1 by one pixel, which may lose a
            thin object.
        empty: what a mask becomes of which nothing is left.

    Raises:
        FoveateError: an unknown kind.
    """
    if resize not in ("nearest", "area"):
        raise FoveateError(f"resize {resize!r} is unknown: use 'nearest' or 'area'")
    size = (like.shape[-2], like.shape[-1])
    values = mask[:, None].to(like.dtype)
    if resize == "nearest":
        grid = F.interpolate(values, size=size, mode="nearest-exact")[:, 0]
    else:
        grid = F.adaptive_avg_pool2d(values, size)[:, 0]
    lost = ~(grid > 0).flatten(1).any(1)
    return torch.where(lost[:, None, None], torch.full_like(grid, empty), grid)


def mass_inside(saliency: Tensor, mask: Tensor) -> Tensor:
    """Share of each map's positive mass inside its mask, ``[B]`` in [0, 1]: ``sum(relu(S) * mask) / sum(relu(S))``.

    A map without positive mass has no share: it counts as 0, the worst value. Masks of 0/255 and ``[B,1,H,W]`` are taken too.

    Raises:
        FoveateError: a mask of other values.
    """
    mask = as_share(mask)
    positive = relu(saliency)
    total = positive.sum((-2, -1))
    inside = (positive * mask.to(positive.dtype)).sum((-2, -1))
    return torch.where(total > 0, inside / torch.where(total > 0, total, torch.ones_like(total)), torch.zeros_like(total))
