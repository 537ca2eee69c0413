"""Maps from the first principal component of a layer's features: Eigen-CAM, Eigen-Grad-CAM."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.targets import Target


@method("eigen_cam", title="Eigen-CAM", paper="Muhammad and Yeasin, IJCNN 2020, eq. 2 and 3", signed=True)
def eigen_cam(capture: Capture, layer: str | None, target: Target, *, centred: bool = False) -> Tensor:
    """``S = A v``: features at each position on the first right singular vector of ``A [hw,K]``. It ignores the class.

    A singular vector has no sign of its own: it gets the one that makes the map agree with the mean feature map.

    Args:
        centred: take the mean of each channel away first, as pytorch-grad-cam does; the paper does not.
    """
    return first_component(capture.activations(layer).detach(), centred)


@method("eigen_grad_cam", title="Eigen-Grad-CAM", paper="pytorch-grad-cam, 2021", signed=True, needs=("gradient",))
def eigen_grad_cam(capture: Capture, layer: str | None, target: Target, *, centred: bool = False) -> Tensor:
    """``S = (A * G) v``: as Eigen-CAM, of features times gradients, so that the class has a say.

    Deviation: the sign makes the map agree with ``sum_k A_k G_k``, the evidence; pytorch-grad-cam leaves it to chance.
    """
    product = capture.activations(layer).detach() * capture.grad(layer, target).detach()
    return first_component(product, centred)


def first_component(features: Tensor, centred: bool = False) -> Tensor:
    """First principal component of ``[B,K,h,w]`` over positions, ``[B,h,w]``, with the sign of the channels' mean.

    By the eigenvectors of the smaller of the two Gram matrices, in float64.
    """
    count, channels, height, width = features.shape
    matrix = features.double().flatten(2).transpose(1, 2)  # [B,hw,K]
    if centred:
        matrix = matrix - matrix.mean(1, keepdim=True)
    if height * width <= channels:
        values, vectors = torch.linalg.eigh(matrix @ matrix.transpose(1, 2))
        projected = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()  # [B,hw]
    else:
        vectors = torch.linalg.eigh(matrix.transpose(1, 2) @ matrix).eigenvectors
        projected = torch.einsum("bnk,bk->bn", matrix, vectors[..., -1])
    sign = torch.sign((projected * matrix.mean(2)).sum(1, keepdim=True))
    projected = projected * torch.where(sign == 0, torch.ones_like(sign), sign)
    result: Tensor = projected.view(count, height, width).to(features.dtype)
    return result
