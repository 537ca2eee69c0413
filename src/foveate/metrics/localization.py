"""Localization: how well a map finds the object, from boxes or masks."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import maps
from foveate.batch import Batch
from foveate.data.boxes import NONE, Object, Region, intersection_over_union, largest_component, objects, predicted_box
from foveate.errors import FoveateError
from foveate.registry import Column, metric
from foveate.runtime.capture import Capture
from foveate.targets import is_right, log_probability

Ties = Literal["expected", "any", "first"]
THRESHOLDS = np.arange(0, 1, 0.01)
LEAST_AREA = 0.05


@metric(
    "mass_inside",
    title="Mass inside the mask",
    paper="Wang et al., CVPR workshops 2020 (energy-based pointing game), on masks",
    columns={
        "mass_inside": Column(
            "up",
            "mass_inside",
            "Map on the object",
            "",
            (0, 1),
            "sum of the map inside the object's mask / sum of the map",
            "Which share of the map lies on the object?",
            "An object of a fifth of the image holds .8 of the map.",
            "It holds .2 of the map, as it would of a map that knows nothing.",
        )
    },
    needs=("mask",),
    digits=3,
    group="localization",
)
def mass_inside(capture: Capture, M: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Share of the map's mass inside the object's mask, in [0, 1], one value per image.

    0 for a map without mass, and NaN for an image without a mask.

    Note:
        ``M`` is scaled to [0, 1], which lifts a map whose smallest value is above 0 to where that value is 0.

    Raises:
        FoveateError: the batch has no masks, or they are of another size than the maps.
    """
    if batch.mask is None:
        raise FoveateError("mass_inside needs a mask for every image, and this data has none")
    if batch.mask.shape != M.shape:
        raise FoveateError(f"masks of shape {list(batch.mask.shape)} do not fit maps of shape {list(M.shape)}")
    share = maps.mass_inside(M.double(), batch.mask)
    return {"mass_inside": torch.where(batch.mask.any(2).any(1), share, torch.nan)}


def best_threshold(mean: Any) -> Any:
    """The accuracy of box predictions at the threshold where it is best over the data: ``[...,k] -> [...]``."""
    return mean.max(-1)


@metric(
    "localization",
    title="Localization: OM LE F1 BA SP EP SM",
    paper="Zhang et al., CVIU 2024 (table); Russakovsky et al., IJCV 2015 (OM, LE); Choe et al., CVPR 2020 (BA); "
    "Zhang et al., ECCV 2016 (SP); Wang et al., CVPR workshops 2020 (EP); Dabkowski and Gal, NeurIPS 2017 (SM)",
    columns={
        "OM": Column(
            "down",
            "official_metric",
            "Localization error, classified",
            "%",
            (0, 100),
            "0 where the model predicts the label and IoU(P, G) > .5, 100 elsewhere; P the box around the map, G the object's",
            "How often is the class wrong, or the box around the map not the object's?",
            "Right class, and the two boxes share .7 of their union: 0.",
            "Wrong class, whatever the box: 100.",
        ),
        "LE": Column(
            "down",
            "localization_error",
            "Localization error",
            "%",
            (0, 100),
            "0 where IoU(P, G) > .5, 100 elsewhere",
            "How often is the box around the map not the object's?",
            "The two boxes share .7 of their union: 0.",
            "The box is that of the whole image around a small bird: 100.",
        ),
        "F1": Column(
            "up",
            "pixel_f1",
            "Pixel F1",
            "%",
            (0, 100),
            "100 x 2 P R / (P + R), P = map inside / map, R = map inside / area of the box",
            "How well does the map fill the object's box, and nothing else?",
            "The map is 1 all over the box and 0 outside: F1 100.",
            "One bright point in the box: P is 1 and R nearly 0, F1 about 0.",
        ),
        "BA": Column(
            "up",
            "box_accuracy",
            "Box accuracy",
            "%",
            (0, 100),
            "100 x share of images with IoU >= .5, at the threshold that is best over the data",
            "On how many images is the object found, at the best threshold there is?",
            "At a threshold of .2 the boxes of 70 of 100 images fit: BA 70.",
            "At no threshold do more than 20 of 100 fit: BA 20.",
        ),
        "SP": Column(
            "up",
            "pointing_game",
            "Pointing game",
            "%",
            (0, 100),
            "100 where the map's maximum is on the object, 0 elsewhere",
            "How often is the brightest point on the object?",
            "The brightest point of 90 of 100 maps is on the object: SP 90.",
            "Of 30 of 100, which is the share of the image that the objects fill: SP 30.",
        ),
        "EP": Column(
            "up",
            "energy_pointing_game",
            "Energy pointing game",
            "%",
            (0, 100),
            "100 x sum of the map on the object / sum of the map",
            "Which share of the map lies on the object?",
            "The object fills a fifth of the image and holds four fifths of the map: EP 80.",
            "It holds a fifth of the map, as it would of a map that knows nothing: EP 20.",
        ),
        "SM": Column(
            "down",
            "saliency_metric",
            "Saliency metric",
            "",
            None,
            "log max(a, .05) - log p, a the share of the image in the box around the map, p the probability on that box",
            "How small is the box on which the model still recognises the class?",
            "A tenth of the image, recognised with p = .9: SM -2.2.",
            "The whole image, recognised with p = .5: SM .69.",
        ),
    },
    needs=("region",),
    pooled={"BA": best_threshold},
    group="localization",
)
def localization(
    capture: Capture,
    M: Tensor,
    batch: Batch,
    *,
    region: Region = "auto",
    ties: Ties = "expected",
    empty: Literal["none", "image"] = "none",
    swap_axes: bool = False,
    short_box: bool = False,
    clip: bool = True,
    largest_share: float = 1.0,
) -> dict[str, Tensor]:
    """Seven columns from boxes (or masks, with the tight box around them): percent, but SM; one value per image.

    The predicted box ``P`` is that of the largest 4-connected component of ``M > mean(M)``; ``G`` are the image's boxes.

    - ``LE``: 100 unless ``max_G IoU(P, G) > .5``. ``OM``: 100 unless that holds and the model predicts the label.
    - ``F1``: ``2PR / (P + R)`` of the map itself as a soft segmentation, ``P = sum_in M / sum M``, ``R = sum_in M / |G|``;
      the best of the image's boxes.
    - ``BA``: MaxBoxAcc: share of images with ``IoU >= .5`` of the largest 8-connected component of ``M > t``, at the best of
      100 thresholds over the whole data (so each image has a curve of 0 and 1, ``[B,100]``).
    - ``SP``: pointing game: is the maximum in a box? Of tied maxima the share that is (``expected``), whether ``any`` is, or
      the ``first`` in raster order. ``EP``: energy pointing game: the share of the map's mass in the boxes' union.
    - ``SM``: ``log max(a, .05) - log p``, ``a`` the area of ``P``, ``p`` the label's probability on ``P`` cut out and enlarged.

    An image without a box (all of it cropped away) is NaN in every column; without labels OM and SM are.

    Args:
        region: ``boxes``, ``mask``, or ``auto``: boxes where there are some.
        empty: what a constant map predicts: nothing, or the whole image.
        swap_axes, short_box, clip: what the published code does otherwise: x for y in SP and EP; boxes that end one pixel
            early; boxes that reach beyond the image (their whole area counts in F1, Python slices read a negative edge from the
            other end, and an image whose boxes are all cropped away counts as missed). To reproduce only.
        largest_share: leave images out whose boxes cover more than this share.

    Deviations: components are compared by their pixels, where the code of MaxBoxAcc compares contour areas. What SM cuts
    out stays in [0, 1] after bicubic enlargement; an empty box shows black.

    Raises:
        FoveateError: neither boxes nor masks, or masks of another size.
    """
    if ties not in ("expected", "any", "first"):
        raise FoveateError(f"ties {ties!r} is unknown: use 'expected', 'any' or 'first'")
    height, width = M.shape[-2:]
    found = objects(batch, (height, width), region, clip)
    grey = M.detach().double().cpu()
    arrays = grey.numpy()
    boxes = [predicted_box(array, empty) for array in arrays]
    if short_box:
        boxes = [(x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)) for x0, y0, x1, y1 in boxes]
    overlap = [intersection_over_union(box, o.boxes) for box, o in zip(boxes, found, strict=True)]
    located = np.array([len(iou) > 0 and iou.max() > 0.5 for iou in overlap])
    nan = np.full(len(M), np.nan)
    right = nan
    if batch.y is not None:
        right = is_right(capture.logits.detach(), batch.y.to(capture.logits.device), capture.head).cpu().numpy().astype(float)
    point = swap_axes and clip is False
    values: dict[str, np.ndarray] = {
        "OM": 100 - 100 * located * right,
        "LE": 100 - 100.0 * located,
        "F1": np.array([_f1(m, o) for m, o in zip(grey, found, strict=True)]),
        "BA": np.stack([_box_accuracy(m, o) for m, o in zip(arrays, found, strict=True)]),
        "SP": np.array([_pointing(m, o, ties, swap_axes) for m, o in zip(grey, found, strict=True)]),
        "EP": np.array([_energy(m, o, swap_axes, point) for m, o in zip(grey, found, strict=True)]),
        "SM": nan if batch.y is None else _saliency_metric(capture, boxes, batch.y),
    }
    share = np.array([float(o.areas.any(0).double().mean()) if len(o.areas) else np.nan for o in found])
    out = ~(share <= largest_share) if clip else share > largest_share
    for column in values.values():
        column[out] = np.nan
    return {name: torch.from_numpy(np.asarray(column, dtype=float)).to(M.device) for name, column in values.items()}


def _f1(m: Tensor, o: Object) -> float:
    best = 0.0
    for area, size in zip(o.areas, o.sizes, strict=True):
        inside = float(m[area].sum())
        precision, recall = inside / (float(m.sum()) + 1e-6), inside / max(1.0, size)
        best = max(best, 2 * precision * recall / (precision + recall + 1e-6))
    return 100 * best


def _box_accuracy(m: np.ndarray, o: Object) -> np.ndarray:
    low, high = m.min(), m.max()
    grey = np.uint8(255 * (m - low) / (high - low)) if high > low else np.zeros(m.shape, np.uint8)
    known: dict[int, float] = {}
    for threshold in (levels := (THRESHOLDS * int(grey.max())).astype(int)):
        if threshold not in known:
            box = largest_component(grey > threshold, diagonal=True)
            iou = intersection_over_union(box, o.boxes) if box != NONE else np.zeros(1)
            known[threshold] = 100.0 * (len(iou) > 0 and iou.max() >= 0.5)
    return np.array([known[threshold] for threshold in levels])


def _pointing(m: Tensor, o: Object, ties: Ties, swap_axes: bool) -> float:
    union = o.areas.any(0) if len(o.areas) else torch.zeros_like(m, dtype=torch.bool)
    hits = (union.T if swap_axes and m.shape[0] == m.shape[1] else union)[m == m.max()].double()
    return 100 * float(hits[0] if ties == "first" else hits.max() if ties == "any" else hits.mean())


def _energy(m: Tensor, o: Object, swap_axes: bool, sliced: bool) -> float:
    if not float(m.sum()) > 0:
        return 0.0
    inside = torch.zeros_like(m, dtype=torch.bool)
    if sliced:
        for x0, y0, x1, y1 in o.boxes.astype(int):
            inside[x0:x1, y0:y1] = True
    elif len(o.areas):
        inside = o.areas.any(0)
        inside = inside.T if swap_axes and m.shape[0] == m.shape[1] else inside
    return 100 * float(m[inside].sum() / m.sum())


def _saliency_metric(capture: Capture, boxes: list[tuple[float, float, float, float]], y: Tensor) -> np.ndarray:
    height, width = capture.size
    cut = []
    for image, (x0, y0, x1, y1) in zip(capture.images, boxes, strict=True):
        part = image[None, :, int(y0) : int(y1), int(x0) : int(x1)]
        if part.numel():
            cut.append(F.interpolate(part, (height, width), mode="bicubic", align_corners=False).clamp(0, 1))
        else:
            cut.append(torch.zeros_like(image)[None])
    log_p = log_probability(capture.score(torch.cat(cut)), y.to(capture.logits.device), capture.head).cpu().numpy()
    areas = [(x1 - x0) * (y1 - y0) / (height * width) for x0, y0, x1, y1 in boxes]
    result: np.ndarray = np.array([math.log(max(area, LEAST_AREA)) for area in areas]) - log_p
    return result
