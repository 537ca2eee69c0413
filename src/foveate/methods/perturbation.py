"""Black boxes: what happens to the score when parts of the image are hidden, at random (RISE) or window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from foveate import maps
from foveate.errors import FoveateError
from foveate.methods.gradient import baseline_of
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.runtime.noise import generator
from foveate.targets import Target


@method("rise", title="RISE", whole=True, paper="Petsiuk et al., BMVC 2018, eq. 6", repeats=True)
def rise(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    masks: int = 4000,
    cells: int = 7,
    keep: float = 0.5,
    score: Literal["probability", "target"] = "probability",
    seed: int = 0,
) -> Tensor:
    """``S = 1/(N E[M]) sum_i p_c(x * M_i) M_i``, ``[B,H,W]``: how sure the model is when a pixel is seen.

    Masks: a grid of ``cells x cells``, each kept with probability ``keep``, upsampled bilinearly to one cell more than the
    image has, cropped at random. All images share the masks, so that a batch gives what single images give. Masked in
    pixel space, black outside (the authors' code masks the normalised image: grey).

    Args:
        masks: N, each a forward pass; the noise of the map falls with its root. The paper took 4000 to 8000.
        score: the class's probability (of a contrast, that of the class between the two), or the target's own score;
            always that of a loss or a callable, which has no probability.
        seed: of the masks.

    Raises:
        FoveateError: a number out of range.
    """
    if score not in ("probability", "target"):
        raise FoveateError(f"score {score!r} is unknown: use 'probability' or 'target'")
    own = score == "target" or target.name in ("loss", "callable")

    def values(logits: Tensor, rows: Tensor) -> Tensor:
        bound = target.rows(rows)
        return (bound(logits) if own else bound.log_probability(logits, capture.head).exp())[:, None]  # [n,1]

    return _weighted(capture, RiseMasks(capture.size, masks, cells, keep, seed), 1, values)[:, 0] / (masks * keep)


def rise_maps(
    capture: Capture,
    classes: Sequence[int] | None = None,
    *,
    masks: int = 4000,
    cells: int = 7,
    keep: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """RISE of every class at once, ``[B,C,H,W]``, from the same passes: one matrix product ``P^T M`` a chunk.

    Args:
        classes: only these columns, in this order: 1000 maps of 224 x 224 are 200 MB an image.
    """
    columns = list(range(capture.classes)) if classes is None else list(classes)
    if wrong := [c for c in columns if not 0 <= c < capture.classes]:
        raise FoveateError(f"class {wrong[0]} is out of range: the model has {capture.classes} classes, from 0")

    def values(logits: Tensor, rows: Tensor) -> Tensor:
        p = logits.softmax(1) if capture.head == "softmax" else logits.sigmoid()
        p = torch.cat([1 - p, p], 1) if capture.head == "binary" else p
        return p[:, columns]  # [n,C]

    return _weighted(capture, RiseMasks(capture.size, masks, cells, keep, seed), len(columns), values) / (masks * keep)


def _weighted(capture: Capture, masks: RiseMasks, columns: int, values: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``sum_i v_i M_i``, ``[B,C,H,W]``, with ``v = values(logits [n,C], rows [n])`` of images seen through the masks M."""
    x = capture.images
    total = torch.zeros(len(x), columns, *capture.size, device=x.device, dtype=x.dtype)
    for numbers in torch.arange(len(masks.grids)).split(capture.chunk_size()):
        M = masks.part(numbers).to(x)  # [n,H,W]
        for b in range(len(x)):
            rows = torch.full((len(M),), b, device=x.device)
            each = values(capture.score(maps.apply_mask(x[b : b + 1], M), many=True), rows)  # [n,C]
            total[b] += torch.einsum("nc,nhw->chw", each.to(total.dtype), M)
    return total


class RiseMasks:
    """The masks of RISE, made a part at a time from small grids that are drawn once: memory depends on the part alone."""

    def __init__(self, size: tuple[int, int], count: int, cells: int, keep: float, seed: int) -> None:
        if count < 1 or cells < 1 or not 0 < keep < 1:
            raise FoveateError(f"masks {count} and cells {cells} are 1 or more, and keep {keep} lies between 0 and 1")
        draws = generator(seed)
        self.size = size
        self.step = (math.ceil(size[0] / cells), math.ceil(size[1] / cells))  # pixels of a cell
        self.cells = cells
        self.grids = (torch.rand(count, cells, cells, generator=draws) < keep).float()
        self.down = torch.randint(self.step[0], (count,), generator=draws)
        self.right = torch.randint(self.step[1], (count,), generator=draws)

    def part(self, numbers: Tensor) -> Tensor:
        """Masks of these numbers, ``[n,H,W]`` in [0, 1]."""
        grown = maps.upsample(self.grids[numbers], ((self.cells + 1) * self.step[0], (self.cells + 1) * self.step[1]))
        height, width = self.size
        shifts = zip(grown, self.down[numbers].tolist(), self.right[numbers].tolist(), strict=True)
        return torch.stack([mask[down : down + height, right : right + width] for mask, down, right in shifts])


@method(
    "occlusion", title="Occlusion", whole=True, paper="Zeiler and Fergus, ECCV 2014, section 4.2", signed=True, repeats=True
)
def occlusion(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    baseline: float | Literal["blur"] | Tensor = 0.0,
) -> Tensor:
    """``S(u) = mean over windows that cover u of s(x) - s(x without the window)``, ``[B,H,W]``, signed.

    Args:
        window: side or sides in pixels, cut off at the border; a seventh of the image by default, 32 of 224.
        stride: likewise; half a window by default, and never more than one.
        baseline: what a window shows; see :func:`foveate.methods.gradient.baseline_of`.

    Deviation: the paper draws one value at the centre of each window; here, as in Captum, each pixel has the mean of the
    windows that cover it.
    """
    height, width = capture.size
    default = (max(1, height // 7), max(1, width // 7))
    tall, wide = default if window is None else (window, window) if isinstance(window, int) else window
    halves = (max(1, tall // 2), max(1, wide // 2))
    down, right = halves if stride is None else (stride, stride) if isinstance(stride, int) else stride
    if min(tall, wide, down, right) < 1 or down > tall or right > wide:
        raise FoveateError(f"window {window} and stride {stride} are pixels, with a stride that is not above the window")
    if tall > height or wide > width:
        raise FoveateError(f"window {window} is larger than the image, {height}x{width}: it would hide all of it")
    tops = range(0, height - tall + down, down)
    lefts = range(0, width - wide + right, right)
    corners = torch.tensor([(top, left) for top in tops for left in lefts])
    x, hidden = capture.images, baseline_of(capture, baseline)
    start = capture.score(x, target, many=True)  # [B], run as the hidden ones are
    total = torch.zeros(len(x), height, width, device=x.device, dtype=start.dtype)
    covered = torch.zeros(height, width, device=x.device, dtype=start.dtype)
    for part in corners.split(capture.chunk_size()):
        windows = _windows(part, (tall, wide), capture.size).to(x)  # [n,H,W], 1 inside
        covered += windows.sum(0)
        for b in range(len(x)):
            rows = torch.full((len(part),), b, device=x.device)
            seen = maps.apply_mask(x[b : b + 1], 1 - windows, hidden[b : b + 1])
            drop = start[b] - capture.score(seen, target, rows, many=True)  # [n]
            total[b] += torch.einsum("n,nhw->hw", drop, windows.to(drop.dtype))
    return total / covered


def _windows(corners: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    rows, columns = torch.arange(size[0])[None], torch.arange(size[1])[None]
    inside_rows = (rows >= corners[:, :1]) & (rows < corners[:, :1] + window[0])  # [n,H]
    inside_columns = (columns >= corners[:, 1:]) & (columns < corners[:, 1:] + window[1])  # [n,W]
    return inside_rows[:, :, None] & inside_columns[:, None, :]
