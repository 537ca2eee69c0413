"""foveate compare: runs side by side, and a gate for a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.options import FAILURES, Debug, Json, err, print_note, sentences
from foveate.errors import FoveateError, printable, required

if TYPE_CHECKING:
    import pandas as pd

    from foveate.evaluation.compare import Comparison

WIDTH = 5  # columns beside each other in a terminal


def compare(
    run: Annotated[
        list[str], typer.Argument(help="Folders of finished runs, all of evaluate or all of train; the first is the reference.")
    ],
    out: Annotated[str | None, typer.Option("--out", "-o", help="A page to write: FILE.html.")] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=CHANGE or METHOD.COLUMN=CHANGE: exit with 1 where a change is worse, as AG=-2. Repeat."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page that is there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Two or more runs side by side: of evaluate, paired by image; of train, a line a recipe, paired by seed and fold."""
    with sentences(debug):
        required("compare", "pandas", "pyarrow", "scipy", "matplotlib", "jinja2")
        from foveate.training.saved import is_trained

        if any(map(is_trained, run)):
            _trainings(run, out, fail_under, as_json, overwrite)
            return
        from foveate.evaluation import compare as comparing
        from foveate.report import evaluation_comparison as comparison

        limits = [comparing.Limit.of(text) for text in fail_under or []]
        _check_page(out, overwrite)
        result = comparing.compare(run)
        failures = result.failures(limits)
        if out is not None:
            comparison.write(out, result, failures)
        if as_json:
            print(
                json.dumps(
                    {"runs": result.names, "table": _cells(result.frame), "notes": result.notes, "failures": failures}, indent=2
                )
            )
        else:
            _print(result)
            if out is not None:
                err.print(f"written to [bold]{escape(printable(out))}[/]")
        for note in result.notes:
            print_note(note)
        for sentence in failures:
            err.print(f"[bold red]worse:[/] {escape(sentence)}", soft_wrap=True)
        if failures:
            raise typer.Exit(FAILURES)


def _check_page(out: str | None, overwrite: bool) -> None:
    """Refuse a page that is none, or that is there already, before the work: somebody may have kept it."""
    if out is None:
        return
    if not out.lower().endswith((".html", ".htm")):
        raise FoveateError(f"--out {out!r} is not a page: name a file that ends in .html")
    if Path(out).is_dir():
        raise FoveateError(f"--out {out!r} is a folder: name a file")
    if not overwrite and Path(out).exists():
        raise FoveateError(f"--out {out!r} is there already: name another file, or ask to overwrite it")


def _cells(frame: Any) -> dict[str, dict[str, Any]]:
    """A frame with the index ``row, column`` as the JSON document has it."""
    from foveate.evaluation.results import plain

    cells: dict[str, dict[str, Any]] = {}
    for (row, column), line in frame.iterrows():
        cells.setdefault(row, {})[column] = {key: plain(value) for key, value in line.items()}
    return cells


def _trainings(run: list[str], out: str | None, fail_under: list[str] | None, as_json: bool, overwrite: bool) -> None:
    from foveate.report import training_comparison as page
    from foveate.training import compare as trainings

    if fail_under:
        raise FoveateError("--fail-under holds for runs of foveate evaluate, and these are of foveate train")
    _check_page(out, overwrite)
    result = trainings.compare(run)
    if out is not None:
        page.write(out, result)
    if as_json:
        print(json.dumps({"table": _cells(result.frame), "notes": result.notes}, indent=2))
    else:
        console, columns = Console(highlight=False), result.columns
        for start in range(0, len(columns), WIDTH):
            part = columns[start : start + WIDTH]
            table = Table(box=None, padding=(0, 2), header_style="dim")
            table.add_column("recipe (runs)", no_wrap=True)
            for column in part:
                table.add_column(column.replace("_", " "), justify="right")
            for name, runs in result.runs.items():
                table.add_row(f"{name.replace('_', ' ')} ({len(runs)})", *[_mean(result.frame, name, c) for c in part])
            console.print(table)
        console.print("[dim]mean ± half of the 95 % interval over runs; in colour where the difference to the first is sure[/]")
        if out is not None:
            err.print(f"written to [bold]{escape(printable(out))}[/]")
    for note in result.notes:
        print_note(note)


def _mean(frame: pd.DataFrame, name: str, column: str) -> str:
    from foveate.report.training_comparison import cell, number

    if (name, column) not in frame.index:
        return ""
    line = frame.loc[(name, column)]
    text, half = number(line["mean"], column), max(line["high"] - line["mean"], line["mean"] - line["low"])
    if half == half:  # a single run has no interval
        text += f" ±{number(half, column).lstrip('0') if half < 1 else number(half, column)}"
    way = cell(line, column)[2]
    return f"[{'green' if way > 0 else 'red'}]{text}[/]" if way else text


def _print(result: Comparison) -> None:
    from foveate.report import evaluation_comparison as comparison
    from foveate.report import tables

    console = Console(highlight=False)
    for column, lines in comparison.lines(result).items():
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column(tables.title(column), no_wrap=True)
        for name in result.names:
            table.add_column(name, justify="right")
        for method, cells in lines:
            texts = [cells[0][0]] + [f"{mean}  {_colour(change, way)}" for mean, change, way in cells[1:]]
            table.add_row(method, *texts)
        console.print(table)


def _colour(change: str, way: int) -> str:
    return f"[{'green' if way > 0 else 'red'}]{change}[/]" if way else f"[dim]{change}[/]"
