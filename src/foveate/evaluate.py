"""Evaluate: methods x metrics x data, to one row a value, and to a table with intervals."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from foveate import maps
from foveate.batch import Batch
from foveate.capture import Capture
from foveate.errors import DegenerateMapWarning, FoveateError, ImageError
from foveate.explain import chosen_methods
from foveate.registry import METRICS, Method, Metric
from foveate.runner import Precision
from foveate.targets import Head

if TYPE_CHECKING:
    import pandas as pd


def batches(data: Iterable[Any] | Dataset[Batch], batch_size: int = 32) -> Iterator[Batch]:
    """Batches of any data: batches as they come, data sets of single images collated, ``(x, y)`` pairs of a DataLoader."""
    waiting: list[Batch] = []
    number = 0
    for item in data:  # type: ignore[union-attr]
        if not isinstance(item, Batch):
            x, y = item[0], torch.as_tensor(item[1])
            item = Batch(x, y) if x.ndim == 4 else Batch(x[None], y.reshape(1))
        if len(item.id) != len(item):
            item = replace(item, id=tuple(str(number + i) for i in range(len(item))))
        number += len(item)
        if len(item) > 1:
            yield item
            continue
        if waiting and waiting[0].x.shape != item.x.shape:  # images of another size wait for their like
            yield Batch.collate(waiting)
            waiting = []
        waiting.append(item)
        if len(waiting) == batch_size:
            yield Batch.collate(waiting)
            waiting = []
    if waiting:
        yield Batch.collate(waiting)


def evaluate(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Batch],
    methods: str | Method | Sequence[str | Method] = "grad_cam",
    metrics: str | Sequence[str] = "all",
    *,
    layer: str | nn.Module = "auto",
    target: str = "label",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    head: Head | None = None,
    precision: Precision = "fp32",
) -> pd.DataFrame:
    """Every metric of every method on every image: a DataFrame with the columns ``id, method, column, value``.

    ``attrs["degenerate"]`` counts the maps of each method that are constant, which are scored as maps of zeros.

    Methods share the forward and backward pass of a batch; :func:`summarize` makes the table.

    Args:
        data: batches, a data set of :mod:`foveate.data`, or a DataLoader of ``(x, y)`` with ``x`` in [0, 1].
        methods: names in the registry, or records, such as ``foveate.methods.adapt`` makes.
        settings: own settings of methods, by name: ``{"opti_cam": {"steps": 50}}``.
        metrics: names or columns; ``"all"`` for all that the data has masks or boxes for.
        target: the class that is explained and scored: ``label``, ``pred`` or ``second``.
        head: ``softmax``, ``binary`` or ``multilabel``; by the number of outputs where it is None.

    Raises:
        FoveateError: an unknown method or metric, or one that needs what the data has not.
    """
    import pandas as pd

    if target not in ("label", "pred", "second"):
        raise FoveateError(f"target {target!r} is unknown: a table explains 'label', 'pred' or 'second' of each image")
    chosen, own = chosen_methods(methods, settings)
    rows: list[tuple[str, str, str, float]] = []
    degenerate = dict.fromkeys((record.name for record in chosen), 0)
    for batch in batches(data, batch_size):
        capture = Capture(model, batch.x, layer, head=head, precision=precision)
        batch = batch.to(capture.x.device)
        aim = capture.target(target, labels=batch.y)
        scored = choose(metrics, batch)
        for record in chosen:
            raw = record(capture, None, aim, **own.get(record.name, {})).detach()
            degenerate[record.name] += int(maps.is_constant(maps.relu(raw)).sum())
            M = maps.prepare(raw, capture.size)
            for name, values in _values(scored, capture, M, batch, target).items():
                rows += [(id_, record.name, name, value) for id_, value in zip(batch.id, values, strict=True)]
    if flat := {name: count for name, count in degenerate.items() if count}:
        warnings.warn(
            f"some maps are constant and count as a map of zeros: {', '.join(f'{n} of {name}' for name, n in flat.items())}; "
            "nothing at this layer speaks for the class there",
            DegenerateMapWarning,
            stacklevel=2,
        )
    frame = pd.DataFrame(rows, columns=["id", "method", "column", "value"])
    frame.attrs["degenerate"] = degenerate
    return frame


def choose(metrics: str | Sequence[str], batch: Batch) -> list[tuple[Metric, list[str]]]:
    """The metrics to compute with the columns to keep of each.

    Raises:
        FoveateError: an unknown name, or one that needs what the batch has not.
    """
    has = {"mask": batch.mask is not None, "boxes": batch.boxes is not None}
    chosen: dict[str, tuple[Metric, list[str]]] = {}
    if metrics == "all":
        usable = [record for record in METRICS.all().values() if all(has[need] for need in record.needs)]
        return [(record, list(record.columns)) for record in usable]
    for name in [metrics] if isinstance(metrics, str) else metrics:
        record = METRICS.get(name)
        if missing := [need for need in record.needs if not has[need]]:
            raise FoveateError(f"metric {name!r} needs {' and '.join(missing)}, and this data has none")
        columns = [column for column in record.columns if column.lower() == name.lower()] or list(record.columns)
        kept = chosen.setdefault(record.name, (record, []))[1]
        kept += [column for column in columns if column not in kept]
    return list(chosen.values())


def _values(
    scored: list[tuple[Metric, list[str]]], capture: Capture, M: Any, batch: Batch, target: str
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for metric, columns in scored:
        settings = {"target": target} if "target" in inspect.signature(metric.function).parameters else {}
        result = metric(capture, M, batch, **settings)
        values.update({column: result[column].double().cpu().tolist() for column in columns})
    return values


def summarize(rows: pd.DataFrame, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The table of rows: mean with a 95 % bootstrap interval for each method and column.

    Args:
        rows: from :func:`evaluate`.
        samples: of the bootstrap, which draws images with replacement.

    Returns:
        A DataFrame with the index ``method, column`` and the columns ``mean, low, high, n``.
    """
    import pandas as pd

    lines = []
    for (method, column), group in rows.groupby(["method", "column"], sort=False):
        values = group["value"].to_numpy(dtype=float)
        values = values[np.isfinite(values)]
        low, high = interval(values, samples, seed)
        lines.append((method, column, float(values.mean()) if len(values) else float("nan"), low, high, len(values)))
    table = pd.DataFrame(lines, columns=["method", "column", "mean", "low", "high", "n"])
    return table.set_index(["method", "column"])


def interval(values: np.ndarray, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; not a number where there are no values."""
    if len(values) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    step = max(1, 4_000_000 // len(values))  # keeps the resampled block below 32 MB
    means = [
        values[rng.integers(0, len(values), (min(step, samples - start), len(values)))].mean(1)
        for start in range(0, samples, step)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def readable(data: Any, order: Iterable[int], failures: list[tuple[str, str]]) -> Iterator[Batch]:
    """The images of a data set that can be read; the others go to ``failures`` with the reason, and are passed over."""
    for index in order:
        try:
            yield data[index]
        except ImageError as error:
            failures.append((error.path or str(index), str(error)))
