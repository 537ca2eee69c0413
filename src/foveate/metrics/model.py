"""The model itself: what it gets right, and how much of its evidence and of its accuracy is the object's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.batch import Batch
from foveate.errors import FoveateError
from foveate.registry import Column, metric
from foveate.runtime.capture import Capture
from foveate.targets import is_right, log_probability


@metric(
    "accuracy",
    title="Accuracy",
    paper="Russakovsky et al., IJCV 2015 (top-1)",
    columns={
        "accuracy": Column(
            "up",
            "accuracy",
            "Accuracy",
            "%",
            (0, 100),
            "100 where the model predicts the label; of several labels, where p > .5",
            "How often is the model right?",
        )
    },
    needs=("labels",),
    of_model=True,
)
def accuracy(capture: Capture, M: None, batch: Batch) -> dict[str, Tensor]:
    """100 where the model predicts the label, 0 elsewhere; of a multi-label head, where the label's probability is above .5."""
    assert batch.y is not None
    y = batch.y.to(capture.logits.device)
    return {"accuracy": 100.0 * is_right(capture.logits.detach(), y, capture.head).double()}


@metric(
    "size",
    title="Parameters and operations",
    paper="counted by torch.utils.flop_counter: two operations a multiply-add, as in the CA-Stream table",
    columns={
        "parameters": Column("down", "parameters", "Parameters", "M", None, "parameters / 10^6", "How large is the model?"),
        "stream_share": Column(
            "down", "stream_share", "Parameters of the stream", "%", None, "of the backbone's", "How much does CA-Stream add?"
        ),
        "GFLOPs": Column("down", "GFLOPs", "GFLOPs", "", None, "operations of a forward pass / 10^9", "What does a pass cost?"),
    },
    of_model=True,
    costly=True,
    digits=2,
)
def size(capture: Capture, M: None, batch: Batch) -> dict[str, Tensor]:
    """Millions of parameters, of a CA-Stream in percent of its backbone's, and billions of operations of a forward pass.

    The same for every image; without a stream its share is 0.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        capture.differentiable(capture.images[:1])  # with parameters that need no gradient: the counter stumbles over them
    ones = torch.ones(len(batch), dtype=torch.float64)
    count = sum(parameter.numel() for parameter in capture.model.parameters())
    streams = [module for module in capture.model.modules() if hasattr(module, "stream") and hasattr(module, "share")]
    share = 100 * float(streams[0].share) if streams else 0.0  # type: ignore[arg-type]
    return {"parameters": ones * count / 1e6, "stream_share": ones * share, "GFLOPs": ones * counter.get_total_flops() / 1e9}


@metric(
    "foreground_share",
    title="Foreground share of contrastive maps",
    paper="Setpal, contrastive optimization (2025): 1 - context ratio",
    columns={
        "foreground_share": Column(
            "up",
            "foreground_share",
            "Foreground share of contrastive maps",
            "",
            (0, 1),
            "sum of |K_tc| on the object / sum of |K_tc| over the classes c, K_tc the map of the label against c",
            "Which share of what tells the label from the other classes lies on the object?",
            "The object fills a fifth of the image and holds .7 of the evidence.",
            "It holds .2: the evidence is in the background.",
        )
    },
    needs=("mask", "labels", "layer"),
    of_model=True,
    digits=3,
)
def foreground_share(capture: Capture, M: None, batch: Batch, *, classes: int = 10) -> dict[str, Tensor]:
    """``sum_c sum_ij h |K_tc| / sum_c sum_ij |K_tc|``: the share of ``K_tc = M_t - M_c`` inside the mask ``h``, in [0, 1].

    ``M_c`` is the HiResCAM of class c, t the label. The mask is averaged over the cells of the map, so that a thin object
    does not vanish. Behind a linear head all classes count; elsewhere the ``classes`` the model finds likeliest.
    """
    assert batch.y is not None
    assert batch.mask is not None
    y = batch.y.to(capture.logits.device)
    rows = torch.arange(len(y), device=y.device)
    if capture.linear_head() is not None:
        M_c = capture.class_maps()  # [B,C,h,w]
    else:
        likely = capture.logits.detach().topk(min(classes, capture.logits.shape[1]), 1).indices
        chosen = torch.cat([likely.flatten(), y]).unique()
        M_c = capture.class_maps(classes=chosen.tolist())
        y = torch.searchsorted(chosen, y)
    K = (M_c[rows, y][:, None] - M_c).detach().double().abs().sum(1)  # [B,h,w]
    h = torch.nn.functional.adaptive_avg_pool2d(batch.mask.to(K)[:, None], (K.shape[-2], K.shape[-1]))[:, 0]
    total = K.sum((1, 2))
    known = (total > 0) & (h.sum((1, 2)) > 0)
    return {"foreground_share": (K * h).sum((1, 2)) / torch.where(known, total, torch.nan)}


def foreground_sensitivity(mean: Any) -> Any:
    """``(a_b - a_f) / (2 min(a, 1 - a))``, ``a`` their mean: ``[...,2] -> [...]`` in [-1, 1]; 0 where ``a`` is 0 or 1."""
    background, foreground = mean[..., 0], mean[..., 1]
    middle = (background + foreground) / 2
    width = 2 * np.minimum(middle, 1 - middle)
    return np.divide(background - foreground, width, out=np.zeros_like(middle), where=width > 0)


@metric(
    "relative_foreground_sensitivity",
    title="Relative foreground sensitivity",
    paper="Moayeri et al., CVPR 2022",
    columns={
        "relative_foreground_sensitivity": Column(
            "up",
            "relative_foreground_sensitivity",
            "Relative foreground sensitivity",
            "",
            None,
            "(a_b - a_f) / (2 min(a, 1 - a)), a_b and a_f the accuracies with noise on the background and on the object",
            "Does noise on the object hurt more than noise behind it?",
            "Noise behind the object leaves .9 right, noise on it .5: .67.",
            "Noise on the object leaves .9 right, noise behind it .5: -.67. The model reads the background.",
        )
    },
    needs=("mask", "labels"),
    pooled={"relative_foreground_sensitivity": foreground_sensitivity},
    of_model=True,
    digits=3,
)
def relative_foreground_sensitivity(
    capture: Capture, M: None, batch: Batch, *, sigma: float = 0.25, samples: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """RFS: does noise on the object hurt more than noise behind it? ``(a_b - a_f) / (2 min(a, 1 - a))`` over the data.

    ``a_b`` and ``a_f`` are the accuracies with Gaussian noise of ``sigma`` (of the range [0, 1]) on the background and on the
    foreground, the same noise in both, clipped to [0, 1]; each image has the two shares of ``samples`` draws that were right.
    """
    assert batch.y is not None
    assert batch.mask is not None
    if sigma <= 0 or samples < 1:
        raise FoveateError(f"sigma {sigma} and samples {samples} must be above 0")
    x, y = capture.images, batch.y.to(capture.logits.device)
    mask = batch.mask.to(x)[:, None]
    right = torch.zeros(len(x), 2, dtype=torch.float64, device=x.device)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        # One draw for all images, so that an image's value does not depend on its batch.
        drawn = sigma * torch.randn(x.shape[1:], generator=draws, dtype=torch.float64).to(x)
        for column, where in enumerate((1 - mask, mask)):
            logits = capture.score((x + drawn * where).clamp(0, 1))
            right[:, column] += _right(logits, y, capture) / samples
    right[~batch.mask.to(right.device).any(2).any(1)] = torch.nan
    return {"relative_foreground_sensitivity": right}


def _right(logits: Tensor, y: Tensor, capture: Capture) -> Tensor:
    lost = torch.isnan(log_probability(logits, y, capture.head))
    return torch.where(lost, torch.nan, is_right(logits, y, capture.head).double())
