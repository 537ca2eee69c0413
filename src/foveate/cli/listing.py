"""foveate list: what is in the registry."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.options import (
    Debug,
    Json,
    sentences,
)
from foveate.errors import FoveateError

WIDE = 130  # characters, below which references are left to --json


def list_(
    kind: Annotated[str, typer.Argument(help="methods, metrics, losses, models or recipes.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What there is: methods, metrics, losses, models or recipes."""
    with sentences(debug):
        from foveate.registry import METHODS, ungrouped

        lines = _listing(kind)
        if as_json:
            print(json.dumps(lines, indent=2))
            return
        if not any(line.get("paper") for line in lines):
            lines = [{key: value for key, value in line.items() if key != "paper"} for line in lines]
        table, console = Table(box=None, padding=(0, 2), header_style="dim"), Console(highlight=False)
        hidden = {"flags", "aliases", "again"} | ({"paper"} if kind == "metrics" and console.width < WIDE else set())
        shown = [column for column in lines[0] if column not in hidden]
        for column in shown:
            table.add_column(column, no_wrap=column == "name")
        for line in lines:
            cells = [", ".join(line[column]) if isinstance(line[column], list) else str(line[column]) for column in shown]
            table.add_row(*map(escape, cells))
        console.print(table)
        if kind == "methods":
            fast = [record.name for record in METHODS.select(ungrouped("all-fast")[0]) if not record.control]
            console.print(f"\n[dim]all-fast, of one pass, and the controls:[/] {', '.join(fast)}")


def _listing(kind: str) -> list[dict[str, Any]]:
    from foveate.registry import LOSSES, METHODS, METRICS

    if kind == "methods":
        flags = ("signed", "differentiable", "complete", "control")
        return [
            {
                "name": m.name,
                "title": m.title,
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
                "long_name": known.name,
                "better": known.better,
                "needs": ["boxes or masks" if need == "region" else need for need in metric.needs],
                "again": metric.costly,
                "title": known.title,
                "paper": metric.paper,
            }
            for metric in METRICS.all().values()
            for column, known in metric.columns.items()
        ]
    if kind == "losses":
        words = {"region": "masks or boxes", "mask": "masks", "linear_head": "a linear head", "guided": "ReLUs"}
        return [
            {"name": loss.name, "title": loss.title, "needs": [words[need] for need in loss.needs], "paper": loss.paper}
            for loss in LOSSES.all().values()
        ]
    if kind == "recipes":
        from foveate.recipe import RECIPES

        return [
            {"name": path.stem, "what": path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "), "paper": ""}
            for path in sorted(RECIPES.glob("*.yaml"))
        ]
    if kind == "models":
        from foveate._torchvision import timm, torchvision
        from foveate.models.load import OWN

        vision = torchvision().models
        names = [f"foveate:{name}" for name in OWN]
        names += [f"torchvision:{name}" for name in vision.list_models(module=vision)]
        names += [f"timm:{name}" for name in timm().list_models()]
        return [{"name": name, "paper": ""} for name in names]
    raise FoveateError(f"there is no list of {kind!r}: use methods, metrics, losses, models or recipes")
