"""Feature: one captured layer, how its output lies in memory, and the gradients known at it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from foveate import layers as L
from foveate.errors import LayerError
from foveate.linear_head import at_least_float32


@dataclass
class Passes:
    """Images that went through the model: forward, backward, and through the tail behind a layer only."""

    forward: int = 0
    backward: int = 0
    tail: int = 0

    def add(self, other: Passes) -> None:
        """Count what another run did."""
        self.forward += other.forward
        self.backward += other.backward
        self.tail += other.tail


@dataclass
class Feature:
    """One captured layer: its module, its raw output as a node of the graph, how it lies, how often it ran."""

    name: str
    module: nn.Module | None
    kept: Tensor | None = None
    read_as: L.Layout | None = None
    runs: int = 0
    gradients: dict[int, Tensor] = field(default_factory=dict)

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
