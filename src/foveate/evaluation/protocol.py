"""Protocol: everything that decides what a number means, under one name, printed and stored with it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

from torch import nn

from foveate.errors import FoveateError
from foveate.precision import Precision
from foveate.records import FILLED_IN
from foveate.registry import METRICS, Metric, check_settings
from foveate.targets import Head

TargetWord = Literal["label", "pred", "second"]
FORM = 1  # goes up when a metric changes what it computes: numbers of different forms are never compared in silence


@dataclass(frozen=True)
class Protocol:
    """How a table is measured.

    Attributes:
        name: of the preset it began as.
        target: the class that is explained and scored: ``label``, ``pred`` or ``second``.
        scaling: of maps to [0, 1]: after the upsampling, or ``first``, at the layer's resolution.
        methods, metrics: settings by name; what is not there has its default.
        source: what it reproduces.
    """

    name: str = "foveate"
    target: TargetWord = "label"
    scaling: Literal["after", "first"] = "after"
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = "defaults: label class, masked in pixel space, black; 28 steps; correct axes, clipped boxes"

    def with_settings(self, settings: Mapping[str, Mapping[str, Any]], target: str | None = None) -> Protocol:
        """The same with some settings of methods or metrics, by name, or another target.

        Raises:
            FoveateError: neither a method nor a metric has the name, or the setting; or an unknown target.
        """
        if target is not None and target not in ("label", "pred", "second"):
            raise FoveateError(f"target {target!r} is unknown: a table explains 'label', 'pred' or 'second' of each image")
        methods, metrics = dict(self.methods), dict(self.metrics)
        for name, own in settings.items():
            if name in METRICS.all():
                metrics[name] = {**metrics.get(name, {}), **check_settings(METRICS.get(name), own)}
            else:
                methods[name] = {**methods.get(name, {}), **own}
        return replace(self, methods=methods, metrics=metrics, target=target or self.target)  # type: ignore[arg-type]

    def of_metric(self, metric: Metric) -> dict[str, Any]:
        """Every setting of a metric, defaults included."""
        parameters = inspect.signature(metric.function).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in FILLED_IN}
        return own | dict(self.metrics.get(metric.name, {}))

    def digest(self, metric: Metric) -> str:
        """Eight digits that change with anything that decides what this metric's columns mean."""
        content = [FORM, metric.name, self.target, self.scaling, self.of_metric(metric)]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]

    def describe(self, metric: Metric) -> str:
        """A metric's settings as text: ``class=label steps=28 kernel=11``."""
        parts = [] if metric.of_model else [f"class={self.target}"]
        parts += [f"{name}={value}" for name, value in self.of_metric(metric).items()]
        return " ".join(parts)

    def record(self) -> dict[str, Any]:
        """For ``run.json``."""
        plain = {name: dict(own) for name, own in self.methods.items()}
        metrics = {name: {"digest": self.digest(m), "settings": self.of_metric(m)} for name, m in METRICS.all().items()}
        return {
            "name": self.name,
            "source": self.source,
            "target": self.target,
            "scaling": self.scaling,
            "methods": plain,
            "metrics": metrics,
        }


PUBLISHED_BOXES = {"ties": "any", "swap_axes": True, "short_box": True, "clip": False}
PRESETS = {
    preset.name: preset
    for preset in (
        Protocol(),
        Protocol(
            "opti_cam",
            metrics={"insertion_deletion": {"steps": 28, "kernel": 11}, "localization": {"ties": "any"}},
            methods={"score_cam": {"weighting": "channel_softmax"}},
            source="the tables of Opti-CAM (Zhang et al., CVIU 2024): Score-CAM with a softmax over channels, blur of 11",
        ),
        Protocol(
            "ca_stream",
            scaling="first",
            metrics={"insertion_deletion": {"steps": 28, "kernel": 5}},
            methods={"score_cam": {"weighting": "probability"}},
            source="the tables of CA-Stream (Torres et al., 2024): maps scaled first, Score-CAM by probability, blur of 5",
        ),
        Protocol(
            "rise",
            target="pred",
            metrics={"insertion_deletion": {"steps": 224, "kernel": 11}},
            source="RISE's demonstration (Petsiuk et al., BMVC 2018): the predicted class, 224 steps, blur of 11",
        ),
        Protocol(
            "legacy",
            metrics={"insertion_deletion": {"steps": 28, "kernel": 5}, "localization": PUBLISHED_BOXES},
            source="the published evaluation code with its slips: axes swapped in SP and EP, boxes unclipped and a pixel short",
        ),
    )
}


class Planned(TypedDict, total=False):
    """Options that everything which measures takes; :func:`foveate.measure` says what they are."""

    layer: str | nn.Module
    target: str | None
    protocol: str | Protocol
    settings: Mapping[str, Mapping[str, Any]] | None
    head: Head | None
    precision: Precision


class Measuring(Planned, total=False):
    """The options of :func:`foveate.measure`, for functions that hand them on."""

    batch_size: int
    output: str | int | None
    keep_maps: bool
    normalised: bool
    maps: Any
    maps_of: Literal["auto", "crop", "file"]


def preset(name: str | Protocol) -> Protocol:
    """A protocol by name.

    Raises:
        FoveateError: no such preset; the message has all.
    """
    if isinstance(name, Protocol):
        return name
    if name not in PRESETS:
        raise FoveateError(f"protocol {name!r} is unknown: there are {', '.join(PRESETS)}")
    return PRESETS[name]
