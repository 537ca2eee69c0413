"""Missing: which images of a batch have no value of a metric, why, and how to say it: NaN is never a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.batch import Batch

MAP = "the map holds NaN or infinity"
MASK = "the mask holds NaN or infinity"
BOXES = "a box is inverted, NaN or infinite"
LOGITS = "the model gives NaN or infinity on changed images"
NOTHING = "no object is in view"
OUTSIDE = "its boxes lie outside the image (boxes are pixels of x, the image as the model gets it)"
NO_MAP = "the image has no map"
ELSEWHERE = "its maps come from elsewhere: what they cost is not known, and they cannot be made again"
UNDEFINED = "it is not defined there"


def not_finite(values: Tensor) -> Tensor:
    """Which rows of ``[B,...]`` hold NaN or infinity, ``[B]`` bool."""
    if not values.is_floating_point():
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    flat = values.detach().flatten(1)
    spoilt = ~torch.isfinite(flat.sum(1))  # a sum is faster than a look at each, and may overflow where nothing is wrong
    return ~torch.isfinite(flat).all(1) if spoilt.any() else spoilt


def impossible(boxes: Tensor) -> bool:
    """Whether a box of ``[n,4]`` (``x0, y0, x1, y1``) cannot be: NaN, infinite, or its far edge before the near one."""
    boxes = boxes.detach().reshape(-1, 4)
    return not bool((torch.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)).all())


def outside(boxes: Tensor, size: tuple[int, int]) -> bool:
    """Whether a box of ``[n,4]`` lies wholly outside an image of ``size`` (height, width): a wrong scale, mostly.

    A box without area that touches the image does not: it is what clipping leaves of an object that a crop cut away.
    """
    boxes = boxes.detach().cpu().double().reshape(-1, 4)
    far = boxes.new_tensor([size[1], size[0]])
    apart = ((boxes[:, :2] > far) | (boxes[:, 2:] < 0)).any(1)
    beside = ((boxes[:, :2] >= far) | (boxes[:, 2:] <= 0)).any(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return bool((apart | beside).any())


def inputs(
    M: Tensor | None, batch: Batch, needs: Sequence[str], raw: Tensor | None = None, region: str = "auto"
) -> dict[str, Tensor]:
    """The images that a metric can say nothing about for what it was given, by reason: ``[B]`` bool on the CPU.

    Args:
        needs: what the metric reads of the batch: of ``mask`` and ``region``.
        raw: the map as the method gave it.
        region: ``auto``, ``boxes`` or ``mask``: what stands for the region.
    """
    found = {}
    if M is not None:
        spoilt = not_finite(M)
        found[MAP] = spoilt if raw is None else spoilt | not_finite(raw)
    of_boxes = "region" in needs and batch.boxes is not None and region != "mask"
    if of_boxes and batch.boxes is not None:
        found[BOXES] = torch.tensor([impossible(boxes) for boxes in batch.boxes])
    if batch.mask is not None and ("mask" in needs or ("region" in needs and not of_boxes)):
        found[MASK] = not_finite(batch.mask)
    return {reason: rows.cpu() for reason, rows in found.items() if rows.any()}


def without(M: Tensor, rows: Tensor | None) -> Tensor:
    """Maps with zeros for those that hold NaN or infinity."""
    return M if rows is None else M.masked_fill(rows.to(M.device).view(-1, *(1,) * (M.ndim - 1)), 0)


def marked(values: Mapping[str, Tensor], given: Mapping[str, Tensor], pooled: Sequence[str]) -> dict[str, Tensor]:
    """The values of a metric with NaN for every image that has none: infinity is none, nor is part of a pooled row."""
    found = dict(values)
    for name, column in values.items():
        if not column.is_floating_point():
            continue
        spoilt = ~torch.isfinite(column)
        if column.ndim > 1:
            whole = spoilt.flatten(1).any(1) if name in pooled else torch.zeros_like(spoilt[:, 0])
            spoilt = spoilt | whole.view(-1, *(1,) * (column.ndim - 1))
        for rows in given.values():
            spoilt = spoilt | rows.to(column.device).view(-1, *(1,) * (column.ndim - 1))
        if spoilt.any():
            found[name] = torch.where(spoilt, torch.nan, column)
    return found


def reasons(lost: Tensor, given: Mapping[str, Tensor], others: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    """How many of the images that have no value lack it for which reason, each counted once.

    Args:
        lost: ``[B]`` bool.
        given: as :func:`inputs` gives it.
        others: what else may be a reason, the first that holds is taken.
    """
    counts = {}
    for reason, rows in (*given.items(), *others, (UNDEFINED, torch.ones_like(lost))):
        if count := int((lost & rows).sum()):
            counts[reason] = count
        lost = lost & ~rows
    return counts


def said(missing: Mapping[str, Mapping[str, Mapping[str, int]]], images: int, quiet: Sequence[str] = (UNDEFINED,)) -> list[str]:
    """Sentences: ``AD, AG and AI of grad_cam: 3 of 6 images have no value: the model gives NaN ...``.

    Args:
        images: how many there are.
        quiet: reasons that need no sentence.
    """
    columns: dict[tuple[str, str, int], list[str]] = {}
    for method, own in missing.items():
        for column, why in own.items():
            for reason, count in why.items():
                if reason not in quiet:
                    columns.setdefault((method, reason, count), []).append(column)
    methods: dict[tuple[tuple[str, ...], str, int], list[str]] = {}
    for (method, reason, count), names in columns.items():
        methods.setdefault((tuple(names), reason, count), []).append(method)
    return [
        f"{_listed(names)} of {_listed(several)}: {count} of {images} images have no value: {reason}."
        for (names, reason, count), several in methods.items()
    ]


def _listed(names: Sequence[Any]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else str(names[0])
