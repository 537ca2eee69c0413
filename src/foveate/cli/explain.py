"""foveate explain: maps of images, as pictures and numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli import completion
from foveate.cli.answers import explain_batch, short, why
from foveate.cli.drawing import Studio, crop_note, parse_pictures
from foveate.cli.images import Pictures
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
    PrecisionOption,
    Setting,
    choosing,
    class_index,
    err,
    listed,
    out_folder,
    own_settings,
    print_note,
    print_notes,
    progress,
    reason_of,
    refuse_empty,
    sentences,
    several,
)
from foveate.cli.questions import AT_ONCE, Question, Unanswered
from foveate.errors import FoveateError, printable, required

if TYPE_CHECKING:
    from foveate.models.classifier import Classifier
    from foveate.targets import Head


PAGE = "index.html"
MOST_REASONS = 5  # of images that cannot be read, in one sentence


@choosing
def explain(
    images: Annotated[list[str], typer.Argument(help="Image files, or folders of them.", metavar="IMAGE")],
    chosen: Chosen,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="One, several with commas, or repeated, of 'foveate list methods'; or all, all-fast (those of one pass, and "
            "controls), controls.",
            rich_help_panel=METHOD,
            autocompletion=completion.methods,
        ),
    ] = None,
    layer: Layer = "auto",
    fuse: Annotated[
        str,
        typer.Option(help="How maps of several layers become one: mean, max, product, tanh_max.", rich_help_panel=METHOD),
    ] = "mean",
    target: Annotated[
        str,
        typer.Option(
            help="pred, label, second, a class index or a class name; several, as pred,label,second, are explained each, "
            "and the first against each other one.",
            rich_help_panel=METHOD,
        ),
    ] = "pred",
    against: Annotated[
        str | None,
        typer.Option(
            help="Why the target and not this class: index, name, strongest, second or label.", rich_help_panel=METHOD
        ),
    ] = None,
    errors: Annotated[
        bool,
        typer.Option(
            "--errors",
            help="Only images that the model gets wrong, by a labels.csv beside them or folders of classes.",
            rich_help_panel=DATA,
        ),
    ] = False,
    setting: Setting = None,
    precision: PrecisionOption = "fp32",
    out: Out = "explained",
    head: HeadKind = None,
    encoding: Encoding = None,
    pictures: Annotated[
        str,
        typer.Option(
            help="all: overlays, four panels and sheets; overlay; sheet: one picture per image; or none. With commas also the "
            "formats: png, pdf, svg, as in 'sheet,pdf'.",
            rich_help_panel=RESULTS,
        ),
    ] = "all",
    colormap: Annotated[
        str,
        typer.Option(
            help="Colours of maps: foveate, or any of matplotlib's, such as viridis or inferno.", rich_help_panel=RESULTS
        ),
    ] = "foveate",
    opacity: Annotated[
        float,
        typer.Option(help="Of a map's largest value on the photograph, above 0 and at most 1.", rich_help_panel=RESULTS),
    ] = 0.85,
    dpi: Annotated[
        int,
        typer.Option(help="Dots an inch of sheets and panels; overlays keep the photograph's pixels.", rich_help_panel=RESULTS),
    ] = 110,
    scale: Annotated[
        str,
        typer.Option(
            help="Which maps have one scale of colours: own (each its own), images (those of a method over all images), "
            "methods (those of an image over its methods), common (all).",
            rich_help_panel=RESULTS,
        ),
    ] = "own",
    crop: Annotated[
        str | None,
        typer.Option(
            help="What the model sees of a photograph, if not what it is made for: none (all of it at its own aspect, for "
            "models that take other sizes), resize (all of it, squashed), centre, ten (corners and centre, each also mirrored: "
            "maps are put together on the whole; ten times the time, or more).",
            rich_help_panel=DATA,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Maps of why a model says what it says of images: pictures, probabilities, and whether a map can be trusted."""
    with sentences(debug):
        required("explain", "matplotlib", "jinja2")
        from foveate.data.images import CROPS
        from foveate.disk.written import check_own, pictures_in
        from foveate.precision import check_precision
        from foveate.registry import ungrouped
        from foveate.report.explained import ExplainedPage
        from foveate.report.sheets import Look, crops_sentence

        precise = check_precision(precision, "--precision")
        for option, text in (*(("IMAGE", image) for image in images), ("--target", target), ("--against", against)):
            refuse_empty(option, text)
        kind, formats = parse_pictures(pictures)
        if crop is not None and crop not in CROPS:
            raise FoveateError(f"--crop {crop!r} is unknown: use {', '.join(CROPS)}")
        studio = Studio(kind, scale, Look(colormap, opacity, dpi, formats))
        given = ",".join(method or ["grad_cam", "hires_cam"])
        names = listed(given)
        ungrouped(names)  # an unknown name stops here, before the model is built
        if not names:
            raise FoveateError(f"--method {given!r} names none: see 'foveate list methods'")
        classifier = chosen.open(encoding)
        question = Question(
            methods=names,
            layer=several(layer),
            fuse=fuse,
            targets=[class_index(one, classifier) for one in _targets(target)],
            against=class_index(against, classifier) if against is not None else None,
            head=cast("Head | None", head),  # another is refused where the outputs are known
            precision=precise,
            settings=own_settings(setting),
            only_errors=errors,
        )
        if question.against is not None and len(question.targets) > 1:
            raise FoveateError(f"--target {target!r} asks for contrasts itself: leave out --against, or give one target")
        folder = out_folder(out)
        if kind != "none":
            check_own(folder / PAGE)
            studio.page = ExplainedPage()
        named = Pictures.named(images, classifier, question.needs_labels, encoding, crop)
        document: list[dict[str, Any]] = []
        earlier = {} if kind == "none" else pictures_in(folder)
        missing = Unanswered()
        stopped: BaseException | None = None
        quiet = as_json or len(named) == 1 or sys.stdout.isatty()  # there, images that are done show how far it is
        try:
            explained = _explained(classifier, named, question, folder, missing, studio)
            for item in progress(explained, "explaining", quiet, len(named)):
                if item is None:
                    continue
                if not document:
                    print_notes(classifier)
                document.append(item)
                if not as_json:
                    _print_image(item)
        except (KeyboardInterrupt, FoveateError) as error:
            stopped = error
        studio.finish()
        if studio.page is not None and document:
            facts = {
                "layer": document[0]["layer"] or "",
                "weights": chosen.weights or ("pretrained" if chosen.pretrained else ""),
                "crop": "" if crop is None else f"{crop}, {crops_sentence('several')}" if crop == "ten" else crop,
            }
            studio.page.write(folder / PAGE, classifier.name, {name: text for name, text in facts.items() if text})
        if stopped is None and len(named.failures) == len(named):
            reasons = [reason for _, reason in named.failures]
            more = f"; and {len(reasons) - MOST_REASONS} others" if len(reasons) > MOST_REASONS else ""
            raise FoveateError("; ".join(dict.fromkeys(reasons[:MOST_REASONS])) + more)
        if isinstance(stopped, FoveateError) and not document:
            raise stopped
        if as_json:
            listing = [{"file": printable(file), "reason": reason} for file, reason in named.failures]
            page = printable(folder / PAGE) if studio.page is not None and document else None
            whole = {"images": document, "complete": stopped is None, "failures": listing, "page": page}
            print(json.dumps({**whole, "refused": missing.refused, "left_out": missing.left_out}, indent=2))
        elif document and kind != "none":
            Console(soft_wrap=True, highlight=False).print(
                f"pictures in [bold]{escape(printable(folder))}[/]; the page: [bold]{escape(printable(folder / PAGE))}[/]"
            )
        print_notes(classifier)
        if stay := sum(path.exists() and path.stat().st_mtime_ns == when for path, when in earlier.items()):
            print_note(
                f"{stay} picture(s) of an earlier call stay in {printable(folder)}; the page has those of this call alone"
            )
        for name, reason in missing.left_out.items():
            print_note(f"left out {reason_of(name, reason)}")
        for name, reason in [*missing.refused.items(), *(("", reason) for _, reason in named.failures)]:
            err.print(f"[bold red]left out:[/] {escape(reason_of(name, reason))}", soft_wrap=True)
        if isinstance(stopped, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted after {len(document)} of {len(named)} image(s)")
        if stopped is not None:
            raise FoveateError(f"stopped after {len(document)} of {len(named)} image(s): {stopped}")
        if errors and not document:
            print_note(f"--errors: the model gets all {len(named) - len(named.failures)} image(s) right")
        if named.failures or missing.refused:
            raise typer.Exit(FAILURES)


def _explained(
    classifier: Classifier, named: Pictures, question: Question, folder: Path, missing: Unanswered, studio: Studio
) -> Iterator[dict[str, Any] | None]:
    """The entry of each image as it is done, None for those that are passed over."""
    start, size = 0, 1  # the first image is shown once it is done, not once the first sixteen are
    while start < len(named):
        rows = range(start, min(start + size, len(named)))
        start, size = rows.stop, min(2 * size, AT_ONCE)
        read, done = named.read(rows, classifier), 0
        for _, alike in groupby(read, key=lambda picture: picture.stem if picture.crops else picture.x.shape):
            try:
                for item in explain_batch(classifier, list(alike), question, folder, missing, studio):
                    done += 1
                    yield item
            except FoveateError as error:
                if named.crop == "none" and "images of shape" in str(error):
                    raise FoveateError(f"--crop none: {error} Use --crop resize, which keeps to its size") from None
                raise
        yield from [None] * (len(rows) - done)


def _targets(text: str) -> list[str]:
    """One target, or several separated by commas: words and indices; names of classes have commas of their own."""
    parts = [part.strip() for part in text.strip(" ,").split(",")]
    listed = all(part in ("pred", "label", "second") or part.lstrip("-").isdigit() for part in parts)
    return list(dict.fromkeys(parts)) if listed else [text]


def _print_image(item: dict[str, Any]) -> None:
    from foveate.report.sheets import crops_sentence

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
    if item["crops"]:
        console.print(f"[dim]{crops_sentence(item['crops'])}[/]", soft_wrap=True)
    if note := crop_note(item):
        console.print(f"[yellow]note:[/] {note}", soft_wrap=True)
    if "picture" in item:
        console.print(f"all of them: [bold]{escape(item['picture'])}[/]", soft_wrap=True)
    console.print(
        f"[dim]per image: {1000 * item['seconds_shared']:.0f} ms for the run of the model and what else all methods share, "
        f"{1000 * item['seconds_left']:.0f} ms for what is left after each map[/]",
        soft_wrap=True,
    )


def _print_answer(console: Console, answer: dict[str, Any], item: dict[str, Any]) -> None:
    from foveate.registry import is_control

    where = f", at layer {escape(item['layer'])} ({escape(item['grid'])})" if item["layer"] else ""
    console.print(f"[bold]{escape(why(answer))}[/]{where}")
    table = Table(box=None, padding=(0, 1), collapse_padding=True, header_style="dim")
    table.add_column("method", no_wrap=True)
    found = answer["maps"].values()
    # A method's own contrast; what was asked stands above.
    own = any(values["against"] not in (None, answer["against"]) for values in found)
    promised = any(values["completeness_error"] is not None for values in found)
    if own:
        table.add_column("and not", min_width=7, max_width=16)
    shared = any(values["share_before"] is not None for values in found)
    columns = {"p before → after": (True, 13), "share before → after": (shared, 13), "error": (promised, 7)}
    for column, (wanted, least) in columns.items():
        if wanted:
            table.add_column(column, justify="right", min_width=least)
    table.add_column("ms", justify="right", no_wrap=True, min_width=6)
    for name, values in answer["maps"].items():
        error = values["completeness_error"]
        cells = [escape(short(values["against_name"] or ""))] if own else []
        for measure in ("p", "share") if shared else ("p",):
            before, after = values[f"{measure}_before"], values[f"{measure}_after"]
            cells.append("" if before is None else f"{before:.3f} → {after:.3f}")
        cells += ["" if error is None else f"{error:.1e}"] if promised else []
        shown = f"{name} [dim](control)[/]" if is_control(name) else name
        table.add_row(shown, *cells, f"{1000 * values['seconds']:.1f}")
    console.print(table)
    if shared:
        console.print("[dim]share: p of the class by p of the two that are told apart[/]", soft_wrap=True)
    if promised:
        console.print(
            "[dim]error: of completeness, by which the map misses what it must add up to, relative[/]", soft_wrap=True
        )
    for name, values in answer["maps"].items():
        if values["degenerate"]:
            advice = ", nothing here speaks for the class: try another target, layer or method" if not is_control(name) else ""
            console.print(f"[yellow]{escape(name)}:[/] the map is constant{advice}", soft_wrap=True)
        if values["remark"]:
            console.print(f"[dim]{escape(name)}: {escape(values['remark'])}[/]", soft_wrap=True)
