"""Measured: which metrics a batch allows, and what one of them gives, with the reason of every value that there is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate import missing
from foveate.batch import Batch
from foveate.data.boxes import objects
from foveate.errors import FoveateError, NotFiniteError
from foveate.registry import METRICS, Metric
from foveate.runtime.capture import Capture


def choose(metrics: str | Sequence[str], batch: Batch, layer: bool = True) -> list[tuple[Metric, list[str]]]:
    """The metrics to compute with the columns to keep of each.

    Raises:
        FoveateError: an unknown name, or one that needs what the batch has not.
    """
    has = {"mask": batch.mask is not None, "boxes": batch.boxes is not None, "labels": batch.y is not None}
    has |= {"region": has["mask"] or has["boxes"], "layer": layer}
    if batch.mask is not None and bool(((batch.mask > 0) & (batch.mask < 1)).any()):
        raise FoveateError("a mask of shares between 0 and 1 has no edge to measure at: compare it first, as in mask > 0.5")
    chosen: dict[str, tuple[Metric, list[str]]] = {}
    for name in [metrics] if isinstance(metrics, str) else metrics:
        if (group := name.lower()) in METRICS.groups:
            there = [r for r in METRICS.all().values() if (r.group == group or (group == "all" and not r.costly))]
            fits = [record for record in there if all(has[need] for need in record.needs)]
            chosen |= {record.name: (record, list(record.columns)) for record in fits}
            if fits:
                continue
        record = METRICS.get(name)
        if missing := ["boxes or masks" if need == "region" else need for need in record.needs if not has[need]]:
            owner = "model" if missing == ["layer"] else "data"
            raise FoveateError(f"metric {name!r} needs {' and '.join(missing)}, and this {owner} has none")
        column = record.column(name)
        columns = list(record.columns) if column is None or name == record.name else [column]
        kept = chosen.setdefault(record.name, (record, []))[1]
        kept += [column for column in columns if column not in kept]
    return list(chosen.values())


def _arrays(result: Mapping[str, Tensor], columns: Sequence[str]) -> dict[str, np.ndarray]:
    return {
        name: values.detach().cpu().double().numpy() if values.ndim == 1 else values.detach().cpu().float().numpy()
        for name, values in result.items()
        if name.removesuffix("_curve") in columns
    }


@dataclass
class Measured:
    """Columns and curves of a method on a batch, and how many images have no value, by column and reason."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[str, dict[str, int]] = field(default_factory=dict)

    def of_elsewhere(self, columns: Sequence[str], maps: Sequence[Tensor | None]) -> Measured:
        """The same of maps that are not made here: no value of ``columns``, and none of an image without a map."""
        count, without = len(maps), sum(m is None for m in maps)
        found = Measured(dict(self.values), {name: dict(why) for name, why in self.missing.items()})
        for why in found.missing.values():
            if without and (rest := why.pop(missing.MAP, 0) - without) >= 0:
                why |= {missing.NO_MAP: without} | ({missing.MAP: rest} if rest else {})
        for name in columns:
            found.values[name] = np.full(count, np.nan)
            found.missing[name] = {missing.ELSEWHERE: count}
        return found


def again(metric: Metric) -> bool:
    """Whether a metric is of the making of a map, and not of the map: it runs the method again, or says what it took."""
    return metric.costly or metric.name == "cost"


def measured(
    metric: Metric, columns: Sequence[str], capture: Capture, M: Tensor | None, batch: Batch, settings: dict[str, Any]
) -> Measured:
    """The columns of a metric, and why some images have no value."""
    before = capture.passes.spoilt
    try:
        result = metric(capture, M, batch, **settings)
    except NotFiniteError:  # the method runs again in it
        nothing = torch.full((len(batch),), torch.nan, dtype=torch.float64)
        result, before = dict.fromkeys(columns, nothing), -1
    found = Measured(_arrays(result, columns))
    for name in columns if metric.name != "cost" else ():
        lost = torch.from_numpy(~np.isfinite(found.values[name]))
        if not (lost := lost if lost.ndim == 1 else lost.any(1)).any():
            continue
        whole = torch.full_like(lost, capture.passes.spoilt > before)
        others = [*_nothing(metric, batch, capture.size, settings), (missing.LOGITS, whole)]
        found.missing[name] = missing.reasons(lost, metric.without_value(M, batch, settings), others)
    return found


def _nothing(metric: Metric, batch: Batch, size: tuple[int, int], settings: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The images of which a metric that needs the object has none, by reason."""
    region: Any = settings.get("region", "auto") if "region" in metric.needs else "mask"
    if not {"region", "mask"} & set(metric.needs):
        return []
    nothing = torch.tensor([not len(thing.areas) for thing in objects(batch, size, region)])
    if batch.boxes is None or region == "mask":
        return [(missing.NOTHING, nothing)]
    outside = torch.tensor([missing.outside(boxes, size) for boxes in batch.boxes])
    return [(missing.OUTSIDE, nothing & outside), (missing.NOTHING, nothing)]
