"""Attention rollout: how patches flow into the class token through all blocks of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foveate import layers as L
from foveate.capture import Capture
from foveate.errors import FoveateError
from foveate.registry import method
from foveate.targets import Target


@method("attention_rollout", title="Attention rollout", paper="Abnar and Zuidema, ACL 2020, section 3", needs=("attention",))
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
    blocks = attentions(capture)
    if not blocks:
        raise FoveateError(
            "attention_rollout needs blocks of attention between all tokens, and none of this model's is: convolutions, "
            "or attention in windows, as in Swin; use 'grad_cam', which works there"
        )
    tokens = blocks[0].shape[-1]
    layout = L.token_layout(tokens, capture.size, capture.model)
    if layout is None:
        raise FoveateError(f"{tokens} tokens do not tell their grid at the image size {capture.size[0]}x{capture.size[1]}")
    eye = torch.eye(tokens, device=blocks[0].device, dtype=blocks[0].dtype)
    rollout = eye.expand(len(blocks[0]), -1, -1)
    for weights in blocks:
        joined = weights.mean(1) if heads == "mean" else weights.amax(1) if heads == "max" else weights.amin(1)
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


def attentions(capture: Capture) -> list[Tensor]:
    """The attention of each block on this batch, ``[B,heads,N,N]``, rows adding up to 1: one forward pass.

    Seen where it is computed: softmax, scaled dot-product attention and ``nn.MultiheadAttention``, fused or not.
    """
    seen = _Attention(len(capture.x))
    with torch.no_grad(), seen:
        capture.differentiable(capture.images)
    sizes = [weights.shape[-1] for weights in seen.blocks]
    return [weights for weights in seen.blocks if weights.shape[-1] == max(sizes)]


class _Attention(TorchFunctionMode):
    """Keeps every square matrix of attention that the model computes for the batch."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.blocks: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(_weights_of(*args, **kwargs))
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
        square = weights.ndim == 4 and weights.shape[-1] == weights.shape[-2] and weights.shape[-1] > 1
        if square and len(weights) == self.count:
            self.blocks.append(weights.detach().float() if weights.element_size() < 4 else weights.detach())


def _weights_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: Any,
) -> Tensor:
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query @ key.transpose(-2, -1)) * factor
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1)
