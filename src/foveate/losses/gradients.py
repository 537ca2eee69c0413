"""Interpretable gradients: the input gradient is drawn towards the guided one while a network is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.batch import Batch
from foveate.errors import FoveateError
from foveate.registry import loss
from foveate.runtime.capture import Capture
from foveate.runtime.layers import INPUT
from foveate.runtime.model import evaluating

Error = Literal["cosine", "l1", "l2", "histogram"]
Of = Literal["loss", "logit", "probability"]
SMALLEST = 1e-12  # of a norm: below it a gradient has no direction


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=SMALLEST**2)
    return result


def _histogram(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.abs(), b.abs()
    shares = [t / t.sum(1, keepdim=True).clamp(min=SMALLEST) for t in (a, b)]
    return 1 - torch.minimum(*shares).sum(1)


_ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "l1": lambda a, b: (a - b).abs().mean(1),
    "l2": lambda a, b: (a - b).square().mean(1),
    "histogram": _histogram,
}


def interpretable_gradients(gradient: Tensor, guided: Tensor, *, error: Error = "cosine") -> Tensor:
    """How far an input gradient is from the guided one, ``E(d, d_G)``, ``[B]``.

    Args:
        gradient: ``[B,C,H,W]`` of one scalar an image, differentiable in the parameters (``create_graph=True``).
        guided: of the same scalar by guided backpropagation; the target, so it is detached here.
        error: ``cosine``: ``1 - <d, d_G> / (|d| |d_G|)`` in [0, 2]; ``l1``, ``l2``: mean absolute and squared difference;
            ``histogram``: ``1 - sum min(|d| / |d|_1, |d_G| / |d_G|_1)`` in [0, 1].

    An image whose gradient or guided gradient is 0 (the model is certain; every path is blocked) has no direction to
    compare: its loss is 0 and gives no gradient.

    Raises:
        FoveateError: an unknown error.

    Source: Torres et al., "A learning paradigm for interpretable gradients", 2024, eq. 11.
    """
    if error not in _ERRORS:
        raise FoveateError(f"error {error!r} is unknown: use {', '.join(map(repr, _ERRORS))}")
    a, b = gradient.flatten(1).float(), guided.detach().flatten(1).float()
    if gradient.dtype == torch.float64:
        a, b = gradient.flatten(1), guided.detach().flatten(1)
    usable = (a.detach().norm(dim=1) > SMALLEST) & (b.norm(dim=1) > SMALLEST)
    # Replaced before the norm is taken: the gradient of a norm at 0 is NaN, also after a where.
    a = torch.where(usable[:, None], a, torch.ones_like(a))
    b = torch.where(usable[:, None], b, torch.ones_like(b))
    return torch.where(usable, _ERRORS[error](a, b), torch.zeros_like(a[:, 0]))


@loss(
    "interpretable_gradients",
    title="Interpretable gradients",
    paper="Torres et al., A learning paradigm for interpretable gradients, VISAPP 2024",
    needs=("guided",),
)
def interpretable_gradients_of(
    capture: Capture,
    batch: Batch,
    *,
    error: Error = "cosine",
    of: Of = "loss",
    batch_norm: Literal["train", "eval"] = "train",
) -> Tensor:
    """:func:`interpretable_gradients` of the label's score by the image, ``[B]``: one forward pass, two backward to the input.

    The capture is made with ``Capture(model, x, ("auto", "input"), frozen=False, guided=True)``; one that was not is run
    again so.

    Args:
        of: what is differentiated: ``loss`` (cross-entropy), ``logit`` or ``probability``. The guided pass gives another
            direction for each, because its seed has another sign.
        batch_norm: ``train``: as the training step runs, so that an image's gradient has terms of the others in its
            batch (what the paper's code must do); ``eval``: a forward pass of its own with the running statistics.

    Raises:
        FoveateError: the model has no ReLU; labels are missing.
    """
    if batch.y is None:
        raise FoveateError("interpretable_gradients needs labels, and the batch has none")
    if batch_norm not in ("train", "eval"):
        raise FoveateError(f"batch_norm {batch_norm!r} is unknown: use 'train' or 'eval'")
    if batch_norm == "eval":
        norms = nn.ModuleList(m for m in capture.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        with evaluating(norms):
            capture = capture.again(capture.x, INPUT, guided=True)
    elif INPUT not in capture.layers or not capture.guided:
        capture = capture.again(capture.x, INPUT, guided=True)
    target = capture.target(batch.y, score=of)
    return interpretable_gradients(capture.grad(INPUT, target), capture.guided_gradient(INPUT, target), error=error)
