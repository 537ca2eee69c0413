"""Sparsity: how much of a map is exactly nothing, and how unevenly the rest is spread."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.batch import Batch
from foveate.registry import Column, Explained, metric
from foveate.runtime.capture import Capture


@metric(
    "sparsity",
    title="Share of exact zeros (of the map, and of what was solved for), Gini index",
    paper="Singla et al., ICML 2019 (eta); Chalasani et al., ICML 2020 (Gini)",
    columns={
        "sparsity": Column(
            "up",
            "sparsity",
            "Sparsity",
            "",
            (0, 1),
            "share of the map's values that are exactly 0",
            "How much of the map is empty?",
            "0.95: a twentieth of the image is named.",
            "0: every place has some value.",
        ),
        "eta": Column(
            "up",
            "eta",
            "Sparsity of the solution",
            "",
            (0, 1),
            "the same share of what the method solved for",
            "How much of what was solved for is 0?",
            "0.95, as CASO was asked for.",
            "0: nothing was left out.",
        ),
        "gini": Column(
            "up",
            "gini",
            "Gini index",
            "",
            (0, 1),
            "sum of (2 i - N - 1) |S|_(i) / (N sum |S|), |S|_(i) ascending",
            "Is the map concentrated on few places?",
            "One bright place alone: 1 - 1/N.",
            "The same value everywhere: 0.",
        ),
    },
    digits=3,
    group="sparsity",
)
def sparsity(capture: Capture, M: Tensor, batch: Batch, *, explained: Explained | None = None) -> dict[str, Tensor]:
    """``sparsity = #(S = 0) / N`` and ``Gini = sum_i (2 i - N - 1) |S|_(i) / (N sum |S|)``, ``|S|_(i)`` ascending; in [0, 1].

    Of the map as the method gave it, at its own resolution: upsampling and scaling make and unmake zeros. A map of zeros
    has sparsity 1, and the Gini index 0 of anything that is equal everywhere. ``eta`` is the same share of what a method
    solved for, where that has more values than its map: of CAFO and CASO over all ``3 H W`` values, as their paper counts
    it; elsewhere it is the sparsity of the map.
    """
    values = (M if explained is None else explained.raw).double().flatten(1).abs()  # [B,N]
    count = values.shape[1]
    place = 2 * torch.arange(1, count + 1, device=values.device, dtype=values.dtype) - count - 1
    total = values.sum(1)
    gini = (values.sort(1).values * place).sum(1) / (count * torch.where(total > 0, total, torch.ones_like(total)))
    zeros = (values == 0).double().mean(1)
    eta = zeros if explained is None else explained.facts.get("eta", zeros)
    return {"sparsity": zeros, "eta": eta, "gini": gini}
