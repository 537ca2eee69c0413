"""Masks that are optimised: the smallest that hides (meaningful perturbation), a given area that keeps (extremal)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import maps
from foveate.errors import FoveateError
from foveate.methods.gradient import baseline_of
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.runtime.noise import generator
from foveate.targets import Target

MASKS = 4  # smooth masks that are made at once: more leave the cache

# -- meaningful perturbation -----------------------------------------------------------------------------------------


@method(
    "meaningful_perturbation",
    title="Meaningful perturbation",
    whole=True,
    paper="Fong and Vedaldi, ICCV 2017, eq. 4 and 5",
    repeats=True,
)
def meaningful_perturbation(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    steps: int = 300,
    lr: float = 0.1,
    area: float = 1e-4,
    variation: float = 1e-2,
    exponent: float = 3.0,
    stride: int | None = None,
    smooth: float | None = None,
    jitter: int | None = None,
    baseline: float | Literal["blur"] | Tensor = "blur",
    init: Literal["circle", "ones"] = "circle",
    seed: int = 0,
) -> Tensor:
    """``S = 1 - m*``, ``m* = argmin_m area ||1 - m||_1 + variation TV_exponent(m) + p_c(x * up(m) + b (1 - up(m)))``.

    The smallest smooth region without which the class is gone; ``[B,H,W]`` in [0, 1]. Adam on masks at ``1 / stride``
    of the resolution, upsampled and blurred; one forward and backward pass per step for the whole batch, whose images do
    not depend on each other.

    Args:
        steps, lr: of Adam.
        area, variation, exponent: weights of the two penalties, and the power of the differences in the second.
        stride: of the mask's parameters, in pixels; a 28th of the shorter side by default, 8 of 224.
        smooth: standard deviation, in pixels, of the blur of the upsampled mask; 5 of 224 by default.
        jitter: the image is shifted by up to so many pixels at each step, by the same draw for all images; 4 of 224.
        baseline: what is seen where the mask is 0; a blur of a tenth of the longer side by default.
        init: ``circle``: the smallest of blurred circular holes at the centre after which 99 % of the drop that hiding
            everything brings is reached; ``ones``.
        seed: of the jitter.

    Raises:
        FoveateError: a number out of range.
    """
    side = min(capture.size)
    stride = max(1, side // 28) if stride is None else stride
    smooth = 5 * side / 224 if smooth is None else smooth
    jitter = side // 56 if jitter is None else jitter
    if steps < 1 or stride < 1 or jitter < 0 or smooth < 0 or init not in ("circle", "ones"):
        raise FoveateError(
            f"steps {steps}, stride {stride}, jitter {jitter}, smooth {smooth} or init {init!r} is out of range: steps and "
            "stride are 1 or more, jitter and smooth 0 or more, init 'circle' or 'ones'"
        )
    if not lr > 0 or exponent < 1 or area < 0 or variation < 0:
        raise FoveateError(
            f"lr {lr} is above 0, exponent {exponent} 1 or more (below, its gradient is infinite at 0), area {area} and "
            f"variation {variation} not below 0"
        )
    hidden = baseline_of(capture, baseline)
    grid = (math.ceil(capture.size[0] / stride), math.ceil(capture.size[1] / stride))

    def found(rows: Tensor) -> Tensor:
        x, blank, draws = capture.images[rows], hidden[rows], generator(seed)
        start = _circles(capture, target, x, blank, rows, grid) if init == "circle" else x.new_ones(len(x), *grid)
        m = start.clone().requires_grad_(True)  # [n,h,w], 1 keeps
        optimiser = torch.optim.Adam([m], lr)
        for _ in range(steps):
            down, right = (torch.randint(-jitter, jitter + 1, (2,), generator=draws)).tolist() if jitter else (0, 0)
            seen = _shifted(maps.apply_mask(x, _grown(m, capture.size, smooth), blank), down, right, jitter)
            p = target.rows(rows).log_probability(capture.differentiable(seen, cast=True), capture.head).exp()
            penalty = area * (1 - m).abs().sum((1, 2)) + variation * total_variation(m, exponent)
            (m.grad,) = torch.autograd.grad((penalty + p.to(penalty.dtype)).sum(), m)
            capture.passes.backward += len(x)
            optimiser.step()
            with torch.no_grad():
                m.clamp_(0, 1)
        return (1 - _grown(m.detach(), capture.size, smooth)).clamp(0, 1)

    return _in_groups(capture, found)


def _in_groups(capture: Capture, found: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``found`` gives for groups of images, ``rows [n] -> [n,H,W]``, so that memory does not grow with the batch."""
    rows = torch.arange(len(capture.x), device=capture.x.device)
    with torch.inference_mode(False), torch.enable_grad():
        return torch.cat([found(part) for part in rows.split(capture.chunk_size("backward"))])


def total_variation(m: Tensor, exponent: float) -> Tensor:
    """``sum_u |m(u) - m(right of u)|^e + |m(u) - m(below u)|^e`` of masks ``[B,h,w]``, ``[B]``."""
    right = (m[:, :, 1:] - m[:, :, :-1]).abs().pow(exponent).sum((1, 2))
    below = (m[:, 1:] - m[:, :-1]).abs().pow(exponent).sum((1, 2))
    return right + below


def _grown(m: Tensor, size: tuple[int, int], smooth: float) -> Tensor:
    return maps.blur(maps.upsample(m, size), smooth)


def _shifted(images: Tensor, down: int, right: int, jitter: int) -> Tensor:
    if not jitter:
        return images
    padded = F.pad(images, (jitter, jitter, jitter, jitter), mode="replicate")
    height, width = images.shape[-2:]
    return padded[:, :, jitter + down : jitter + down + height, jitter + right : jitter + right + width]


def _circles(capture: Capture, target: Target, x: Tensor, blank: Tensor, rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """For each image the mask with the smallest hole at the centre that brings 99 % of the possible drop, ``[n,h,w]``."""
    height, width = grid
    down = (torch.arange(height).to(x) + 0.5) / height - 0.5
    right = (torch.arange(width).to(x) + 0.5) / width - 0.5
    distance = (down[:, None] ** 2 + right[None, :] ** 2).sqrt()
    radii = torch.linspace(0.05, 0.75, 15, dtype=torch.float64).to(x)
    holes = ((distance - radii[:, None, None]) * 10).sigmoid()  # [15,h,w], soft edges
    grown = maps.upsample(holes, capture.size)

    def p(images: Tensor) -> Tensor:
        return target.rows(rows).log_probability(capture.score(images), capture.head).exp()

    whole, nothing = p(x), p(blank)
    after = torch.stack([p(maps.apply_mask(x, hole.expand(len(x), -1, -1), blank)) for hole in grown], 1)  # [n,15]
    enough = after <= (whole - 0.99 * (whole - nothing).clamp(min=0))[:, None]
    enough[:, -1] = True
    return holes[enough.int().argmax(1)]


# -- extremal perturbation -------------------------------------------------------------------------------------------


@method(
    "extremal_perturbation", title="Extremal perturbation", whole=True, paper="Fong et al., ICCV 2019, eq. 2 to 6", repeats=True
)
def extremal_perturbation(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    areas: Sequence[float] = (0.1,),
    steps: int = 800,
    lr: float = 0.01,
    stride: int | None = None,
    sigma: float | None = None,
    blurs: int = 8,
    strongest: float | None = None,
    weight: float = 300.0,
    growth: float = 1.0035,
    start: float | Tensor = 1.0,
    baseline: float | Literal["blur"] | Tensor = "blur",
) -> Tensor:
    """The mean over ``areas`` a of ``m_a = argmax_m score(x through m) - weight ||sort(m) - r_a||^2 / N``, ``[B,H,W]``.

    ``r_a`` has its ``a N`` largest entries at 1 and the others at 0. Masks are smooth by construction
    (:class:`SmoothMask`); an image seen through a mask is blurred where the mask is low, through a pyramid of ``blurs``
    levels, or fades into another ``baseline``. SGD with momentum .9 and dampening .9, images and masks mirrored at every
    other step.

    Images and areas share each of ``steps`` forward and backward passes, as many as a chunk holds; none depends on another.

    Args:
        areas: shares of the image in (0, 1).
        stride: of the mask's parameters, in pixels; a 32nd of the shorter side by default, 7 of 224.
        sigma: radius of the mask's smoothness, in pixels; 21 of 224 by default.
        strongest: the largest standard deviation of the blur, in pixels; 20 of 224 by default.
        weight, growth: of the area term, which is multiplied by ``growth`` at every step.
        start: of the mask's parameters: a number, or ``[h,w]`` at every ``stride`` pixels.
        baseline: what is seen where the mask is 0: ``blur``, a grey value (0: black, as AD and AG show what is masked), images.

    Deviation: TorchRay runs one image at a time; nothing in the method asks for it.

    Raises:
        FoveateError: a number out of range.
    """
    if not areas or not all(0 < area < 1 for area in areas):
        raise FoveateError(f"areas {tuple(areas)} are shares of the image, each between 0 and 1")
    side = min(capture.size)
    stride = max(1, side // 32) if stride is None else stride
    sigma = 21 * side / 224 if sigma is None else sigma
    strongest = 20 * side / 224 if strongest is None else strongest
    if steps < 1 or stride < 1 or blurs < 2 or not (lr > 0 and sigma > 0 and strongest >= 0):
        raise FoveateError(
            f"steps {steps} and stride {stride} are 1 or more, blurs {blurs} is 2 or more, lr {lr} and sigma {sigma} are "
            f"above 0, strongest {strongest} is not below"
        )
    smooth = SmoothMask(capture.size, stride, sigma, capture.images)
    hidden = None if isinstance(baseline, str) and baseline == "blur" else baseline_of(capture, baseline)
    pixels = capture.size[0] * capture.size[1]
    inside = [pixels - math.ceil(pixels * (1 - area)) for area in areas]  # pixels of each area

    def found(numbers: Tensor) -> Tensor:
        rows = numbers // len(areas)  # image of each mask, [N]
        within = [inside[number % len(areas)] for number in numbers.tolist()]
        x = capture.images[rows]
        pyramid = blur_pyramid(x, blurs, strongest) if hidden is None else torch.stack([hidden[rows], x])  # [L,N,C,H,W]
        p = (torch.as_tensor(start).to(pyramid) * pyramid.new_ones(len(rows), *smooth.grid)).requires_grad_(True)
        optimiser = torch.optim.SGD([p], lr, momentum=0.9, dampening=0.9)
        for step in range(steps):
            m = smooth(p)
            seen = through(pyramid, m)
            if step % 2 == 0:
                seen = seen.flip(-1)
            reward = target.rows(rows)(capture.differentiable(seen, cast=True))
            miss = area_miss(m.flatten(1), within)
            loss = weight * growth**step * miss - reward.to(miss.dtype)
            (p.grad,) = torch.autograd.grad(loss.sum(), p)
            capture.passes.backward += len(rows)
            optimiser.step()
            with torch.no_grad():
                p.clamp_(0, 1)
        return smooth(p.detach())

    total = capture.images.new_zeros(len(capture.x), *capture.size)
    numbers = torch.arange(len(total) * len(areas), device=total.device)  # of each image's masks
    with torch.inference_mode(False), torch.enable_grad():
        for part in numbers.split(capture.chunk_size("backward")):
            for number, m in zip(part.tolist(), found(part), strict=True):  # index_add_ has no fixed order on a GPU
                total[number // len(areas)] += m
    return total / len(areas)


def area_miss(m: Tensor, inside: Sequence[int]) -> Tensor:
    """``||sort(m) - r||^2 / N`` of masks ``[n,N]``, with ``r`` 1 at its ``inside`` largest entries and 0 elsewhere, ``[n]``.

    ``sum m^2 - 2 sum of the largest m + inside``: the same number and gradient without sorting what is not largest.
    """
    largest = torch.stack([row.topk(count).values.sum() for row, count in zip(m, inside, strict=True)])
    counts = torch.tensor(list(inside), device=m.device).to(m.dtype)
    return (m.square().sum(1) - 2 * largest + counts) / m.shape[1]


class SmoothMask:
    """Smooth masks from few parameters: ``m(u) = smoothmax_i k(|u - c_i| / sigma) p_i`` over the cells near pixel u.

    ``k(z) = exp(-2 max(z - 1/2, 0)^2)`` and ``smoothmax v = sum v softmax(20 v)``; cells are ``stride`` pixels wide, and
    those within ``1 + ceil(sigma / stride)`` cells count.
    """

    def __init__(self, size: tuple[int, int], stride: int, sigma: float, like: Tensor) -> None:
        self.size, self.stride = size, stride
        self.grid = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        radius = 1 + math.ceil(sigma / stride)
        offsets = torch.arange(radius + 1).to(like) * stride  # of a neighbour's cell, below or right
        inside = torch.arange(stride).to(like) - (stride - 1) / 2  # of a pixel, from the centre of its own cell
        gap = (inside[None, :] - offsets[:, None]).square()  # [r+1,s]
        distance = (gap[:, None, :, None] + gap[None, :, None, :]).sqrt() / sigma
        kernel = torch.exp(-2 * (distance - 0.5).clamp(min=0) ** 2).flatten(2)  # [r+1,r+1,s^2]
        # Neighbours at +-(a, b) have the same kernel, mirrored: their exponentials are taken once, and added in four frames.
        self.orbits = [
            (20 * kernel[a, b], [_Neighbour(down, right, self.grid) for down in {a, -a} for right in {b, -b}])
            for a, b in product(range(radius + 1), repeat=2)
        ]
        rows, columns = (_within(cells, radius).to(like) for cells in self.grid)
        self.outside = (2 * radius + 1) ** 2 - rows[:, None] * columns[None, :]  # neighbours beyond the border, [h,w]

    def __call__(self, p: Tensor) -> Tensor:
        """Masks ``[N,H,W]`` in [0, 1] from parameters ``[N,h,w]`` in [0, 1]."""
        whole = torch.cat([_SmoothMax.apply(part, self) for part in p.split(MASKS)])  # type: ignore[no-untyped-call]
        whole = whole.transpose(2, 3).flatten(3).flatten(1, 2)
        return whole[:, : self.size[0], : self.size[1]].clamp(0, 1)


class _Neighbour:
    """Where a cell's neighbour lies: the cells that have it, those that it is, and how its kernel is mirrored."""

    def __init__(self, down: int, right: int, grid: tuple[int, int]) -> None:
        spans = [
            (slice(max(0, -step), max(0, size - max(0, step))), slice(max(0, step), max(0, size + min(0, step))))
            for step, size in zip((down, right), grid, strict=True)
        ]
        self.here, self.there = ((..., rows, columns, slice(None)) for rows, columns in zip(*spans, strict=True))
        self.frame = 2 * (down < 0) + (right < 0)


def _within(cells: int, radius: int) -> Tensor:
    """How many of a cell's neighbours along one side there are, for each cell."""
    here = torch.arange(cells)
    return (here + radius).clamp(max=cells - 1) - (here - radius).clamp(min=0) + 1


def _mirrored(x: Tensor, frame: int) -> Tensor:
    return x.flip([dimension for dimension, bit in ((-2, 2), (-1, 1)) if frame & bit]) if frame else x


class _SmoothMax(torch.autograd.Function):
    """``sum_i v_i e^(20 v_i) / sum_i e^(20 v_i)``, ``v_i = p_i k_i``, ``[n,h,w] -> [n,h,w,s,s]``, forward and backward.

    All neighbours at once are 80 masks in memory, and autograd would keep several such tensors; a sum needs eight.
    ``v <= 1``, so that no exponential is above e^20. Parameters beyond the border are 0.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, smooth: SmoothMask) -> Tensor:
        side = smooth.stride
        sums = p.new_zeros(4, 2, *p.shape, side * side)  # by frame: of v e^v, of e^v
        term = torch.empty_like(sums[0])
        for k, neighbours in smooth.orbits:
            v, e = term
            torch.exp(torch.mul(p[..., None], k, out=v), out=e)
            v.mul_(e)
            for neighbour in neighbours:
                sums[neighbour.frame][neighbour.here].add_(term[neighbour.there])
        frames = sums.unflatten(-1, (side, side))
        above, below = frames[0]
        for frame in (1, 2, 3):
            frames[0] += _mirrored(frames[frame], frame)
        below += smooth.outside[:, :, None, None]
        result = above.div_(below)  # of 20 v
        ctx.smooth = smooth
        ctx.save_for_backward(p, result, below)
        returned: Tensor = result / 20
        return returned

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        p, result, below = ctx.saved_tensors
        share = gradients[0] / below
        both = torch.stack([share * (1 - result), share])  # d/dp_i = k e (1 + 20 v - 20 m) / sum e
        shares = [_mirrored(both, frame).flatten(-2) for frame in range(4)]
        total, (v, e) = torch.zeros_like(p), torch.empty_like(shares[0])
        for k, neighbours in ctx.smooth.orbits:
            gathered = torch.zeros_like(shares[0])
            for neighbour in neighbours:
                gathered[neighbour.there].add_(shares[neighbour.frame][neighbour.here])
            torch.exp(torch.mul(p[..., None], k, out=v), out=e)
            total += v.mul_(gathered[1]).add_(gathered[0]).mul_(e) @ k
        return total / 20, None


def blur_pyramid(x: Tensor, levels: int, strongest: float) -> Tensor:
    """Images from most blurred to intact, ``[L,B,C,H,W]``: level l has standard deviation ``(1 - l/(L-1)) strongest``."""
    return torch.stack([maps.blur(x, (1 - level / (levels - 1)) * strongest) for level in range(levels)])


def through(pyramid: Tensor, m: Tensor) -> Tensor:
    """Images ``[L,N,C,H,W]`` seen through masks ``[N,H,W]``: linear between the two nearest levels, ``[N,C,H,W]``."""
    height = m * (len(pyramid) - 1)
    below = height.detach().long().clamp(max=len(pyramid) - 2)  # the level below each pixel
    index = below[None, :, None].expand(1, -1, pyramid.shape[2], -1, -1)  # [1,N,3,H,W]
    low, high = pyramid.gather(0, index)[0], pyramid.gather(0, index + 1)[0]
    return low + (height - below)[:, None] * (high - low)
