"""Cost: what a map takes, beside what it scores."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.batch import Batch
from foveate.registry import Column, Explained, metric
from foveate.runtime.capture import Capture


@metric(
    "cost",
    title="Seconds, passes and memory an image",
    paper="the column T of Zhang et al., CVIU 2024",
    columns={
        "T": Column(
            "down", "seconds", "Time", "s", None, "of one image, with the run of the model", "How long does a map take?"
        ),
        "forwards": Column(
            "down", "forward_passes", "Forward passes", "", None, "of one image", "How often does the model run?"
        ),
        "backwards": Column(
            "down", "backward_passes", "Backward passes", "", None, "passes of one image", "How often are gradients computed?"
        ),
        "memory": Column("down", "memory", "Memory", "MB", None, "peak of a batch, beyond what was taken", "What must fit?"),
    },
    digits=3,
    statistic="median",
    group="cost",
)
def cost(capture: Capture, M: Tensor, batch: Batch, *, explained: Explained | None = None) -> dict[str, Tensor]:
    """``T``: seconds; ``forwards``, ``backwards``: passes (also those of the part after a layer); ``memory``: MB at the peak.

    Of one image, on a fresh run of the model which is counted too; memory is of the whole batch, beyond what was taken
    before. Measured on the first batches only, and is NaN elsewhere; the table has the median over batches.
    """
    spent = None if explained is None else explained.spent
    nan = float("nan")
    values = (nan,) * 4 if spent is None else (spent.seconds, spent.forwards + spent.tails, spent.backwards, spent.megabytes)
    names = ("T", "forwards", "backwards", "memory")
    return {name: torch.full((len(batch),), value, dtype=torch.float64) for name, value in zip(names, values, strict=True)}
