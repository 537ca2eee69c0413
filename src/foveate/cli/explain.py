"""foveate explain: maps of images, as pictures and numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Pretrained,
    Size,
    Std,
    Weights,
    class_index,
    err,
    open_model,
    out_folder,
    print_notes,
    progress,
    sentences,
)
from foveate.errors import FoveateError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.explain import Explanation
    from foveate.models.load import Classifier


AT_ONCE = 16  # images that share one run of the model


def explain(
    images: Annotated[list[str], typer.Argument(help="Image files.", metavar="IMAGE...")],
    model: Model,
    weights: Weights = None,
    pretrained: Pretrained = False,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Repeat for several; see 'foveate list methods'.")
    ] = None,
    layer: Layer = "auto",
    target: Annotated[str, typer.Option(help="pred, label, second, a class index or a class name.")] = "pred",
    against: Annotated[
        str | None, typer.Option(help="Why the target and not this class: index, name, strongest, second or label.")
    ] = None,
    out: Out = "explained",
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
    """Maps of why a model says what it says of images: pictures, probabilities, and whether a map can be trusted."""
    with sentences(debug):
        from foveate import images as files
        from foveate.registry import METHODS

        names = [METHODS.get(name).name for name in (method or ["grad_cam", "hires_cam"])]
        classifier = open_model(model, weights, pretrained, num_classes, size, mean, std, classes, device)
        wanted = class_index(target, classifier)
        other = class_index(against, classifier) if against is not None else None
        folder = out_folder(out)
        read: list[tuple[Path, Tensor]] = []
        failures: list[tuple[str, str]] = []
        for name in images:
            try:
                read.append((Path(name), classifier.preprocess(files.read(name))))
            except ImageError as error:
                failures.append((name, str(error)))
        if not read:
            raise FoveateError("; ".join(reason for _, reason in failures))
        document: list[dict[str, Any]] = []
        refused: dict[str, str] = {}
        stems = _stems([path for path, _ in read])
        steps = range(0, len(read), AT_ONCE)
        for start in progress(steps, "explaining", quiet=as_json or len(steps) == 1):
            part = slice(start, start + AT_ONCE)
            document += _explain_batch(
                classifier, read[part], stems[part], names, layer, wanted, other, folder, head=head, refused=refused
            )
        failures += refused.items()
        if as_json:
            print(json.dumps({"images": document, "failures": [{"file": f, "reason": r} for f, r in failures]}, indent=2))
        else:
            for item in document:
                _print_image(item)
            Console(soft_wrap=True, highlight=False).print(f"pictures in [bold]{escape(str(folder))}[/]")
        print_notes(classifier)
        for _, reason in failures:
            err.print(f"[bold red]left out:[/] {escape(reason)}", soft_wrap=True)
        if failures:
            raise typer.Exit(FAILURES)


def _stems(paths: Sequence[Path]) -> list[str]:
    """A name for each image's pictures; files of the same name in different folders get a number."""
    stems: list[str] = []
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}_{number}", number + 1
        stems.append(stem)
    return stems


def _explain_batch(
    classifier: Classifier,
    read: Sequence[tuple[Path, Tensor]],
    stems: Sequence[str],
    names: Sequence[str],
    layer: str,
    target: str | int,
    against: str | int | None,
    folder: Path,
    *,
    head: str | None,
    refused: dict[str, str],
) -> list[dict[str, Any]]:
    import torch

    from foveate.data.folder import labels_beside
    from foveate.explain import explain as run
    from foveate.maps import apply_mask
    from foveate.targets import log_probability

    labels = None
    if "label" in (target, against):
        found = labels_beside([path for path, _ in read])
        if None in found:
            path = read[found.index(None)][0]
            raise FoveateError(f"--target label: no labels.csv beside {path} has a line for it: name a class instead")
        labels = torch.tensor([classifier.class_index(one) if isinstance(one, str) else one for one in found])
    x = torch.stack([image for _, image in read])
    start = time.perf_counter()
    options: dict[str, Any] = {"layer": layer, "target": target, "against": against, "labels": labels, "head": head}
    explanation = run(classifier, x, names, refused=refused, **options)
    names = list(explanation.maps)
    if not names:
        raise FoveateError("; ".join(refused.values()))
    shared = time.perf_counter() - start - sum(explanation.seconds.values())
    capture, y = explanation.capture, explanation.target.y
    before = log_probability(capture.logits.detach(), y, capture.head).exp()
    masked = torch.cat([apply_mask(capture.x.detach(), explanation.maps[name]) for name in names])
    after = log_probability(capture.score(masked), y.repeat(len(names)), capture.head).exp().view(len(names), -1)
    items: list[dict[str, Any]] = [
        {
            "file": str(path),
            "layer": explanation.layer,
            "grid": str(capture.layout()),
            "target": int(y[i]),
            "target_name": classifier.class_name(int(y[i])),
            "top": _top(capture.logits[i].detach(), capture.head, classifier),
            "seconds_shared": round(shared / len(read), 5),
            "maps": {},
        }
        for i, (path, _) in enumerate(read)
    ]
    for row, name in enumerate(names):
        for i, item in enumerate(items):
            entry = _write(explanation, classifier, name, i, float(before[i]), float(after[row, i]), folder, stems[i])
            item["maps"][name] = entry
    return items


def _top(logits: Tensor, head: str, classifier: Classifier, count: int = 5) -> list[list[Any]]:
    import torch

    if head == "binary":
        p = torch.stack([(-logits[0]).sigmoid(), logits[0].sigmoid()])
    else:
        p = logits.softmax(0) if head == "softmax" else logits.sigmoid()
    values, indices = p.topk(min(count, len(p)))
    return [[i, classifier.class_name(i), round(v, 6)] for i, v in zip(indices.tolist(), values.tolist(), strict=True)]


def _write(
    explanation: Explanation, classifier: Classifier, name: str, i: int, before: float, after: float, folder: Path, stem: str
) -> dict[str, Any]:
    """Write the overlay and the side-by-side picture of one map; its entry in the JSON document."""
    from foveate.images import to_image
    from foveate.registry import METHODS
    from foveate.report import pictures

    record, target, error = METHODS.get(name), explanation.targets[name], explanation.completeness_error[name]
    other = int(target.other[i]) if target.other is not None and not record.control else None
    completeness = float(error[i]) if error is not None else None
    flat = bool(explanation.degenerate[name][i])
    suffix = f"{stem}.{name}" + ("" if other is None else f".against_{other}")
    picture, over = folder / f"{suffix}.png", folder / f"{suffix}.overlay.png"
    x, saliency = explanation.capture.x[i].detach(), explanation.maps[name][i]
    title = f"{record.title}: {_short(classifier.class_name(int(target.y[i])))}"
    if record.control:
        title = f"{record.title} (control: it does not look at the model)"
    if other is not None:
        title += f", and not {_short(classifier.class_name(other))}"
    note = "" if completeness is None else f"completeness error {completeness:.1e}"
    if flat:
        note = "nothing here speaks for the class"
    raw = explanation.raw[name][i]
    pictures.side_by_side(picture, x, saliency, raw, signed=record.signed, title=title, before=before, after=after, note=note)
    to_image(pictures.overlay(x, saliency)).save(over)
    return {
        "against": other,
        "against_name": None if other is None else classifier.class_name(other),
        "p_before": before,
        "p_after": after,
        "completeness_error": completeness,
        "seconds": round(explanation.seconds[name] / len(explanation.capture.x), 6),
        "degenerate": flat,
        "picture": str(picture),
        "overlay": str(over),
    }


def _short(name: str) -> str:
    return name.split(",")[0]


def _print_image(item: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"\n[bold]{escape(item['file'])}[/]", soft_wrap=True)
    top = Table(box=None, padding=(0, 2), show_header=False)
    for index, name, p in item["top"]:
        bar = "█" * max(1, round(24 * p)) if p >= 0.005 else ""
        top.add_row(f"{p:7.3f}", f"[cyan]{bar}[/]", f"{escape(name)} [dim]({index})[/]")
    console.print(top)
    aim = f"why [bold]{escape(_short(item['target_name']))}[/]"
    console.print(f"{aim}, at layer {escape(item['layer'])} ({escape(item['grid'])})")
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("method", "and not", "p before", "p after", "completeness error", "ms"):
        if column != "and not" or any(values["against_name"] for values in item["maps"].values()):
            table.add_column(column, justify="left" if column in ("method", "and not") else "right")
    for name, values in item["maps"].items():
        error = values["completeness_error"]
        others = [escape(_short(values["against_name"] or ""))] if len(table.columns) == 6 else []
        table.add_row(
            name,
            *others,
            f"{values['p_before']:.3f}",
            f"{values['p_after']:.3f}",
            "" if error is None else f"{error:.1e}",
            f"{1000 * values['seconds']:.1f}",
        )
    console.print(table)
    console.print(f"[dim]one run of the model, shared by all: {1000 * item['seconds_shared']:.0f} ms an image[/]")
