"""Batch: images with what is known about them, the record that methods, metrics, losses and data sets exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A batch of images and what is known about each.

    Attributes:
        x: images, ``[B,3,H,W]``, values in [0, 1].
        y: class indices, ``[B]`` (int64), or None where no labels are known.
        mask: foreground, ``[B,H,W]`` bool (True = the object), or None.
        boxes: one ``[n,4]`` tensor an image (``x0, y0, x1, y1`` in pixels of ``x``), or None.
        id: one name an image, stable between runs.
        background: what stands behind the object, by any name, one an image, for accuracy by group; or None.
    """

    x: Tensor
    y: Tensor | None = None
    mask: Tensor | None = None
    boxes: tuple[Tensor, ...] | None = None
    id: tuple[str, ...] = ()
    background: tuple[str, ...] | None = None

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
