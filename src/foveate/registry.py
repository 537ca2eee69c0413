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
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

from foveate import peers
from foveate.disk.text import parse_yaml, quoted
from foveate.errors import FoveateError
from foveate.records import (
    GROUPS,
    Column,
    Direction,
    Explained,
    Loss,
    LossNeed,
    Method,
    MethodNeed,
    Metric,
    MetricNeed,
    Spent,
    plain,
)

__all__ = ["Column", "Direction", "Explained", "Loss", "Method", "Metric", "Register", "Spent", "loss", "method", "metric"]

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
            names += [name for record in self._records.values() for name in _names(record)]
            near = difflib.get_close_matches(name, names, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(names))}"
            hint = peers.hint(self.kind, name) or hint
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
        key = plain(name)
        known: Record
        for known in self._records.values():
            if key in map(plain, (known.name, known.title, *known.aliases)):
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

    The second value has the names that came in only with a group: where the model does not support one, nobody asked for it.
    """
    named: list[str | Method] = []
    asked: set[str] = set()
    grouped: set[str] = set()
    for item in [methods] if isinstance(methods, (str, Method)) else methods:
        group = plain(item) if isinstance(item, str) else ""
        if group not in map(plain, METHODS.groups):
            named.append(item)
            asked.add(METHODS.get(item, groups=True).name)
            continue
        for name, record in sorted(METHODS.all().items(), key=lambda item: item[1].control):
            if group == "all" or record.control or (group == "allfast" and not record.repeats):
                named.append(name)
                grouped.add(name)
    return named, grouped - asked


def _names(record: Method | Metric | Loss) -> list[str]:
    """The names of a record that a message lists: of a metric its columns, their long names, and itself."""
    if not isinstance(record, Metric):
        return [record.name]
    both = (name for short, column in record.columns.items() for name in (short, column.name))
    return list(dict.fromkeys((*both, record.name)))


def _place(record: Method | Metric | Loss) -> tuple[str, str]:
    return record.function.__module__, record.function.__qualname__


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
METRICS: Register[Metric] = Register("metric", "foveate.metrics", groups=("all", *(name for name in GROUPS if name != "other")))
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
    needs: tuple[MethodNeed, ...] = (),
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
    columns: Mapping[str, Column | Direction],
    needs: tuple[MetricNeed, ...] = (),
    pooled: Mapping[str, Callable[[Any], Any]] | None = None,
    of_model: bool = False,
    costly: bool = False,
    digits: int = 1,
    statistic: Literal["mean", "median"] = "mean",
    aliases: tuple[str, ...] = (),
    group: str = "other",
) -> Callable[[Function], Function]:
    """Register ``(capture, M [B,H,W], batch, **own settings) -> {column: [B]}`` as a metric."""
    if group not in GROUPS:
        raise FoveateError(f"metric {name!r} belongs to no group {group!r}: use one of {', '.join(GROUPS)}")

    def add(function: Function) -> Function:
        known = {short: _described(short, column) for short, column in columns.items()}
        names = (*known, *(column.name for short, column in known.items() if column.name not in (short, name)), *aliases)
        rest = (of_model, costly, digits, statistic)
        METRICS.add(Metric(name, title, function, paper, known, needs, dict(pooled or {}), *rest, names, group))
        return function

    return add


def _described(short: str, column: Column | Direction) -> Column:
    """A column with its names filled in."""
    column = Column(column) if isinstance(column, str) else column
    name = column.name or short
    return replace(column, name=name, title=column.title or name.replace("_", " ").capitalize())


def loss(
    name: str,
    *,
    title: str,
    paper: str,
    needs: tuple[LossNeed, ...] = (),
    replaces: bool = False,
    share: bool = False,
    aliases: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Register ``(capture, batch, **own settings) -> [B]`` as a loss."""

    def add(function: Function) -> Function:
        LOSSES.add(Loss(name, title, function, paper, needs, replaces, share, aliases))
        return function

    return add
