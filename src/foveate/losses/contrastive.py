"""Contrastive losses: cross-entropy written on contrastive maps, and what a mask of the object adds to it.

With HiResCAMs ``M_c`` and the label t, ``K_c = M_t - M_c`` says where the evidence for t over c lies. Behind a linear head
its sum is the difference of the logits without their biases, so cross-entropy is a function of maps, and a mask can say
which part of them may count. The maps have a closed form there and no backward pass is differentiated.

Source: Setpal, "Crossing Cross-Entropy: contrastive optimization", 2024, its draft and code; later "core-focused
cross-entropy". The drafts' second line ``sum_c exp(+sum K)`` is not cross-entropy; this is the first one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.batch import Batch, as_share
from foveate.data.boxes import regions
from foveate.errors import FoveateError
from foveate.maps import grid_mask
from foveate.registry import loss
from foveate.runtime.capture import Capture
from foveate.runtime.linear_head import LinearHead

PAPER = "Setpal, Crossing Cross-Entropy, 2024"
Resize = Literal["nearest", "area"]


def contrastive(K: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-entropy of contrastive maps ``K [B,C,h,w]`` (row t is 0), ``[B]``: ``log sum_c exp(b_c - b_t - sum_ij K_cij)``.

    Args:
        bias: ``b_c - b_t`` of the head, ``[B,C]``; without it the value is the cross-entropy of the bias-free head.
    """
    logits = -K.sum((2, 3))
    return (logits if bias is None else logits + bias).logsumexp(1)


def ablated_cross_entropy(K: Tensor, mask: Tensor, bias: Tensor | None = None, background: float = 1.0) -> Tensor:
    """Ablated cross-entropy (ACE), ``[B]``: ``log sum_c exp(a_c)``, ``a_c = b_c - b_t + sum_ij (1 - h)|K_c| - h K_c``.

    Outside of the mask any evidence, for or against, makes every other class likelier. Never below :func:`contrastive`
    (``background`` at least 1), and equal to it where all evidence is on the object.

    Args:
        K: ``[B,C,h,w]``, row t is 0.
        mask: ``h [B,h,w]`` in [0, 1], 1 on the object.
        bias: ``b_c - b_t``, ``[B,C]``.
        background: factor of the second term, for a start from random weights whose ``|K|`` is large.
    """
    h = as_share(mask).to(K.dtype)[:, None]
    a = (background * (1 - h) * K.abs() - h * K).sum((2, 3))  # [B,C]
    return (a if bias is None else a + bias).logsumexp(1)


def contrastive_binary(M: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of class maps ``M [B,C,h,w]``, summed over classes, ``[B]``: the logit is ``sum_ij M_c + b_c``.

    Args:
        y: ``[B,C]``, 1 where a class is present.
        bias: ``[C]``.
    """
    logits = M.sum((2, 3)) if bias is None else M.sum((2, 3)) + bias
    return F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none").sum(1)


def ablated_binary_cross_entropy(
    M: Tensor, y: Tensor, mask: Tensor, bias: Tensor | None = None, background: float = 1.0
) -> Tensor:
    """ACE of binary and multi-label heads, ``[B]``: for a present class the logit is ``sum h M - sum (1 - h)|M|``.

    Classes that are absent keep their plain logit. The draft writes ``h * sum M`` and ``log s`` for them; its code, and
    this, have ``sum(h M)`` and ``log(1 - sigmoid(s))``.

    Args:
        M: ``[B,C,h,w]``; y: ``[B,C]``; bias: ``[C]``.
        mask: ``[B,h,w]``, or one per class, ``[B,C,h,w]``, in [0, 1].
    """
    mask = as_share(mask).to(M.dtype)
    h = mask if mask.ndim == 4 else mask[:, None]
    present = y.to(M.dtype)
    held = (h * M - background * (1 - h) * M.abs()).sum((2, 3))
    logits = torch.where(present > 0.5, held, M.sum((2, 3)))
    logits = logits if bias is None else logits + bias
    return F.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(1)


def divergence(
    K: Tensor,
    mask: Tensor,
    others: Tensor,
    *,
    mask_sharpness: float = 50.0,
    map_sharpness: float = 1.0,
    background: float = 0.0,
    foreground: float = 0.0,
) -> Tensor:
    """Divergence of a map from its mask, ``[B]``: ``sum_c sum_ij P (log P' - log Q_c)``.

    ``P = softmax_ij(mask_sharpness h)``, ``Q_c = softmax_ij(map_sharpness K_c)``, ``log P'`` is 0 on the object, so that
    more evidence than needed costs nothing there, and ``log P`` elsewhere; ``Q`` is held above 1e-6. Masks, not boxes.

    Args:
        K: ``[B,C,h,w]``; mask: ``[B,h,w]``.
        others: ``[B,C]`` bool, False for the row of the label, which is constant.
        background, foreground: factors of the earlier form's ``mean K^2`` outside and ``-mean K`` inside the mask.

    Deviation: the row of the label, a constant, is left out of the sum.
    """
    mask = as_share(mask).to(K.dtype)
    h = mask[:, None]
    P = (mask_sharpness * mask).flatten(1).softmax(1)[:, None]  # [B,1,hw]
    log_Q = (map_sharpness * K).flatten(2).log_softmax(2).clamp(min=math.log(1e-6))  # [B,C,hw]
    log_P = torch.where(h.flatten(2) > 0.5, torch.zeros_like(P), P.clamp(min=1e-30).log())
    value = (P * (log_P - log_Q)).sum(2)  # [B,C]
    if background:
        value = value + background * ((1 - h) * K**2).mean((2, 3))
    if foreground:
        value = value - foreground * (h * K).mean((2, 3))
    return (value * others).sum(1)


def sliced_wasserstein(
    K: Tensor, mask: Tensor, others: Tensor, *, confidence: float = 0.95, directions: int = 32, tag: float = 10.0
) -> Tensor:
    """Sliced Wasserstein distance of maps to evidence that is spread evenly over the object, ``[B]``, squared.

    A cell is a point ``(K_c, tag h)`` of the plane; the target's points are ``(T, tag h)`` with ``T = l h / sum h`` and
    ``l = -log((1 - p) / (p (C - 1)))``, which gives the label the probability p. Both are projected on directions, sorted and
    compared. Where ``K_c`` exceeds the target on the object, it costs nothing.

    Args:
        K: ``[B,C,h,w]``; mask: ``[B,h,w]``; others: ``[B,C]`` bool, False for the row of the label.
        confidence: p, the probability at which the object has shown enough.
        directions: half circle's even division. The code draws 512 at random, the draft some 20: in the plane an even
            division is exacter, and a run that is resumed finds the same.
    """
    count, classes = others.shape
    h = as_share(mask).to(K.dtype).flatten(1)[:, None]  # [B,1,hw]
    enough = -math.log((1 - confidence) / (confidence * max(1, classes - 1)))
    target = (enough * h / h.sum(2, keepdim=True).clamp(min=1)).expand(-1, classes, -1)
    flat = K.flatten(2)
    flat = torch.where((h > 0.5) & (flat > target), target, flat)
    angles = torch.arange(directions, device=K.device, dtype=K.dtype) * (math.pi / directions)
    total = K.new_zeros(count, classes)
    for across, along in zip(angles.cos().tolist(), angles.sin().tolist(), strict=True):
        ours = (across * flat + along * tag * h).sort(2).values
        theirs = (across * target + along * tag * h).sort(2).values
        total = total + (ours - theirs).square().mean(2)
    return (total / directions * others).sum(1) / others.sum(1)


# -- registered ----------------------------------------------------------------------------------------------------


def required_head(capture: Capture, name: str) -> LinearHead:
    """The linear head after the layer, or a sentence for the loss of a name.

    Raises:
        FoveateError: there is none.
    """
    head = capture.linear_head()
    if head is None:
        raise FoveateError(
            f"{name} needs a head that is linear in layer {capture.layer!r} (average pooling or flattening, then one linear "
            "layer), and this model has another, or its last map has a single cell at this image size: "
            "foveate.contrastive_architecture(model) changes ResNets and ConvNeXts, and "
            "'cam_loss' and 'mass_outside' work with any head"
        )
    return head


def _maps(capture: Capture, batch: Batch, name: str, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``K [B,C,h,w]`` of the labels, the classes other than each label ``[B,C]``, and ``b_c - b_t``."""
    y = _labels(capture, batch, name)
    head = required_head(capture, name)
    M = head.maps(capture.activations())  # [B,C,h,w]
    if capture.head == "binary":  # one logit is the difference of two: M_1 - M_0 = M
        M = torch.cat([torch.zeros_like(M), M], 1)
        b = torch.cat([torch.zeros_like(head.bias), head.bias])
    else:
        b = head.bias
    rows = torch.arange(len(y), device=y.device)
    others = F.one_hot(y, M.shape[1]) == 0
    return M[rows, y][:, None] - M, others, (b - b[y][:, None]) if bias else None


def _labels(capture: Capture, batch: Batch, name: str) -> Tensor:
    if batch.y is None:
        raise FoveateError(f"{name} needs labels, and the batch has none")
    if batch.y.ndim != 1:
        raise FoveateError(f"{name} needs one class per image, and the labels have shape {list(batch.y.shape)}")
    return batch.y.to(capture.logits.device)


def _mask(capture: Capture, batch: Batch, name: str, resize: Resize) -> Tensor:
    """The mask on the map's grid, ``[B,h,w]``; all ones where nothing of the object is left, as the code has it."""
    mask = regions(batch) if name == "ablated_cross_entropy" else batch.mask
    if mask is None:
        boxes = "; a box is not enough for it" if batch.boxes is not None else ""
        raise FoveateError(f"{name} needs masks of the objects, and the data has none{boxes}: 'cam_loss' needs none")
    return grid_mask(mask.to(capture.logits.device), capture.activations(), resize, empty=1.0)


def _many_hot(capture: Capture, batch: Batch) -> Tensor | None:
    """Labels ``[B,C]`` of a multi-label head; None for other heads."""
    if capture.head != "multilabel":
        return None
    if batch.y is None or batch.y.shape != capture.logits.shape:
        given = None if batch.y is None else list(batch.y.shape)
        raise FoveateError(f"a multi-label head of {capture.logits.shape[1]} classes needs labels [B,C], and they are {given}")
    return batch.y.to(capture.logits.device)


@loss("contrastive", title="Contrastive cross-entropy", paper=PAPER, replaces=True, needs=("linear_head",))
def contrastive_of(capture: Capture, batch: Batch, *, bias: bool = True) -> Tensor:
    """:func:`contrastive` on the maps of the layer, ``[B]``: cross-entropy itself, or that without the head's bias.

    Raises:
        FoveateError: the head is not linear in the layer; labels are missing.
    """
    if (many := _many_hot(capture, batch)) is not None:
        head = required_head(capture, "contrastive")
        return contrastive_binary(head.maps(capture.activations()), many, head.bias if bias else None)
    K, _, b = _maps(capture, batch, "contrastive", bias)
    return contrastive(K, b)


@loss(
    "ablated_cross_entropy",
    title="Ablated cross-entropy (ACE)",
    paper=PAPER,
    replaces=True,
    needs=("linear_head", "region"),
    aliases=("ace", "core_focused_cross_entropy"),
)
def ablated_cross_entropy_of(
    capture: Capture, batch: Batch, *, bias: bool = True, background: float = 1.0, resize: Resize = "nearest"
) -> Tensor:
    """:func:`ablated_cross_entropy` on the maps of the layer, ``[B]``; instead of cross-entropy, not beside it.

    Args:
        resize: of the mask to the map's grid: the nearest pixel, as the code has it, or the share of each cell. Boxes
            serve where there are no masks.

    Raises:
        FoveateError: the head is not linear in the layer; labels, or masks and boxes, are missing.
    """
    name = "ablated_cross_entropy"
    if (many := _many_hot(capture, batch)) is not None:
        head = required_head(capture, name)
        b = head.bias if bias else None
        return ablated_binary_cross_entropy(
            head.maps(capture.activations()), many, _mask(capture, batch, name, resize), b, background
        )
    K, _, b = _maps(capture, batch, name, bias)
    return ablated_cross_entropy(K, _mask(capture, batch, name, resize), b, background)


@loss("divergence", title="Divergence from the mask", paper=PAPER, needs=("linear_head", "mask"))
def divergence_of(
    capture: Capture,
    batch: Batch,
    *,
    mask_sharpness: float = 50.0,
    map_sharpness: float = 1.0,
    background: float = 0.0,
    foreground: float = 0.0,
    resize: Resize = "nearest",
) -> Tensor:
    """:func:`divergence` of the contrastive maps from the mask, ``[B]``; added to ACE with a small weight.

    Raises:
        FoveateError: the head is not linear in the layer; labels or masks are missing.
    """
    K, others, _ = _maps(capture, batch, "divergence", False)
    mask = _mask(capture, batch, "divergence", resize)
    sharpness = {"mask_sharpness": mask_sharpness, "map_sharpness": map_sharpness}
    return divergence(K, mask, others, **sharpness, background=background, foreground=foreground)


@loss("sliced_wasserstein", title="Sliced Wasserstein to the mask", paper=PAPER, needs=("linear_head", "mask"))
def sliced_wasserstein_of(
    capture: Capture,
    batch: Batch,
    *,
    confidence: float = 0.95,
    directions: int = 32,
    tag: float = 10.0,
    resize: Resize = "nearest",
) -> Tensor:
    """:func:`sliced_wasserstein` of the contrastive maps to the mask, ``[B]``; added to ACE.

    Raises:
        FoveateError: the head is not linear in the layer; labels or masks are missing; no probability, no direction.
    """
    if not 0 < confidence < 1:
        raise FoveateError(f"confidence {confidence} is not a probability between 0 and 1")
    if directions < 1:
        raise FoveateError(f"directions {directions} is not a number of directions: use 1 or more")
    K, others, _ = _maps(capture, batch, "sliced_wasserstein", False)
    mask = _mask(capture, batch, "sliced_wasserstein", resize)
    return sliced_wasserstein(K, mask, others, confidence=confidence, directions=directions, tag=tag)
