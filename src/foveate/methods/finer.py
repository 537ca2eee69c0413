"""Finer-CAM: what tells a class from those that the model nearly takes it for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.methods.cam import grad_cam, hires_cam
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.targets import Target


@method(
    "finer_cam",
    title="Finer-CAM",
    paper="Zhang et al., CVPR 2025",
    signed=True,
    differentiable=True,
)
def finer_cam(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    similar: int | None = None,
    strength: float = 0.6,
    weights: Literal["equal", "probability"] = "equal",
    base: Literal["grad_cam", "hires_cam"] = "grad_cam",
) -> Tensor:
    """Grad-CAM of ``y_c - strength sum_d w_d y_d`` over the classes d with the logits nearest to ``y_c``, ``[B,h,w]``.

    ``strength`` 0 is Grad-CAM; 1 with one similar class is the contrast with it. A map of a sum is the sum of the maps,
    so that one backward pass serves all classes.

    Args:
        similar: how many classes it is told from; 3, as the paper has it, or all others where the model has fewer.
        weights: ``equal``: the mean of them; ``probability``: each as likely as the model finds it, as pytorch-grad-cam
            has it (with ``strength=1``).
        base: the map of that score.

    Raises:
        FoveateError: the score is not a logit, or the model has too few classes.
    """
    if target.name != "logit" or capture.head == "binary":
        raise FoveateError(
            f"finer_cam tells the logit of a class from those like it, and cannot explain a {target.name!r} of a "
            f"{capture.head} head: use 'grad_cam'"
        )
    if weights not in ("equal", "probability"):
        raise FoveateError(f"weights {weights!r} is unknown: use 'equal' or 'probability'")
    if base not in ("grad_cam", "hires_cam"):
        raise FoveateError(f"base {base!r} is unknown: use 'grad_cam' or 'hires_cam'")
    similar = min(3, capture.classes - 1) if similar is None else similar
    if not 1 <= similar < capture.classes:
        raise FoveateError(f"similar {similar} must be 1 or more, and below the number of classes, {capture.classes}")
    with torch.inference_mode(False), torch.no_grad():
        logits, own = capture.logits.detach(), target.y[:, None]
        gap = (logits - logits.gather(1, own)).abs().scatter(1, own, float("inf"))
        nearest = gap.topk(similar, 1, largest=False).indices  # [B,n]
        shares = torch.full_like(nearest, 1, dtype=logits.dtype) / similar
        if weights == "probability":
            p = logits.softmax(1).gather(1, nearest)
            shares = p / p.sum(1, keepdim=True)

    def score(logits: Tensor, y: Tensor) -> Tensor:
        return logits.gather(1, y[:, None])[:, 0] - strength * (shares * logits.gather(1, nearest)).sum(1)

    told_apart = Target(target.y, score, "difference")
    return (grad_cam if base == "grad_cam" else hires_cam)(capture, layer, told_apart)
