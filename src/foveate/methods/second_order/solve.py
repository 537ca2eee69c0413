"""Solutions: the sparse change of an image that raises the loss most, by its gradient, or by its curvature too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.methods.second_order.curvature import Curvature, classes_for, lanczos, smooth_parts
from foveate.methods.second_order.proximal import maximise, quantile, soft
from foveate.runtime.capture import Capture
from foveate.runtime.model import Normalized
from foveate.runtime.noise import gaussian, width
from foveate.targets import Target

Hessian = Literal["auto", "factored", "products"]
Unit = Literal["image", "network"]
Convention = Literal["talk", "authors"]
MARGIN = 10.0  # of lambda_2 over L / 2
SAME = 0.99  # cosine with CAFO, above which the two maps are one to the eye
TOGETHER = 8  # of a chunk, so many parts are solved apart on a CPU: one image of 224 x 224
CLASSES = 48  # times copies, up to which factors are exact and cheaper than products with the Hessian
BYTES = 2**30  # of factors that are held at once


@dataclass(frozen=True)
class Solution:
    """The change of each image, and how it was found.

    Attributes:
        delta: ``[B,C,H,W]``, exact zeros where nothing changes; colours are variables of their own.
        first_order: the change by the gradient alone, with the same sparsity (CAFO): what CASO is compared with.
        lambda1, lambda2: of each image, ``[B]``.
        eta: share of exact zeros of ``delta``, ``[B]``.
        reached: whether ``eta`` is what was asked for, ``[B]``; a gradient of zeros or of ties cannot reach everything.
        largest, second: eigenvalues of the Hessian, ``[B]``; NaN for CAFO, and for a second one that is not known to 5 %.
        factored: which images had the factored Hessian, ``[B]``; the others products with it.
        classes: how many classes their factors had, ``[B]``; 0 for products.
        left_out: bound on the norm of what those leave out, ``[B]``: twice an estimate of its trace.
        error: bound on the relative error of ``delta``: ``|delta - best| / |delta|``, ``[B]``.
        converged: whether it is within the tolerance, ``[B]``; never where factors leave out too much.
        steps: of proximal gradient, ``[B]``.
        products: with the Hessian, ``[B]``.
        cosine: between ``delta`` and ``first_order``, ``[B]``; near 1 the second order does not matter.
    """

    delta: Tensor
    first_order: Tensor
    lambda1: Tensor
    lambda2: Tensor
    eta: Tensor
    reached: Tensor
    largest: Tensor
    second: Tensor
    factored: Tensor
    classes: Tensor
    left_out: Tensor
    error: Tensor
    converged: Tensor
    steps: Tensor
    products: Tensor
    cosine: Tensor


def first_order(
    capture: Capture,
    target: Target,
    *,
    lambda1: float | None = None,
    eta: float = 0.9,
    lambda2: float = MARGIN,
    copies: int = 1,
    noise: float = 0.15,
    noise_seed: int = 0,
    unit: Unit = "image",
) -> Solution:
    """CAFO: ``D_i = sign(g_i) max(|g_i| - lambda_1, 0) / (2 lambda_2)``, exact, from one backward pass.

    ``g`` is the gradient of ``l = -log p_y`` by the image; where ``lambda_1`` is not given it is the quantile of ``|g|``
    that makes the share ``eta`` of all ``3 H W`` values 0, exact to one value where none are equal.

    Args:
        lambda1: in the unit of the gradient; a sure prediction has a small gradient, of which a fixed value leaves nothing.
        eta: share of zeros where ``lambda1`` is None, in [0, 1); the paper takes what falls into (0.75, 1).
        lambda2: only scales D here; above 0.
        copies: SmoothCAFO where it is above 1: the gradient is the mean over so many noisy copies of the image.
        noise: standard deviation of that noise, as a share of the image's range; the label stays that of the clean image.
        unit: what a change of 1 is: ``image``: black to white; ``network``: one standard deviation of the normalisation,
            in which the papers' values of ``lambda_1`` and ``lambda_2`` are.

    Raises:
        FoveateError: a value out of range, a score that has no probability.
    """
    _check(lambda1, eta, copies, noise)
    if not 0 < lambda2 < float("inf"):
        raise FoveateError(f"lambda2 {lambda2} must be above 0, or the problem has no largest value")

    def solve(rows: Tensor, images: Tensor, scale: Tensor) -> list[Solution]:
        curvature = Curvature(capture, target, rows, images, scale, twice=False)
        g = curvature.gradient
        threshold = quantile(g, eta) if lambda1 is None else g.new_full((len(g),), lambda1)
        delta = soft(g, threshold[:, None]) / (2 * lambda2)
        none = torch.zeros_like(rows)
        found = Solution(
            **_described(delta, delta, threshold, eta, lambda1, capture.images.shape[1:]),
            lambda2=torch.full_like(threshold, lambda2, dtype=torch.float64),
            largest=torch.full_like(threshold, float("nan"), dtype=torch.float64),
            second=torch.full_like(threshold, float("nan"), dtype=torch.float64),
            factored=none.bool(),
            classes=none,
            left_out=none.double(),
            error=none.double(),
            converged=~none.bool(),
            steps=none,
            products=none,
        )
        return [found]

    (found,) = _by_groups(capture, solve, copies, noise, noise_seed, unit, twice=False)
    return found


def second_order(
    capture: Capture,
    target: Target,
    *,
    lambda1: float | None = None,
    eta: float = 0.9,
    lambda2: float | None = None,
    convention: Convention = "talk",
    hessian: Hessian = "auto",
    share: float = 0.0,
    tolerance: float = 1e-3,
    copies: int = 1,
    noise: float = 0.15,
    noise_seed: int = 0,
    unit: Unit = "image",
) -> Solution:
    """CASO: the change that raises the loss most when the loss is its second-order expansion.

    ``max_D g^T D + D^T H D / 2 - lambda_1 |D|_1 - lambda_2 |D|_2^2``, concave where ``lambda_2 > L / 2`` with L the largest
    eigenvalue of the Hessian H of ``l = -log p_y``. Solved by accelerated proximal gradient with the step ``1 / L'`` that
    needs no line search, on a Hessian of low rank: its factors, or eigenvectors that Lanczos' iteration finds. With
    products, what those miss of H is put right by further products until the optimality condition of the exact problem
    bounds the error. ``lambda_1 = 0`` is solved in closed form on the low rank. Every image stops for itself.

    Args:
        lambda1: 0 or more; where None, found so that the share ``eta`` of D is 0, within .0001, by warm-started bisection.
        eta: see :func:`first_order`.
        lambda2: above ``L / 2``; ``L / 2 + 10`` of each image where it is None.
        convention: ``authors``: their ``lambda2`` is added to L in a term ``(L + lambda2) / 2 |D|^2``, 20 where None.
        hessian: ``factored``: ``W (diag p - p p^T) W^T`` by a backward pass for each class, of piecewise-linear networks
            only; ``products``: double backpropagation, any network; ``auto``: factored where the network allows it and has at
            most 48 classes (times ``copies``).
        share: of the probability of all classes but the likeliest, that factors may leave out; none by default. A bound on
            what they leave out is added to L and to the error.
        tolerance: bound on the relative error of D.
        copies, noise, noise_seed: SmoothCASO: gradient and Hessian are means over the copies, with one D.
        unit: see :func:`first_order`.

    Deviations: the authors take ten power steps for L, which then is too small; ten iterations with a line search over the
    sum of the batch, which couples its images; and they predict the label of each noisy copy anew.

    Raises:
        FoveateError: a value out of range; ``lambda2`` at most L / 2, with the least that is allowed; factors of a
            network that is not piecewise linear, with the reason; a model that cannot be differentiated twice.

    Source: Singla et al., Understanding impacts of high-order loss approximations and features, ICML 2019.
    """
    (found,) = path(
        capture,
        target,
        [lambda1],
        eta=eta,
        lambda2=lambda2,
        convention=convention,
        hessian=hessian,
        share=share,
        tolerance=tolerance,
        copies=copies,
        noise=noise,
        noise_seed=noise_seed,
        unit=unit,
    )
    return found


def path(
    capture: Capture,
    target: Target,
    lambda1: Sequence[float | None],
    *,
    eta: float = 0.9,
    lambda2: float | None = None,
    convention: Convention = "talk",
    hessian: Hessian = "auto",
    share: float = 0.0,
    tolerance: float = 1e-3,
    copies: int = 1,
    noise: float = 0.15,
    noise_seed: int = 0,
    unit: Unit = "image",
    second: bool = False,
) -> list[Solution]:
    """CASO for several ``lambda_1``, one solution each: the Hessian is looked at once for all of them.

    Settings and errors are those of :func:`second_order`; None among ``lambda1`` is the one for the share ``eta``.

    Args:
        second: find the second eigenvalue too, to 5 %; more products where it is small beside the first.
    """
    for value in lambda1:
        _check(value, eta, copies, noise)
    _check_second(lambda2, convention, hessian, share, tolerance)
    smooth = () if hessian == "products" else smooth_parts(capture)
    if hessian == "factored" and smooth:
        raise FoveateError(
            f"the factored Hessian is that of a piecewise-linear network, and this one has {', '.join(smooth)}: "
            "use hessian='products'"
        )
    few = classes_for(target, capture.logits, capture.head, 0) * copies <= CLASSES
    by_factors = hessian == "factored" or (hessian == "auto" and not smooth and bool(few.all()))
    rank = int(classes_for(target, capture.logits, capture.head, share).max()) * copies if by_factors else 0

    def solve(rows: Tensor, images: Tensor, scale: Tensor) -> list[Solution]:
        curvature = Curvature(capture, target, rows, images, scale, twice=not by_factors)
        classes, left_out = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.float64)
        if by_factors:
            factors = curvature.factors(share)
            spectrum, classes, left_out = factors.spectrum(), factors.classes, factors.left_out
        else:
            spectrum = lanczos(curvature.multiply, curvature.gradient, tolerance=min(tolerance, 1e-3), second=second)
        shift = 2 * _lambda2(lambda2, convention, spectrum.largest, rows)
        g, exact = curvature.gradient, None if by_factors else curvature.multiply

        def at(value: float | None) -> Solution:
            found = maximise(spectrum, shift, g, lambda1=value, eta=eta, tolerance=tolerance, exact=exact)
            delta, threshold = torch.stack([one.delta for one in found]), torch.stack([one.threshold for one in found])
            error = torch.tensor([one.error for one in found], dtype=torch.float64, device=g.device)
            error = error + left_out / (shift - spectrum.largest)
            plain = soft(g, (quantile(g, eta) if value is None else threshold)[:, None]) / shift[:, None].to(g)
            return Solution(
                **_described(delta, plain, threshold, eta, value, capture.images.shape[1:]),
                lambda2=shift / 2,
                largest=spectrum.largest,
                second=spectrum.second,
                factored=torch.full_like(rows, by_factors, dtype=torch.bool),
                classes=classes,
                left_out=left_out,
                error=error,
                converged=error <= tolerance,
                steps=torch.tensor([one.steps for one in found], device=g.device),
                products=spectrum.products + torch.tensor([one.products for one in found], device=g.device),
            )

        return [at(value) for value in lambda1]

    return _by_groups(capture, solve, copies, noise, noise_seed, unit, twice=True, rank=rank)


def _zeros(delta: Tensor) -> Tensor:
    return (delta == 0).double().mean(1)


def _lambda2(lambda2: float | None, convention: Convention, largest: Tensor, rows: Tensor) -> Tensor:
    """lambda_2 of each image in the talk's convention, ``[n]``.

    Raises:
        FoveateError: it is not above L / 2.
    """
    if convention == "authors":
        return (largest + (2 * MARGIN if lambda2 is None else lambda2)) / 2
    if lambda2 is None:
        return largest / 2 + MARGIN
    low = largest >= 2 * lambda2
    if low.any():
        worst = int(largest.argmax())
        least = float(largest[worst]) / 2 * (1 + 1e-5)  # what is printed is rounded
        raise FoveateError(
            f"lambda2 {lambda2} is not above L / 2 of image {int(rows[worst])}, L the largest eigenvalue of its Hessian, so "
            f"that the problem has no largest value: give more than {least:.6g}, or None for L / 2 + 10"
        )
    return torch.full_like(largest, lambda2)


def _described(
    delta: Tensor, plain: Tensor, threshold: Tensor, eta: float, lambda1: float | None, shape: torch.Size
) -> dict[str, Tensor]:
    """What a solution says of itself, from ``delta [n,d]`` and what the gradient alone gives, ``plain [n,d]``."""
    zeros = _zeros(delta)
    reached = (zeros - eta).abs() <= max(1e-3, 1 / delta.shape[1]) if lambda1 is None else torch.ones_like(zeros).bool()
    lengths = delta.double().norm(dim=1) * plain.double().norm(dim=1)
    inner = (delta.double() * plain.double()).sum(1)
    cosine = torch.where(lengths > 0, inner / lengths.clamp(min=1e-300), torch.ones_like(inner)).clamp(-1, 1)
    values = {"lambda1": threshold.double(), "eta": zeros, "reached": reached, "cosine": cosine}
    return {"delta": delta.view(-1, *shape), "first_order": plain.view(-1, *shape), **values}


def _by_groups(
    capture: Capture,
    solve: Callable[[Tensor, Tensor, Tensor], list[Solution]],
    copies: int,
    noise: float,
    seed: int,
    unit: Unit,
    *,
    twice: bool,
    rank: int = 0,
) -> list[Solution]:
    """Solve for so many images at once as fit into a chunk with their copies, and into memory with ``rank`` factors each."""
    x = capture.images
    scale = _scale(capture, unit)
    deviation = width(x, noise)
    every = torch.arange(len(x), device=x.device)
    step = capture.chunk_size("backward") // copies
    if twice and x.device.type == "cpu":
        step //= TOGETHER  # images wait for the one that needs most, and on a CPU a batch is not faster than its images
    if rank:
        step = min(step, BYTES // (rank * x[0].numel() * x.element_size()))
    step = max(1, step)
    parts = []
    for rows in every.split(step):
        images = x[rows][:, None].expand(-1, copies, -1, -1, -1)
        if copies > 1:
            images = images + deviation[rows][:, None] * gaussian(seed, range(copies), x.shape[1:], x)
        parts.append(solve(rows, images, scale))
    names = [f.name for f in fields(Solution)]
    return [
        Solution(**{name: torch.cat([getattr(one, name) for one in several]) for name in names})
        for several in zip(*parts, strict=True)
    ]


def _scale(capture: Capture, unit: Unit) -> Tensor:
    x = capture.images
    if unit == "image":
        return x.new_ones(1, 1, 1, 1)
    if unit != "network":
        raise FoveateError(f"unit {unit!r} is unknown: use 'image' or 'network'")
    if not isinstance(capture.model, Normalized):
        raise FoveateError("unit 'network' needs the model's normalisation: wrap it with foveate.normalized(model, mean, std)")
    return capture.model.std.to(x)


def _check(lambda1: float | None, eta: float, copies: int, noise: float) -> None:
    if lambda1 is not None and not 0 <= lambda1 < float("inf"):
        raise FoveateError(f"lambda1 {lambda1} must be 0 or more, or None to find it for a sparsity eta")
    if not 0 <= eta < 1:
        raise FoveateError(f"eta {eta} is a share of zeros: use a value in [0, 1), such as 0.9")
    if copies < 1 or not 0 <= noise < float("inf"):
        raise FoveateError(f"copies {copies} must be 1 or more, and noise {noise} not below 0")


def _check_second(lambda2: float | None, convention: str, hessian: str, share: float, tolerance: float) -> None:
    if convention not in ("talk", "authors"):
        raise FoveateError(f"convention {convention!r} is unknown: use 'talk' or 'authors'")
    if hessian not in ("auto", "factored", "products"):
        raise FoveateError(f"hessian {hessian!r} is unknown: use 'auto', 'factored' or 'products'")
    if not 0 <= share < 1 or not tolerance > 0:
        raise FoveateError(f"share {share} must be in [0, 1), and tolerance {tolerance} above 0")
    if lambda2 is not None and not 0 < lambda2 < float("inf"):
        raise FoveateError(f"lambda2 {lambda2} must be a number above 0")
