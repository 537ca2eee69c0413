"""The limit: the best time of a pass of a network on this machine, taken in the same turns as the job beside it.

``forward``; ``folded``, batch norms folded into convolutions; ``bf16``, folded too, in half precision with weights cast
beforehand; ``backward``, a forward pass with the backward pass to the image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from benchmarks.peers.row import Contestant, timed
from torch import Tensor, nn

from foveate.runtime.folding import folded

Kind = Literal["forward", "folded", "bf16", "backward"]
COUNTS = (1, 2, 4, 8, 16, 32)
ON_GPU = (1, 8, 32, 64)


class Passes:
    """Passes of a copy of a model whose parameters need no gradient, in the batch and layout that is fastest."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.folded = copy.deepcopy(self.model)
        for own, name, value in folded(self.folded, torch.rand(1, 3, 224, 224, device=device))[0]:
            own[name] = nn.Parameter(value, requires_grad=False) if isinstance(value, Tensor) else value
        self.half = copy.deepcopy(self.folded)
        for module in self.half.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.bfloat16()
        self.device = device
        self._known: dict[tuple[Kind, int, int], tuple[int, torch.memory_format]] = {}

    def seconds(self, kind: Kind, images: int, size: int = 224, most: int = 64) -> float:
        """Seconds of passes of so many images, none in a batch above ``most``, measured now; the best of three for over 64."""
        count, layout = self.best(kind, size, most)
        x = torch.rand(count, 3, size, size, device=self.device)
        some = 64 if self.device.type == "cpu" else 1024
        passes = max(1, min(images, some) // count)
        # What stands for more passes than were run must not multiply a stall, nor the first use of memory.
        rounds = 3 if images > some else 1
        seconds = min(timed(lambda: [self._run(kind, x, layout) for _ in range(passes)])[0] for _ in range(rounds))
        return seconds * images / (passes * count)

    def limit(self, kind: Kind, images: int, size: int = 224, most: int = 64) -> Callable[[Contestant], float]:
        return lambda ours: self.seconds(kind, images, size, most)

    def counted(self, ours: Contestant) -> float:
        """Seconds of the passes that foveate itself needed, each at its best, all forward passes as fast as folded ones."""
        alone = self.seconds("folded", ours.forward - ours.backward) if ours.forward > ours.backward else 0.0
        return alone + (self.seconds("backward", ours.backward) if ours.backward else 0.0)

    def best(self, kind: Kind, size: int, most: int) -> tuple[int, torch.memory_format]:
        key = (kind, size, most)
        if key not in self._known:
            found = {}
            for count in (c for c in (COUNTS if self.device.type == "cpu" else ON_GPU) if c <= max(1, most)):
                for layout in (torch.contiguous_format, torch.channels_last):
                    x = torch.rand(count, 3, size, size, device=self.device)
                    self._run(kind, x, layout)
                    found[count, layout] = min(timed(lambda x=x, a=layout: self._run(kind, x, a))[0] for _ in range(3)) / count
            self._known[key] = min(found, key=lambda k: found[k])
        return self._known[key]

    def _run(self, kind: Kind, x: Tensor, layout: torch.memory_format) -> None:
        if kind == "backward":
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(self.model(leaf.contiguous(memory_format=layout))[:, 0].sum(), leaf)
            return
        model = {"forward": self.model, "folded": self.folded, "bf16": self.half}[kind]
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=kind == "bf16"):
            model(x.contiguous(memory_format=layout))
