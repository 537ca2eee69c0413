"""CAFO and CASO: the sparse change of the image that raises the loss most, by its gradient, and by its curvature too."""

from __future__ import annotations

from dataclasses import fields

from foveate.methods.gradient import Colour, over_colour
from foveate.methods.second_order.solve import (
    MARGIN,
    SAME,
    Convention,
    Hessian,
    Solution,
    Unit,
    first_order,
    second_order,
)
from foveate.records import Found
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.targets import Target


@method(
    "cafo",
    title="CAFO",
    whole=True,
    paper="Singla et al., ICML 2019, without the second-order term",
    aliases=("context_aware_first_order",),
)
def cafo(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    lambda1: float | None = None,
    eta: float = 0.9,
    lambda2: float = MARGIN,
    copies: int = 1,
    noise: float = 0.15,
    noise_seed: int = 0,
    unit: Unit = "image",
    colour: Colour = "sum_abs",
) -> Found:
    """``S = sum_c |D_c|``, ``[B,H,W]``, ``D = argmax g^T D - lambda_1 |D|_1 - lambda_2 |D|_2^2``; see :func:`first_order`.

    Args:
        colour: how the three channels become one for display; see :func:`foveate.methods.gradient.over_colour`.
    """
    found = first_order(
        capture,
        target,
        lambda1=lambda1,
        eta=eta,
        lambda2=lambda2,
        copies=copies,
        noise=noise,
        noise_seed=noise_seed,
        unit=unit,
    )
    return _shown(found, colour)


@method(
    "caso",
    title="CASO",
    whole=True,
    paper="Singla et al., ICML 2019",
    aliases=("context_aware_second_order",),
    repeats=True,
)
def caso(
    capture: Capture,
    layer: str | None,
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
    colour: Colour = "sum_abs",
) -> Found:
    """``S = sum_c |D_c|``, ``[B,H,W]``, ``D = argmax g^T D + D^T H D / 2 - lambda_1 |D|_1 - lambda_2 |D|_2^2``.

    See :func:`second_order` for the settings, and for a solution with everything that is known of it.

    Args:
        colour: how the three channels become one for display; see :func:`foveate.methods.gradient.over_colour`.
    """
    found = second_order(
        capture,
        target,
        lambda1=lambda1,
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
    return _shown(found, colour)


def _shown(found: Solution, colour: Colour) -> Found:
    facts = {f.name: getattr(found, f.name) for f in fields(Solution) if f.name not in ("delta", "first_order")}
    return Found(over_colour(found.delta, colour), facts, [_remark(found, i) for i in range(len(found.eta))])


def _remark(found: Solution, i: int) -> str:
    text = f"eta {float(found.eta[i]):.3f} at lambda1 {float(found.lambda1[i]):.3g}"
    if not bool(found.reached[i]):
        text += ", the nearest to what was asked: the gradient has ties or is 0"
    if bool(found.largest[i].isnan()):
        return text
    how = f"factors of {int(found.classes[i])} classes" if bool(found.factored[i]) else f"{int(found.products[i])} products"
    text += f"; Hessian by {how}, L {float(found.largest[i]):.3g}; cosine with CAFO {float(found.cosine[i]):.3f}"
    if not bool(found.converged[i]):
        text += f"; not converged: off by up to {100 * float(found.error[i]):.1g} %"
    return text + (": the second order does not matter here" if float(found.cosine[i]) > SAME else "")
