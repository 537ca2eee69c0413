"""Feature: one captured layer, how its output lies in memory, and the gradients known at it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from foveate.errors import LayerError
from foveate.runtime import layers as L
from foveate.runtime.linear_head import at_least_float32
from foveate.targets import Target


@dataclass
class Passes:
    """Images that went through the model: forward, backward, and through the tail after a layer only.

    ``spoilt`` is how many changed images it gave NaN or infinity on.
    """

    forward: int = 0
    backward: int = 0
    tail: int = 0
    spoilt: int = 0

    def add(self, other: Passes) -> None:
        """Count what another run did."""
        self.forward += other.forward
        self.backward += other.backward
        self.tail += other.tail
        self.spoilt += other.spoilt


@dataclass
class Feature:
    """One captured layer: its module, its raw output as a node of the graph, how it lies, what each of its calls gave."""

    name: str
    module: nn.Module | None
    kept: Tensor | None = None
    read_as: L.Layout | None = None
    calls: list[Tensor] = field(default_factory=list)
    number: int = -1  # of the call that is kept
    gradients: dict[Target, Tensor] = field(default_factory=dict)

    @property
    def raw(self) -> Tensor:
        if self.kept is None:
            raise LayerError(f"layer {self.name!r} did not run for this input")
        return self.kept

    @property
    def layout(self) -> L.Layout:
        if self.read_as is None:
            raise LayerError(f"layer {self.name!r} has no spatial grid")
        return self.read_as

    def grid(self, tensor: Tensor) -> Tensor:
        """A tensor that lies like the layer's output as ``[B,K,h,w]``, float32 or better."""
        return at_least_float32(L.to_grid(tensor, self.layout))

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """A forward hook: what the layer returned is kept, and where no graph has reached it one begins."""
        raw = L.first_tensor(output)
        if raw is None:
            raise LayerError(f"layer {self.name!r} returns a {type(output).__name__}, not a tensor")
        if not raw.requires_grad:
            raw = raw.detach().requires_grad_(True)  # nothing before it is differentiated
        self.kept = raw
        self.calls.append(raw)
        return L.with_first(output, raw.clone())  # an in-place ReLU after the layer must not overwrite it

    def settle(
        self,
        x: Tensor,
        layout: L.Layout | None,
        model: nn.Module,
        looked_at: Callable[[], L.Call | None],
        advice: Callable[[], str],
    ) -> None:
        """Check that the layer ran for all images, take the call that saw them, and settle how its output is a grid.

        Args:
            layout: how to read it, where the automatic reading does not fit.
            looked_at: which call depends on the image; None where none does.
            advice: what works instead, as a sentence; asked only where this layer does not.

        Raises:
            LayerError: it did not run, does not depend on the image, ran for other images, or has no grid.
        """
        if self.module is None:
            return
        if self.kept is None:
            raise LayerError(f"layer {self.name!r} did not run for this input: {advice()}")
        run = looked_at()
        if run is None:
            raise LayerError(f"layer {self.name!r} does not depend on the image, but on something the model holds: {advice()}")
        last = len(self.calls) - 1
        self.number = run.number if 0 <= run.number <= last else last
        self.kept = self.calls[self.number]
        self.calls.clear()
        if len(self.kept) != len(x):
            raise LayerError(
                f"layer {self.name!r} gives {len(self.kept)} rows for {len(x)} image(s), one per window perhaps: {advice()}"
            )
        if last and not run.alone:
            warnings.warn(
                f"layer {self.name!r} runs {last + 1} times in one forward pass: its last output is used", stacklevel=4
            )
        size = (x.shape[-2], x.shape[-1])
        found = layout or L.layout_of(self.kept.shape, size, self.module, model)
        self.read_as = L.check_grid(self.name, self.kept, found, advice)
