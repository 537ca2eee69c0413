"""Causal metrics: Insertion and Deletion, the probability while pixels come and go in the order of the map."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.batch import Batch
from foveate.errors import FoveateError, required
from foveate.registry import Column, metric
from foveate.runtime.capture import Capture
from foveate.runtime.model import Normalized
from foveate.targets import classes, log_probability

End = tuple[Tensor, Tensor]
_ends: weakref.WeakKeyDictionary[Capture, dict[object, End]] = weakref.WeakKeyDictionary()


@metric(
    "insertion_deletion",
    title="Insertion, Deletion",
    paper="Petsiuk et al., BMVC 2018, algorithm 1",
    columns={
        "I": Column(
            "up",
            "insertion",
            "Insertion",
            "%",
            (0, 100),
            "100 x area under the probability while the most salient pixels come first into a blurred image",
            "Is the class recognised early, when the map's most salient pixels are shown first?",
            "The model is sure after a tenth of the pixels: I about 90.",
            "The probability rises with the last pixels alone: I about 5.",
        ),
        "D": Column(
            "down",
            "deletion",
            "Deletion",
            "%",
            (0, 100),
            "100 x area under the probability while the most salient pixels are taken away first",
            "Is the class lost early, when the map's most salient pixels are taken away first?",
            "The probability is gone after a tenth of the pixels: D about 5.",
            "The model stays sure until most pixels are gone: D about 80.",
        ),
    },
    group="faithfulness",
)
def insertion_deletion(
    capture: Capture,
    M: Tensor,
    batch: Batch,
    *,
    target: str = "label",
    columns: Sequence[str] = ("I", "D"),
    steps: int = 28,
    kernel: int = 11,
    sigma: float = 5.0,
    start: Literal["blur", "mean", "black"] = "blur",
    end: Literal["mean", "black", "blur"] = "mean",
    ties: Literal["raster", "random"] = "raster",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Area under the probability of the class, in percent, one value per image; curves ``I_curve``, ``D_curve`` ``[B,n+1]``.

    Insertion starts from the blurred image and shows the most salient pixels first; Deletion starts from the image and
    hides them first. ``ceil(HW / steps)`` pixels change at a time, ``n`` times; ``area = sum_i (p_i + p_{i+1}) / 2n``, with
    equal spacing (the last step may be smaller, as in the authors' code). Only the order of the pixels counts.

    The ends are shared: the whole image is known, the blurred and the empty image run once for all methods. That leaves
    ``2 (n - 1)`` forward passes per image, and ``n - 1`` where one of the two is wanted.

    Args:
        target: whose probability: ``label``, ``pred`` (RISE's own) or ``second``.
        columns: ``I``, ``D`` or both; the other is not computed.
        steps: 28 changes 1792 pixels of 224 x 224 at a time (RISE on data sets), 224 changes 224 (its demonstration).
        kernel: side of the blur: 11 (RISE, the Opti-CAM tables) or 5 (the CA-Stream tables). See :func:`rise_kernel`.
        start, end: what is seen where nothing is shown: ``mean`` is the mean of the model's normalisation, the zero of RISE.
        ties: pixels of equal value in ``raster`` order, or at ``random`` from the ``seed``. A constant map measures nothing
            else.

    Raises:
        FoveateError: an unknown option or column, fewer than 2 steps, labels missing.
    """
    for value, words in ((start, ("blur", "mean", "black")), (end, ("mean", "black", "blur"))):
        if value not in words:
            raise FoveateError(f"{value!r} is unknown: pixels come from {', '.join(map(repr, words))}")
    if ties not in ("raster", "random"):
        raise FoveateError(f"ties {ties!r} is unknown: use 'raster' or 'random'")
    if not columns or set(columns) - {"I", "D"}:
        raise FoveateError(f"columns {list(columns)} are unknown: use 'I', 'D' or both")
    if steps < 2:
        raise FoveateError(f"steps {steps} is too few for a curve: use 2 or more")
    y = classes(target, capture.logits, batch.y, capture.head)
    rank = _rank(M, ties, seed)  # [B,H,W]
    pixels = rank[0].numel()
    step = -(-pixels // steps)
    count = -(-pixels // step)
    whole = capture.log_probability(y)  # [B]
    together = max(1, capture.chunk_size() // len(M))  # steps that fill what runs at once
    found: dict[str, Tensor] = {}
    for column, name, shows in (("I", start, True), ("D", end, False)):
        if column not in columns:
            continue
        other, known = _end(capture, name, kernel, sigma)

        def parts(other: Tensor = other, shows: bool = shows) -> Iterator[Tensor]:
            for several in torch.arange(1, count, device=rank.device).split(together):
                changed = (rank < several[:, None, None, None] * step)[:, :, None]  # [s,B,1,H,W]
                yield torch.where(changed, *((capture.x, other) if shows else (other, capture.x))).flatten(0, 1)

        inner = capture.score(parts(), many=True)  # [(n-1)B,C]
        inner_p = log_probability(inner, y.repeat(count - 1), capture.head).view(count - 1, len(y)).T  # [B,n-1]
        ends = [log_probability(known, y, capture.head)[:, None], whole[:, None]]
        curve = torch.cat([ends[0], inner_p, ends[1]] if shows else [ends[1], inner_p, ends[0]], 1).exp()
        found[column] = 100 * (curve[:, 1:] + curve[:, :-1]).mean(1) / 2
        found[f"{column}_curve"] = curve
    return found


def rise_kernel(side: int, sigma: float = 5.0) -> Tensor:
    """The blur of RISE, ``[side,side]``: a Gaussian filter of a unit impulse on this small grid, edges reflected.

    That makes it nearly a box: entries of (11, 5) lie between .0077 and .0088. A true Gaussian of 5 pixels is far wider.

    Raises:
        FoveateError: an even side, which has no centre.
    """
    if side < 1 or side % 2 == 0:
        raise FoveateError(f"kernel {side} has no centre: use an odd number")
    required("a blurred image", "scipy")
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((side, side))
    impulse[side // 2, side // 2] = 1
    return torch.from_numpy(gaussian_filter(impulse, sigma))


def _end(capture: Capture, name: str, kernel: int, sigma: float) -> End:
    """Images of which nothing is shown, ``[B,C,H,W]``, and their logits ``[B,C]``; run once a capture."""
    kept = _ends.setdefault(capture, {})
    key = (name, kernel, sigma) if name == "blur" else name
    if key not in kept:
        x = capture.x
        mean = capture.model.mean.to(x) if isinstance(capture.model, Normalized) else x.new_zeros(1)
        if name == "blur":
            weight = rise_kernel(kernel, sigma).to(x).expand(x.shape[1], 1, -1, -1)
            # Zeros around the normalised image, as in RISE: the edges are drawn towards the mean.
            images = F.conv2d(x - mean, weight, padding=kernel // 2, groups=x.shape[1]) + mean
            logits = capture.score(images)
        else:
            empty = (mean if name == "mean" else x.new_zeros(1)).expand(1, *x.shape[1:])
            images, logits = empty.expand_as(x), capture.score(empty).expand(len(x), -1)
        kept[key] = images, logits
    return kept[key]


def _rank(M: Tensor, ties: str, seed: int) -> Tensor:
    """The place of each pixel when the most salient comes first, ``[B,H,W]``."""
    flat = M.flatten(1)
    if ties == "random":
        shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
        order = shuffle[flat[:, shuffle].argsort(stable=True, dim=1, descending=True)]
    else:
        order = flat.argsort(stable=True, dim=1, descending=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(M.shape)
