"""Channels weighed by running the model again: Score-CAM (seen through each channel), Ablation-CAM (without it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from foveate import maps
from foveate.errors import FoveateError
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.runtime.linear_head import LinearHead
from foveate.targets import Target

Weighting = Literal["channel_softmax", "probability", "increase"]
Scorer = Callable[[Tensor, Tensor], Tensor]


@method("score_cam", title="Score-CAM", paper="Wang et al., CVPR workshops 2020, eq. 4 to 7", signed=True, repeats=True)
def score_cam(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    weighting: Weighting = "channel_softmax",
    constant: Literal["zero", "skip"] = "zero",
) -> Tensor:
    """``S = sum_k w_k A_k``, with ``w_k`` from the score of ``x * n(up(A_k))``: one forward pass per channel, no gradients.

    Three definitions are in circulation, and their numbers differ:

    - ``channel_softmax``: ``w = softmax_k(s_k)`` of scores (logits), as the paper and the Opti-CAM tables have it; any
      baseline cancels. Where logits differ by tens it is nearly one channel.
    - ``probability``: ``w_k = p_c(x * n(up(A_k)))``, the authors' code and the CA-Stream tables.
    - ``increase``: ``w_k = s_k - s(black image)``, the paper's Channel-wise Increase of Confidence without a softmax.

    Masked in pixel space, black outside. A constant channel has no range, ``n`` of it is 0: all of them are scored by
    one black image (``zero``), or left out (``skip``), which changes a softmax over channels but for channels of zeros
    only by a factor.

    Raises:
        FoveateError: an unknown option.
    """
    if weighting not in ("channel_softmax", "probability", "increase"):
        raise FoveateError(f"weighting {weighting!r} is unknown: use 'channel_softmax', 'probability' or 'increase'")
    if constant not in ("zero", "skip"):
        raise FoveateError(f"constant {constant!r} is unknown: use 'zero' or 'skip'")
    activations = capture.activations(layer).detach()  # [B,K,h,w]
    count, channels = activations.shape[:2]
    flat = maps.is_constant(activations.flatten(0, 1)).view(count, channels)
    score = _scorer(capture, target, weighting)
    x = capture.images
    black = score(torch.zeros_like(x), torch.arange(count, device=flat.device))  # [B]
    scores = black[:, None].repeat(1, channels)  # [B,K]
    rows, columns = (~flat).nonzero(as_tuple=True)
    for row, column in zip(rows.split(capture.chunk_size()), columns.split(capture.chunk_size()), strict=True):
        masks = maps.scale(maps.upsample(activations[row, column], capture.size))
        scores[row, column] = score(maps.apply_mask(x[row], masks), row)
    if weighting == "channel_softmax":
        left_out = flat if constant == "skip" else torch.zeros_like(flat)
        left_out = left_out & ~flat.all(1, keepdim=True)  # a softmax over nothing is NaN
        weights = scores.masked_fill(left_out, float("-inf")).softmax(1)
    else:
        weights = scores - black[:, None] if weighting == "increase" else scores
        weights = weights.masked_fill(flat, 0) if constant == "skip" else weights
    return torch.einsum("bk,bkhw->bhw", weights.to(activations.dtype), activations)


def _scorer(capture: Capture, target: Target, weighting: Weighting) -> Scorer:
    if weighting == "probability":
        return lambda images, rows: target.rows(rows).log_probability(capture.score(images, many=True), capture.head).exp()
    return lambda images, rows: capture.score(images, target, rows, many=True)


@method("ablation_cam", title="Ablation-CAM", paper="Desai and Ramaswamy, WACV 2020, eq. 3 and 4", signed=True, repeats=True)
def ablation_cam(
    capture: Capture, layer: str | None, target: Target, *, variant: Literal["paper", "pytorch_grad_cam"] = "paper"
) -> Tensor:
    """``S = sum_k w_k A_k``, ``w_k = (s - s_k) / |s|``, with ``s_k`` the score when channel k is 0 at the layer.

    Only what comes after the layer runs again; with a linear head ``s_k`` has a closed form and nothing runs at all.

    Deviation: the paper divides by the score itself, whose sign, not only its size, would turn the whole map over.

    Args:
        variant: ``pytorch_grad_cam``: that library's numbers: division by the signed score, and where the least
            activation of an image is not 0, the channel is set to that minimum less 1e7, less 2e7 for the second, and so
            on to the 32nd of those that run together. Only to reproduce them.
    """
    if variant not in ("paper", "pytorch_grad_cam"):
        raise FoveateError(f"variant {variant!r} is unknown: use 'paper' or 'pytorch_grad_cam'")
    activations = capture.activations(layer).detach()  # [B,K,h,w]
    with torch.no_grad():
        score = target(capture.logits).detach()  # [B]
    head = capture.linear_head(layer)
    low = activations.amin((1, 2, 3))  # [B]
    if variant == "paper" or not low.any():
        ablated = _without_each(capture, head, target, activations) if head else None
        value = torch.zeros_like(low)[:, None].expand(activations.shape[:2])
    else:
        # Their minimum is taken anew for each of 32 channels that run together, with those before it ablated already.
        place = torch.arange(activations.shape[1], device=low.device) % 32 + 1
        ablated, value = None, torch.where(low == 0, low, low - 1e7 * place[:, None]).T
    if ablated is None:
        ablated = _rerun_without_each(capture, layer, target, activations, value)
    signed = score if variant == "pytorch_grad_cam" else score.abs()
    divisor = torch.where(signed.abs() > 1e-6, signed, torch.ones_like(signed))
    weights = (score[:, None] - ablated) / divisor[:, None]  # [B,K]
    return torch.einsum("bk,bkhw->bhw", weights.to(activations.dtype), activations)


def _without_each(capture: Capture, head: LinearHead, target: Target, activations: Tensor) -> Tensor:
    """Scores ``[B,K]`` without each channel, in closed form: the logits less what the channel adds to them."""
    count, channels = activations.shape[:2]
    logits, weight = capture.logits.detach(), head.weight.detach()
    rows = []
    for b in range(count):
        if head.pooled:
            added = weight[:, :, 0, 0] * activations[b].sum((1, 2))  # [C,K]
        else:
            added = torch.einsum("ckhw,khw->ck", weight, activations[b])
        row = torch.full((channels,), b, device=activations.device)
        rows.append(target.rows(row)(logits[b] - added.T))  # [K]
    return torch.stack(rows)


def _rerun_without_each(capture: Capture, layer: str | None, target: Target, activations: Tensor, value: Tensor) -> Tensor:
    """Scores ``[B,K]`` with each channel at ``value [B,K]``, by running what comes after the layer."""
    count, channels = activations.shape[:2]
    every = torch.arange(count * channels, device=activations.device)
    scores = []
    for part in every.split(capture.tail_size(layer)):
        rows, columns = part // channels, part % channels
        changed = activations[rows]  # [n,K,h,w], a copy
        changed[torch.arange(len(part), device=part.device), columns] = value[rows, columns][:, None, None]
        scores.append(capture.tail(changed, layer, target, rows))
    return torch.cat(scores).view(count, channels)
