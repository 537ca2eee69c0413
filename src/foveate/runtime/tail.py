"""Tail: what comes after a captured layer as a function of its grid; the whole model with the layer replaced at worst."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from torch import Tensor
from torch.nn import Module

from foveate.errors import SlowPathWarning
from foveate.runtime import layers as L
from foveate.runtime.cut import make_tail
from foveate.runtime.feature import Feature
from foveate.runtime.linear_head import at_least_float32
from foveate.runtime.model import eager, hooked, modules_of, read_logits
from foveate.runtime.runner import Runner


@dataclass(frozen=True)
class Tail:
    """The rest of a model after a layer.

    Attributes:
        run: ``(A [N,K,h,w], rows [N]) -> logits [N,C]``; ``rows`` says which image of the batch each belongs to.
        cut: whether the rest could be cut off; otherwise the whole model runs each time.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    cut: bool


def tail_after(run: Runner, feature: Feature, x: Tensor, logits: Tensor) -> Tail:
    """The tail of a model after a captured layer of images ``x``, for which it gave ``logits``."""

    def replaced(native: Tensor, rows: Tensor) -> Tensor:
        if feature.module is None:
            return read_logits(run.detached(native))
        calls = count()

        def swap(module: Module, inputs: object, output: object) -> object:
            return L.with_first(output, native.clone()) if next(calls) == feature.number else output

        with hooked(run.model, [(feature.module, swap)]), eager(modules_of(run.model)):
            return read_logits(run.detached(x[rows]))

    raw, layout = feature.raw.detach(), feature.layout
    with run.as_caller():
        cut = make_tail(run.model, feature.name, raw, x, logits)
    if cut is None and feature.module is not None:
        warnings.warn(
            f"what comes after layer {feature.name!r} could not be cut off: the whole model runs each time",
            SlowPathWarning,
            stacklevel=4,
        )
    last = cut or replaced

    def rest(activations: Tensor, rows: Tensor) -> Tensor:
        native = L.from_grid(activations.to(raw.dtype), raw[rows], layout)
        with run.lock, run.as_caller():
            return at_least_float32(last(native, rows))

    return Tail(rest, cut is not None)
