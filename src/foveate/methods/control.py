"""Controls: maps that ignore the model. A metric that ranks one of them high does not measure the explanation."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.targets import Target


def _grid(capture: Capture, layer: str | None) -> tuple[int, int]:
    """The grid of the layer; where the model has none cells of 32 pixels, as in most networks, and 7 a side at least."""
    if layer is None and not capture.layers:
        return max(7, capture.size[0] // 32), max(7, capture.size[1] // 32)
    layout = capture.layout(layer)
    return layout.height, layout.width


@method("fake_cam", title="Fake-CAM", paper="Poppi et al., CVPR workshops 2021", control=True)
def fake_cam(
    capture: Capture, layer: str | None, target: Target, *, resolution: Literal["feature", "pixel"] = "feature"
) -> Tensor:
    """Ones with a 0 in the top left corner: almost the whole image, so that Average Drop is near 0.

    Args:
        resolution: ``feature``: the corner is one cell of the layer's grid, as in the tables of the Opti-CAM paper, a
            wedge of about 32 pixels after upsampling; ``pixel``: one pixel, map ``[B,H,W]``.
    """
    if resolution not in ("feature", "pixel"):
        raise FoveateError(f"resolution {resolution!r} is unknown: use 'feature' or 'pixel'")
    height, width = _grid(capture, layer) if resolution == "feature" else capture.size
    saliency = capture.images.new_ones(len(capture.x), height, width)
    saliency[:, 0, 0] = 0
    return saliency


@method("random", title="Random", paper="control", control=True)
def random(capture: Capture, layer: str | None, target: Target, *, seed: int = 0) -> Tensor:
    """Uniform noise at the layer's resolution, seeded by ``seed`` and the image's bytes: the same in any batch."""
    height, width = _grid(capture, layer)
    rows = []
    for image in capture.x:
        content = zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes(), seed & 0xFFFFFFFF)
        generator = torch.Generator().manual_seed(content)
        rows.append(torch.rand(height, width, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(capture.images)


@method("centre", title="Centre", paper="control", control=True, aliases=("center",))
def centre(capture: Capture, layer: str | None, target: Target, *, sigma: float = 0.25) -> Tensor:
    """A Gaussian at the centre with standard deviation ``sigma`` of each side: where photographers put things."""
    if not sigma > 0:
        raise FoveateError(f"sigma {sigma} is not above 0: it is a share of the map's side")
    height, width = _grid(capture, layer)
    rows = (torch.arange(height).to(capture.images) + 0.5) / height - 0.5
    columns = (torch.arange(width).to(capture.images) + 0.5) / width - 0.5
    prior = torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / (2 * sigma**2))
    return prior.expand(len(capture.images), -1, -1).clone()
