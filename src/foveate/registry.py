"""The registry: records of methods, metrics and losses, the decorators that make them, and look-up by name.

A function with a decorator in a file of ``methods/``, ``metrics/`` or ``losses/`` is all that a new one needs: the
folder is read on the first look-up, and the command line, the tables and the contract tests follow from the records.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch

from foveate import elsewhere, missing
from foveate.errors import FoveateError
from foveate.precision import uncast
from foveate.text import parse_yaml, quoted

Direction = Literal["up", "down"]


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
        needs: what the model must offer: of ``gradient`` (at the layer), ``image_gradient``, ``linear_head``, ``relu`` and
            ``attention``.
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
    needs: tuple[str, ...] = ()
    whole: bool = False
    control: bool = False
    repeats: bool = False
    inner: Method | None = None
    around: Callable[[Method], Method] | None = None
    aliases: tuple[str, ...] = ()

    def __call__(self, capture: Any, *args: Any, **settings: Any) -> Any:
        """The raw map: ``(capture, layer, target, **own settings) -> S [B,h,w]``.

        Also under the caller's inference mode, and in full precision under the caller's autocast, which the model keeps.
        """
        capture.facts, capture.remarks = {}, []
        with torch.inference_mode(False), uncast(capture.x.device.type):
            return self.function(capture, *args, **settings)


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
        return self.method(capture, None, self.target if target is None else target, **self.settings).detach()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Metric:
    """A number, or several that share their work, that says something about a map.

    Attributes:
        function: ``(capture, M [B,H,W], batch, **own settings) -> {column: [B]}``; what else it gives as ``[B,k]`` are curves,
            kept beside the columns. Parameters called ``target``, ``explained`` and ``columns`` (the wanted
            ones) are filled in.
        columns: each column with the direction that is better.
        needs: what there must be: of ``labels``, ``mask`` and ``region`` (boxes or masks) in the batch, ``layer`` of the model.
        pooled: columns that belong to the whole data and not to one image: the function gives ``{column: [B,k]}``, and this
            makes the column of the mean over images, ``[...,k] -> [...]``, such as the best of k thresholds.
        ranges: the least and the largest value of each column, on which its intervals rest; what is not here has no bounds.
        statistic: of the images that makes the table: ``mean``, or ``median`` with the range instead of an interval.
        of_model: it says something about the model and takes no map (``M`` is None): one row a table.
        costly: it runs the method again, on other networks or for other classes: left out of ``all``.
        digits: decimals that are worth printing.
    """

    name: str
    title: str
    function: Callable[..., Any]
    paper: str
    columns: Mapping[str, Direction]
    needs: tuple[str, ...] = ()
    pooled: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    of_model: bool = False
    costly: bool = False
    digits: int = 1
    statistic: Literal["mean", "median"] = "mean"
    aliases: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, capture: Any, M: torch.Tensor | None, batch: Any, **settings: Any) -> Any:
        """The values: ``(capture, M [B,H,W], batch, **own settings) -> {column: [B]}``.

        In full precision under the caller's autocast, which the model keeps. An image whose map, mask or boxes hold NaN or
        infinity, or on which the model gives such values, is not a number in every column, and never a 0.
        """
        given = self.without_value(M, batch, settings)
        clean = M if M is None else missing.without(M, given.get(missing.MAP))
        with uncast(capture.x.device.type):
            values = self.function(capture, clean, batch, **settings)
        return missing.marked(values, {} if self.name == "cost" else given, tuple(self.pooled))

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
    needs: tuple[str, ...] = ()
    replaces: bool = False
    share: bool = False
    aliases: tuple[str, ...] = ()

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """The loss of each image: ``(capture, batch, **own settings) -> [B]``."""
        return self.function(*args, **settings)


Record = TypeVar("Record", Method, Metric, Loss)


class Register(Generic[Record]):
    """Records of one kind by name; the files of its folder are imported on the first look-up."""

    def __init__(self, kind: str, folder: str, groups: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.groups = groups  # words that stand for several records
        self.folder = folder
        self.fallbacks: list[Callable[[str], Record | None]] = []  # asked for names that are not in the register
        self._records: dict[str, Record] = {}
        self._read = False
        self._lock = threading.RLock()

    def add(self, record: Record) -> None:
        """Put a record under its name and aliases.

        Raises:
            FoveateError: another function has one of the names already.
        """
        names: tuple[str, ...] = (record.name, *record.aliases)
        for name in names:
            known = self._find(name)
            if known is not None and _place(known) != _place(record):
                raise FoveateError(f"{self.kind} {name!r} is registered already, by {known.function.__module__}")
        self._records[record.name] = record

    def all(self) -> dict[str, Record]:
        """Every record by name, in alphabetical order."""
        self._read_folder()
        return dict(sorted(self._records.items()))

    def get(self, name: str | Record, groups: bool = False) -> Record:
        """The record of a name or alias; case, hyphens and underscores do not matter. A record is itself.

        Args:
            groups: whether the caller takes groups too, so that a wrong name may be one.

        Raises:
            FoveateError: no such name; the message has the nearest ones.
        """
        if not isinstance(name, str):
            return name
        self._read_folder()
        record: Record | None = self._find(name)
        for fallback in self.fallbacks if record is None else ():
            record = record or fallback(name)
        if record is None:
            names: list[str] = list(self.groups) if groups else []
            names += [name for record in self._records.values() for name in getattr(record, "columns", (record.name,))]
            near = difflib.get_close_matches(name, names, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(names))}"
            hint = elsewhere.hint(self.kind, name) or hint
            raise FoveateError(f"{self.kind} {name!r} is unknown: {hint}")
        return record

    def known(self, name: str) -> Record | None:
        """The record of a name, or None."""
        try:
            return self.get(name)
        except FoveateError:
            return None

    def select(self, names: str | Record | Sequence[str | Record]) -> list[Record]:
        """The records of one name or several, or records themselves, each once, in the order given.

        Raises:
            FoveateError: no such name, or none at all.
        """
        given = names if isinstance(names, Sequence) and not isinstance(names, str) else [names]
        found = [self.get(name) for name in dict.fromkeys(given)]
        records = list({record.name: record for record in found}.values())
        for record in found:
            if not any(record.function is known.function for known in records):
                raise FoveateError(f"two {self.kind}s are called {record.name!r}: give one of them a name of its own")
        if not records:
            raise FoveateError(f"no {self.kind} was named: see 'foveate list {self.kind}s'")
        return records

    def _find(self, name: str) -> Record | None:
        key = _plain(name)
        known: Record
        for known in self._records.values():
            if key in map(_plain, (known.name, *known.aliases)):
                return known
        return None

    def _read_folder(self) -> None:
        with self._lock:  # another thread waits until all of it is there
            if self._read:
                return
            self._read = True  # before the imports, which look names up themselves
            try:
                package = importlib.import_module(self.folder)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self.folder}.{module.name}")
            except BaseException:
                self._read = False
                raise


def ungrouped(methods: str | Method | Sequence[str | Method]) -> tuple[list[str | Method], set[str]]:
    """Methods with ``all``, ``all-fast`` (of one pass, and controls) and ``controls`` written out, controls last.

    The second value has the names that came in only with a group: where the model cannot have one, nobody asked for it.
    """
    named: list[str | Method] = []
    asked: set[str] = set()
    grouped: set[str] = set()
    for item in [methods] if isinstance(methods, (str, Method)) else methods:
        group = _plain(item) if isinstance(item, str) else ""
        if group not in map(_plain, METHODS.groups):
            named.append(item)
            asked.add(METHODS.get(item, groups=True).name)
            continue
        for name, record in sorted(METHODS.all().items(), key=lambda item: item[1].control):
            if group == "all" or record.control or (group == "allfast" and not record.repeats):
                named.append(name)
                grouped.add(name)
    return named, grouped - asked


def _place(record: Method | Metric | Loss) -> tuple[str, str]:
    return record.function.__module__, record.function.__qualname__


def _plain(name: str) -> str:
    return name.lower().replace("+", "p").replace("_", "").replace("-", "").replace(" ", "")


def check_settings(record: Method | Metric | Loss, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with values of the types that the function says: never ``"many"`` where it takes an int.

    Raises:
        FoveateError: not one of the record's own settings, or a value of another type; the message has what it takes.
    """
    known = [p.name for p in inspect.signature(record.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise FoveateError(
                f"{record.name} has no setting {name!r}: " + (f"it has {', '.join(known)}" if known else "it has none at all")
            )
    return {name: _typed(record, name, value) for name, value in settings.items()}


def _typed(record: Method | Metric | Loss, name: str, value: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    annotation = typing.get_type_hints(record.function).get(name, Any)
    if annotation in (Any, object):
        return value
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):  # a list as people write it: 0.1, or 0.1,0.2
            with suppress(ValidationError):
                return adapter.validate_python(_parts(value) if isinstance(value, str) else [value])
        reasons = "; ".join(dict.fromkeys(problem["msg"][0].lower() + problem["msg"][1:] for problem in error.errors()))
        raise FoveateError(f"{record.name}.{name} cannot be {quoted(value)}: {reasons}") from None


def _parts(text: str) -> list[Any]:
    try:
        return [parse_yaml(part, "a value") for part in text.split(",")]
    except FoveateError:
        return [text]


METHODS: Register[Method] = Register("method", "foveate.methods", groups=("all", "all-fast", "controls"))
METRICS: Register[Metric] = Register("metric", "foveate.metrics")
LOSSES: Register[Loss] = Register("loss", "foveate.losses")


def is_control(name: str) -> bool:
    """Whether a method of a table ignores the model; a method that is not registered is none."""
    record = METHODS.known(name)
    return record is not None and record.control


def title_of(name: str) -> str:
    """How a method is called in a sentence."""
    record = METHODS.known(name)
    return name if record is None else record.title


Function = TypeVar("Function", bound=Callable[..., Any])


def method(
    name: str,
    *,
    title: str,
    paper: str,
    signed: bool = False,
    differentiable: bool = False,
    complete: Callable[..., Any] | None = None,
    complete_to: float = 1e-10,
    contrasts: bool = False,
    needs: tuple[str, ...] = (),
    whole: bool = False,
    control: bool = False,
    repeats: bool = False,
    aliases: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Register ``(capture, layer, target, **own settings) -> S [B,h,w]`` as a method; the function stays as it is."""

    def add(function: Function) -> Function:
        flags: dict[str, Any] = {"signed": signed, "differentiable": differentiable, "contrasts": contrasts}
        flags |= {"whole": whole, "control": control, "repeats": repeats}
        promise: dict[str, Any] = {"complete": complete, "complete_to": complete_to}
        METHODS.add(Method(name, title, function, paper, needs=needs, aliases=aliases, **flags, **promise))
        return function

    return add


def metric(
    name: str,
    *,
    title: str,
    paper: str,
    columns: Mapping[str, Direction],
    needs: tuple[str, ...] = (),
    pooled: Mapping[str, Callable[[Any], Any]] | None = None,
    of_model: bool = False,
    costly: bool = False,
    digits: int = 1,
    statistic: Literal["mean", "median"] = "mean",
    aliases: tuple[str, ...] = (),
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Callable[[Function], Function]:
    """Register ``(capture, M [B,H,W], batch, **own settings) -> {column: [B]}`` as a metric."""

    def add(function: Function) -> Function:
        names, rest = (*columns, *aliases), (of_model, costly, digits, statistic)
        METRICS.add(
            Metric(name, title, function, paper, dict(columns), needs, dict(pooled or {}), *rest, names, dict(ranges or {}))
        )
        return function

    return add


def loss(
    name: str,
    *,
    title: str,
    paper: str,
    needs: tuple[str, ...] = (),
    replaces: bool = False,
    share: bool = False,
    aliases: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Register ``(capture, batch, **own settings) -> [B]`` as a loss."""

    def add(function: Function) -> Function:
        LOSSES.add(Loss(name, title, function, paper, needs, replaces, share, aliases))
        return function

    return add
