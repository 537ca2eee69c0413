"""foveate list: what is in the registry."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.options import (
    Debug,
    Json,
    kinds,
    sentences,
)
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.records import Method

WIDE = 130  # characters, below which references are left to --json


KINDS = ("methods", "metrics", "losses", "models", "recipes")


def list_(
    kind: Annotated[str, typer.Argument(help="methods, metrics, losses, models or recipes.", autocompletion=kinds)],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Only what has all of these words in it: vit 384.", metavar="[WORD]..."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What there is: methods, metrics, losses, models or recipes."""
    with sentences(debug):
        from foveate.peers import hint
        from foveate.registry import METHODS, ungrouped

        asked = words or []
        lines = [line for line in _listing(kind) if _has(line, asked)]
        if not lines:
            one = kind.removesuffix("s")
            near = hint(one, " ".join(asked)) or f"'foveate list {kind}' shows all"
            raise FoveateError(f"no {one} has {' and '.join(map(repr, asked))} in it: {near}")
        if as_json:
            print(json.dumps(lines, indent=2))
            return
        if not any(line.get("paper") for line in lines):
            lines = [{key: value for key, value in line.items() if key != "paper"} for line in lines]
        table, console = Table(box=None, padding=(0, 2, 0, 0), header_style="dim"), Console(highlight=False)
        narrow = "settings" in lines[0] and console.width < WIDE
        hidden = {"flags", "aliases", "again", "metric"} | ({"paper", "title"} if narrow else set())
        shown = [column for column in lines[0] if column not in hidden]
        for column in shown:
            table.add_column(column, no_wrap=column in ("name", "passes"), overflow="fold")
        before = None
        for line in lines:
            again = line.get("metric") is not None and line["metric"] == before  # a column beside another of one metric
            before = line.get("metric")
            table.add_row(*("" if again and column == "settings" else escape(_cell(line[column])) for column in shown))
        console.print(table)
        if kind == "methods" and not asked:
            fast = [record.name for record in METHODS.select(ungrouped("all-fast")[0]) if not record.control]
            console.print(f"\n[dim]all-fast, of one pass, and the controls:[/] {', '.join(fast)}")
            console.print("[dim]passes: of the model for an image, forward + backward; a setting: --set rise.masks=1000[/]")


def _has(line: dict[str, Any], words: list[str]) -> bool:
    """Whether all words are in a line, as it is read or as a name is written."""
    text = " ".join(_cell(value) for key, value in line.items() if key not in ("needs", "passes", "better")).lower()
    plain = text.replace("_", "").replace("-", "")
    return all(word.lower() in text or word.lower().replace("_", "").replace("-", "") in plain for word in words)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_cell(default)}" for name, default in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(record: Any) -> dict[str, Any]:
    """A record's own settings with their defaults, as JSON has them."""
    own = inspect.signature(record.function).parameters.values()
    filled = ("target", "explained", "columns")  # by what measures
    settings = {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY and p.name not in filled}
    plain = (bool, int, float, str, list, dict, type(None))
    return {
        name: list(value) if isinstance(value, tuple) else value if isinstance(value, plain) else str(value)
        for name, value in settings.items()
        if value is not inspect.Parameter.empty
    }


# Settings that say how often a method runs the model; and methods of which no setting or need says it.
COUNTED = ("masks", "steps", "samples", "copies")
MANY = {
    "cafo": "2 + 1",
    "finer_cam": "1 + 1",
    "guided_grad_cam": "1 + 2",
    "full_grad": "a few",
    "ablation_cam": "1 + a tail per channel",
    "score_cam": "1 a channel",
    "occlusion": "1 a window",
    "caso": "tens",
}
WORDS = {
    "gradient": "a gradient",
    "image_gradient": "a gradient",
    "linear_head": "a linear head",
    "relu": "ReLUs",
    "attention": "attention",
    "stream": "a CA-Stream",
    "region": "boxes or masks",
    "layer": "a layer",
    "mask": "masks",
    "guided": "ReLUs",
}


def passes(method: Method) -> str:
    """How often a method runs the model for an image, forward + backward, in words where that depends."""
    settings = _settings(method)
    if method.name in MANY:
        return MANY[method.name]
    for name in COUNTED if method.repeats else ():
        if name in settings:
            return f"{name} ({_cell(settings[name])})"
    if method.control:
        return "0"
    return "1 + 1" if {"gradient", "image_gradient", "relu"} & set(method.needs) else "1"


def _needs(method: Method) -> list[str]:
    layer = [] if method.whole or method.control else ["a layer"]
    return list(dict.fromkeys([*layer, *(WORDS[need] for need in method.needs)]))


def _listing(kind: str) -> list[dict[str, Any]]:
    from foveate.registry import LOSSES, METHODS, METRICS

    if kind == "methods":
        flags = ("signed", "differentiable", "complete", "control")
        return [
            {
                "name": m.name,
                "title": m.title,
                "needs": _needs(m),
                "passes": passes(m),
                "settings": _settings(m),
                "flags": [f for f in flags if getattr(m, f)],
                "aliases": list(m.aliases),
                "paper": m.paper,
            }
            for m in METHODS.all().values()
        ]
    if kind == "metrics":
        return [
            {
                "name": column,
                "long_name": known.name if known.name != column else "",
                "better": known.better,
                "needs": [WORDS.get(need, need) for need in metric.needs],
                "again": metric.costly,
                "title": known.title,
                "metric": metric.name,
                "group": metric.group,
                "settings": _settings(metric),
                "paper": metric.paper,
            }
            for metric in METRICS.all().values()
            for column, known in metric.columns.items()
        ]
    if kind == "losses":
        return [
            {"name": loss.name, "title": loss.title, "needs": [WORDS[need] for need in loss.needs], "paper": loss.paper}
            for loss in LOSSES.all().values()
        ]
    if kind == "recipes":
        from foveate.training.recipe import RECIPES

        return [
            {"name": path.stem, "what": path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "), "paper": ""}
            for path in sorted(RECIPES.glob("*.yaml"))
        ]
    if kind == "models":
        from foveate._torchvision import timm, torchvision
        from foveate.models.sources import OWN

        vision = torchvision("list models").models
        names = [f"foveate:{name}" for name in OWN]
        names += [f"torchvision:{name}" for name in vision.list_models(module=vision)]
        names += [f"timm:{name}" for name in timm("list models").list_models()]
        return [{"name": name, "paper": ""} for name in names]
    raise FoveateError(f"there is no list of {kind!r}: use methods, metrics, losses, models or recipes")
