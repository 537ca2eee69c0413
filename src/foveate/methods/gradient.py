"""Gradients of the score by the image: plain, times input, along a path, under noise, guided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from foveate import maps
from foveate.errors import FoveateError
from foveate.methods.cam import grad_cam as _grad_cam
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.runtime.noise import gaussian, width
from foveate.targets import Target

Colour = Literal["max_abs", "sum_abs", "sum"]
Quadrature = Literal["midpoint", "gauss_legendre", "right"]


def over_colour(values: Tensor, colour: Colour) -> Tensor:
    """One value per pixel: ``max_c |v_c|``, ``sum_c |v_c|`` or ``sum_c v_c`` (signed); ``[B,C,H,W]`` to ``[B,H,W]``.

    Raises:
        FoveateError: an unknown word.
    """
    if colour == "max_abs":
        return values.abs().amax(1)
    if colour == "sum_abs":
        return values.abs().sum(1)
    if colour == "sum":
        return values.sum(1)
    raise FoveateError(f"colour {colour!r} is unknown: use 'max_abs', 'sum_abs' or 'sum'")


@method(
    "gradient",
    title="Gradient",
    whole=True,
    paper="Simonyan et al., ICLR workshops 2014, eq. 4 and section 3.1",
    differentiable=True,
    needs=("image_gradient",),
    aliases=("vanilla_gradient", "saliency"),
)
def gradient(capture: Capture, layer: str | None, target: Target, *, colour: Colour = "max_abs") -> Tensor:
    """``S = max_c |d score / d x_c|``, ``[B,H,W]``: how much the score changes when a pixel does.

    Args:
        colour: how the three channels become one; see :func:`over_colour`.
    """
    return over_colour(capture.image_gradient(target), colour)


@method(
    "input_x_gradient",
    title="Input x gradient",
    whole=True,
    paper="Shrikumar et al., 2016",
    signed=True,
    differentiable=True,
    needs=("image_gradient",),
    aliases=("gradient_x_input",),
)
def input_x_gradient(capture: Capture, layer: str | None, target: Target, *, colour: Colour = "sum") -> Tensor:
    """``S = sum_c x_c d score / d x_c``, ``[B,H,W]``, signed; ``x`` in [0, 1], so that black pixels have no say."""
    return over_colour(capture.images * capture.image_gradient(target), colour)


def path_completeness(
    capture: Capture,
    layer: str | None,
    target: Target,
    saliency: Tensor,
    *,
    baseline: object = 0.0,
    colour: Colour = "sum",
    **settings: object,
) -> Tensor | None:
    """How far a map misses ``f(x) - f(baseline)``: ``|sum S - (f(x) - f(b))| / |f(x) - f(b)|``, ``[B]``.

    None where colours were not added up, and there is nothing that the map promises.
    """
    if colour != "sum":
        return None
    with torch.no_grad():
        empty = baseline_of(capture, baseline).split(capture.chunk_size("backward"))
        black = target(torch.cat([capture.differentiable(part).detach() for part in empty]))
        gain = target(capture.logits.detach()) - black
        return (saliency.detach().sum((1, 2)) - gain).abs() / gain.abs().clamp(min=1e-6)


def baseline_of(capture: Capture, baseline: object) -> Tensor:
    """Images that hold nothing, ``[B,C,H,W]``: a grey value, ``"blur"`` (a tenth of the longer side), or a tensor.

    Raises:
        FoveateError: none of these.
    """
    x = capture.images
    if isinstance(baseline, (int, float)) and 0 <= baseline <= 1:
        return torch.full_like(x, float(baseline))
    if baseline == "blur":
        return maps.blur(x, max(capture.size) / 10)
    if isinstance(baseline, Tensor):
        try:
            return baseline.to(x).expand_as(x)
        except RuntimeError:
            raise FoveateError(f"a baseline of shape {list(baseline.shape)} does not fit images {list(x.shape)}") from None
    raise FoveateError(f"baseline {baseline!r} is unknown: use a grey value in [0, 1], 'blur', or a tensor of images")


@method(
    "integrated_gradients",
    title="Integrated gradients",
    whole=True,
    paper="Sundararajan et al., ICML 2017, eq. 1",
    signed=True,
    complete=path_completeness,
    complete_to=0.05,
    aliases=("ig",),
    repeats=True,
)
def integrated_gradients(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    steps: int = 50,
    baseline: float | Literal["blur"] | Tensor = 0.0,
    quadrature: Quadrature = "midpoint",
    colour: Colour = "sum",
) -> Tensor:
    """``S = sum_c (x - b)_c int_0^1 d score / d x_c (b + a (x - b)) da``, ``[B,H,W]``, signed.

    Summed over colour it adds up to ``score(x) - score(b)`` but for the error of the quadrature, which is reported.

    Args:
        steps: points on the path, each a forward and a backward pass.
        baseline: what holds nothing: black by default; see :func:`baseline_of`.
        quadrature: ``midpoint`` (a deviation from the paper's ``right`` sum, whose error is of first order), or
            ``gauss_legendre``, Captum's default.
    """
    if steps < 1:
        raise FoveateError(f"steps {steps} is not a number of points on the path: use 1 or more")
    points, weights = _quadrature(quadrature, steps)
    x, start = capture.images, baseline_of(capture, baseline)

    def images(rows: Tensor, numbers: Tensor) -> Tensor:
        a = points[numbers].to(x)[:, None, None, None]
        return start[rows] + a * (x - start)[rows]

    total = accumulate(capture, target, steps, images, lambda g, numbers: g * weights[numbers].to(g)[:, None, None, None])
    return over_colour((x - start) * total, colour)


def _quadrature(kind: str, steps: int) -> tuple[Tensor, Tensor]:
    if kind == "midpoint":
        return (torch.arange(steps, dtype=torch.float64) + 0.5) / steps, torch.full((steps,), 1 / steps, dtype=torch.float64)
    if kind == "right":
        return (torch.arange(steps, dtype=torch.float64) + 1) / steps, torch.full((steps,), 1 / steps, dtype=torch.float64)
    if kind == "gauss_legendre":
        import numpy as np

        points, weights = np.polynomial.legendre.leggauss(steps)
        return (torch.from_numpy(points) + 1) / 2, torch.from_numpy(weights) / 2
    raise FoveateError(f"quadrature {kind!r} is unknown: use 'midpoint', 'gauss_legendre' or 'right'")


def accumulate(
    capture: Capture,
    target: Target,
    count: int,
    images: Callable[[Tensor, Tensor], Tensor],
    change: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The sum over ``count`` changed copies of each image of their changed gradients, ``[B,C,H,W]``.

    Copies of all images share the chunks; memory depends on the chunk alone.

    Args:
        images: ``(rows [n], numbers [n]) -> [n,3,H,W]``: copy ``numbers`` of images ``rows``.
        change: ``(gradients [n,3,H,W], numbers [n]) -> [n,3,H,W]``: what is done to each before it is added.
    """
    x = capture.images
    total = torch.zeros_like(x)
    every = torch.arange(len(x) * count, device=x.device)
    for part in every.split(capture.chunk_size("backward")):
        rows, numbers = part // count, part % count
        part_of = capture.image_gradient(target, images(rows, numbers), rows)
        total = total.index_add(0, rows, change(part_of, numbers.cpu()).to(total.dtype))
    return total


@method("smooth_grad", title="SmoothGrad", whole=True, paper="Smilkov et al., 2017", aliases=("smoothgrad",), repeats=True)
def smooth_grad(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    samples: int = 50,
    sigma: float = 0.15,
    square: bool = False,
    seed: int = 0,
    colour: Colour = "max_abs",
) -> Tensor:
    """``S = max_c |mean_i d score / d x_c (x + e_i)|``, ``e_i ~ N(0, (sigma (max x - min x))^2)``, ``[B,H,W]``.

    Args:
        samples: noisy copies, each a forward and a backward pass.
        sigma: noise as a share of the image's own range, in pixel space.
        square: average the squares (SmoothGrad-Squared), which keeps what changes its sign.
        seed: of the noise, which all images share: a batch gives what single images give.
    """
    if samples < 1 or sigma < 0:
        raise FoveateError(f"samples {samples} must be 1 or more, and sigma {sigma} not below 0")
    x = capture.images
    sizes = width(x, sigma)

    def noisy(rows: Tensor, numbers: Tensor) -> Tensor:
        unique, where = numbers.unique(return_inverse=True)
        return x[rows] + sizes[rows] * gaussian(seed, unique.tolist(), x.shape[1:], x)[where]

    total = accumulate(capture, target, samples, noisy, lambda g, _: g.square() if square else g)
    return over_colour(total / samples, colour)


@method(
    "guided_backprop",
    title="Guided backprop",
    whole=True,
    paper="Springenberg et al., ICLR workshops 2015",
    differentiable=True,
    needs=("relu",),
    aliases=("guided_backpropagation",),
)
def guided_backprop(capture: Capture, layer: str | None, target: Target, *, colour: Colour = "max_abs") -> Tensor:
    """``max_c |gradient|`` with ``g_in = g_out [x > 0] [g_out > 0]`` at every ReLU, ``[B,H,W]``.

    Sharp pictures that hardly depend on the classifier (Adebayo et al. 2018): measure before you believe them.

    Raises:
        FoveateError: the model has no ReLU.
    """
    return over_colour(capture.guided_image_gradient(target), colour)


@method(
    "guided_grad_cam",
    title="Guided Grad-CAM",
    paper="Selvaraju et al., ICCV 2017, section 3.2",
    differentiable=True,
    needs=("relu", "gradient"),
)
def guided_grad_cam(capture: Capture, layer: str | None, target: Target, *, colour: Colour = "max_abs") -> Tensor:
    """``max_c |up(relu(Grad-CAM)) * guided gradient|``, ``[B,H,W]``: fine detail where the class is.

    Raises:
        FoveateError: the model has no ReLU.
    """
    where = maps.upsample(maps.relu(_grad_cam(capture, layer, target)), capture.size)  # [B,H,W]
    return over_colour(where[:, None] * capture.guided_image_gradient(target), colour)
