"""Attention written out: its weights, and the same result by two matrix products where that is faster than torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WEIGHTS = 2**25  # that one call may write out: torch's own never holds them all


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: Any,
) -> Tensor:
    """``softmax(q k^T / sqrt(d))``, ``[..., tokens, tokens]``: called as ``scaled_dot_product_attention`` is.

    The scale is put on the queries, which are fewer numbers than the products.
    """
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1)


class WrittenAttention(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` of 16-bit numbers on a CPU is two matrix products and a softmax.

    torch's own there is not made for 16 bits: of a ViT-Tiny's block it takes twice the time forward, and four times
    forward and backward, at the same distance from fp32. Masked, causal, grouped or dropped attention stays torch's,
    one of very many tokens, and what ``nn.MultiheadAttention`` calls within.

    Attributes:
        seen: whether anything attended at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen = True
            if len(args) == 3 and not any(kwargs.get(name) for name in ("is_causal", "enable_gqa", "dropout_p")):
                query, key, value = args
                if kwargs.get("attn_mask") is None and _faster_written(query, key):
                    return attention_weights(query, key, scale=kwargs.get("scale")) @ value
        return func(*args, **kwargs)


def _faster_written(query: Tensor, key: Tensor) -> bool:
    if query.device.type != "cpu" or query.shape[:-1].numel() * key.shape[-2] > WEIGHTS:
        return False
    return query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
