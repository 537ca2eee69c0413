"""foveate confidence: does the second order matter less, the surer a network is?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from foveate.cli.evaluate import Data, measuring, open_data
from foveate.cli.options import (
    DONE,
    FAILURES,
    Chosen,
    Debug,
    Encoding,
    Json,
    Out,
    choosing,
    err,
    out_folder,
    print_notes,
    sentences,
)
from foveate.disk import files
from foveate.errors import FoveateError, printable, required


@choosing
def confidence(
    data: Data,
    chosen: Chosen,
    name: Annotated[str | None, typer.Option(help="What to call the network; from --model where it is not given.")] = None,
    eta: Annotated[float, typer.Option(min=0, max=0.999, help="Share of zeros of both maps.")] = 0.9,
    unit: Annotated[
        str, typer.Option(help="network: standard deviations, as in the paper; image: black to white.")
    ] = "network",
    limit: Annotated[int | None, typer.Option(min=1, help="The first N images only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    out: Out = "confidence",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a study of that name by another call.")] = False,
    encoding: Encoding = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """CASO against CAFO by confidence: run it once for each network with the same --out, and they share one figure."""
    with sentences(debug), ExitStack() as stack:
        required("confidence", "pandas", "scipy", "matplotlib", "jinja2")
        from foveate.data.labels import has_several
        from foveate.evaluation import confidence_study as studies
        from foveate.evaluation.identity import contents, listing, short, weights_of
        from foveate.report.confidence_study import draw, write

        if unit not in ("network", "image"):
            raise FoveateError(f"--unit {unit!r} is unknown: use network or image")
        called = name or Path(chosen.model.split(":")[-1]).name
        if not called.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise FoveateError(f"--name {called!r} becomes a file's name: use letters, digits, - and _")
        classifier = chosen.open(encoding)
        source = open_data(data, classifier, False, limit, encoding)
        if has_several(source):
            raise FoveateError(f"{data!r} gives an image several classes, or none: the study is of one class per image")
        folder = out_folder(out)
        named = ("model", "weights", "mean", "std", "pretrained", "size", "num_classes")
        call = {"data": data, "eta": eta, "unit": unit, **{one: getattr(chosen, one) for one in named}}
        call |= {} if chosen.output is None else {"output": chosen.output}
        call["images"] = short("\n".join([*listing(source)[1], *contents(source, range(len(source)))]))
        call["digest"] = weights_of(classifier)
        stack.enter_context(files.locked(folder))
        files.clear_waiting(folder)
        _claim(folder, called, call, overwrite)
        print_notes(classifier)
        options: dict[str, Any] = {"eta": eta, "unit": unit, "batch_size": batch_size}
        lost: list[tuple[str, str]] = []
        with measuring(len(source), as_json) as tick:
            studies.study(classifier, source, folder / f"{called}.csv", tick=tick, failures=lost, **options)
        frames = studies.known(folder)
        trends = {key: studies.trend(frame) for key, frame in frames.items()}
        figure = folder / "confidence.png"
        draw(frames, trends, figure)
        page = write(folder / "confidence.html", figure, trends)
        for _, reason in lost:
            err.print(f"[bold red]left out:[/] {escape(reason)}", soft_wrap=True)
        if as_json:
            networks = {key: asdict(value) for key, value in trends.items()}
            failures = [{"file": printable(file), "reason": reason} for file, reason in lost]
            print(json.dumps({"networks": networks, "figure": str(figure), "page": str(page), "failures": failures}, indent=2))
            raise typer.Exit(FAILURES if lost else DONE)
        console = Console(highlight=False, soft_wrap=True)
        for key, value in trends.items():
            console.print(f"• {escape(value.sentence(key))}")
        console.print(
            f"written to [bold]{escape(printable(out))}[/]: {called}.csv, the figure confidence.png, and the page "
            "[bold]confidence.html[/]"
        )
        raise typer.Exit(FAILURES if lost else DONE)


def _claim(folder: Path, called: str, call: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write down which call a name is of; the other studies of the folder must fit into one figure with it.

    Raises:
        FoveateError: they do not, or a file of that name is of something else.
    """
    from foveate.evaluation.confidence_study import SHARED, read_call

    record, known, replaced = folder / f"{called}.json", False, False
    for other in folder.glob("*.json"):
        before = read_call(other)
        if before is None:
            if other == record:
                raise FoveateError(f"{str(record)!r} is not of foveate confidence: give another --name or --out")
            continue
        known = True
        if other == record and before != call:
            if not overwrite:
                raise FoveateError(
                    f"{str(record)!r} is of another call, of other weights or images: give another --name or --out, or ask to "
                    "overwrite it"
                )
            replaced = True
            continue
        if any(before.get(key) != call[key] for key in SHARED):
            raise FoveateError(
                f"{str(other)!r} has other data, eta or unit, and one figure cannot show both: give another --out"
            )
    written = [f"{called}.csv"] * (not record.exists()) + ["confidence.png", "confidence.html"] * (not known)
    for name in written:
        if (folder / name).exists():
            raise FoveateError(f"{str(folder / name)!r} is there already, and not of foveate confidence: give another --out")
    if replaced:
        files.delete(folder / f"{called}.csv")
    files.write_json(record, call)
