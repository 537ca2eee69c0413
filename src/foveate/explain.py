"""Explain: several methods on one batch from one capture; maps, what they cost, and whether they can be trusted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate import maps
from foveate.capture import Capture, Precision
from foveate.errors import DegenerateMapWarning, FoveateError, LayerError
from foveate.methods.cam import completeness, contrast_of
from foveate.registry import METHODS, Method, check_settings
from foveate.targets import Head, Target


@dataclass(frozen=True)
class Explanation:
    """Maps of one batch by several methods.

    Attributes:
        maps: for each method ``M [B,H,W]`` in [0, 1], at the size of the images.
        raw: for each method ``S [B,h,w]``, signed, as the paper defines it.
        target: what was explained, with the class of each image in ``target.y``.
        targets: the same for each method: a contrast where the method makes one of it.
        layer: the layer that was looked at.
        completeness_error: for methods that promise it, ``[B]``, relative to the score; None elsewhere.
        seconds: time of each method, beyond the one run that all share.
        degenerate: for each method which of its maps say nothing, ``[B]`` bool.
        capture: the run itself, for metrics.
    """

    maps: dict[str, Tensor]
    raw: dict[str, Tensor]
    target: Target
    layer: str
    capture: Capture
    targets: dict[str, Target] = field(default_factory=dict)
    completeness_error: dict[str, Tensor | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    degenerate: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The map of a method by name or alias, ``[B,H,W]``."""
        return self.maps[name if name in self.maps else METHODS.get(name).name]


def explain(
    model: nn.Module,
    x: Tensor,
    methods: str | Sequence[str] = "grad_cam",
    *,
    layer: str | nn.Module = "auto",
    target: object = None,
    against: object = None,
    score: str = "logit",
    labels: Tensor | None = None,
    head: Head | None = None,
    precision: Precision = "fp32",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    refused: dict[str, str] | None = None,
) -> Explanation:
    """Saliency maps of a batch by one or more methods, from one forward and at most one backward pass for all of them.

    Args:
        model: any classifier that takes images in [0, 1]: see :func:`foveate.normalized` and ``foveate.models.load``.
        x: ``[B,3,H,W]`` in [0, 1].
        methods: names in the registry (``foveate list methods``).
        layer: ``"auto"``, a dotted path or a module.
        target: None for the predicted class; an int, one an image, ``"label"``, ``"second"``, or a callable of logits.
        against: the other class: why the target, and not that one.
        score: ``logit``, ``probability`` or ``loss``.
        labels: true classes ``[B]``, for ``target="label"``.
        head: ``softmax``, ``binary`` (one logit) or ``multilabel`` (a sigmoid for each class); by the number of outputs
            where it is None.
        refused: where given, a method that this model cannot have goes there with the reason, and the others go on.
        settings: own settings of methods, by name: ``{"fake_cam": {"resolution": "pixel"}}``.

    Raises:
        FoveateError: and its kinds, each with what was given and what to do.
    """
    records = METHODS.select(methods)
    own = {METHODS.get(name): dict(values) for name, values in (settings or {}).items()}
    for record, values in own.items():
        if record not in records:
            raise FoveateError(
                f"there are settings for {record.name!r}, but it is not among the methods: {', '.join(r.name for r in records)}"
            )
        check_settings(record, values)
    capture = Capture(model, x, layer, head=head, precision=precision)
    resolved = capture.target(target, score=score, against=against, labels=labels)
    explanation = Explanation({}, {}, resolved, capture.layer, capture)
    if any("gradient" in record.needs and not record.contrasts for record in records):
        capture.grad(None, resolved)  # shared by all of them, so that it counts for none of them
    for record in records:
        try:
            _run(record, explanation, own.get(record, {}))
        except LayerError:
            raise
        except FoveateError as error:
            if refused is None:
                raise
            refused[record.name] = str(error)
    return explanation


def _run(record: Method, explanation: Explanation, settings: Mapping[str, Any]) -> None:
    capture = explanation.capture
    target = explanation.target
    if record.contrasts:
        target = contrast_of(capture, target, settings.get("against"))
    explanation.targets[record.name] = target
    start = time.perf_counter()
    raw = record(capture, capture.layer, target, **settings).detach()
    explanation.maps[record.name] = maps.prepare(raw, capture.size)
    if raw.is_cuda:
        torch.cuda.synchronize()
    explanation.seconds[record.name] = time.perf_counter() - start
    explanation.raw[record.name] = raw
    flat = maps.is_constant(maps.relu(raw))
    explanation.degenerate[record.name] = flat
    if flat.any():
        warnings.warn(
            f"{record.name}: {int(flat.sum())} of {len(flat)} maps are constant (image {int(flat.nonzero()[0])} of the "
            "batch first): nothing at this layer speaks for the class; try another target, layer or method",
            DegenerateMapWarning,
            stacklevel=3,
        )
    explanation.completeness_error[record.name] = completeness(capture, capture.layer, target, raw) if record.complete else None


def saliency(model: nn.Module, x: Tensor, method: str = "grad_cam", **options: Any) -> Tensor:
    """The map of one method, ``M [B,H,W]`` in [0, 1]: :func:`explain` for those who want nothing but the tensor."""
    return explain(model, x, method, **options)[method]
