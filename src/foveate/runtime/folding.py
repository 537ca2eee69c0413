"""Folding: convolutions that do the work of the batch norms after them, for changed images that run by the hundred."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from foveate.runtime.model import Place, hooked, modules_of, read_logits, swapped

Pairs = list[tuple[nn.Conv2d, nn.BatchNorm2d]]
TOLERANCE = 1e-4  # of the largest logit, a hundred times what rounding does in float32


def folded(model: nn.Module, x: Tensor) -> tuple[list[Place], int]:
    """What to put into a model (:func:`foveate.runtime.model.swapped`) so that many images run faster, and the passes of ``x``.

    ``W' = W g / sqrt(v + e)`` and ``b' = (b - m) g / sqrt(v + e) + beta``, while the batch norm itself hands on what it
    gets. Pairs are seen in a run: a batch norm that reads what a convolution has just returned. That nothing else reads it
    is seen by running the same image folded: where the logits differ by more than rounding, nothing is folded. Nothing of
    this is kept: weights change, and what was 0 when it was tried need not stay so.

    Args:
        x: an image to try it on, ``[1,3,H,W]``, in the model's precision.
    """
    norms = [module for module in modules_of(model) if type(module) is nn.BatchNorm2d and not module.training]
    if not norms:
        return [], 0
    with torch.no_grad(), suppress(RuntimeError):  # a model that cannot run says so where it is run in earnest
        pairs, plain = _seen(model, x, norms)
        places = _without_norms(pairs)
        with swapped(places):
            error = (read_logits(model(x)) - plain).abs().max()
        return places if error <= TOLERANCE * plain.abs().max() else [], 2
    return [], 2


def _seen(model: nn.Module, x: Tensor, norms: list[nn.BatchNorm2d]) -> tuple[Pairs, Tensor]:
    """Each batch norm with the convolution whose output it reads, both of which run once; and the logits."""
    made: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}  # the output is held, so that no other takes its id
    found: Pairs = []
    runs: dict[nn.Module, int] = {}

    def after_convolution(module: nn.Conv2d, inputs: Any, output: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        made[id(output)] = module, output, output._version

    def after_norm(module: nn.BatchNorm2d, inputs: Any, output: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        conv, given, version = made.get(id(inputs[0]), (None, None, 0)) if inputs else (None, None, 0)
        if conv is not None and given is not None and given._version == version:  # no in-place ReLU in between
            found.append((conv, module))

    hooks: list[tuple[nn.Module, Callable[..., None]]] = [(n, after_norm) for n in norms if n.running_mean is not None]
    hooks += [(m, after_convolution) for m in modules_of(model) if type(m) is nn.Conv2d and "weight" in m._parameters]
    with hooked(model, hooks):
        logits = read_logits(model(x))
    return [(conv, norm) for conv, norm in found if runs[conv] == runs[norm] == 1], logits


def _without_norms(pairs: Pairs) -> list[Place]:
    places: list[Place] = []
    for conv, norm in pairs:
        with torch.no_grad(), torch.inference_mode(False):
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None and variance is not None  # _seen takes no others
            scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
            shift = (0 if conv.bias is None else conv.bias) - mean
            bias = shift * scale + (0 if norm.bias is None else norm.bias)
            weight = conv.weight * scale[:, None, None, None]
        own = conv._parameters
        places += [(own, "weight", weight.to(conv.weight.dtype)), (own, "bias", bias.to(conv.weight.dtype))]
        places.append((norm.__dict__, "forward", _hand_on))
    return places


def _hand_on(input: Tensor) -> Tensor:
    return input
