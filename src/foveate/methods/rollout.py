"""Attention rollout: how patches flow into the class token through all blocks of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foveate.errors import FoveateError
from foveate.registry import method
from foveate.runtime import layers as L
from foveate.runtime.attention import attention_weights
from foveate.runtime.capture import Capture
from foveate.targets import Target


@method(
    "attention_rollout",
    title="Attention rollout",
    whole=True,
    paper="Abnar and Zuidema, ACL 2020, section 3",
    needs=("attention",),
)
def attention_rollout(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    heads: Literal["mean", "max", "min"] = "mean",
    discard: float = 0.0,
) -> Tensor:
    """``R = prod_l (I + A_l) / 2``, the class token's row over the patches, ``[B,h,w]``; it ignores the class.

    ``A_l`` is the attention of block l over its heads, rows made to add up to 1. Without a class token it is the mean
    over all rows.

    Args:
        heads: how heads become one; the paper takes the mean.
        discard: share of the lowest weights of each block set to 0, the class token's own column left; 0 in the paper.

    Raises:
        FoveateError: no attention between all tokens was seen: a convolutional network, or windows (Swin).
    """
    if heads not in ("mean", "max", "min") or not 0 <= discard < 1:
        raise FoveateError(f"heads {heads!r} must be 'mean', 'max' or 'min', and discard {discard} in [0, 1)")
    x = capture.images
    return torch.cat([_rollout(capture, part, heads, discard) for part in x.split(capture.chunk_size())])


def _rollout(capture: Capture, x: Tensor, heads: str, discard: float) -> Tensor:
    blocks = attentions(capture, x, heads)
    tokens = blocks[0].shape[-1]
    layout = L.token_layout(tokens, capture.size, capture.model)
    if layout is None:
        raise FoveateError(f"{tokens} tokens do not tell their grid at the image size {capture.size[0]}x{capture.size[1]}")
    eye = torch.eye(tokens, device=blocks[0].device, dtype=blocks[0].dtype)
    rollout = eye.expand(len(x), -1, -1)
    for joined in blocks:
        if discard:
            joined = _without_lowest(joined, discard, layout.prefix)
        step = joined + eye
        rollout = (step / step.sum(-1, keepdim=True)) @ rollout
    row = rollout[:, 0, layout.prefix :] if layout.prefix else rollout.mean(1)
    return row.reshape(len(row), layout.height, layout.width)


def _without_lowest(weights: Tensor, share: float, prefix: int) -> Tensor:
    flat = weights.flatten(1)
    lowest = flat.argsort(1)[:, : int(share * flat.shape[1])]
    kept = flat.scatter(1, lowest, 0).view_as(weights)
    return torch.cat([weights[..., :prefix], kept[..., prefix:]], -1)


def attentions(capture: Capture, x: Tensor, heads: str = "mean") -> list[Tensor]:
    """The attention of each block, its heads made one, ``[B,N,N]``, rows adding up to 1: one forward pass.

    Seen where it is computed: softmax, scaled dot-product attention and ``nn.MultiheadAttention``, fused or not.

    Raises:
        FoveateError: there is none between all tokens, or also some of another kind: in windows, or to fewer keys.
    """
    seen = _Attention(len(x), heads)
    with seen:
        capture.differentiable(x)
    sizes = {weights.shape[-1] for weights in seen.blocks}
    if not seen.blocks or seen.others or len(sizes) > 1:
        found = "none of this model's is" if not seen.blocks else "some of this model's are not"
        raise FoveateError(
            f"attention_rollout needs blocks of attention between all tokens, and {found}: convolutions, attention in windows "
            "(Swin) or to fewer keys (PVT) have no rollout; use 'grad_cam', which works there"
        )
    return seen.blocks


class _Attention(TorchFunctionMode):
    """Keeps every square matrix of attention that the model computes for the batch, and counts what else it attends to."""

    def __init__(self, count: int, heads: str) -> None:
        super().__init__()
        self.count = count
        self.heads = heads
        self.others = 0
        self.blocks: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(attention_weights(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            output, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            self._keep(weights)
            return output, weights
        result = func(*args, **kwargs)
        if func in (torch.softmax, torch.Tensor.softmax, F.softmax) and isinstance(result, Tensor):
            self._keep(result)
        return result

    def _keep(self, weights: Tensor) -> None:
        if weights.ndim == 3 and len(weights) == self.count:
            weights = weights[:, None]
        if weights.ndim not in (3, 4) or weights.shape[-1] == 1:
            return  # a softmax over something else
        if weights.ndim == 3 or weights.shape[-1] != weights.shape[-2] or len(weights) != self.count:
            self.others += 1
            return
        weights = weights.detach().float() if weights.element_size() < 4 else weights.detach()
        joined = weights.mean(1) if self.heads == "mean" else weights.amax(1) if self.heads == "max" else weights.amin(1)
        self.blocks.append(joined)
