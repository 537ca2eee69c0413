"""Batch: images with what is known about them, the record that methods, metrics, losses and data sets exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError


@dataclass(frozen=True)
class Batch:
    """A batch of images and what is known about each.

    Masks may be given as bool, 0/1 or 0/255 of any type, as ``[B,1,H,W]``, and masks, boxes and labels as arrays or nested
    lists: they become what stands here.

    Attributes:
        x: images, ``[B,C,H,W]``, values in [0, 1].
        y: class indices, ``[B]`` (int64), or None where no labels are known.
        mask: foreground, ``[B,H,W]`` bool (True = the object), or None; for losses also the share of each pixel, in [0, 1].
        boxes: one ``[n,4]`` tensor an image (``x0, y0, x1, y1`` in pixels of ``x``), or None.
        id: one name per image, stable between runs.
        background: what stands behind the object, by any name, one per image, for accuracy by group; or None.

    A mask with NaN stays a float, and a box that cannot be (NaN, infinite, ``x1 < x0``) stays what it is: metrics have no
    value of such an image, and say so.

    Raises:
        FoveateError: a mask of other values or of another size than the images; boxes that are shares of the image; not as
            many of them as images.
    """

    x: Tensor
    y: Tensor | None = None
    mask: Tensor | None = None
    boxes: tuple[Tensor, ...] | None = None
    id: tuple[str, ...] = ()
    background: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.y is not None and not isinstance(self.y, Tensor):
            object.__setattr__(self, "y", torch.as_tensor(self.y))
        if self.mask is not None:
            object.__setattr__(self, "mask", as_mask(self.mask, (len(self.x), *self.x.shape[-2:])))
        if self.boxes is not None:
            object.__setattr__(self, "boxes", as_boxes(self.boxes, len(self.x)))

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = value.to(device)
            elif field.name == "boxes" and value is not None:
                value = tuple(boxes.to(device) for boxes in value)
            moved[field.name] = value
        return Batch(**moved)

    def only(self, rows: Sequence[int]) -> Batch:
        """The same batch with these images alone, in this order."""
        index = torch.tensor(list(rows), dtype=torch.long)
        kept: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                kept[field.name] = value[index.to(value.device)]
            elif value is not None:
                kept[field.name] = tuple(value[i] for i in rows) if value else value
        return Batch(**kept)  # type: ignore[arg-type]

    @staticmethod
    def collate(samples: Sequence[Batch]) -> Batch:
        """One batch from several of one image each; what not all of them have is left out."""
        masks = [sample.mask for sample in samples]
        labels = [sample.y for sample in samples]
        boxes = [sample.boxes for sample in samples]
        return Batch(
            x=torch.cat([sample.x for sample in samples]),
            y=torch.cat([y for y in labels if y is not None]) if all(y is not None for y in labels) else None,
            mask=torch.cat([m for m in masks if m is not None]) if all(m is not None for m in masks) else None,
            boxes=tuple(box for sample in boxes if sample is not None for box in sample)
            if all(sample is not None for sample in boxes)
            else None,
            id=tuple(name for sample in samples for name in sample.id),
            background=tuple(place for sample in samples for place in sample.background or ())
            if all(sample.background is not None for sample in samples)
            else None,
        )


def as_mask(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """A mask of any unambiguous form as bool ``[B,H,W]``: bool, 0/1, 0/255, ``[B,1,H,W]``, ``[H,W]`` of one image, lists.

    With NaN or infinity among its values it stays a float, and has NaN there.

    Shares of pixels in [0, 1] stay as they are: losses weigh by them, and what is measured needs an edge.

    Raises:
        FoveateError: other values, such as those of several classes; another size.
    """
    given = _tensor(mask, "mask")
    if given.ndim == 4 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim == 2 and shape[0] == 1:
        given = given[None]
    if tuple(given.shape) != tuple(shape):
        raise FoveateError(f"masks of shape {list(given.shape)} do not fit images of shape {list(shape)}, one mask an image")
    if given.dtype == torch.bool:
        return given
    known = torch.isfinite(given)
    on = known & (given != 0)
    if bool((on == (given == 1)).all()) or bool((on == (given == 255)).all()):
        return on if bool(known.all()) else on.to(given.dtype).masked_fill(~known, float("nan"))
    if given.is_floating_point() and bool(((given >= 0) & (given <= 1)).all()):
        return given
    some = ", ".join(f"{value:g}" for value in given.flatten()[:100_000].unique()[:6].tolist())
    raise FoveateError(
        f"a mask is bool, 0 and 1, or 0 and 255, and this one has other values ({some}): compare it, as in mask == 1"
    )


def as_share(mask: Tensor) -> Tensor:
    """A mask on the grid of a map, ``[B,h,w]`` with values in [0, 1], also from bool, 0/255 and ``[B,1,h,w]``.

    Raises:
        FoveateError: other values.
    """
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    known = torch.isfinite(mask)  # NaN stays, for who counts it
    if mask.dtype == torch.bool or bool((((mask >= 0) & (mask <= 1)) | ~known).all()):
        return mask
    on = mask == 255
    if bool((on | (mask == 0) | ~known).all()):
        return on if bool(known.all()) else on.to(mask.dtype).masked_fill(~known, float("nan"))
    low, high = (f"{float(value):g}" for value in mask.aminmax())
    raise FoveateError(f"a mask has values from 0 to 1, or 0 and 255, and this one has some from {low} to {high}")


def as_boxes(boxes: Any, count: int) -> tuple[Tensor, ...]:
    """Boxes as one ``[n,4]`` tensor an image, from tensors, arrays or nested lists; None is an image without any.

    Raises:
        FoveateError: not one entry an image, not four numbers a box, or numbers that are no box in pixels.
    """
    if len(boxes) != count:
        raise FoveateError(
            f"boxes are given for {len(boxes)} image(s), and there are {count}: give a list [n,4] for each image"
        )
    found = tuple(_boxes_of(own, number) for number, own in enumerate(boxes))
    known = torch.cat([own.detach().reshape(-1, 4).cpu() for own in found]) if found else torch.zeros(0, 4)
    known = known[(known[:, 2:] > known[:, :2]).all(1)]
    if len(known) and bool(((known >= 0) & (known <= 1)).all()):
        raise FoveateError(
            f"boxes are pixels of the image, and these look like shares of it, such as {known[0].tolist()}: multiply x by its "
            "width and y by its height"
        )
    return found


def _boxes_of(boxes: Any, number: int) -> Tensor:
    own = _tensor([] if boxes is None else boxes, "boxes")
    if not own.numel():
        return own.float().reshape(0, 4)
    if own.ndim > 2 or own.shape[-1] != 4:
        raise FoveateError(f"boxes of shape {list(own.shape)} of image {number} are not [n,4]: x0, y0, x1, y1")
    own = own.reshape(-1, 4)
    if not own.is_floating_point():
        own = own.float()
    return own


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, (list, tuple)) and values and all(isinstance(value, Tensor) for value in values):
            return torch.stack(list(values))
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FoveateError(f"the {what} cannot be read as an array: {error}") from None
