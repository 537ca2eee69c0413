"""Boxes: regions of the object, the box that a map predicts, and how much two boxes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from foveate.batch import Batch
from foveate.errors import FoveateError, required
from foveate.missing import impossible, not_finite

Region = Literal["auto", "boxes", "mask"]
NONE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Object:
    """Where the object of one image is.

    Attributes:
        boxes: ``[n,4]``, ``x0, y0, x1, y1`` in pixels, the far edges exclusive; one around it where only a mask is known.
        sizes: ``[n]``, pixels of each box, also those beyond the image where boxes are not clipped.
        areas: ``[n,H,W]`` bool, the pixels of each box, or the mask itself as one; a pixel is in where its centre is.
    """

    boxes: np.ndarray
    areas: Tensor
    clipped: bool = True

    @property
    def sizes(self) -> list[float]:
        """See the class."""
        if self.clipped:
            return [float(area.sum()) for area in self.areas]
        return [float((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in self.boxes]


def objects(batch: Batch, size: tuple[int, int], region: Region = "auto", clip: bool = True) -> list[Object]:
    """The object of each image from boxes, or from masks; boxes go first where both are known (``auto``).

    Boxes are clipped to the image; one of which nothing is left does not count. ``clip=False`` keeps them as they are. An
    image with a box or a mask that cannot be (NaN, infinite, inverted) has no object.

    Raises:
        FoveateError: neither is known, the one asked for is not, or masks are of another size.
    """
    if region not in ("auto", "boxes", "mask"):
        raise FoveateError(f"region {region!r} is unknown: use 'auto', 'boxes' or 'mask'")
    if batch.boxes is not None and region != "mask":
        return [_from_boxes(boxes, size, clip) for boxes in batch.boxes]
    if batch.mask is None or region == "boxes":
        raise FoveateError(f"localization needs boxes or masks (region {region!r}), and this data has none")
    if tuple(batch.mask.shape[-2:]) != tuple(size):
        raise FoveateError(f"masks of shape {list(batch.mask.shape)} do not fit maps of {size[0]} x {size[1]}")
    return [_from_mask(mask) for mask in batch.mask.cpu()]


def _from_boxes(boxes: Tensor, size: tuple[int, int], clip: bool) -> Object:
    given = boxes.detach().double().reshape(-1, 4).cpu()
    given = given[:0] if impossible(given) else given
    inside = given.minimum(torch.tensor([size[1], size[0]] * 2)).clamp(min=0)
    there = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    if clip:
        given, inside = inside[there], inside[there]
    columns, rows = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    across = (columns >= inside[:, :1]) & (columns < inside[:, 2:3])  # [n,W]
    down = (rows >= inside[:, 1:2]) & (rows < inside[:, 3:])  # [n,H]
    return Object(given.numpy(), down[:, :, None] & across[:, None], clip)


def _from_mask(mask: Tensor) -> Object:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows) or bool(not_finite(mask[None])):
        return Object(np.zeros((0, 4)), torch.zeros(0, *mask.shape, dtype=torch.bool))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    return Object(np.array([box], dtype=float), mask[None].bool())


def regions(batch: Batch) -> Tensor | None:
    """Where the object of each image may be, ``[B,H,W]`` in [0, 1]: its mask, else its boxes; None where neither is known."""
    if batch.mask is not None:
        return batch.mask
    return None if batch.boxes is None else box_masks(batch.boxes, (batch.x.shape[-2], batch.x.shape[-1]))


def box_masks(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Boxes ``[n,4]`` (``x0, y0, x1, y1``) of each image as masks ``[B,H,W]`` in [0, 1], exact at fractions of a pixel."""
    height, width = size
    masks = torch.zeros(len(boxes), height, width)
    for mask, image in zip(masks, boxes, strict=True):
        for x0, y0, x1, y1 in image.tolist():
            rows, columns = _covered(y0, y1, height), _covered(x0, x1, width)
            torch.maximum(mask, rows[:, None] * columns, out=mask)
    return masks


def _covered(start: float, end: float, count: int) -> Tensor:
    """How much of each of ``count`` unit cells an interval covers."""
    cells = torch.arange(count, dtype=torch.float32)
    return ((cells + 1).clamp(max=end) - cells.clamp(min=start)).clamp(min=0)


def intersection_over_union(box: Sequence[float], others: np.ndarray) -> np.ndarray:
    """``|P and G| / |P or G|`` of one box with each of ``[n,4]``; 0 for an empty box."""
    near, far = np.maximum(others[:, :2], box[:2]), np.minimum(others[:, 2:], box[2:])
    shared = np.clip(far - near, 0, None).prod(1)
    union = (box[2] - box[0]) * (box[3] - box[1]) + (others[:, 2:] - others[:, :2]).prod(1) - shared
    result: np.ndarray = np.divide(shared, union, out=np.zeros(len(shared)), where=union > 0)
    return result


def largest_component(binary: np.ndarray, diagonal: bool = False) -> tuple[float, float, float, float]:
    """The tight box of the largest connected component of ``[H,W]`` bool, far edges exclusive; empty where all is False.

    Of two of equal size the first in raster order. ``diagonal`` connects pixels at their corners too.
    """
    required("the box of a map", "scipy")
    from scipy import ndimage

    seen = _extent(binary)
    if seen is None:
        return NONE
    x0, y0, x1, y1 = seen
    labels, count = ndimage.label(binary[y0:y1, x0:x1], np.ones((3, 3)) if diagonal else None)
    if count > 1:  # one component fills its own extent
        largest = _extent(labels == 1 + int(np.bincount(labels.ravel())[1:].argmax()))
        assert largest is not None
        x0, y0, x1, y1 = x0 + largest[0], y0 + largest[1], x0 + largest[2], y0 + largest[3]
    return float(x0), float(y0), float(x1), float(y1)


def _extent(binary: np.ndarray) -> tuple[int, int, int, int] | None:
    rows = np.flatnonzero(binary.any(1))
    if not len(rows):
        return None
    columns = np.flatnonzero(binary[rows[0] : rows[-1] + 1].any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def predicted_box(M: np.ndarray, empty: Literal["none", "image"] = "none") -> tuple[float, float, float, float]:
    """The box that a map predicts: of the largest 4-connected component of ``M > mean(M)``, ``[H,W]``.

    A constant map predicts nothing, or with ``empty="image"`` the whole image.
    """
    box = largest_component(M - M.mean() > 0)
    return (0.0, 0.0, float(M.shape[1]), float(M.shape[0])) if box == NONE and empty == "image" else box
