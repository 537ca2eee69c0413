"""Linear heads: average pooling or flattening and one linear layer, where maps of all classes have a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class LinearHead:
    """A head that is linear in the features: global average pooling or flattening, then one linear layer.

    Attributes:
        weight: ``[C,K,1,1]`` behind average pooling (already divided by ``h w``), ``[C,K,h,w]`` behind flattening:
            ``logits = sum_kij weight * A + bias``.
        bias: ``[C]``.
        pooled: whether it is average pooling.
    """

    weight: Tensor
    bias: Tensor
    pooled: bool

    def maps(self, activations: Tensor) -> Tensor:
        """HiResCAM of every class at once, ``M [B,C,h,w]``: ``M_c = sum_k weight_ck * A_k``; sums to logit - bias."""
        if self.pooled:
            return torch.einsum("ck,bkhw->bchw", self.weight[:, :, 0, 0], activations)
        return torch.einsum("ckhw,bkhw->bchw", self.weight, activations)


def recognise(activations: Tensor, weight: Tensor, bias: Tensor | None, features: Tensor) -> LinearHead | None:
    """The head between ``activations [B,K,h,w]`` and a linear layer that read ``features [B,F]``; None for another one.

    It is known by what it computed in this run: ``features`` are the pooled or the flattened activations, to 1e-5.
    """
    count, (height, width) = activations.shape[1], activations.shape[2:]
    tolerance = 1e-5 if features.dtype in (torch.float32, torch.float64) else 2e-2

    def made(rebuilt: Tensor) -> bool:
        if rebuilt.shape != features.shape:
            return False
        return bool((rebuilt - features.to(rebuilt.dtype)).abs().amax() <= tolerance * rebuilt.abs().amax())

    with torch.no_grad():
        pooled, flattened = made(activations.mean((2, 3))), made(activations.flatten(1))
    if not (pooled or flattened):
        return None
    weight = at_least_float32(weight)
    bias = weight.new_zeros(len(weight)) if bias is None else at_least_float32(bias)
    if pooled:
        return LinearHead(weight[:, :, None, None] / (height * width), bias, True)
    return LinearHead(weight.reshape(-1, count, height, width), bias, False)
