"""Torchmetrics: the columns of a table as metrics of other people's loops, summed over devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from foveate._torchvision import mend
from foveate.batch import Batch
from foveate.errors import FoveateError, required
from foveate.evaluation.evaluate import Plan
from foveate.evaluation.protocol import Planned
from foveate.evaluation.results import MAP, MODEL
from foveate.evaluation.statistics import metric_of
from foveate.registry import METRICS

mend()  # torchmetrics imports torchvision
required("foveate.torchmetrics", "torchmetrics")
from torchmetrics import Metric  # noqa: E402


class _Held:
    """A model that copies of its holder share."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: object) -> _Held:
        return self


class SaliencyMetrics(Metric):
    """Means of several columns for several methods, ``{"grad_cam/AD": value}``, as a torchmetrics metric.

    ``update(x, y, mask, boxes)`` explains and measures a batch, ``compute()`` gives the means over all of them, on all
    devices. What the whole data decides (BA) is decided by ``compute``. The model is explained in evaluation mode and put
    back into its own.

    Args:
        model: the classifier; it is not moved, copied or saved with the metric.
        methods, metrics, options: as for :func:`foveate.measure`; costs are left out.
        prefix: put before each key.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(
        self,
        model: nn.Module,
        methods: str | Sequence[str] = "grad_cam",
        metrics: str | Sequence[str] = ("AD", "AG", "AI"),
        prefix: str = "",
        **options: Unpack[Planned],
    ) -> None:
        super().__init__()
        object.__setattr__(self, "held", _Held(model))  # no submodule: moving or copying the metric does neither to the model
        self.plan = Plan.of(methods, metrics, **options)
        self.prefix = prefix
        self.keys: list[tuple[str, str]] = []

    def update(
        self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None, boxes: Sequence[Tensor] | None = None
    ) -> None:
        """Explain and measure a batch: ``x [B,C,H,W]`` in [0, 1], labels ``y [B]``, masks ``[B,H,W]`` or boxes."""
        model: nn.Module = self.__dict__["held"].model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            batch = Batch(x, y, mask, None if boxes is None else tuple(boxes), tuple(map(str, range(len(x)))))
            part = self.plan.run(model, batch, number=10**9)
        finally:
            for module, training in modes.items():
                module.training = training
        for (method, column), values in part.values.items():
            record = metric_of(column)
            if record is None or record.name == "cost" or column == MAP or (values.ndim == 2 and column not in record.pooled):
                continue
            tensor = torch.from_numpy(values).to(self.device, torch.float64)
            known = torch.isfinite(tensor) if tensor.ndim == 1 else torch.isfinite(tensor).all(1)
            name = f"{method} {column}".replace(".", "_").replace(":", "_")
            if (method, column) not in self.keys:
                self.keys.append((method, column))
                self.add_state(f"sum {name}", torch.zeros(tensor.shape[1:], dtype=torch.float64), dist_reduce_fx="sum")
                self.add_state(f"count {name}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            setattr(self, f"sum {name}", getattr(self, f"sum {name}") + tensor[known].sum(0))
            setattr(self, f"count {name}", getattr(self, f"count {name}") + known.sum())

    def compute(self) -> dict[str, Tensor]:
        """The mean of each method and column; NaN where no image counted."""
        found = {}
        for method, column in self.keys:
            record = metric_of(column)
            name = f"{method} {column}".replace(".", "_").replace(":", "_")
            mean = getattr(self, f"sum {name}") / getattr(self, f"count {name}")
            if record is not None and column in record.pooled:
                mean = torch.as_tensor(float(record.pooled[column](mean.cpu().numpy())), dtype=torch.float64)
            found[self.prefix + (column if method == MODEL else f"{method}/{column}")] = mean.float()
        return found


class SaliencyMetric(SaliencyMetrics):
    """One column for one method as a single number: for ``MetricCollection``, checkpoints and early stopping.

    Args:
        column: ``AD``, ``AG``, ``LE`` ...: ``higher_is_better`` is set by it.

    Raises:
        FoveateError: a metric with several columns, where one has to be named.
    """

    def __init__(self, model: nn.Module, column: str, method: str = "grad_cam", **options: Unpack[Planned]) -> None:
        record = METRICS.get(column)
        name = record.column(column) or next(iter(record.columns))
        if record.column(column) is None and len(record.columns) > 1:
            raise FoveateError(f"{column!r} has the columns {', '.join(record.columns)}: name one of them")
        super().__init__(model, method, name, **options)
        self._up = record.columns[name].better == "up"

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """By the direction of the column."""
        return self._up

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean over all images."""
        values = super().compute()
        return next(iter(values.values())) if values else torch.tensor(float("nan"))
