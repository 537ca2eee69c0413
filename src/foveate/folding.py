"""Folding: convolutions that do the work of the batch norms behind them, for changed images that run by the hundred."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from foveate.classifier import Place, hooked, modules_of, read_logits, swapped
from foveate.memo import Memo

Pairs = list[tuple[nn.Conv2d, nn.BatchNorm2d]]
TOLERANCE = 1e-4  # of the largest logit, a hundred times what rounding does in float32
_pairs = Memo()


def folded(model: nn.Module, x: Tensor, half: bool) -> tuple[list[Place], int]:
    """What to put into a model (:func:`foveate.classifier.swapped`) so that many images run faster, and how often it ran.

    ``W' = W g / sqrt(v + e)`` and ``b' = (b - m) g / sqrt(v + e) + beta``, while the batch norm itself hands on what it
    gets. Pairs are seen in a run: a batch norm that reads what a convolution has just returned. That nothing else reads it
    is seen by running the same image folded: where the logits differ by more than rounding, nothing is folded. Both runs
    are made once a model; its weights are read anew each time.

    Args:
        x: an image to try it on, ``[1,3,H,W]``.
        half: weights in bf16, so that autocast has nothing left to do at each chunk.
    """
    known, runs = _pairs.of(model), 0
    if "pairs" not in known:
        known["pairs"] = []
        norms = [module for module in modules_of(model) if type(module) is nn.BatchNorm2d and not module.training]
        if norms:
            with torch.no_grad(), suppress(RuntimeError):  # a model that cannot run says so where it is run in earnest
                pairs, plain = _seen(model, x, norms)
                with swapped(_without_norms(pairs)):
                    error = (read_logits(model(x)) - plain).abs().max()
                known["pairs"] = pairs if error <= TOLERANCE * plain.abs().max() else []
                runs = 2
    places = _without_norms(known["pairs"])
    return (_in_bf16(model, places) if half else places), runs


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
        conv, given, version = made.get(id(inputs[0]), (None, None, 0))
        if conv is not None and given is not None and given._version == version:  # no in-place ReLU in between
            found.append((conv, module))

    with ExitStack() as stack:
        for norm in norms:
            if norm.running_mean is not None:
                stack.enter_context(hooked(norm, after_norm))
        for module in modules_of(model):
            if type(module) is nn.Conv2d and "weight" in module._parameters:
                stack.enter_context(hooked(module, after_convolution))
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


def _hand_on(x: Tensor) -> Tensor:
    return x


def _in_bf16(model: nn.Module, places: list[Place]) -> list[Place]:
    """The same in bf16, with the weights of the other convolutions and linear layers, which autocast would cast each time."""
    taken = {(id(own), name) for own, name, _ in places}
    others: list[Place] = []
    for module in modules_of(model):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for name, tensor in module._parameters.items():
                if tensor is not None and (id(module._parameters), name) not in taken:
                    others.append((module._parameters, name, tensor.detach()))
    return [(own, name, value.bfloat16() if isinstance(value, Tensor) else value) for own, name, value in places + others]
