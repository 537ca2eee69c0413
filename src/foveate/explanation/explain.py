"""Explain: several methods on one batch from one capture; maps, what they cost, and whether they can be trusted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate import maps
from foveate.errors import DegenerateMapWarning, FoveateError, LayerError
from foveate.explanation.answers import Answers, Explanation, Seen
from foveate.methods.cam import contrast_of
from foveate.methods.wrappers import Fusion, check_fusion, over_layers
from foveate.models.inputs import Taken, taken
from foveate.precision import Precision
from foveate.registry import METHODS, Method, check_settings, ungrouped
from foveate.runtime.capture import Capture
from foveate.runtime.model import one_output
from foveate.targets import Head, Labels, Target, note_single, told_apart

Model = nn.Module | Callable[[Tensor], Any]
Methods = str | Method | Sequence[str | Method]
Layers = str | nn.Module | Sequence[str | nn.Module]
Settings = Mapping[str, Mapping[str, Any]]
MOST_FROM_IMAGE = 8 * 224 * 224  # pixels whose whole graph is kept; more run again for the image's gradient, in chunks


def explain(
    model: Model,
    x: Any,
    methods: Methods = "grad_cam",
    *,
    layer: Layers = "auto",
    fuse: Fusion = "mean",
    target: object = None,
    against: object = None,
    score: str = "logit",
    labels: Labels | None = None,
    head: Head | None = None,
    output: str | int | None = None,
    precision: Precision = "fp32",
    settings: Settings | None = None,
    refused: dict[str, str] | None = None,
    normalised: bool = False,
) -> Explanation:
    """Saliency maps of a batch by one or more methods, from one forward and at most one backward pass for all CAMs.

    Args:
        model: any classifier that takes images in [0, 1]: see :func:`foveate.normalized` and :func:`foveate.load`. For
            methods that need no layer (RISE, occlusion, integrated gradients), any function of images to logits.
        x: what there is to explain: a path, a folder, a PIL image, an array ``[H,W,3]``, a list of them, or a tensor
            ``[B,3,H,W]`` or ``[3,H,W]`` in [0, 1]. Photographs are resized and cropped as the model wants them.
        methods: names in the registry (``foveate list methods``), or records, such as ``foveate.methods.adapt`` makes;
            ``all``, ``all-fast`` (those of a single pass, and the controls) and ``controls`` stand for several, of which
            those that the model allows are taken.
        layer: ``"auto"``, a dotted path or a module; several for maps of several layers.
        fuse: how maps of several layers become one: ``mean``, ``max``, ``product`` or ``tanh_max``. Methods that know
            several layers themselves (Opti-CAM) take them all.
        target: None for the predicted class; an int, one per image, ``"label"``, ``"second"``, or a callable of logits.
        against: the other class: why the target, and not that one.
        score: ``logit``, ``probability`` or ``loss``.
        labels: true classes ``[B]``, for ``target="label"``.
        head: ``softmax``, ``binary`` (one logit) or ``multilabel`` (a sigmoid for each class); by the number of outputs
            where it is None.
        output: of a model with several outputs, the one that is explained: a name, an index, or a dotted path such as
            ``heads.breed``; the one called logits, or the first, where it is None.
        precision: of changed images, in methods that run the model again and again: ``fp32`` or ``bf16``.
        refused: where given, a method that this model does not support goes there with the reason, and the others go on.
        settings: own settings of methods, by name: ``{"fake_cam": {"resolution": "pixel"}}``.
        normalised: ``x`` was normalised with the model's own mean and std, which is undone.

    Raises:
        FoveateError: and its kinds, each with what was given and what to do.

    Example:
        >>> model = foveate.load("foveate:small_cnn")
        >>> why = foveate.explain(model, np.zeros((120, 160, 3), np.uint8), ["grad_cam", "centre"])
        >>> why["grad_cam"].shape, why.overlay("centre").size
        (torch.Size([1, 96, 96]), (160, 120))
    """
    asked = Asking.of(model, x, methods, layer, fuse, head, output, precision, settings, normalised)
    capture, known = asked.capture, asked.labels if labels is None else labels
    resolved = capture.target(target, score=score, against=against, labels=known)
    if resolved.name != "callable":
        note_single(capture.logits, head)
    return asked.answer(resolved, refused=refused)


def explain_each(
    model: Model,
    x: Any,
    methods: Methods = "grad_cam",
    *,
    targets: Sequence[Any] = ("pred", "label", "second"),
    contrasts: bool = True,
    layer: Layers = "auto",
    fuse: Fusion = "mean",
    labels: Labels | None = None,
    head: Head | None = None,
    output: str | int | None = None,
    precision: Precision = "fp32",
    settings: Settings | None = None,
    refused: dict[str, str] | None = None,
    normalised: bool = False,
) -> Answers:
    """Beyond the ground truth: why what the model says, why what it should say, and why the one and not the other.

    One run of the model answers all: ``explain_each(model, x, labels=y)`` has the keys ``pred``, ``label``, ``second``,
    ``pred-label`` and ``pred-second``, the last two the contrasts of the first target with each other one.

    Args:
        x: in the forms of :func:`explain`.
        targets: what to explain, each in a form that :func:`explain` takes for ``target``.
        contrasts: also the first target against each of the others. Where both are one class (an image that is
            classified rightly, ``pred`` against ``label``), the strongest other class takes its place: there is no
            question of the former kind, and ``targets[...].other`` says which class was asked against.
        labels: true classes ``[B]``, for ``"label"``.
        refused: as in :func:`explain`, with keys such as ``finer_cam for label``. A method that has no answer to a contrast
            alone is in ``left_out`` of that answer.

    Raises:
        FoveateError: as :func:`explain`.
    """
    if not targets or isinstance(targets, str):
        raise FoveateError(f"targets {targets!r} are a list of classes, such as ['pred', 'label', 'second']")
    if contrasts and any(callable(target) for target in targets):
        raise FoveateError("a callable target has no class to be asked against: give contrasts=False")
    names = [_name(target) for target in targets]
    if len(set(names)) < len(names):
        raise FoveateError(f"targets {', '.join(names)} hold one of them twice: give each once")
    asked = Asking.of(model, x, methods, layer, fuse, head, output, precision, settings, normalised)
    capture, known = asked.capture, asked.labels if labels is None else labels
    note_single(capture.logits, head)
    answers = Answers()
    for name, target in zip(names, targets, strict=True):
        answers[name] = asked.answer(capture.target(target, labels=known), name, refused=refused)
    answered = {name for answer in answers.values() for name in answer.maps}  # these may pass over contrasts
    first = answers[names[0]].target.y
    for name in names[1:] if contrasts else ():
        other = told_apart(first, answers[name].target.y, capture.logits, capture.head)
        key = f"{names[0]}-{name}"
        answers[key] = asked.answer(capture.target(first, against=other), key, optional=answered, refused=refused)
    return answers


@dataclass(frozen=True)
class Asking:
    """One run of a model on images, of which several things can be asked.

    Attributes:
        own: settings of methods, by name.
        optional: methods that came only with a group: one that the model does not support is left out.
        labels: that came along with the images.
    """

    capture: Capture
    seen: Seen
    records: Sequence[Method]
    own: Mapping[str, Mapping[str, Any]]
    optional: set[str]
    fuse: Fusion
    labels: Tensor | None

    @classmethod
    def of(
        cls,
        model: Model,
        x: Any,
        methods: Methods,
        layer: Layers,
        fuse: Fusion,
        head: Head | None,
        output: str | int | None,
        precision: Precision,
        settings: Settings | None,
        normalised: bool = False,
    ) -> Asking:
        """Run the model; arguments are those of :func:`explain`."""
        check_fusion(fuse)
        records, own, optional = chosen_methods(methods, settings)
        given = taken(model, x, normalised=normalised)
        capture = _captured(records, one_output(model, output), given.x, layer, head, precision)
        return cls(capture, _seen(capture, given, own, fuse, precision), records, own, optional, fuse, given.y)

    def answer(
        self,
        target: Target,
        question: str = "",
        *,
        settings: Settings | None = None,
        optional: Iterable[str] = (),
        refused: dict[str, str] | None = None,
    ) -> Explanation:
        """Maps of each method for one target.

        Args:
            question: what it is called in ``refused``.
            settings: of methods for this question, over their own.
            optional: methods beside those of groups that may be left out.
        """
        capture, passed_over = self.capture, self.optional | set(optional)
        explanation = Explanation({}, {}, target, ", ".join(capture.layers), self.seen, run=capture)
        if any("gradient" in record.needs and not record.contrasts for record in self.records):
            capture.grad(None, target)  # shared by all of them, so that it counts for none of them
        for record in self.records:
            own = {**self.own.get(record.name, {}), **(settings or {}).get(record.name, {})}
            try:
                _run(record, explanation, own, self.fuse)
            except FoveateError as error:
                if record.name in passed_over:
                    explanation.left_out[record.name] = str(error)
                    continue
                if refused is None or isinstance(error, LayerError):
                    raise
                refused[f"{record.name} for {question}" if question else record.name] = str(error)
        explanation.maps.update(maps.prepare_all(explanation.raw, capture.size))
        return explanation


def _seen(capture: Capture, given: Taken, own: Settings, fuse: Fusion, precision: Precision) -> Seen:
    """What a run saw, with what was asked for in a form that can be written."""
    plain = {name: {key: _plain(value) for key, value in values.items()} for name, values in own.items()}
    return Seen.of(capture, given, {"fuse": fuse, "precision": precision, "methods": plain})


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)


def _captured(
    records: Sequence[Method], model: Any, x: Tensor, layer: Layers | None, head: Head | None, precision: Precision
) -> Capture:
    """The run that all methods share; it begins at the image where one of them wants the image's gradient, guided or not."""
    if layer == "auto" and all(record.whole or record.control for record in records):
        if not any(record.control for record in records):
            layer = None  # nobody asks for one, and not every model has one
        else:
            try:
                return Capture(model, x, layer, head=head, precision=precision)
            except LayerError:
                layer = None
    needs = {need for record in records for need in record.needs}
    if needs.isdisjoint(("image_gradient", "relu")) or x.numel() > 3 * MOST_FROM_IMAGE:
        return Capture(model, x, layer, head=head, precision=precision)
    if "relu" in needs:
        with suppress(FoveateError):  # no ReLU here: the method itself says so
            return Capture(model, x, layer, guided=True, from_image=True, head=head, precision=precision)
    return Capture(model, x, layer, from_image=True, head=head, precision=precision)


def _name(target: object) -> str:
    if isinstance(target, Tensor):
        return "given"
    return "pred" if target is None else str(target)


def chosen_methods(methods: Methods, settings: Settings | None) -> tuple[list[Method], dict[str, Mapping[str, Any]], set[str]]:
    """The records of methods, their own settings by name, and the names of those that came in only with a group."""
    names, optional = ungrouped(methods)
    records = METHODS.select(names)
    own: dict[str, Mapping[str, Any]] = {}
    for given, values in (settings or {}).items():
        record = next((r for r in records if r.name == given), None) or METHODS.get(given)
        if record.name not in [r.name for r in records]:
            raise FoveateError(
                f"there are settings for {record.name!r}, but it is not among the methods: {', '.join(r.name for r in records)}"
            )
        own[record.name] = check_settings(record, values)
    return records, own, optional


def _run(record: Method, explanation: Explanation, settings: Mapping[str, Any], fuse: Fusion) -> None:
    capture = explanation.capture
    target = explanation.target
    if record.contrasts:
        target = contrast_of(capture, target, settings.get("against"))
    explanation.targets[record.name] = target
    run = record
    if len(capture.layers) > 1:
        run = over_layers(record, fuse)
        if run is record and run.several == "over" and fuse != "mean":
            settings = {"how": fuse, **settings}
        elif run.several == "layers":
            settings = {"layers": capture.layers, **settings}
    start = time.perf_counter()
    layer = capture.layer if capture.layers else None
    found = run.found(capture, layer, target, **settings)
    raw = found.map.detach()
    explanation.facts[record.name], explanation.remarks[record.name] = dict(found.facts), list(found.remarks)
    maps.check(raw)
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
            stacklevel=4,
        )
    error = run.complete(capture, layer, target, raw, **settings) if run.complete is not None else None
    explanation.completeness_error[record.name] = error


def saliency(
    model: Model,
    x: Any,
    method: str | Method = "grad_cam",
    *,
    layer: Layers = "auto",
    fuse: Fusion = "mean",
    target: object = None,
    against: object = None,
    score: str = "logit",
    labels: Labels | None = None,
    head: Head | None = None,
    output: str | int | None = None,
    precision: Precision = "fp32",
    settings: Settings | None = None,
    normalised: bool = False,
) -> Tensor:
    """The map of one method, ``M [B,H,W]`` in [0, 1]: :func:`explain` for those who want nothing but the tensor.

    Its arguments are those of :func:`explain`.

    Raises:
        FoveateError: as :func:`explain`, or several methods, which :func:`explain` takes.
    """
    if not isinstance(method, (str, Method)):
        raise FoveateError(f"saliency takes one method, and not {method!r}: foveate.explain takes several")
    METHODS.get(method)  # no group
    return explain(
        model,
        x,
        method,
        layer=layer,
        fuse=fuse,
        target=target,
        against=against,
        score=score,
        labels=labels,
        head=head,
        output=output,
        precision=precision,
        settings=settings,
        normalised=normalised,
    )[method]


__all__ = ["Explanation", "chosen_methods", "explain", "explain_each", "saliency"]
