"""Pictures: what pages and sheets share: signed maps, thumbnails and small maps as text, and curves."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from foveate.data.images import to_image
from foveate.errors import required
from foveate.maps import scale, upsample
from foveate.overlay import heat

SIGNED = "RdBu_r"
STAND_INS = ("#c20001", "#0b0002", "#700003", "#5c0004", "#1c0005", "#a60006")  # for the colours of the page, c0 to c5
INK, MUTED, ACCENT, WRONG = "#1c2733", "#66727f", "#0b7285", "#c2410c"


def signed_heat(raw: Tensor, size: tuple[int, int]) -> Tensor:
    """A raw map ``[h,w]`` in red for evidence for, blue for evidence against, white for none: ``[3,H,W]``."""
    values = scale(upsample(raw[None].detach().float(), size), "max")[0]
    return heat(values / 2 + 0.5, SIGNED)


def enlarge(x: Tensor, factor: int) -> Image.Image:
    """``[3,H,W]`` as an image, ``factor`` times as large."""
    image = to_image(x)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)


def data_uri(image: Image.Image, quality: int = 88) -> str:
    """An image as the text of a ``src`` attribute."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Thumb:
    """An image as a page shows it: a data URI, and its width by its height."""

    picture: str
    aspect: float

    @classmethod
    def of(cls, given: Tensor | Image.Image, side: int, quality: int) -> Thumb:
        """Of ``x [K,H,W]`` in [0, 1], or of a picture; no side is longer than ``side`` pixels."""
        image = given.copy() if isinstance(given, Image.Image) else to_image(given)
        aspect = round(image.width / image.height, 4)
        image.thumbnail((side, side))
        return cls(data_uri(image, quality), aspect)


def grey(values: np.ndarray | Tensor) -> dict[str, Any]:
    """A small map ``[h,w]`` in [0, 1] as grey values for the page's own colours."""
    height, width = values.shape
    levels = np.uint8(np.round(np.asarray(values) * 255)).tobytes()
    return {"grey": base64.b64encode(levels).decode(), "width": width, "height": height}


def digits(value: float) -> float | None:
    """Four digits of a number, for a page; None where there is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Curves:
    """Training curves for a page: each panel with its title as SVG, and the runs with their colours."""

    panels: list[tuple[str, str]]
    runs: list[tuple[str, str]]


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], panels: Sequence[tuple[str, str]]) -> Curves:
    """Training curves of several runs: a panel for each ``(figure, title)`` that any run has, in the colours of the page."""
    required("a figure", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    shown = [(key, title) for key, title in panels if any(key in line for history in runs.values() for line in history)]
    colours = {name: f"var(--c{place % 6})" for place, name in enumerate(runs)}
    drawn = []
    for key, title in shown:
        figure = Figure(figsize=(3.8, 2.5), layout="constrained")
        axis: Any = figure.subplots()
        for place, history in enumerate(runs.values()):
            points = [(line["epoch"], line[key]) for line in history if key in line]
            if points:
                marker = "o" if len(points) == 1 else ""  # a line of one point is not seen
                axis.plot(*zip(*points, strict=True), color=STAND_INS[place % 6], linewidth=1.8, marker=marker, markersize=4)
        axis.set_xlabel("epoch", fontsize=9.5, color=MUTED)
        axis.tick_params(labelsize=9, colors=MUTED)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(MUTED)
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        for place, colour in enumerate(STAND_INS):
            text = text.replace(colour, f"var(--c{place})")
        text = text.replace(MUTED, "var(--muted)")
        label = html.escape(f"{title} by epoch, of {', '.join(runs)}", quote=True)
        drawn.append((title, text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)))
    return Curves(drawn, list(colours.items()))
