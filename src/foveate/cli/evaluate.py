"""foveate evaluate: methods x metrics x data, as a table."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.options import (
    FAILURES,
    Classes,
    Debug,
    Device,
    HeadKind,
    Json,
    Layer,
    Mean,
    Model,
    NumClasses,
    Out,
    PrecisionOption,
    Pretrained,
    Setting,
    Size,
    Std,
    Weights,
    check_precision,
    err,
    open_model,
    out_folder,
    own_settings,
    print_notes,
    progress,
    renumbered,
    sentences,
)
from foveate.errors import FoveateError


def evaluate(
    data: Annotated[str, typer.Argument(help="A folder with labels.csv, a folder with one folder a class, or 'scenes'.")],
    model: Model,
    weights: Weights = None,
    pretrained: Pretrained = False,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = "grad_cam,fake_cam,random,centre",
    metrics: Annotated[str, typer.Option(help="Columns, separated by commas, or 'all' that the data allows.")] = "all",
    layer: Layer = "auto",
    target: Annotated[str, typer.Option(help="The class explained and scored: label, pred or second.")] = "label",
    limit: Annotated[int | None, typer.Option(min=1, help="The first N images only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    setting: Setting = None,
    precision: PrecisionOption = "fp32",
    out: Out = "evaluated",
    head: HeadKind = None,
    num_classes: NumClasses = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    classes: Classes = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A table of methods and metrics on a data set, with 95 % intervals."""
    with sentences(debug):
        import pandas as pd
        import torch
        from torch.utils.data import Subset

        from foveate import __version__
        from foveate.data import scenes
        from foveate.data.folder import open_folder
        from foveate.evaluate import evaluate as run
        from foveate.evaluate import readable, summarize

        classifier = open_model(model, weights, pretrained, num_classes, size, mean, std, classes, device)
        check_precision(precision)
        settings = own_settings(setting)
        source: Any
        if data == "scenes":
            source = scenes.make("test", 0, classifier.preprocess.crop[0])
        else:
            source = open_folder(data, classifier.preprocess)
        source = renumbered(source, classifier, data)
        folder = out_folder(out)
        if limit is not None and limit < len(source):
            source = Subset(source, range(limit))
        failures: list[tuple[str, str]] = []
        order = progress(range(len(source)), "measuring", quiet=as_json)
        rows = run(
            classifier,
            readable(source, order, failures),
            methods.split(","),
            "all" if metrics == "all" else metrics.split(","),
            layer=layer,
            target=target,
            batch_size=batch_size,
            head=head,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
            settings=settings,
        )
        if rows.empty:
            raise FoveateError("; ".join(reason for _, reason in failures[:3]) or f"{data!r} holds no images")
        table = summarize(rows)
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "rows" / "rows.parquet")
        table.to_csv(folder / "table.csv")
        wide = _wide(table)
        (folder / "table.md").write_text(_markdown(wide), encoding="utf-8")
        call = {"data": data, "model": model, "methods": methods, "metrics": metrics, "layer": layer, "target": target}
        versions = {"foveate": __version__, "torch": torch.__version__, "pandas": pd.__version__}
        left_out = [{"file": file, "reason": reason} for file, reason in failures]
        (folder / "run.json").write_text(
            json.dumps(
                {
                    "arguments": {**call, "limit": limit, "precision": precision, "settings": settings},
                    "versions": versions,
                    "failures": left_out,
                    "degenerate": rows.attrs["degenerate"],
                },
                indent=2,
            )
            + "\n",
            encoding="utf-8",
        )
        if as_json:
            nested: dict[str, dict[str, Any]] = {}
            for (name, column), line in table.iterrows():  # type: ignore[misc]
                numbers = {key: _finite(line[key]) for key in ("mean", "low", "high")}
                nested.setdefault(name, {})[column] = {**numbers, "n": int(line["n"])}
            print(
                json.dumps(
                    {"table": nested, "out": str(folder), "failures": left_out, "degenerate": rows.attrs["degenerate"]},
                    indent=2,
                )
            )
        else:
            _print_wide(wide)
            Console(highlight=False, soft_wrap=True).print(
                f"class: {target}; masked in pixel space, black; 95 % bootstrap intervals; written to [bold]{escape(out)}[/]"
            )
        print_notes(classifier)
        for _, reason in failures:
            err.print(f"[bold red]left out:[/] {escape(reason)}", soft_wrap=True)
        if failures:
            raise typer.Exit(FAILURES)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _wide(table: Any) -> list[list[str]]:
    """Lines of a table with a row a method: the header first, then ``mean [low, high]``."""
    from foveate.registry import METHODS, METRICS

    # The thesis' order first, then what it has not.
    order = ["AD", "AG", "AI", "I", "D", "OM", "LE", "F1", "BA", "SP", "EP", "SM", "T"]
    columns = sorted(
        dict.fromkeys(table.index.get_level_values("column")),
        key=lambda column: order.index(column) if column in order else len(order),
    )
    arrows = {name: "↓" if way == "down" else "↑" for record in METRICS.all().values() for name, way in record.columns.items()}
    lines = [["method", *(f"{column} {arrows[column]}" for column in columns)]]
    for name in dict.fromkeys(table.index.get_level_values("method")):
        cells = []
        for column in columns:
            line = table.loc[(name, column)]
            digits = 3 if column == "mass_inside" else 1
            cells.append(f"{line['mean']:.{digits}f} [{line['low']:.{digits}f}, {line['high']:.{digits}f}]")
        lines.append([name + (" (control)" if METHODS.get(name).control else ""), *cells])
    return lines


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] + ["---:"] * (len(lines[0]) - 1), *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _print_wide(lines: list[list[str]]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for i, column in enumerate(lines[0]):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    for line in lines[1:]:
        cells = [cell.partition(" [") for cell in line[1:]]
        table.add_row(escape(line[0]), *(f"{mean}\n[dim]{low.rstrip(']').replace(', ', '–')}[/]" for mean, _, low in cells))
    Console(highlight=False).print(table)
