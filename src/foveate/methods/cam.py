"""The CAM family: maps ``S = sum_k w_k A_k`` of the features and gradients of one layer, from one run of the model.

A variant is the function ``(A, G) -> w`` of its paper, with ``A`` the features and ``G = d score / d A``, both
``[B,K,h,w]``, and ``w`` of shape ``[B,K,1,1]`` (one weight per channel) or ``[B,K,h,w]`` (one per position). Maps are raw:
the ReLU of the papers' ``h`` is applied by :func:`foveate.maps.prepare`, so that evidence against a class is not lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.targets import Target

Weighting = Callable[[Tensor, Tensor], Tensor]
MapFunction = Callable[[Capture, str | None, Target], Tensor]
EPSILON = 1e-6


def weighted(weights: Weighting) -> MapFunction:
    """The method ``S = sum_k w_k A_k`` of a weight function ``(A, G) -> w``, which stays in reach as ``.weights``."""

    @wraps(weights)
    def saliency(capture: Capture, layer: str | None, target: Target) -> Tensor:
        activations = capture.activations(layer)
        return (weights(activations, capture.grad(layer, target)) * activations).sum(1)  # [B,h,w]

    saliency.weights = weights  # type: ignore[attr-defined]
    del saliency.__wrapped__  # its signature is the method's, not the weights'
    return saliency


def completeness(capture: Capture, layer: str | None, target: Target, saliency: Tensor, **settings: object) -> Tensor | None:
    """How far a map and the bias miss the score, ``|sum_ij S + b - s| / |s|``, ``[B]``; None where nothing is promised.

    The promise holds where the head is linear in the layer and the score is a logit or a difference of logits. Values
    are relative to the magnitude of the score.
    """
    head = capture.linear_head(layer)
    if head is None or target.name not in ("logit", "contrast"):
        return None
    with torch.no_grad():
        bias = target(head.bias.expand(len(saliency), -1))
        score = target(capture.logits)
        return (saliency.sum((1, 2)) + bias - score).abs() / score.abs().clamp(min=1e-6)


@method(
    "grad_cam",
    title="Grad-CAM",
    paper="Selvaraju et al., ICCV 2017, eq. 1 and 2",
    signed=True,
    differentiable=True,
    needs=("gradient",),
)
@weighted
def grad_cam(A: Tensor, G: Tensor) -> Tensor:
    """``w_k = mean_ij G_kij``, on the logit: a probability's gradient mixes classes and vanishes when it is sure."""
    return G.mean((2, 3), keepdim=True)  # [B,K,1,1]


@method(
    "grad_cam_pp",
    title="Grad-CAM++",
    paper="Chattopadhay et al., WACV 2018, eq. 19, closed form for an exponential score",
    signed=True,
    differentiable=True,
    needs=("gradient",),
    aliases=("gradcam++",),
)
@weighted
def grad_cam_pp(A: Tensor, G: Tensor) -> Tensor:
    """``w_k = sum_ij alpha_kij relu(G_kij)``, ``alpha = G^2 / (2 G^2 + sum_ab A_kab G^3)``.

    Deviations: the factor ``exp(y_c)`` of the paper's score is dropped, a positive constant that scaling removes; alpha
    is computed where ``G > 0`` only, as ``1 / (2 + G sum A)``, which is the same number without the underflow of ``G^2``;
    where ``2 + G sum A <= 0`` (signed features) alpha has no meaning and is 0.
    """
    positive = G.clamp(min=0)
    denominator = 2 + positive * A.sum((2, 3), keepdim=True)
    usable = (G > 0) & (denominator > EPSILON)
    alpha = torch.where(usable, 1 / torch.where(usable, denominator, torch.ones_like(denominator)), torch.zeros_like(G))
    return (alpha * positive).sum((2, 3), keepdim=True)  # [B,K,1,1]


@method(
    "xgrad_cam",
    title="XGrad-CAM",
    paper="Fu et al., BMVC 2020, eq. 8",
    signed=True,
    differentiable=True,
    needs=("gradient",),
    aliases=("axiom_cam",),
)
@weighted
def xgrad_cam(A: Tensor, G: Tensor) -> Tensor:
    """``w_k = sum_ij G_kij A_kij / sum_ij A_kij``; 0 for a channel whose features add up to 0.

    Deviation: no epsilon is added to the sum, which would bias channels of small activation; a sum below 1e-6 of the
    channel's absolute sum (signed features that cancel) counts as 0 instead.
    """
    total, magnitude = A.sum((2, 3), keepdim=True), A.abs().sum((2, 3), keepdim=True)
    usable = total.abs() > EPSILON * magnitude
    ratio = (G * A).sum((2, 3), keepdim=True) / torch.where(usable, total, torch.ones_like(total))
    return torch.where(usable, ratio, torch.zeros_like(ratio))  # [B,K,1,1]


@method(
    "layer_cam",
    title="Layer-CAM",
    paper="Jiang et al., TIP 2021, eq. 5 and 6",
    signed=True,
    differentiable=True,
    needs=("gradient",),
)
@weighted
def layer_cam(A: Tensor, G: Tensor) -> Tensor:
    """``w_kij = relu(G_kij)``: a weight for each position. Behind a max-pool the gradient is sparse: look before it."""
    return G.clamp(min=0)  # [B,K,h,w]


@method(
    "hires_cam",
    title="HiResCAM",
    paper="Draelos and Carin, 2020",
    signed=True,
    differentiable=True,
    complete=completeness,
    needs=("gradient",),
)
@weighted
def hires_cam(A: Tensor, G: Tensor) -> Tensor:
    """``w_kij = G_kij``: with a linear head the map and the bias add up to the logit exactly."""
    return G  # [B,K,h,w]


@method(
    "cam",
    title="CAM",
    paper="Zhou et al., CVPR 2016, eq. 2",
    signed=True,
    differentiable=True,
    needs=("linear_head",),
)
def cam(capture: Capture, layer: str | None, target: Target) -> Tensor:
    """``S = sum_k W_ck A_k`` with the weights of the classifier; its mean and the bias add up to the logit.

    For other scores than a logit, ``W_c`` becomes ``sum_c (d score / d y_c) W_c``: for a contrast ``W_c - W_c'``.

    Raises:
        FoveateError: the head is not global average pooling and one linear layer.
    """
    head = capture.linear_head(layer)
    if head is None or not head.pooled:
        raise FoveateError(
            f"cam needs a head of global average pooling and one linear layer after layer {layer or capture.layer!r}, "
            "and this model has another: use 'grad_cam' or 'hires_cam', which are the same there and defined everywhere"
        )
    activations = capture.activations(layer)
    cells = activations.shape[2] * activations.shape[3]
    return (capture.grad(layer, target).mean((2, 3), keepdim=True) * activations).sum(1) * cells


@method(
    "contrastive_cam",
    title="ContrastiveCAM",
    paper="Setpal, Crossing Cross-Entropy, 2024, eq. 4",
    signed=True,
    differentiable=True,
    complete=completeness,
    contrasts=True,
    needs=("gradient",),
)
def contrastive_cam(capture: Capture, layer: str | None, target: Target, *, against: object = None) -> Tensor:
    """``K_tc = M_t - M_c`` with HiResCAMs ``M``: where the evidence for t over c lies. Positive speaks for t.

    With a linear head its sum is ``(y_t - b_t) - (y_c - b_c)``. A target that is a contrast already is taken as it is;
    otherwise the other class is ``against``.

    Args:
        against: the other class, in the forms of :func:`foveate.targets.classes`; None for the strongest class other
            than the target.

    Raises:
        FoveateError: the score is not a logit.
    """
    return hires_cam(capture, layer, contrast_of(capture, target, against))


def contrast_of(capture: Capture, target: Target, against: object = None) -> Target:
    """The target's contrast with another class; the strongest class other than the target where ``against`` is None.

    A contrast stays as it is, and so does the logit of a binary head, which is the log-odds of its two classes.

    Raises:
        FoveateError: the score is not a logit.
    """
    if target.other is not None or (capture.head == "binary" and target.name == "logit"):
        return target
    if target.name != "logit":
        raise FoveateError(f"a contrast is a difference of logits, and the score asked for is {target.name!r}")
    return capture.target(target.y, against="strongest" if against is None else against)


def contrastive_maps(capture: Capture, layer: str | None, target: Target) -> Tensor:
    """All pairs at once: ``K [B,C,h,w]`` with ``K_c = M_t - M_c``; row t is 0. Differentiable when live.

    Closed form for average pooling or flattening and one linear layer; one backward pass per class elsewhere, after the
    layer only. With a bias-free linear head, ``cross-entropy = log sum_c exp(-sum_ij K_cij)``.
    """
    if capture.head == "binary":
        raise FoveateError("a model with one logit has one pair of classes: use 'hires_cam', which is its contrast")
    maps = capture.class_maps(layer)  # [B,C,h,w]
    own = maps.gather(1, target.y[:, None, None, None].expand(-1, 1, *maps.shape[2:]))  # [B,1,h,w]
    return own - maps
