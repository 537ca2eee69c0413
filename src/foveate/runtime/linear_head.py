"""Linear heads: average pooling or flattening and one linear layer, where maps of all classes have a closed form."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CHECKED = 64  # classes


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class LinearHead:
    """A head that is linear in the features: global average pooling or flattening, then one linear layer.

    Attributes:
        matrix: of the linear layer, ``[C,K]`` after average pooling, ``[C,K h w]`` after flattening.
        bias: ``[C]``.
        size: ``h, w`` of the features.
        pooled: whether it is average pooling.
    """

    matrix: Tensor
    bias: Tensor
    size: tuple[int, int]
    pooled: bool

    @property
    def weight(self) -> Tensor:
        """``[C,K,1,1]`` or ``[C,K,h,w]``: ``logits = sum_kij weight * A + bias``."""
        return self._spread(self.matrix)

    def gradient(self, by_logits: Tensor) -> Tensor:
        """``sum_c d score / d logit_c  weight_c``, ``[B,K,1,1]`` or ``[B,K,h,w]``, from ``[B,C]``."""
        return self._spread(by_logits @ self.matrix)

    def maps(self, activations: Tensor) -> Tensor:
        """HiResCAM of every class at once, ``M [B,C,h,w]``: ``M_c = sum_k weight_ck * A_k``; sums to logit - bias."""
        if self.pooled:
            return torch.einsum("ck,bkhw->bchw", self.weight[:, :, 0, 0], activations)
        return torch.einsum("ckhw,bkhw->bchw", self.weight, activations)

    def of(self, classes: list[int]) -> LinearHead:
        """The head of these classes alone, in this order."""
        return replace(self, matrix=self.matrix[classes], bias=self.bias[classes])

    def _spread(self, rows: Tensor) -> Tensor:
        height, width = self.size
        return rows[:, :, None, None] / (height * width) if self.pooled else rows.reshape(len(rows), -1, height, width)


# What may stand between features and logits: pooling or reshaping, and one matrix product. A factor, an activation, a
# norm, a second product: all of them have other names, and then there is no closed form.
_STEPS = (
    *("Addmm", "Mm", "T", "Mean", "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D", "AvgPool2D", "View", "UnsafeView"),
    *(
        "ReshapeAlias",
        "_ReshapeAlias",
        "Squeeze",
        "Unsqueeze",
        "Clone",
        "ToCopy",
        "Permute",
        "Transpose",
        "Slice",
        "Alias",
        "AsStrided",
    ),
)


def is_linear(logits: Tensor, raw: Tensor) -> bool:
    """Whether the graph from a feature ``raw`` to ``logits`` has pooling, reshaping and one matrix product in it, no more."""
    start, end = logits.grad_fn, raw.grad_fn if raw.grad_fn is not None else raw
    if start is None:
        return False
    products, seen, waiting = 0, set(), [start]
    while waiting:
        node = waiting.pop()
        if node in seen or node is end or getattr(node, "variable", None) is not None:
            continue
        seen.add(node)
        name = re.sub(r"Backward\d*$", "", type(node).__name__)
        if name not in _STEPS:
            return False
        products += name in ("Addmm", "Mm")
        waiting += [source for source, _ in node.next_functions if source is not None]
    return products == 1


def recognise(
    activations: Tensor, raw: Tensor, weight: Tensor, bias: Tensor | None, features: Tensor, logits: Tensor
) -> LinearHead | None:
    """The head between ``activations [B,K,h,w]`` and ``logits [B,C]``; None where it is not linear.

    It is known by the graph between them, which holds nothing but pooling, reshaping and one matrix product, and by
    what it computed in this run: ``features [B,F]``, read by the last linear layer, are the pooled or the flattened
    activations, and the logits of some classes, :data:`CHECKED` at least where there are so many, are their product with
    its weights, image by image. The graph has no step that could do one thing to some classes and another to others.
    """
    if not is_linear(logits, raw) or weight.shape[0] != logits.shape[1]:
        return None
    height, width = activations.shape[2:]
    tolerance = 1e-4 if min(t.element_size() for t in (features, raw, logits)) >= 4 else 3e-2

    def made(rebuilt: Tensor, given: Tensor, scale: Tensor | None = None) -> bool:
        if rebuilt.shape != given.shape:
            return False
        error = (rebuilt - given.to(rebuilt.dtype)).abs().flatten(1).amax(1)
        return bool((error <= tolerance * (rebuilt.abs() if scale is None else scale).flatten(1).amax(1)).all())

    with torch.no_grad():
        pooled = made(activations.mean((2, 3)), features)
        if not pooled and not made(activations.flatten(1), features):
            return None
        some = slice(None, None, max(1, len(weight) // CHECKED))
        w, b = weight[some], None if bias is None else bias[some]
        linear = F.linear(features.to(w.dtype), w, b)
        # Rounding is in proportion to the terms of a logit and not to their sum, which may be near 0.
        terms = F.linear(features.abs().to(w.dtype), w.abs(), None if b is None else b.abs())
        if not made(linear, logits[:, some], terms):
            return None
    matrix = at_least_float32(weight)
    bias = matrix.new_zeros(len(matrix)) if bias is None else at_least_float32(bias)
    return LinearHead(matrix, bias, (height, width), pooled)


def recognise_any(
    activations: Tensor, raw: Tensor, linears: list[tuple[Tensor, Tensor | None, Tensor]], logits: Tensor
) -> LinearHead | None:
    """The last of the linear layers ``(weight, bias, features)`` of a run that is the head after a layer; None for none."""
    for weight, bias, features in reversed(linears):
        head = recognise(activations, raw, weight, bias, features, logits)
        if head is not None:
            return head
    return None
