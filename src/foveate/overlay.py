"""Overlay: maps in colours, and on the images and photographs that they are of."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from foveate.data.images import as_rgb, cropped_away
from foveate.errors import FoveateError, required
from foveate.maps import relu, scale, upsample

HEAT = "foveate"
# Navy, violet, magenta: colours that photographs hardly have, their lightness rising evenly (docs/pictures.md).
OWN = {HEAT: ("#06123f", "#3a24c8", "#a02cf0", "#ff30e0")}
OPACITY = 0.85  # of the largest value
OUTSIDE = 0.55  # brightness of what the network did not see
ROWS = 256  # of a photograph that are drawn together
SPECKLE = 0.1  # of the largest: pixels below do not count as bright, however few are above


@cache
def colours(name: str) -> Any:
    """A colour map by its name: one of :data:`OWN`, or one of matplotlib's.

    Raises:
        FoveateError: there is none of that name.
    """
    required("a map in colours", "matplotlib")
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    if name in OWN:
        return LinearSegmentedColormap.from_list(name, OWN[name])
    try:
        return colormaps[name]
    except KeyError:
        near = difflib.get_close_matches(name, [*OWN, *colormaps], 3, 0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(OWN)}, or one of matplotlib's, as viridis"
        raise FoveateError(f"colour map {name!r} is unknown: {advice}") from None


def ramp(name: str) -> str:
    """The 256 colours of a colour map in a row, six hexadecimal digits each, for pages that colour maps themselves."""
    values = (255 * colours(name)(np.linspace(0, 1, 256))[:, :3]).round().astype(int)
    return "".join(f"{red:02x}{green:02x}{blue:02x}" for red, green, blue in values)


def heat(saliency: Tensor, colormap: str = HEAT) -> Tensor:
    """A map ``[H,W]`` in [0, 1] in colours, ``[3,H,W]`` in [0, 1]."""
    values = colours(colormap)(saliency.detach().float().clamp(0, 1).cpu().numpy())[..., :3]
    return torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1).float()


def is_speckled(saliency: Tensor) -> bool:
    """Whether a map ``[H,W]`` in [0, 1] is of single pixels, as gradients are: at its own scale it is not seen on an image.

    Its pixels differ from the mean of the 5 x 5 around them by a quarter of the mean of all; maps of cells do by a tenth.
    """
    saliency = saliency.detach().float()
    if min(saliency.shape) < 5:
        return False
    around = F.avg_pool2d(saliency[None, None], 5, 1)[0, 0]
    return bool((saliency[2:-2, 2:-2] - around).abs().mean() > 0.25 * saliency.mean())


@dataclass(frozen=True)
class Shade:
    """A map as it is shown: ``values [H,W]`` in [0, 1], and what its 0 and its 1 are in the map's own values.

    Attributes:
        speckled: it is of single pixels (:func:`is_speckled`): what lies above ``high`` is shown alike, on an image dimmed
            further.
    """

    values: Tensor
    speckled: bool = False
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, saliency: Tensor) -> Shade:
        """A map ``[H,W]`` in [0, 1]; of a map of single pixels the brightest 1 % are alike."""
        saliency = saliency.detach().float().clamp(0, 1).cpu()
        if not is_speckled(saliency):
            return cls(saliency)
        return cls((saliency / _bright(saliency)).clamp(max=1), True)

    @classmethod
    def of_raw(cls, raw: Tensor, size: tuple[int, int], limit: float | None = None) -> Shade:
        """A raw map ``[h,w]``: of its positive part from its least to its largest value, or from 0 to a common ``limit``.

        A constant map is 0 at its own scale, as in :func:`foveate.maps.prepare`.
        """
        raw = upsample(relu(raw.detach().float().cpu())[None], size)
        low, high = (float(raw.min()), float(raw.max())) if limit is None else (0.0, limit)
        own = scale(raw)[0]
        speckled = is_speckled(own)
        if limit is not None:
            return cls((raw[0] / limit).clamp(max=1) if limit > 0 else torch.zeros_like(own), speckled, low, high)
        bright = float(_bright(own)) if speckled else 1.0
        return cls((own / bright).clamp(max=1), speckled, low, low + bright * (high - low))

    def note(self) -> str:
        """What has to be said of it; nothing of most maps."""
        return "brightest 1 % alike" if self.speckled else "" if self.values.any() else "an empty map"


def _bright(saliency: Tensor) -> Tensor:
    pixels = saliency.flatten()
    return pixels.kthvalue(max(1, math.ceil(0.99 * len(pixels)))).values.clamp(min=SPECKLE)


def overlay(x: Tensor, saliency: Tensor | Shade, *, colormap: str = HEAT, opacity: float = OPACITY) -> Tensor:
    """The image ``[K,H,W]`` under its map ``[H,W]``: the more salient, the more of the heat, on a dimmed grey image.

    Of a map of single pixels (:func:`is_speckled`) the brightest 1 % are shown alike, on an image dimmed further.
    """
    shade = saliency if isinstance(saliency, Shade) else Shade.of(saliency)
    return _blended(as_rgb(x.detach().float().cpu()), shade.values, shade.speckled, colormap, opacity)


def _blended(x: Tensor, values: Tensor, speckled: bool, colormap: str, opacity: float) -> Tensor:
    if speckled:
        x, opacity = 0.6 * x, min(1.0, opacity + 0.1)
    grey = x.mean(0, keepdim=True)
    quiet = (0.55 * x + 0.45 * grey) * 0.82
    share = opacity * values**0.8
    lit = 0.74 * heat(values, colormap) + 0.26 * x
    return (quiet * (1 - share) + (quiet * 0.25 + lit * 0.9) * share).clamp(0, 1)


def on_photograph(
    image: Image.Image,
    saliency: Tensor | Shade,
    frame: Sequence[float],
    *,
    colormap: str = HEAT,
    opacity: float = OPACITY,
) -> Image.Image:
    """The overlay on a photograph as it is: at its own resolution and aspect, what the network saw of it in a frame.

    What lies outside of the frame is darker; no frame is drawn where all of the photograph was seen.

    Args:
        saliency: ``[H,W]`` in [0, 1], a map of what the network saw.
        frame: ``left, top, right, bottom`` of that in pixels of the photograph: :meth:`foveate.data.images.Preprocess.frame`.
    """
    width, height = image.size
    pixels = np.asarray(image.convert("RGB"))
    shade = saliency if isinstance(saliency, Shade) else Shade.of(saliency)
    left, top, right, bottom = frame
    # Where the centre of each pixel of the photograph lies on the map, from -1 to 1 over what was seen.
    across = ((torch.arange(width) + 0.5 - left) / (right - left) * 2 - 1).float()
    down = ((torch.arange(height) + 0.5 - top) / (bottom - top) * 2 - 1).float()
    drawn = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, ROWS):  # whole, a large photograph would take gigabytes of floats
        rows = down[start : start + ROWS]
        grid = torch.stack(torch.meshgrid(across, rows, indexing="xy"), -1)[None]
        here = F.grid_sample(shade.values[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
        outside = ((rows.abs() > 1)[:, None] | (across.abs() > 1)).float()
        x = torch.from_numpy(pixels[start : start + ROWS].copy()).permute(2, 0, 1).float().div(255)
        blended = _blended(x, here * (1 - outside), shade.speckled, colormap, opacity) * (1 - (1 - OUTSIDE) * outside)
        drawn[start : start + ROWS] = (blended * 255).round().byte().permute(1, 2, 0).numpy()
    made = Image.fromarray(drawn, "RGB")
    if cropped_away(frame, image.size) > 0:
        thick = max(1, round(max(image.size) / 600))
        draw = ImageDraw.Draw(made)
        edges = [round(left), round(top), round(right) - 1, round(bottom) - 1]
        draw.rectangle(edges, outline="white", width=thick)
        draw.rectangle([edges[0] + thick, edges[1] + thick, edges[2] - thick, edges[3] - thick], outline="black", width=1)
    return made
