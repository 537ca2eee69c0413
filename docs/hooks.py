"""For mkdocs: tables from foveate's registry, wherever a page has a line such as <!-- table: methods -->."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from foveate.registry import LOSSES, METHODS, METRICS

MARK = re.compile(r"^<!-- table: (\w+) -->$", re.M)
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page with its tables filled in."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def rows(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def formula(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, which states the formula."""
    first = (function.__doc__ or "").strip().split("\n\n")[0]
    return ROLE.sub(r"`\1`", " ".join(first.split())).replace("``", "`").replace("|", "&#124;")


def code(function: Callable[..., Any]) -> str:
    """The function, linked to its place in the API reference."""
    return f"[`{function.__name__}`][{function.__module__}.{function.__qualname__}]"


def shown(text: str) -> str:
    """Formulas in code take HTML's bar only outside of the code."""
    return re.sub(r"`([^`]*)`", lambda m: "<code>" + m[1].replace("<", "&lt;") + "</code>", text)


def methods() -> str:
    lines = ([f"`{n}`", r.paper, shown(formula(r.function)), code(r.function)] for n, r in METHODS.all().items())
    return rows(("method", "paper", "formula", "function"), lines)


def metrics() -> str:
    lines = (
        [", ".join(f"`{c}`" for c in r.columns), r.paper, shown(formula(r.function)), code(r.function)]
        for r in METRICS.all().values()
    )
    return rows(("columns", "paper", "formula", "function"), lines)


def losses() -> str:
    """The loss on a capture, after the formula of the loss on maps that it names first."""
    lines = ([f"`{n}`", r.paper, shown(formula(r.function)), code(r.function)] for n, r in LOSSES.all().items())
    return rows(("loss", "paper", "what it is", "function"), lines)


def columns() -> str:
    arrows = {"up": "↑", "down": "↓"}
    lines = (
        [f"`{short}`", column.title, arrows[column.better], column.about, column.formula.replace("|", "&#124;")]
        for record in METRICS.all().values()
        for short, column in record.columns.items()
    )
    return rows(("column", "title", "better", "question", "value of one image"), lines)


TABLES = {"methods": methods, "metrics": metrics, "losses": losses, "columns": columns}
