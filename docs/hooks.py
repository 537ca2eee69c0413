"""For mkdocs: tables from foveate's registry, wherever a page has <!-- table: methods --> or the like."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from foveate.registry import LOSSES, METHODS, METRICS

MARK = re.compile(r"^<!-- table: (\w+) -->$", re.M)
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page with its tables filled in."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown).replace("<!-- gallery -->", gallery())


def rows(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def formula(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, which states the formula."""
    first = (function.__doc__ or "").strip().split("\n\n")[0]
    return ROLE.sub(r"`\1`", " ".join(first.split())).replace("``", "`").replace("|", "&#124;")


def linked(name: str, function: Callable[..., Any]) -> str:
    """A name, linked to its function's place in the API reference."""
    return f"[`{name}`][{function.__module__}.{function.__qualname__}]"


def shown(text: str) -> str:
    """Formulas in code take HTML's bar only outside of the code."""
    return re.sub(r"`([^`]*)`", lambda m: "<code>" + m[1].replace("<", "&lt;") + "</code>", text)


def records(register: Any) -> str:
    lines = ([linked(n, r.function), r.paper, shown(formula(r.function))] for n, r in register.all().items())
    return rows(("name", "paper", "formula"), lines)


def columns() -> str:
    arrows = {"up": "↑", "down": "↓"}
    lines = (
        [f"`{short}`", column.title, arrows[column.better], column.about, column.formula.replace("|", "&#124;")]
        for record in METRICS.all().values()
        for short, column in record.columns.items()
    )
    return rows(("column", "title", "better", "question", "value of one image"), lines)


def gallery() -> str:
    """A picture of each method, by kind, below the photographs."""
    kinds: dict[str, list[str]] = {}
    for name, record in METHODS.all().items():
        room = record.function.__module__.rpartition(".")[2]
        kind = "Controls" if record.control else KINDS.get(room, "Others")
        kinds.setdefault(kind, []).append(figure(name, record.title, record.paper))
    parts = [grid([figure("photograph", "The pictures", "")])]
    parts += [
        f"## {kind}\n\n{grid(kinds[kind])}" for kind in (*dict.fromkeys(KINDS.values()), "Others", "Controls") if kind in kinds
    ]
    return "\n\n".join(parts)


def grid(figures: list[str]) -> str:
    return '<div class="gallery" markdown>\n' + "\n".join(figures) + "\n</div>"


def figure(name: str, title: str, paper: str) -> str:
    below = f"<strong>{title}</strong><br><code>{name}</code><br>{paper}" if paper else f"<strong>{title}</strong>"
    picture = f'<img src="gallery/{name}.jpg" alt="{title} on an orca on grass and a leopard on water">'
    return f"<figure>{picture}<figcaption>{below}</figcaption></figure>"


KINDS = {
    "cam": "Class activation maps",
    "finer": "Class activation maps",
    "score": "Class activation maps",
    "eigen": "Class activation maps",
    "opti": "Found by optimisation",
    "mask": "Found by optimisation",
    "perturbation": "Black box",
    "gradient": "Gradients at the image",
    "fullgrad": "Gradients at the image",
    "caso": "Second order",
    "rollout": "Attention",
    "stream": "Attention",
}
TABLES = {
    "methods": lambda: records(METHODS),
    "metrics": lambda: records(METRICS),
    "losses": lambda: records(LOSSES),
    "columns": columns,
}
