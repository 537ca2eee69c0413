"""Localization: how much of a map lies on the object."""

from __future__ import annotations

from torch import Tensor

from foveate import maps
from foveate.batch import Batch
from foveate.capture import Capture
from foveate.errors import FoveateError
from foveate.registry import metric


@metric(
    "mass_inside",
    title="Mass inside the mask",
    paper="Wang et al., CVPR workshops 2020 (energy-based pointing game), on masks",
    columns={"mass_inside": "up"},
    needs=("mask",),
)
def mass_inside(capture: Capture, M: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Share of the map's mass inside the object's mask, in [0, 1], one value an image; 0 for a map without mass.

    Note:
        ``M`` is scaled to [0, 1], which lifts a map whose smallest value is above 0 to where that value is 0.

    Raises:
        FoveateError: the batch has no masks, or they are of another size than the maps.
    """
    if batch.mask is None:
        raise FoveateError("mass_inside needs a mask for every image, and this data has none")
    if batch.mask.shape != M.shape:
        raise FoveateError(f"masks of shape {list(batch.mask.shape)} do not fit maps of shape {list(M.shape)}")
    return {"mass_inside": maps.mass_inside(M.double(), batch.mask)}
