"""foveate evaluate: methods x metrics x data, as a table."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from foveate.cli import completion
from foveate.cli.options import (
    DATA,
    FAILURES,
    METHOD,
    RESULTS,
    Chosen,
    Debug,
    Encoding,
    HeadKind,
    Json,
    Layer,
    Out,
    Overwrite,
    PrecisionOption,
    Setting,
    choosing,
    err,
    listed,
    out_folder,
    own_settings,
    print_note,
    print_notes,
    reason_of,
    refuse_empty,
    sentences,
)
from foveate.errors import FoveateError, printable, required

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from foveate.batch import Batch
    from foveate.models.classifier import Classifier
    from foveate.report.evaluation import Written

CELL, NAME = 17, 28  # characters of the terminal that a column and the names take

Data = Annotated[
    str,
    typer.Argument(
        help="A folder with labels.csv or one folder a class, 'imagenet:FOLDER' (validation images with XML boxes), "
        "'pets:FOLDER' (Oxford-IIIT, masks), 'torchvision:NAME:FOLDER', or 'scenes'."
    ),
]


@choosing
def evaluate(
    data: Data,
    chosen: Chosen,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            help="Names, separated by commas; all, all-fast (those of one pass, and controls), controls.",
            show_default="grad_cam and the controls",
            rich_help_panel=METHOD,
            autocompletion=completion.methods,
        ),
    ] = "grad_cam,fake_cam,random,centre",
    metrics: Annotated[
        str,
        typer.Option(
            help="Columns or metrics, separated by commas; 'all' that the data allows, but randomisation and "
            "class_sensitivity, which run every method again: 'all,randomisation'.",
            rich_help_panel=METHOD,
            autocompletion=completion.metrics,
        ),
    ] = "all",
    layer: Layer = "auto",
    target: Annotated[
        str | None,
        typer.Option(
            help="The class explained and scored: label, pred or second; the protocol's by default.", rich_help_panel=METHOD
        ),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Preset: foveate, opti_cam, ca_stream, rise, legacy.", rich_help_panel=METHOD)
    ] = "foveate",
    maps: Annotated[
        list[str] | None,
        typer.Option(
            help="Maps from elsewhere, beside the methods: a folder of .npy, .npz, grey .png or .safetensors called as the "
            "images are; FOLDER, or NAME=FOLDER. Repeat.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    maps_of: Annotated[
        str,
        typer.Option(
            help="What such maps cover: crop (what the network sees), file, or auto: what their shape fits.",
            rich_help_panel=METHOD,
        ),
    ] = "auto",
    controls: Annotated[
        bool,
        typer.Option(
            help="Put the controls into a table that has none: they show which columns can be fooled.", rich_help_panel=METHOD
        ),
    ] = True,
    baseline: Annotated[
        str | None, typer.Option(help="The method that others are compared with, image by image.", rich_help_panel=METHOD)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N images only.", rich_help_panel=DATA)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.", rich_help_panel=DATA)] = 8,
    setting: Setting = None,
    precision: PrecisionOption = "fp32",
    devices: Annotated[
        int, typer.Option(min=1, help="Processes: GPUs where there are some, else CPU processes.", rich_help_panel=DATA)
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=RESULTS)] = False,
    overwrite: Overwrite = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first image that has to be left out.", rich_help_panel=DATA)
    ] = False,
    out: Out = "evaluated",
    head: HeadKind = None,
    encoding: Encoding = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A table of methods and metrics on a data set, with 95 % intervals, and a page to look at."""
    with sentences(debug), ExitStack() as stack:
        required("evaluate", "pandas", "pyarrow", "scipy", "matplotlib", "jinja2")
        from foveate.data.labels import has_several, several_labels
        from foveate.disk.files import locked
        from foveate.evaluation import runs, statistics
        from foveate.evaluation.elsewhere import elsewhere
        from foveate.evaluation.evaluate import Plan, readable
        from foveate.evaluation.identity import fingerprint
        from foveate.models.normalisation import IMAGES, better_normalisation
        from foveate.precision import check_precision
        from foveate.registry import METHODS
        from foveate.report import evaluation

        check_precision(precision, "--precision")
        settings = own_settings(setting)
        for option, text in (("DATA", data), ("--methods", methods), ("--metrics", metrics), ("--layer", layer)):
            refuse_empty(option, text)
        asked: list[Any] = listed(methods)
        if controls and not any(record.control for record in map(METHODS.known, asked) if record is not None):
            asked.append("controls")
        plan = Plan.of(
            asked,
            metrics if metrics == "all" else listed(metrics),
            protocol,
            settings,
            target,
            layer,
            head,  # type: ignore[arg-type]
            precision,  # type: ignore[arg-type]
            keep_maps=True,
            maps=elsewhere(named_maps(maps), maps_of),  # type: ignore[arg-type]
        )
        statistics.baseline_of([record.name for record in plan.records], baseline)
        classifier = chosen.open(encoding)
        unclipped = plan.protocol.metrics.get("localization", {}).get("clip", True) is False
        source = open_data(data, classifier, unclipped, limit, encoding)
        if has_several(source) and head != "multilabel":
            raise FoveateError(several_labels(f"the labels of {data!r}"))
        folder = out_folder(out)
        kind = next((p.device.type for p in classifier.parameters()), "cpu")
        workers = runs.Workers(devices, "cuda" if kind == "cuda" else "cpu")
        if workers.device is not None:
            classifier.to(workers.device)
        workers.share(classifier)
        call: dict[str, Any] = {
            "data": printable(data),
            "model": printable(chosen.model),
            "layer": layer,
            "methods": ",".join(map(str, asked)),
            "metrics": metrics,
            "precision": precision,
        }
        call |= {"limit": limit, "batch_size": batch_size, "head": head, "size": chosen.size}
        call |= {} if chosen.output is None else {"output": chosen.output}
        images = runs.Images.of(source, batch_size)
        for theirs in plan.maps:
            theirs.bind(source, images.names)
        if plan.maps:
            call |= {"maps": {theirs.name: theirs.digest() for theirs in plan.maps}, "maps_of": maps_of}
        identity = fingerprint(classifier, images.listed, plan, call)
        with workers.together():
            if workers.rank == 0:
                stack.enter_context(locked(folder))
                for sentence in runs.prepare(folder, identity, resume, evaluation.about(plan, call), images, overwrite):
                    print_note(sentence)
        with workers.together():
            plan.settle(classifier, readable(source, range(len(source)), []))  # a wrong call ends before notes and work
        if workers.rank == 0:
            first = spread(source, IMAGES, batch_size) if classifier.assumed else ()
            if advice := better_normalisation(classifier, first, plan.head):
                classifier.notes.append(advice)
            print_notes(classifier)  # before the work: an assumption that is wrong costs it
        with workers.together(), measuring(len(source), as_json or workers.rank > 0, workers.count) as tick:
            runs.run(classifier, images, plan, folder, identity, workers=workers, strict=strict, tick=tick)
        if workers.rank > 0:
            return
        results = runs.results_of(folder)
        if not len(results):
            raise FoveateError("; ".join(reason for _, reason in results.failures[:3]) or f"{data!r} holds no images")
        written = evaluation.write(folder, results, plan, source, classifier, baseline, call)
        if as_json:
            print(json.dumps(written.document(folder), indent=2))
        else:
            print_table(written)
            console = Console(highlight=False, soft_wrap=True)
            console.print(f"[dim]{escape(written.protocol_line())}[/]")
            for sentence in written.findings:
                console.print(f"• {escape(sentence)}")
            if written.advice:
                console.print(f"[bold]Which method should I use?[/] {escape(written.advice)}")
            console.print(f"written to [bold]{escape(printable(out))}[/]: table.md, rows/, and the page [bold]report.html[/]")
        for name, reason in results.left_out.items():
            print_note(f"left out {reason_of(name, reason)}")
        for _, reason in results.failures:
            err.print(f"[bold red]left out:[/] {escape(reason)}", soft_wrap=True)
        if results.failures:
            raise typer.Exit(FAILURES)


def named_maps(given: list[str] | None) -> dict[str, str] | None:
    """Folders of maps by the names of their columns, from ``FOLDER`` and ``NAME=FOLDER``.

    Raises:
        FoveateError: a name twice.
    """
    found: dict[str, str] = {}
    for text in given or []:
        refuse_empty("--maps", text)
        name, equals, where = text.partition("=")
        if not equals or Path(text).exists():
            name, where = Path(text).resolve().stem, text
        if name in found:
            raise FoveateError(f"--maps {text!r}: {name!r} is given twice: give each a name, as in NAME=FOLDER")
        found[name] = where
    return found or None


def open_data(data: str, classifier: Classifier, unclipped: bool, limit: int | None, encoding: str | None = None) -> Any:
    """A data set by what a person may call it, its labels in the model's numbering.

    Raises:
        FoveateError: no such data, or classes that the model does not have.
    """
    from torch.utils.data import Subset

    from foveate.data.benchmarks import open_benchmark
    from foveate.models.inputs import renumbered

    opened = open_benchmark(data, classifier.preprocess, clip_boxes=not unclipped, encoding=encoding)
    source = renumbered(opened, classifier, data)
    return Subset(source, range(limit)) if limit is not None and limit < len(source) else source


def spread(source: Any, count: int, batch_size: int) -> Iterator[Batch]:
    """Batches of some images from all over a data set: the first ones are often of one class."""
    from foveate.evaluation.evaluate import batches, readable

    return batches(readable(source, range(0, len(source), max(1, len(source) // count)), []), batch_size)


class measuring:
    """A progress bar with the rate and the time left; nothing where it is to be quiet."""

    def __init__(self, total: int, quiet: bool, share: int = 1) -> None:
        self.share = share
        parts = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("images  {task.fields[rate]}"))
        self.progress = Progress(*parts, TimeRemainingColumn(), console=err, disable=quiet)
        self.task = self.progress.add_task("", total=total, rate="")
        self.done = 0

    def __enter__(self) -> Callable[[int], None]:
        self.progress.start()
        return self.tick

    def tick(self, images: int) -> None:
        self.done += images * self.share  # the other processes are about as far
        task = self.progress.tasks[0]
        rate = f"{task.speed:.2f}/s" if task.speed else ""
        self.progress.update(self.task, completed=min(self.done, task.total or 0), rate=rate)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def print_table(written: Written) -> None:
    """The table on the terminal, some columns beside each other, means above their intervals; bold: no other is better."""
    from foveate.registry import is_control, title_of
    from foveate.report import tables

    frame, console = written.frame, Console(highlight=False)
    shown = tables.columns(frame)
    row = max(1, (console.width - NAME) // CELL)
    for start in range(0, len(shown), row):
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("method", no_wrap=True)
        part = shown[start : start + row]
        for column in part:
            table.add_column(tables.title(column), justify="right", no_wrap=True)
        for method in tables.methods(frame):
            cells = []
            for column in part:
                middle, low, high = tables.cell(frame, method, column)
                text = f"[bold]{middle}[/]" if tables.is_best(frame, method, column) else middle
                cells.append(text if middle == "–" else f"{text}\n[dim]{low}–{high}[/]")
            title = escape(title_of(method))
            table.add_row(f"{title} [dim](control)[/]" if is_control(method) else title, *cells)
        console.print(table)
    if words := tables.legend(shown):
        console.print(f"[dim]{escape(words)}[/]", soft_wrap=True)
    for column in tables.columns(frame, model=True):
        middle, low, high = tables.cell(frame, "(model)", column)
        console.print(f"the model's {column.replace('_', ' ')}: [bold]{middle}[/] [dim]{low}–{high}[/]")
