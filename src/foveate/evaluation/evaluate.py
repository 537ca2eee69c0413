"""Evaluate: methods x metrics x data, to every value of every image, and to a table with intervals."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from foveate import maps, missing
from foveate.batch import Batch
from foveate.data.labels import has_several, label_by_label, several_labels
from foveate.errors import DegenerateMapWarning, FoveateError, ImageError, LayerError, NotFiniteError, required
from foveate.evaluation.elsewhere import Elsewhere, Of, alone, elsewhere, together
from foveate.evaluation.measured import Measured, again, choose, measured
from foveate.evaluation.protocol import Measuring, Protocol, preset
from foveate.evaluation.results import MAP, MAP_SIDE, MODEL, Results, add_missing, joined
from foveate.explanation.explain import Methods, Model, chosen_methods
from foveate.methods.cam import contrast_of
from foveate.models.inputs import data_of
from foveate.precision import Precision
from foveate.records import Found
from foveate.registry import METHODS, METRICS, Explained, Method, Metric, Spent
from foveate.runtime import memory
from foveate.runtime.capture import Capture
from foveate.runtime.model import one_output, unwrap
from foveate.shown import drawn
from foveate.targets import Head, check_single, is_right, log_probability

if TYPE_CHECKING:
    import pandas as pd

COSTED_BATCHES = 3
NOT_FINITE = "the model gives NaN or infinity"
SAME = 1e-6  # maps in [0, 1] that differ by less are one map: a 4000th of what an 8-bit picture can show


def batches(data: Batch | Iterable[Any] | Dataset[Batch], batch_size: int = 8) -> Iterator[Batch]:
    """Batches of any data: one or several as they come, single images collated, ``(x, y)`` pairs of a DataLoader."""
    waiting: list[Batch] = []
    number = 0
    for item in [data] if isinstance(data, Batch) else data:  # type: ignore[union-attr]
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
    model: Model,
    data: Any,
    methods: Methods = "grad_cam",
    metrics: str | Sequence[str] = "all",
    *,
    baseline: str | None = None,
    **options: Unpack[Measuring],
) -> pd.DataFrame:
    """The table of methods and metrics on data: one line per method and column, as :meth:`Results.table` says.

    ``attrs`` has the ``findings`` (sentences), the ``protocol`` and the ``degenerate`` maps of each method.

    Args:
        baseline: the method that others are compared with, image by image.
        options: those of :func:`measure`, which gives every value of every image instead.
    """
    from foveate.evaluation.findings import findings

    required("evaluate", "pandas", "scipy")
    results = measure(model, data, methods, metrics, **options)
    frame = results.table(baseline)
    frame = drawn("dataframe").Table(frame).__finalize__(frame)
    frame.attrs |= {
        "findings": findings(frame, results),
        "protocol": results.protocol,
        "degenerate": dict(results.degenerate),
        "left_out": dict(results.left_out),
    }
    return frame


def measure(
    model: Model,
    data: Any,
    methods: Methods = "grad_cam",
    metrics: str | Sequence[str] = "all",
    *,
    layer: str | nn.Module = "auto",
    target: str | None = None,
    protocol: str | Protocol = "foveate",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    head: Head | None = None,
    output: str | int | None = None,
    precision: Precision = "fp32",
    keep_maps: bool = False,
    normalised: bool = False,
    maps: Any = None,
    maps_of: Of = "auto",
) -> Results:
    """Every metric of every method on every image: :class:`Results`, with ``.frame()`` and ``.table()``.

    Methods share the forward and backward pass of a batch, metrics the masked one, and equal maps are scored once. An image
    that cannot be read, holds NaN, or on which the model gives NaN is left out and named in ``failures``; where only a map or
    a masked image is to blame, the values are NaN, and counted with their reason in ``missing``.

    Args:
        data: a folder by its path, or what else ``foveate evaluate`` takes by name; a batch, several, a data set, a DataLoader
            of ``(x, y)`` with ``x`` in [0, 1]; or images in the forms of :func:`foveate.explain`, alone or as ``(x, y)``.
        methods: names in the registry, or records, such as ``foveate.methods.adapt`` makes; ``all``, ``all-fast`` (those of
            a single pass, and the controls) and ``controls`` stand for several, of which those the model allows are taken.
        metrics: names or columns; ``"all"`` for all that the data has labels, masks or boxes for, but the costly ones,
            which run each method again (``class_sensitivity``, ``randomisation``): name them beside it.
        target: the class that is explained and scored: ``label``, ``pred`` or ``second``; the protocol's where it is None.
        protocol: ``foveate``, ``opti_cam``, ``ca_stream``, ``rise``, ``legacy``, or a :class:`Protocol`.
        settings: of methods and metrics, by name: ``{"opti_cam": {"steps": 50}, "insertion_deletion": {"kernel": 5}}``.
        head: ``softmax``, ``binary`` or ``multilabel``; by the number of outputs where it is None. One output is then
            binary where all labels are 0 or 1, and refused elsewhere: it may be a regression.
        output: of a model with several outputs, the one that is explained: a name, an index or a dotted path.
        keep_maps: keep a small copy of each map, for pictures of the data as a whole.
        normalised: the images were normalised with the model's own mean and std, which is undone.
        maps: maps from elsewhere, for a row beside the methods': an array ``[N,h,w]`` in the order of the images, a folder of
            ``.npy``, ``.npz``, grey ``.png`` or ``.safetensors`` called as the images are, or several by name.
        maps_of: what they cover: the ``crop`` that the network sees, the stored ``file``, or ``auto``: what their shape fits.

    Raises:
        FoveateError: an unknown method or metric, one that needs what the data has not, or no image that can be measured.
    """
    classifier = one_output(unwrap(model), output)
    plan = Plan.of(methods, metrics, protocol, settings, target, layer, head, precision, keep_maps, elsewhere(maps, maps_of))
    failures: list[tuple[str, str]] = []
    data = data_of(model, data, normalised)
    if has_several(data) and head != "multilabel":
        raise FoveateError(several_labels("these labels"))
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        if callable(name_of := getattr(data, "name_of", None)):
            for given in plan.maps:
                given.bind(data, [name_of(i) for i in range(len(data))])
        data = readable(data, range(len(data)), failures)

    def parts() -> Iterator[Results]:
        for number, batch in enumerate(batches(data, batch_size)):
            if batch.y is not None and batch.y.ndim == 2 and batch.y.shape[1] > 1:
                plan.classes = batch.y.shape[1]
                without = [name for name, row in zip(batch.id, batch.y, strict=True) if not row.any()]
                failures.extend((name, f"{name}: it has no label") for name in without)
            batch = label_by_label(batch, plan.head)
            if len(batch):
                plan.settle(classifier, [batch])
                yield plan.run(classifier, batch, number)

    results = joined(parts())
    for given in plan.maps:
        given.settle([*results.ids, *(name for name, _ in results.failures)])
    results.failures = failures + results.failures
    results.left_out, results.protocol = dict(plan.left_out), plan.protocol.record()
    if results.failures and not len(results):
        raise FoveateError(f"no image can be measured, the first: {results.failures[0][1]}")
    if results.failures:
        warnings.warn(f"{len(results.failures)} image(s) are left out, the first: {results.failures[0][1]}", stacklevel=2)
    quiet = [missing.UNDEFINED, missing.NOTHING]
    if plan.protocol.metrics.get("localization", {}).get("clip", True) is False:
        quiet.append(missing.OUTSIDE)  # of data whose boxes are not clipped, the crop cut the object away
    for sentence in missing.said(results.missing, len(results), quiet):
        warnings.warn(sentence.removesuffix("."), stacklevel=2)
    if flat := {name: count for name, count in results.degenerate.items() if count}:
        warnings.warn(
            f"some maps are constant and count as a map of zeros: {', '.join(f'{n} of {name}' for name, n in flat.items())}; "
            "nothing at this layer speaks for the class there",
            DegenerateMapWarning,
            stacklevel=2,
        )
    return results


@dataclass
class Plan:
    """What is done with each batch: checked once, before the first image is read."""

    records: list[Method]
    own: dict[str, Mapping[str, Any]]
    optional: set[str]
    metrics: str | list[str]
    protocol: Protocol
    layer: str | nn.Module | None = "auto"
    head: Head | None = None
    precision: Precision = "fp32"
    keep_maps: bool = False
    maps: list[Elsewhere] = field(default_factory=list)
    classes: int | None = None  # of multi-hot labels
    left_out: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        methods: Methods,
        metrics: str | Sequence[str],
        protocol: str | Protocol = "foveate",
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        target: str | None = None,
        layer: str | nn.Module = "auto",
        head: Head | None = None,
        precision: Precision = "fp32",
        keep_maps: bool = False,
        maps: Sequence[Elsewhere] = (),
    ) -> Plan:
        """Look every name up.

        Raises:
            FoveateError: an unknown name or setting.
        """
        base, given = preset(protocol), dict(settings or {})
        of_methods = {name: own for name, own in given.items() if name not in METRICS.all()}
        listed = [methods] if isinstance(methods, (str, Method)) else list(methods)
        given_records = {method.name for method in listed if isinstance(method, Method)}
        for name in of_methods:
            if METHODS.known(name) is None and name not in given_records:
                raise FoveateError(f"there is neither a method nor a metric {name!r} whose settings could be changed")
        records, own, optional = chosen_methods(listed, of_methods)
        for name, values in base.methods.items():
            if name in [record.name for record in records]:
                own[name] = {**values, **own.get(name, {})}
        wanted = metrics if metrics == "all" else [metrics] if isinstance(metrics, str) else list(metrics)
        for name in [] if isinstance(wanted, str) else wanted:
            if name.lower() not in METRICS.groups:
                METRICS.get(name, groups=True)
        full = base.with_settings({**given, **own}, target)
        records = [*(given.record for given in maps), *records]
        return Plan(records, own, optional, wanted, full, layer, head, precision, keep_maps, list(maps))

    def settle(self, model: nn.Module, data: Iterable[Batch]) -> None:
        """Leave out what came in with a group and does not apply to the model, by the first image, once for all batches.

        The first on which the model gives finite logits: nothing can be said by another.
        """
        for batch in data if self.optional else ():
            for i in range(len(batch)):
                with suppress(NotFiniteError):
                    one = batch.only([i])
                    self._settle(self._capture(model, one.x), one)
                    return

    def _settle(self, capture: Capture, batch: Batch) -> None:
        check_single(capture.logits, self.head, batch.y, batch.id)  # the sentence on its labels is better than a target's
        target = capture.target(self.protocol.target, labels=None if batch.y is None else batch.y.to(capture.x.device))
        for record in [record for record in self.records if record.name in self.optional]:
            try:
                if not record.repeats:  # what runs for seconds applies to any model
                    record(capture, None, target, **self.own.get(record.name, {}))
            except NotFiniteError:
                pass  # of this image
            except FoveateError as error:
                self.left_out[record.name] = str(error)
        self.records = [record for record in self.records if record.name not in self.left_out]
        self.optional = set()

    def run(self, model: nn.Module, batch: Batch, number: int = 0) -> Results:
        """Measure one batch; costs are measured where it is one of the first.

        Images that hold NaN, or on which the model gives such logits, are in ``failures`` and have no values.
        """
        given = {source.name: source.maps(batch.id, (batch.x.shape[-2], batch.x.shape[-1])) for source in self.maps}
        capture, kept, failures = self._captured(model, batch)
        if capture is None:
            return Results(failures=failures)
        lost = {name for name, _ in failures}
        given = {own: [m for m, name in zip(found, batch.id, strict=True) if name not in lost] for own, found in given.items()}
        batch = kept.to(capture.x.device)
        check_single(capture.logits, self.head, batch.y, batch.id)
        if self.classes not in (None, capture.logits.shape[1]):
            raise FoveateError(f"labels are of {self.classes} classes, and the model has {capture.logits.shape[1]} outputs")
        if batch.y is not None:
            capture.target("label", labels=batch.y)  # a label out of range stops the run before the work
        scored = choose(self.metrics, batch, bool(capture.layers))
        target = capture.target(self.protocol.target, labels=batch.y)
        said = capture.pred
        if capture.head == "multilabel" and batch.y is not None:  # it says every class above one half: the label, or its first
            said = torch.where(is_right(capture.logits.detach(), batch.y, capture.head), batch.y, said)
        shared = log_probability(capture.logits.detach(), said, capture.head).exp()
        part = Results(
            list(batch.id),
            {},
            np.full(len(batch), -1) if batch.y is None else batch.y.cpu().numpy(),
            said.cpu().numpy(),
            shared.cpu().numpy(),
            failures=failures,
        )
        known: list[tuple[str, Tensor, Measured]] = []
        costed = number < COSTED_BATCHES and any(metric.name == "cost" for metric, _ in scored)
        for record in self.records:
            theirs = given.get(record.name)
            if (
                theirs is None and costed and number == 0 and not record.repeats
            ):  # the first run of anything is slower than those that follow
                with suppress(NotFiniteError):
                    record(capture, None, target, **self.own.get(record.name, {}))
            try:
                raw, spent, facts = self._map(model, capture, batch, record, target, costed, theirs)
            except NotFiniteError:
                raw, spent, facts = self._singly(model, capture, batch, record), None, {}
            spoilt = missing.not_finite(raw)  # such a map is none: it is neither constant nor prepared
            clean = missing.without(raw, spoilt)
            part.degenerate[record.name] = int((maps.is_constant(maps.relu(clean)) & ~spoilt).sum())
            # Of a shape of its own each is prepared alone, as it would be in any other batch.
            each = [clean] if theirs is None else [missing.without(m, missing.not_finite(m)) for m in alone(theirs, raw)]
            shown = torch.cat([self._prepared(m, capture.size) for m in each])
            M = shown.masked_fill(spoilt[:, None, None], torch.nan) if spoilt.any() else shown
            own = self.own.get(record.name, {})
            aim = contrast_of(capture, target, own.get("against")) if record.contrasts else target
            explained = Explained(record, raw, aim, own, spent, facts)
            twin = next(((name, found) for name, other, found in known if _same(M, other)), None)
            asked = scored if theirs is None else [pair for pair in scored if not again(pair[0])]
            found = self._values(asked, capture, M, batch, explained, Measured() if twin is None else twin[1])
            if theirs is not None:
                found = found.of_elsewhere([name for metric, columns in scored if again(metric) for name in columns], theirs)
            if twin is not None:
                part.same[record.name] = twin[0]
            else:
                known.append((record.name, M, found))
            part.values |= {(record.name, name): array for name, array in found.values.items()}
            add_missing(part.missing, {record.name: found.missing} if found.missing else {})
            if self.keep_maps:
                small = F.adaptive_avg_pool2d(shown[:, None].float(), MAP_SIDE)[:, 0].flatten(1)
                part.values[record.name, MAP] = (small * 255).round().div(255).cpu().numpy()
        for metric, columns in scored:
            if metric.of_model:
                found = measured(metric, columns, capture, None, batch, dict(self.protocol.metrics.get(metric.name, {})))
                part.values |= {(MODEL, name): array for name, array in found.values.items()}
                add_missing(part.missing, {MODEL: found.missing} if found.missing else {})
        return part

    def _captured(self, model: nn.Module, batch: Batch) -> tuple[Capture | None, Batch, list[tuple[str, str]]]:
        """The run of a batch, without the images that it cannot be made of; those with the reason."""
        lost = dict.fromkeys(missing.not_finite(batch.x).nonzero()[:, 0].tolist(), "the image holds NaN or infinity")
        if not lost:
            try:
                return self._capture(model, batch.x), batch, []
            except NotFiniteError as error:
                if not error.rows:
                    raise
                lost = dict.fromkeys(error.rows, NOT_FINITE)
        failures = [(batch.id[i], f"{batch.id[i]}: {reason}") for i, reason in sorted(lost.items())]
        kept = batch.only([i for i in range(len(batch)) if i not in lost])
        if not len(kept):
            return None, kept, failures
        capture, kept, others = self._captured(model, kept)
        return capture, kept, failures + others

    def _singly(self, model: nn.Module, capture: Capture, batch: Batch, record: Method) -> Tensor:
        """Maps of a method one image at a time, for it meets NaN on one of them at least; NaN there."""
        found: list[Tensor | None] = []
        for i in range(len(batch)):
            one = batch.only([i])
            with suppress(NotFiniteError):
                alone = Capture(model, one.x, list(capture.layers) or None, head=self.head, precision=self.precision)
                target = alone.target(self.protocol.target, labels=one.y)
                found.append(record(alone, None, target, **self.own.get(record.name, {})).detach())
                continue
            found.append(None)
        like = next((raw for raw in found if raw is not None), capture.x.new_zeros(1, 1, 1))
        return torch.cat([torch.full_like(like, torch.nan) if raw is None else raw for raw in found])

    def _capture(self, model: nn.Module, x: Tensor) -> Capture:
        """One run; at no layer where the model has none and no method but the controls asks for one."""
        try:
            return Capture(model, x, self.layer, head=self.head, precision=self.precision)
        except LayerError:
            if self.layer != "auto" or not all(record.whole or record.control for record in self.records):
                raise
        self.layer = None
        return Capture(model, x, None, head=self.head, precision=self.precision)

    def _map(
        self, model: nn.Module, capture: Capture, batch: Batch, record: Method, target: Any, costed: bool, theirs: Any
    ) -> tuple[Tensor, Spent | None, Mapping[str, Tensor]]:
        own = self.own.get(record.name, {})
        if theirs is not None:
            return together(theirs, capture.images), None, {}
        if not costed:
            found = record.found(capture, None, target, **own)
            return found.map.detach(), None, found.facts

        def run() -> tuple[Capture, Found, float]:
            start = time.perf_counter()
            fresh = Capture(model, batch.x, list(capture.layers) or None, head=self.head, precision=self.precision)
            found = record.found(fresh, None, fresh.target(self.protocol.target, labels=batch.y), **own)
            if found.map.is_cuda:
                torch.cuda.synchronize(found.map.device)
            return fresh, found, time.perf_counter() - start

        # Where memory is measured the process has first given back what it kept, and a short run is slower by that.
        unhindered = None if record.repeats else run()[2]
        with memory.peak(capture.x.device) as megabytes:
            fresh, found, seconds = run()
        seconds = seconds if unhindered is None else unhindered
        done, count = fresh.passes, len(batch)
        spent = (seconds / count, done.forward / count, done.backward / count, done.tail / count)
        return found.map.detach(), Spent(*spent, megabytes()), found.facts

    def _prepared(self, raw: Tensor, size: tuple[int, int]) -> Tensor:
        if self.protocol.scaling == "first":
            raw = maps.scale(maps.relu(raw))
            return maps.upsample(raw, size).clamp(0, 1)
        return maps.prepare(raw, size)

    def _values(
        self,
        scored: list[tuple[Metric, list[str]]],
        capture: Capture,
        M: Tensor,
        batch: Batch,
        explained: Explained,
        known: Measured,
    ) -> Measured:
        found = Measured()
        for metric, columns in scored:
            if metric.of_model:
                continue
            if "explained" not in metric.filled_in and set(columns) <= set(known.values):
                found.values |= {name: known.values[name] for name in known.values if name.removesuffix("_curve") in columns}
                found.missing |= {name: why for name, why in known.missing.items() if name in columns}
                continue
            offered = {"target": self.protocol.target, "explained": explained, "columns": columns}
            filled = {name: offered[name] for name in metric.filled_in}
            own = self.protocol.metrics.get(metric.name, {})
            one = measured(metric, columns, capture, M, batch, {**filled, **own})
            found.values |= one.values
            found.missing |= one.missing
        return found


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    gap = (a - b).abs()
    most = gap.max()
    return bool(most <= SAME) if not most.isnan() else bool(((gap <= SAME) | (a.isnan() & b.isnan())).all())


def readable(data: Any, order: Iterable[int], failures: list[tuple[str, str]]) -> Iterator[Batch]:
    """The images of a data set that can be read; the others go to ``failures`` with the reason, and are passed over."""
    for index in order:
        try:
            yield data[index]
        except ImageError as error:
            failures.append((error.path or str(index), str(error)))
