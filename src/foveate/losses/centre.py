"""CAM loss: the map's mass away from the centre, where photographers do not put the thing itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.batch import Batch
from foveate.data.images import read
from foveate.errors import FoveateError
from foveate.maps import relu
from foveate.registry import METHODS, loss
from foveate.runtime.capture import Capture

Form = Literal["mass", "abs", "raw", "square"]


def gaussian(height: int, width: int, sigma: float = 0.25, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """``exp(-d^2 / (2 sigma^2))`` on a grid, ``[h,w]`` float64, 1 at the centre.

    Args:
        sigma: standard deviation as a share of each side.
        centre: row and column as shares of the sides; (0.5, 0.5) lies between the four middle cells of an even grid.

    Raises:
        FoveateError: sigma is not above 0, or the centre is outside of the map.
    """
    if not sigma > 0:
        raise FoveateError(f"sigma {sigma} is not above 0: it is a share of the map's side")
    if not all(0 <= share <= 1 for share in centre):
        raise FoveateError(f"centre {centre} is outside of the map: give row and column as shares in [0, 1]")
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height - centre[0]
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width - centre[1]
    return torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / (2 * sigma**2))


def inverted_gaussian(height: int, width: int, sigma: float = 0.25, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """``K = 1 - exp(-d^2 / (2 sigma^2))``, ``[h,w]`` in [0, 1): the price of mass, 0 at the centre.

    Deviation: the talk's kernel is ``max(G) - G`` of a Gaussian with sum 1, about 5e-5 at 224 pixels; this one does not
    depend on the size of the map, so that a weight means the same on every network.
    """
    return 1 - gaussian(height, width, sigma, centre)


@lru_cache(maxsize=32)
def _kernel(
    height: int,
    width: int,
    sigma: float,
    centre: tuple[float, float],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """A kernel where the maps are, kept: training asks for the same one at every step."""
    with torch.inference_mode(False):
        return inverted_gaussian(height, width, sigma, centre).to(device, dtype)


def _mass(saliency: Tensor, kernel: Tensor) -> Tensor:
    positive = relu(saliency)
    total = positive.sum((1, 2))
    usable = total > 0
    away = (positive * kernel).sum((1, 2))
    return torch.where(usable, away / torch.where(usable, total, torch.ones_like(total)), torch.zeros_like(total))


_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mass": _mass,
    "abs": lambda saliency, kernel: (saliency.abs() * kernel).mean((1, 2)),
    "raw": lambda saliency, kernel: (saliency * kernel).mean((1, 2)),
    "square": lambda saliency, kernel: (saliency**2 * kernel).mean((1, 2)),
}


def cam_loss(
    saliency: Tensor,
    *,
    sigma: float = 0.25,
    centre: tuple[float, float] = (0.5, 0.5),
    form: Form = "mass",
    kernel: Tensor | None = None,
) -> Tensor:
    """CAM loss of raw maps ``S [B,h,w]``, ``[B]``: ``sum_ij K_ij phi(S)_ij`` with the inverted Gaussian ``K``.

    Args:
        sigma: width of the Gaussian as a share of the map's sides.
        centre: where the mass is free, as shares of the sides.
        form: ``mass`` (default): ``phi = relu(S) / sum relu(S)``, in [0, 1), does not depend on the map's scale; 0
            with no gradient for a map without positive part. ``abs``, ``raw``, ``square``: mean of ``K |S|``, ``K S``,
            ``K S^2``; they shrink the map as well, and ``raw`` rewards a negative border.
        kernel: custom prices instead of the Gaussian, ``[h,w]`` or one per image ``[B,h,w]``, 0 where mass is free.

    Raises:
        FoveateError: an unknown form, sigma not above 0, a kernel of another size than the map.

    Source: Setpal, "Interpretability tools as feedback loops", 2023, and the history of its code. Published evidence
    is mixed: on Waterbirds its authors report a worst-group accuracy below plain training.
    """
    if form not in _FORMS:
        raise FoveateError(f"form {form!r} is unknown: use {', '.join(map(repr, _FORMS))}")
    height, width = saliency.shape[-2:]
    if kernel is None:
        kernel = _kernel(height, width, sigma, centre, saliency.device, saliency.dtype)
    elif kernel.shape[-2:] != (height, width):
        raise FoveateError(f"a kernel of shape {list(kernel.shape)} does not fit maps of {height}x{width}")
    return _FORMS[form](saliency, kernel.to(saliency.dtype))


def trained_map(capture: Capture, batch: Batch, method: str) -> Tensor:
    """The raw map ``[B,h,w]`` of each image's own class by a method, differentiable in the parameters.

    Raises:
        FoveateError: the method's map has no gradient in the parameters; labels are missing.
    """
    record = METHODS.get(method)
    if not record.differentiable:
        raise FoveateError(f"method {method!r} cannot be trained through: use 'hires_cam', 'grad_cam' or 'cam'")
    if batch.y is None:
        raise FoveateError("this loss needs labels, and the batch has none")
    return record(capture, None, capture.target(batch.y))


@loss("cam_loss", title="CAM loss", paper="Setpal, Interpretability tools as feedback loops, 2023", share=True)
def cam_loss_of(
    capture: Capture,
    batch: Batch,
    *,
    method: str = "contrastive_cam",
    sigma: float = 0.25,
    centre: tuple[float, float] = (0.5, 0.5),
    form: Form = "mass",
    kernel: str | None = None,
) -> Tensor:
    """:func:`cam_loss` on the map of each image's own class by any differentiable method, ``[B]``.

    The default map is the contrast with the strongest other class. Its sum is what cross-entropy raises, so it has a
    positive part to be moved. A single class's map has not: adding any map to all classes changes no probability, and
    a network can escape this loss by making the maps of all classes negative (on the scenes two of three did).

    Args:
        kernel: a custom picture instead of the Gaussian: white where mass is free, black where it costs 1.

    Raises:
        FoveateError: the method's map has no gradient in the parameters; labels are missing; the picture cannot be read.
    """
    saliency = trained_map(capture, batch, method)
    prices = None if kernel is None else _drawn(kernel, saliency.shape[-2], saliency.shape[-1], saliency.device)
    return cam_loss(saliency, sigma=sigma, centre=(centre[0], centre[1]), form=form, kernel=prices)


@lru_cache(maxsize=8)
def _drawn(path: str, height: int, width: int, device: torch.device) -> Tensor:
    image = read(path).convert("L").resize((width, height), Image.Resampling.BOX)
    return 1 - torch.from_numpy(np.array(image)).to(device, torch.float32) / 255
