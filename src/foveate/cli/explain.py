"""foveate explain: maps of images, as pictures and numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.images import Picture, Pictures
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
    class_index,
    err,
    listed,
    open_model,
    out_folder,
    own_settings,
    print_notes,
    progress,
    sentences,
    several,
)
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.explain import Explanation
    from foveate.models.load import Classifier


AT_ONCE = 16  # images that share one run of the model
MOST_REASONS = 5  # of images that cannot be read, in one sentence


def explain(
    images: Annotated[list[str], typer.Argument(help="Image files, or folders of them.", metavar="IMAGE...")],
    model: Model,
    weights: Weights = None,
    pretrained: Pretrained = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="One, several with commas, or repeated, as listed by 'foveate list methods'; all-fast: those of one pass.",
        ),
    ] = None,
    layer: Layer = "auto",
    fuse: Annotated[str, typer.Option(help="How maps of several layers become one: mean, max, product, tanh_max.")] = "mean",
    target: Annotated[
        str,
        typer.Option(
            help="pred, label, second, a class index or a class name; several, as pred,label,second, are explained each, "
            "and the first against each other one."
        ),
    ] = "pred",
    against: Annotated[
        str | None, typer.Option(help="Why the target and not this class: index, name, strongest, second or label.")
    ] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Only images that the model gets wrong, by labels.csv.")] = False,
    setting: Setting = None,
    precision: PrecisionOption = "fp32",
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
        from foveate.precision import check_precision
        from foveate.registry import ungrouped

        check_precision(precision, "--precision")
        given = ",".join(method or ["grad_cam", "hires_cam"])
        names = listed(given)
        ungrouped(names)  # an unknown name stops here, before the model is built
        if not names:
            raise FoveateError(f"--method {given!r} names none: see 'foveate list methods'")
        classifier = open_model(model, weights, pretrained, num_classes, size, mean, std, classes, device)
        question = Question(
            layer=several(layer),
            fuse=fuse,
            targets=[class_index(one, classifier) for one in _targets(target)],
            against=class_index(against, classifier) if against is not None else None,
            head=head,
            precision=precision,
            settings=own_settings(setting),
            only_errors=errors,
        )
        if question.against is not None and len(question.targets) > 1:
            raise FoveateError(f"--target {target!r} asks for contrasts itself: leave out --against, or give one target")
        folder = out_folder(out)
        pictures = Pictures.named(images, classifier, question.needs_labels, folder)
        failures: list[tuple[str, str]] = []
        document: list[dict[str, Any]] = []
        refused: dict[str, str] = {}
        left_out: dict[str, str] = {}
        steps, interrupted = range(0, len(pictures), AT_ONCE), False
        try:
            for start in progress(steps, "explaining", quiet=as_json or len(steps) == 1):
                read = pictures.read(range(start, min(start + AT_ONCE, len(pictures))), classifier, failures)
                if read:
                    document += _explain_batch(classifier, read, names, question, folder, refused, left_out)
        except KeyboardInterrupt:
            interrupted = True  # what is done is printed all the same
        if len(failures) == len(pictures):
            more = f"; and {len(failures) - MOST_REASONS} others" if len(failures) > MOST_REASONS else ""
            raise FoveateError("; ".join(reason for _, reason in failures[:MOST_REASONS]) + more)
        if errors and not document and not interrupted:
            raise FoveateError(f"--errors: the model gets all {len(pictures) - len(failures)} image(s) right")
        failures += refused.items()
        if as_json:
            listing = [{"file": file, "reason": reason} for file, reason in failures]
            print(json.dumps({"images": document, "left_out": left_out, "failures": listing}, indent=2))
        else:
            for item in document:
                _print_image(item)
            if document:
                Console(soft_wrap=True, highlight=False).print(f"pictures in [bold]{escape(str(folder))}[/]")
        print_notes(classifier)
        for name, reason in left_out.items():
            err.print(f"[yellow]note:[/] {escape(f'{name} is left out: {reason}')}", soft_wrap=True)
        for _, reason in failures:
            err.print(f"[bold red]left out:[/] {escape(reason)}", soft_wrap=True)
        if interrupted:
            done = f"after {len(document)} image(s), whose pictures are in {folder}" if document else "before the first image"
            raise KeyboardInterrupt(f"interrupted {done}")
        if failures:
            raise typer.Exit(FAILURES)


@dataclass(frozen=True)
class Question:
    """What is asked of every image."""

    layer: str | list[str]
    fuse: Any
    targets: list[str | int]
    against: str | int | None
    head: Any
    precision: Any
    settings: dict[str, dict[str, Any]]
    only_errors: bool

    @property
    def needs_labels(self) -> bool:
        return self.only_errors or "label" in (*self.targets, self.against)


def _targets(text: str) -> list[str]:
    """One target, or several separated by commas: words and indices; names of classes have commas of their own."""
    parts = [part.strip() for part in text.split(",")]
    listed = all(part in ("pred", "label", "second") or part.lstrip("-").isdigit() for part in parts)
    return list(dict.fromkeys(parts)) if listed else [text]


def _explain_batch(
    classifier: Classifier,
    read: Sequence[Picture],
    names: Sequence[str],
    question: Question,
    folder: Path,
    refused: dict[str, str],
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    import torch

    x = torch.stack([picture.x for picture in read])
    if question.only_errors:
        with torch.inference_mode():
            said = _predicted(classifier, x, question.head).tolist()
        read = [picture for picture, index in zip(read, said, strict=True) if index != picture.label]
        if not read:
            return []
        x = torch.stack([picture.x for picture in read])
    labels = torch.tensor([picture.label for picture in read]) if question.needs_labels else None
    start = time.perf_counter()
    answers = _ask(classifier, x, names, question, labels, refused)
    for key, answer in answers.items():
        for name, reason in answer.left_out.items():
            everywhere = all(name in other.left_out for other in answers.values())
            left_out[name if everywhere else f"{name} for {key}"] = reason
    answers = {key: answer for key, answer in answers.items() if answer.maps}
    if not answers:
        raise FoveateError("; ".join(dict.fromkeys(refused.values())))
    shared = time.perf_counter() - start - sum(sum(answer.seconds.values()) for answer in answers.values())
    first = next(iter(answers.values()))
    capture = first.capture
    items: list[dict[str, Any]] = [
        {
            "file": str(picture.path),
            "layer": first.layer,
            "grid": str(capture.layout()),
            "target": int(first.target.y[i]),
            "target_name": classifier.class_name(int(first.target.y[i])),
            "top": _top(capture.logits[i].detach(), capture.head, classifier),
            "seconds_shared": round(shared / len(read), 5),
            "answers": [],
        }
        for i, picture in enumerate(read)
    ]
    stems = [picture.stem for picture in read]
    for key, answer in answers.items():
        _add_answer(items, key if len(answers) > 1 else "", answer, classifier, folder, stems)
    for i, item in enumerate(items):
        item["maps"] = item["answers"][0]["maps"]
        several = len(item["answers"]) > 1
        if several or len(item["maps"]) > 1:
            kind = "answers" if several else "methods"
            item["picture"] = _write_sheet(item, answers, i, folder / f"{stems[i]}.{kind}.png")
        if not several:
            del item["answers"]
    return items


def _predicted(classifier: Classifier, x: Tensor, head: Any) -> Tensor:
    from foveate.classifier import read_logits
    from foveate.targets import head_of, predicted

    first = next(classifier.parameters(), None)
    logits = read_logits(classifier(x if first is None else x.to(first.device, first.dtype)))
    return predicted(logits, head_of(logits, head)).cpu()


def _ask(
    classifier: Classifier,
    x: Tensor,
    names: Sequence[str],
    question: Question,
    labels: Tensor | None,
    refused: dict[str, str],
) -> dict[str, Explanation]:
    from foveate.explain import explain, explain_each

    options: dict[str, Any] = {
        "layer": question.layer,
        "fuse": question.fuse,
        "labels": labels,
        "head": question.head,
        "precision": question.precision,
        "settings": question.settings,
        "refused": refused,
    }
    if len(question.targets) > 1:
        return explain_each(classifier, x, names, targets=question.targets, **options)
    return {"": explain(classifier, x, names, target=question.targets[0], against=question.against, **options)}


def _add_answer(
    items: list[dict[str, Any]], key: str, answer: Explanation, classifier: Classifier, folder: Path, stems: Sequence[str]
) -> None:
    """Write the pictures of one answer, and add it to the document; an image that has this answer already is passed over."""
    from foveate.maps import apply_mask
    from foveate.targets import log_probability

    capture, y, names = answer.capture, answer.target.y, list(answer.maps)
    # As masked images are run: two precisions differ by more than a map may change.
    half = capture.precision != "fp32"
    before = (capture.log_probability(y) if half else log_probability(capture.logits.detach(), y, capture.head)).exp()
    masked = (apply_mask(capture.x.detach(), answer.maps[name]) for name in names)
    after = log_probability(capture.score(masked), y.repeat(len(names)), capture.head).exp().view(len(names), -1)
    others = answer.target.other if answer.target.name == "contrast" else None
    for i, item in enumerate(items):
        other = None if others is None else int(others[i])
        question = {"question": key or "target", "target": int(y[i]), "against": other}
        if any(all(question[k] == known[k] for k in ("target", "against")) for known in item["answers"]):
            continue
        maps = {}
        for row, name in enumerate(names):
            stem = stems[i] + (f".{key}" if key else "")
            maps[name] = _write(answer, classifier, name, i, float(before[i]), float(after[row, i]), folder, stem)
        names_of = {
            "target_name": classifier.class_name(int(y[i])),
            "against_name": None if other is None else classifier.class_name(other),
        }
        item["answers"].append({**question, **names_of, "maps": maps})


def _write_sheet(item: dict[str, Any], answers: dict[str, Explanation], i: int, path: Path) -> str:
    """One picture of all answers to an image, each with the maps of all methods."""
    from foveate.report import pictures

    rows = []
    for answer in item["answers"]:
        maps = (answers[answer["question"]] if len(answers) > 1 else next(iter(answers.values()))).maps
        panels = {_title(name): (maps[name][i], values["p_after"]) for name, values in answer["maps"].items()}
        p = next(iter(answer["maps"].values()))["p_before"]
        rows.append((_why(answer), p, panels))
    pictures.sheet(path, next(iter(answers.values())).capture.x[i].detach(), rows)
    return str(path)


def _title(name: str) -> str:
    from foveate.registry import METHODS

    record = METHODS.get(name)
    return f"{record.title} (control)" if record.control else record.title


def _why(answer: dict[str, Any]) -> str:
    word = {"pred": "predicted: ", "label": "label: ", "second": "runner-up: "}.get(answer["question"], "")
    name = _short(answer["target_name"])
    return f"{word}why {name}" if answer["against"] is None else f"why {name}, not {_short(answer['against_name'])}"


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
    suffix = f"{stem}.{name.replace(':', '_')}" + ("" if other is None else f".against_{other}")
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
        "facts": {key: _plain(values[i]) for key, values in explanation.facts[name].items()},
        "remark": remarks[i] if (remarks := explanation.remarks[name]) else None,
        "picture": str(picture),
        "overlay": str(over),
    }


def _plain(value: Any) -> Any:
    """A fact as JSON has it: NaN and infinity are null there."""
    number = value.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


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
    answers = item.get("answers", [{"question": "target", "against": None, **item}])
    for answer in answers:
        _print_answer(console, answer, item)
    if "picture" in item:
        console.print(f"all of them: [bold]{escape(item['picture'])}[/]", soft_wrap=True)
    console.print(
        f"[dim]one run of the model and what else all methods share: {1000 * item['seconds_shared']:.0f} ms an image[/]"
    )


def _print_answer(console: Console, answer: dict[str, Any], item: dict[str, Any]) -> None:
    console.print(f"[bold]{escape(_why(answer))}[/], at layer {escape(item['layer'])} ({escape(item['grid'])})")
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("method", no_wrap=True)
    found = answer["maps"].values()
    # A method's own contrast; what was asked stands above.
    own = any(values["against"] not in (None, answer["against"]) for values in found)
    promised = any(values["completeness_error"] is not None for values in found)
    if own:
        table.add_column("and not", no_wrap=True)
    for column in ("p before", "p after", *(["completeness error"] if promised else []), "ms"):
        table.add_column(column, justify="right")
    for name, values in answer["maps"].items():
        error = values["completeness_error"]
        cells = [escape(_short(values["against_name"] or ""))] if own else []
        cells += [f"{values['p_before']:.3f}", f"{values['p_after']:.3f}"]
        cells += ["" if error is None else f"{error:.1e}"] if promised else []
        table.add_row(name, *cells, f"{1000 * values['seconds']:.1f}")
    console.print(table)
    for name, values in answer["maps"].items():
        if values["remark"]:
            console.print(f"[dim]{escape(name)}: {escape(values['remark'])}[/]", soft_wrap=True)
