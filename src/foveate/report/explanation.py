"""Explanation: as a fragment of HTML for notebooks, as a matplotlib figure, and a map on its photograph; films likewise."""

from __future__ import annotations

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from foveate.data.images import to_image
from foveate.errors import ImageError, required
from foveate.explanation.answers import Explanation
from foveate.maps import upsample
from foveate.overlay import HEAT, colours, heat, on_photograph, overlay
from foveate.registry import METHODS, is_control, title_of
from foveate.report import pictures, sheets
from foveate.report.film import epochs_shown
from foveate.report.page import filled
from foveate.training.film import Film

required("a figure", "matplotlib")
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

SIDE, LEAST_SIDE = 192, 128  # pixels of a picture in a notebook, and where there are many
FEW, MOST = 30, 64  # pictures up to which they are of that size, and that are shown at all
EPOCHS = 6
_numbers = itertools.count(1)  # of what a notebook shows: two outputs on a page must not share their buttons


# -- one map on one photograph -------------------------------------------------------------------------------------


def overlaid(explanation: Explanation, method: str, index: int, photograph: Image.Image | None = None) -> Image.Image:
    """A map on its photograph, or on what the network saw where there is none."""
    photograph = explanation.photograph(index) if photograph is None else photograph
    saliency, preprocess = explanation.maps[method][index].detach().float().cpu(), explanation.seen.preprocess
    if photograph is None or preprocess is None:
        return to_image(overlay(explanation.seen.x[index].cpu(), saliency))
    return on_photograph(photograph, saliency, preprocess.frame(photograph.size))


def _shown(explanation: Explanation, index: int, side: int) -> tuple[Image.Image, list[Image.Image]]:
    """A photograph and its overlays, at most ``side`` pixels wide and high; of a file that is gone, what was seen."""
    try:
        photograph = explanation.photograph(index)
    except ImageError:
        photograph = None
    if photograph is None:
        whole = to_image(explanation.seen.x[index].cpu())
        given = (to_image(overlay(explanation.seen.x[index].cpu(), own[index])) for own in explanation.maps.values())
        return _fitted(whole, side), [_fitted(image, side) for image in given]
    small = _fitted(photograph, side)
    frame = explanation.seen.preprocess.frame(photograph.size) if explanation.seen.preprocess else (0.0, 0.0, *photograph.size)
    factor = (small.width / photograph.width, small.height / photograph.height) * 2
    within = [edge * by for edge, by in zip(frame, factor, strict=True)]
    return small, [on_photograph(small, own[index].float().cpu(), within) for own in explanation.maps.values()]


def _fitted(image: Image.Image, side: int) -> Image.Image:
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC)


def _uri(image: Image.Image) -> str:
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), quality=72)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


# -- in a notebook -------------------------------------------------------------------------------------------------


def html(answers: Mapping[str, Explanation]) -> str:
    """One or several explanations of the same images as a fragment of HTML: tabs of methods, and how much the map covers.

    Everything is in it; without its style it is a list of pictures with captions.
    """
    first = next(iter(answers.values()), None)
    if first is None:
        return "<p>no answers</p>"
    names = list(dict.fromkeys(name for answer in answers.values() for name in answer.maps))
    each = max(1, len(answers) * (1 + len(names)))
    shown = min(len(first), max(1, MOST // each))
    side = SIDE if shown * each <= FEW else LEAST_SIDE
    images = []
    for index in range(shown):
        rows, picture = [], ""
        for key, answer in answers.items():
            small, drawn = _shown(answer, index, side)
            picture = picture or _uri(small)
            cells: list[dict[str, Any]] = [
                {
                    "number": names.index(name) + 1,
                    "title": title_of(name),
                    "overlay": _uri(image),
                    "empty": bool(answer.degenerate[name][index]) if name in answer.degenerate else False,
                    "question": answer.question(index, name),
                    "remark": next(iter(answer.remarks.get(name, [])[index : index + 1]), "") or "",
                }
                for name, image in zip(answer.maps, drawn, strict=True)
            ]
            rows.append({"key": key, "question": answer.question(index), "cells": cells, "p": answer.said(index)[2]})
        best, p, _ = first.said(index)
        said = f"{first.seen.class_name(best)}, p = {p:.3f}"
        images.append({"name": first.seen.called(index), "said": said, "picture": picture, "rows": rows, "size": small.size})
    content = {
        "kind": "explanation",
        "number": f"{next(_numbers)}-{first.seen.x.shape[0]}{len(names)}",
        "heading": heading(answers),
        "layer": first.layer,
        "tabs": [{"name": name, "title": title_of(name), "control": is_control(name)} for name in names],
        "images": images,
        "rest": len(first) - shown,
        "left_out": list({**first.left_out}.items()),
        "side": side,
        "colours": _colours(),
    }
    return filled("explanation_fragment.html.j2", content)


def heading(answers: Mapping[str, Explanation]) -> str:
    """What is shown, in a line."""
    first = next(iter(answers.values()))
    questions = f", {len(answers)} questions" if len(answers) > 1 else ""
    return f"Explanation of {len(first)} image{'s' * (len(first) != 1)}{questions} by {first.seen.model}"


def _colours() -> str:
    stops = heat(torch.linspace(0, 1, 7)[None])[:, 0].T
    return ", ".join(f"rgb({', '.join(str(round(255 * float(value))) for value in stop)})" for stop in stops)


def film_html(film: Film) -> str:
    """The film strip as a fragment of HTML: images down, some epochs across."""
    batch, frames = film.batch, epochs_shown(film, EPOCHS) if film.frames else []
    assert batch.y is not None  # a film has labels
    shown = min(len(batch), max(1, MOST // (1 + len(frames))))
    names = film.class_names
    images = []
    for index in range(shown):
        label, x = int(batch.y[index]), batch.x[index].cpu()
        cells = []
        for number, frame in enumerate(frames, 1):
            M = upsample(torch.from_numpy(frame.maps[index : index + 1]).float() / 255, (x.shape[-2], x.shape[-1]))[0]
            inside, right = float(frame.inside[index]), int(frame.predicted[index]) == label
            words = f"p = {frame.probability[index]:.2f}, {'right' if right else 'wrong'}"
            words += "" if np.isnan(inside) else f"; {inside:.0%} on the object"
            drawn = _uri(_fitted(to_image(overlay(x, M)), LEAST_SIDE))
            cells.append({"number": number, "title": f"epoch {frame.epoch}", "overlay": drawn, "empty": False})
            cells[-1] |= {"question": words, "remark": ""}
        picture = _fitted(to_image(x), LEAST_SIDE)
        name = batch.id[index] if batch.id else f"image {index}"
        known = names[label] if names and label < len(names) else f"class {label}"
        row = {"key": "", "question": known, "cells": cells, "p": None}
        images.append({"name": name, "said": known, "picture": _uri(picture), "rows": [row], "size": picture.size})
    title = METHODS.get(film.method).title
    content = {
        "kind": "film",
        "number": f"{next(_numbers)}-film",
        "heading": f"Film of {len(batch)} image{'s' * (len(batch) != 1)} over {len(film.frames)} epoch(s): {title}",
        "layer": "" if film.layer == "auto" else film.layer,
        "tabs": [{"name": f"epoch {frame.epoch}", "title": f"epoch {frame.epoch}", "control": False} for frame in frames],
        "images": images,
        "rest": len(batch) - shown,
        "left_out": [],
        "side": LEAST_SIDE,
        "colours": _colours(),
    }
    return filled("explanation_fragment.html.j2", content)


# -- on paper ------------------------------------------------------------------------------------------------------


class Sheet(Figure):
    """A figure that a notebook shows, whatever backend matplotlib has there."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", facecolor="white")
        return buffer.getvalue()


def figure(explanation: Explanation, rows: Sequence[int]) -> Sheet:
    """Images down, methods across, with what was asked and what the model says; long lines are broken."""
    names = list(explanation.maps)
    lines = max(1, math.ceil((1 + len(names)) / sheets.ABREAST))
    columns = math.ceil((1 + len(names)) / lines)
    drawn = [_shown(explanation, index, 448) for index in rows]
    heights = [2.1 * min(2.0, picture.height / picture.width) + 0.55 for picture, _ in drawn for _ in range(lines)]
    made = Sheet(figsize=(2.3 * columns + 0.6, sum(heights) + 0.5), dpi=110, layout="constrained")
    axes: Any = made.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (index, (picture, maps)) in enumerate(zip(rows, drawn, strict=True)):
        own = axes[number * lines : (number + 1) * lines].flat
        best, p, _ = explanation.said(index)
        said = f"{explanation.seen.called(index)[-34:]}\n{explanation.seen.class_name(best)}, p = {p:.3f}"
        for axis, image, title in zip(own, [picture, *maps], [said, *map(title_of, names)], strict=False):
            axis.imshow(image)
            axis.set_title(_broken(title), fontsize=8.5, color=pictures.INK, loc="left", parse_math=False)
        if number == 0 or explanation.question(index) != explanation.question(rows[0]):
            axes[number * lines, min(1, columns - 1)].text(
                0, -0.03, _broken(f"why {explanation.question(index)}"), fontsize=7.5, color=pictures.MUTED, va="top",
                transform=axes[number * lines, min(1, columns - 1)].transAxes, parse_math=False,
            )  # fmt: skip
    if names:
        scale = ScalarMappable(Normalize(0, 1), colours(HEAT))
        bar = made.colorbar(scale, ax=axes[:lines], shrink=0.9, aspect=25, pad=0.01)
        bar.ax.tick_params(labelsize=7, colors=pictures.MUTED, length=2)
        bar.outline.set_visible(False)
    where = f", at layer {explanation.layer}" if explanation.layer else ""
    made.suptitle(
        textwrap.shorten(heading({"": explanation}) + where, 110, placeholder=" …"),
        fontsize=10,
        color=pictures.INK,
        parse_math=False,
    )
    return made


def _broken(text: str) -> str:
    return "\n".join(textwrap.shorten(line, 40, placeholder=" …") if len(line) > 40 else line for line in text.split("\n"))
