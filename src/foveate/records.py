"""The records of methods, metrics and losses: what is known of each, and how each is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from foveate import missing
from foveate.precision import uncast

Direction = Literal["up", "down"]
# What a record may ask for. A method, of the model; a metric, of the data and of the model; a loss, of both.
MethodNeed = Literal["gradient", "image_gradient", "linear_head", "relu", "attention", "stream"]
MetricNeed = Literal["labels", "mask", "region", "layer"]
LossNeed = Literal["mask", "region", "linear_head", "guided"]
FILLED_IN = ("target", "explained", "columns")  # settings of a metric that are no choice: who measures fills them in
# Groups of metrics, each with the question that its columns answer, in the order of a page.
GROUPS = {
    "faithfulness": "Does the map show what the model needs?",
    "localization": "Does the map lie on the object?",
    "sanity": "Does the map depend on the model and on the class?",
    "sparsity": "Is the map concentrated on few places?",
    "cost": "What does it cost?",
    "other": "Other columns",
}


def plain(name: str) -> str:
    """A name without case, hyphens, underscores and spaces, as names are compared."""
    return name.lower().replace("+", "p").replace("_", "").replace("-", "").replace(" ", "")


@dataclass(frozen=True)
class Found:
    """What a method may return instead of its map alone.

    Attributes:
        map: ``S [B,h,w]``.
        facts: numbers of each image, such as the sparsity that was reached: ``{name: [B]}``.
        remarks: the same for people, one sentence per image, or none.
    """

    map: torch.Tensor
    facts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Method:
    """A way to make saliency maps.

    Attributes:
        function: ``(capture, layer, target, **own settings) -> S [B,h,w]``, raw: no ReLU, no scaling beyond the paper's.
        paper: where it comes from.
        signed: its map has negative values with a meaning (evidence against).
        differentiable: the map is a differentiable function of the model's parameters (``create_graph``).
        complete: where a theorem says what the map adds up to: ``(capture, layer, target, S, **own settings)`` to how far
            it misses that, relative to the score, ``[B]``; None where the theorem does not apply to the model at hand.
        complete_to: what it misses at most by, at the default settings.
        contrasts: it explains a class against another, the strongest other one where none is named.
        needs: what the model must offer; ``gradient`` is that at the layer.
        whole: it looks at the image and not at a layer, so that ``layer`` has no say.
        control: it ignores the model: every table must contain such rows, to show what a metric lets pass.
        repeats: it runs the model, or a part of it, many times for one map: seconds and not milliseconds.
        inner: of a wrapped method, the method inside,
        around: and the same wrapper around another one.
        aliases: other names that people know.
    """

    name: str
    title: str
    function: Callable[..., Any]
    paper: str
    signed: bool = False
    differentiable: bool = False
    complete: Callable[..., Any] | None = None
    complete_to: float = 1e-10
    contrasts: bool = False
    needs: tuple[MethodNeed, ...] = ()
    whole: bool = False
    control: bool = False
    repeats: bool = False
    inner: Method | None = None
    around: Callable[[Method], Method] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def several(self) -> Literal["layers", "over"] | None:
        """Its own setting that takes the paths of several layers; None where it looks at one."""
        known = inspect.signature(self.function).parameters
        return "over" if "over" in known else "layers" if "layers" in known else None

    def __call__(self, capture: Any, *args: Any, **settings: Any) -> torch.Tensor:
        """The raw map: ``(capture, layer, target, **own settings) -> S [B,h,w]``."""
        return self.found(capture, *args, **settings).map

    def found(self, capture: Any, *args: Any, **settings: Any) -> Found:
        """The raw map, and what else the method knows of it.

        Also under the caller's inference mode, and in full precision under the caller's autocast, which the model keeps.
        """
        with torch.inference_mode(False), uncast(capture.x.device.type):
            found = self.function(capture, *args, **settings)
        return found if isinstance(found, Found) else Found(found)


@dataclass(frozen=True)
class Spent:
    """What one image cost a method, its share of the run of the model included."""

    seconds: float
    forwards: float
    backwards: float
    tails: float
    megabytes: float


@dataclass(frozen=True)
class Explained:
    """Where a map came from, for metrics that ask for it by a parameter ``explained``.

    Attributes:
        method: the record that made it.
        raw: the map as the method gave it, ``[B,h,w]``.
        target: the score that was explained.
        settings: the method's own.
        spent: what it cost, where that was measured.
        facts: what else the method knows of its maps, ``{name: [B]}``.
    """

    method: Method
    raw: torch.Tensor
    target: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    spent: Spent | None = None
    facts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def again(self, capture: Any, target: Any = None) -> torch.Tensor:
        """The same method on another capture, or for another target: ``[B,h,w]``, without a graph."""
        return self.method(capture, None, self.target if target is None else target, **self.settings).detach()


@dataclass(frozen=True)
class Column:
    """A column of a metric, and what a reader needs to understand it.

    Attributes:
        better: the direction that is better.
        name: the long name, which stands for the column everywhere: ``average_drop``; the column itself where empty.
        title: how it is headed and called in sentences: ``Average Drop``; made of the name where empty.
        unit: ``%``, ``s``, ``MB``, or nothing.
        range: the least and the largest value, on which its intervals rest; None for what has no bounds.
        formula: of one image's value.
        about: what it asks, in one sentence.
        good, bad: an example of each.
    """

    better: Direction
    name: str = ""
    title: str = ""
    unit: str = ""
    range: tuple[float, float] | None = None
    formula: str = ""
    about: str = ""
    good: str = ""
    bad: str = ""


@dataclass(frozen=True)
class Metric:
    """A number, or several that share their work, that says something about a map.

    Attributes:
        function: ``(capture, M [B,H,W], batch, **own settings) -> {column: [B]}``; what else it gives as ``[B,k]`` are curves,
            kept beside the columns. Parameters called ``target``, ``explained`` and ``columns`` (the wanted
            ones) are filled in.
        columns: each column with what is known of it, or with the direction that is better alone.
        needs: what there must be: of ``labels``, ``mask`` and ``region`` (boxes or masks) in the batch, ``layer`` of the model.
        pooled: columns that belong to the whole data and not to one image: the function gives ``{column: [B,k]}``, and this
            makes the column of the mean over images, ``[...,k] -> [...]``, such as the best of k thresholds.
        statistic: of the images that makes the table: ``mean``, or ``median`` with the range instead of an interval.
        of_model: it says something about the model and takes no map (``M`` is None): one row a table.
        costly: it runs the method again, on other networks or for other classes: left out of ``all``.
        digits: decimals that are worth printing.
        group: the question that it belongs to: one of :data:`GROUPS`.
    """

    name: str
    title: str
    function: Callable[..., Any]
    paper: str
    columns: Mapping[str, Column]
    needs: tuple[MetricNeed, ...] = ()
    pooled: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    of_model: bool = False
    costly: bool = False
    digits: int = 1
    statistic: Literal["mean", "median"] = "mean"
    aliases: tuple[str, ...] = ()
    group: str = "other"

    def __call__(self, capture: Any, M: torch.Tensor | None, batch: Any, **settings: Any) -> Any:
        """The values: ``(capture, M [B,H,W], batch, **own settings) -> {column: [B]}``.

        In full precision under the caller's autocast, which the model keeps. An image whose map, mask or boxes hold NaN or
        infinity, or on which the model gives such values, is NaN in every column, and never 0.
        """
        given = self.without_value(M, batch, settings)
        clean = M if M is None else missing.without(M, given.get(missing.MAP))
        with uncast(capture.x.device.type):
            values = self.function(capture, clean, batch, **settings)
        return missing.marked(values, {} if self.name == "cost" else given, tuple(self.pooled))

    @property
    def filled_in(self) -> tuple[str, ...]:
        """Those of :data:`FILLED_IN` that it takes."""
        return tuple(name for name in FILLED_IN if name in inspect.signature(self.function).parameters)

    def column(self, name: str) -> str | None:
        """The column that a name stands for, short or long; None for the metric's own name, which stands for all of them."""
        if plain(name) == plain(self.name) and self.name not in self.columns:
            return None
        names = {short: (short, column.name) for short, column in self.columns.items()}
        return next((short for short, both in names.items() if plain(name) in map(plain, both)), None)

    def without_value(self, M: torch.Tensor | None, batch: Any, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The images that it can say nothing about for what it is given, by reason: ``[B]`` bool."""
        raw = getattr(settings.get("explained"), "raw", None)
        return missing.inputs(M, batch, self.needs, raw, settings.get("region", "auto"))


@dataclass(frozen=True)
class Loss:
    """What is added to cross-entropy: ``(capture, batch, **own settings) -> [B]``, differentiable in the parameters.

    Attributes:
        needs: of ``mask``, ``region`` (masks or boxes), ``linear_head`` and ``guided``: a capture of the layer and of
            ``"input"``, made with ``guided=True``.
        replaces: it is a cross-entropy of its own, and stands instead of the plain one.
        share: its value is a share in [0, 1], so that 1 less it says how well the map fits.
    """

    name: str
    title: str
    function: Callable[..., Any]
    paper: str
    needs: tuple[LossNeed, ...] = ()
    replaces: bool = False
    share: bool = False
    aliases: tuple[str, ...] = ()

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """The loss of each image: ``(capture, batch, **own settings) -> [B]``."""
        return self.function(*args, **settings)
