"""Attention supervision: the map's mass outside of a mask or a box, right for the right reasons."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate import maps
from foveate.batch import Batch, as_share
from foveate.data.boxes import regions
from foveate.errors import FoveateError
from foveate.losses.centre import cam_loss, trained_map
from foveate.registry import loss
from foveate.runtime.capture import Capture


def mass_outside(saliency: Tensor, mask: Tensor, *, form: Literal["mass", "abs", "raw", "square"] = "mass") -> Tensor:
    """Mass of raw maps ``S [B,h,w]`` outside of masks, ``[B]``: ``sum_ij (1 - h_ij) phi(S)_ij``.

    Args:
        mask: ``h [B,h,w]`` in [0, 1], 1 where the map may be; an image whose mask is empty has no loss.
        form: ``mass``: ``phi = relu(S) / sum relu(S)``, the share outside, in [0, 1]; ``abs``, ``raw``, ``square``: means of
            ``(1 - h) |S|`` and so on. ``square`` on input gradients is the penalty of Ross et al., IJCAI 2017.
    """
    mask = as_share(mask)
    known = mask.flatten(1).any(1)
    value = cam_loss(saliency, form=form, kernel=1 - mask.to(saliency.dtype))
    return torch.where(known, value, torch.zeros_like(value))


@loss(
    "mass_outside",
    title="Mass outside of the mask",
    paper="Ross et al., Right for the right reasons, IJCAI 2017, on class maps",
    needs=("region",),
    share=True,
    aliases=("right_for_the_right_reasons", "rrr"),
)
def mass_outside_of(
    capture: Capture,
    batch: Batch,
    *,
    method: str = "contrastive_cam",
    form: Literal["mass", "abs", "raw", "square"] = "mass",
) -> Tensor:
    """:func:`mass_outside` of the map of each image's own class by any differentiable method, ``[B]``.

    Masks, or boxes where there are none, are averaged over the cells of the map, so that a thin object does not vanish.

    Raises:
        FoveateError: the data has neither masks nor boxes; labels are missing; the method has no gradient.
    """
    saliency = trained_map(capture, batch, method)
    mask = regions(batch)
    if mask is None:
        raise FoveateError("mass_outside needs masks or boxes, and the data has neither: 'cam_loss' needs none")
    return mass_outside(saliency, maps.grid_mask(mask.to(saliency.device), saliency), form=form)
