"""foveate confidence: does the second order matter less, the surer a network is?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from foveate.cli.evaluate import Data, measuring, open_data
from foveate.cli.options import (
    Classes,
    Debug,
    Device,
    Encoding,
    Json,
    Mean,
    Model,
    NumClasses,
    Out,
    Pretrained,
    Size,
    Std,
    Weights,
    open_model,
    out_folder,
    print_notes,
    sentences,
)
from foveate.errors import FoveateError
from foveate.text import read_json


def confidence(
    data: Data,
    model: Model,
    weights: Weights = None,
    pretrained: Pretrained = False,
    name: Annotated[str | None, typer.Option(help="What to call the network; from --model where it is not given.")] = None,
    eta: Annotated[float, typer.Option(min=0, max=0.999, help="Share of zeros of both maps.")] = 0.9,
    unit: Annotated[
        str, typer.Option(help="network: standard deviations, as in the paper; image: black to white.")
    ] = "network",
    limit: Annotated[int | None, typer.Option(min=1, help="The first N images only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    out: Out = "confidence",
    num_classes: NumClasses = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    classes: Classes = None,
    encoding: Encoding = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """CASO against CAFO by confidence: run it once for each network with the same --out, and they share one figure."""
    with sentences(debug):
        from foveate import confidence as studies
        from foveate.report.confidence import draw

        if unit not in ("network", "image"):
            raise FoveateError(f"--unit {unit!r} is unknown: use network or image")
        called = name or Path(model.split(":")[-1]).name
        if not called.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise FoveateError(f"--name {called!r} becomes a file's name: use letters, digits, - and _")
        classifier = open_model(model, weights, pretrained, num_classes, size, mean, std, classes, device, encoding)
        source = open_data(data, classifier, False, limit, encoding)
        folder = out_folder(out)
        shared = {"data": data, "eta": eta, "unit": unit}
        call = {**shared, "model": model, "weights": weights, "mean": mean, "std": std}
        call |= {"pretrained": pretrained, "size": size, "num_classes": num_classes}
        record = folder / f"{called}.json"
        for other in folder.glob("*.json"):
            before = read_json(other)
            if other == record and before != call:
                raise FoveateError(f"{str(record)!r} is of another call: give another --name or --out")
            if any(before.get(key) != value for key, value in shared.items()):
                raise FoveateError(
                    f"{str(other)!r} has other data, eta or unit, and one figure cannot show both: give another --out"
                )
        record.write_text(json.dumps(call, indent=2) + "\n", encoding="utf-8")
        print_notes(classifier)
        options: dict[str, Any] = {"eta": eta, "unit": unit, "batch_size": batch_size}
        with measuring(len(source), as_json) as tick:
            studies.study(classifier, source, folder / f"{called}.csv", tick=tick, **options)
        rows = studies.known(folder)
        trends = {key: studies.trend(frame) for key, frame in rows.items()}
        figure = folder / "confidence.png"
        draw(rows, trends, figure)
        if as_json:
            networks = {key: asdict(value) for key, value in trends.items()}
            print(json.dumps({"networks": networks, "figure": str(figure)}, indent=2))
            return
        console = Console(highlight=False, soft_wrap=True)
        for key, value in trends.items():
            console.print(f"• {escape(value.sentence(key))}")
        console.print(f"written to [bold]{escape(out)}[/]: {called}.csv, and the figure [bold]confidence.png[/]")
