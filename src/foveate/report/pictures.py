"""Pictures: maps in colour, on the image, beside it; curves; as images, files and data URIs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from foveate.errors import FoveateError
from foveate.files import replacing
from foveate.images import to_image
from foveate.maps import scale, upsample
from foveate.overlay import HEAT as HEAT
from foveate.overlay import OPACITY as OPACITY
from foveate.overlay import Shade as Shade
from foveate.overlay import colours as colours
from foveate.overlay import heat as heat
from foveate.overlay import is_speckled as is_speckled
from foveate.overlay import on_photograph as on_photograph
from foveate.overlay import overlay as overlay

SIGNED = "RdBu_r"
PNG = {"compress_level": 4}  # half the time of the default, and 3 % larger
MARK = {"Software": "foveate"}
SIGNS = {".pdf": b"/Creator (foveate)", ".svg": b"<dc:title>foveate</dc:title>"}  # what MARK is in other formats
ENDS = 65536  # bytes at either end of a file in which they stand
STAND_INS = ("#c20001", "#0b0002", "#700003", "#5c0004", "#1c0005", "#a60006")  # for the colours of the page, c0 to c5
INK, MUTED, ACCENT, WRONG = "#1c2733", "#66727f", "#0b7285", "#c2410c"


def write(image: Image.Image, path: str | Path, dpi: int | None = None) -> None:
    """Write an image as PNG that says where it comes from, so that a folder of photographs can be told from its pictures."""
    marks = PngInfo()
    for key, value in MARK.items():
        marks.add_text(key, value)
    with saving(path) as waiting:
        size: dict[str, Any] = {} if dpi is None else {"dpi": (dpi, dpi)}
        image.save(waiting, "PNG", pnginfo=marks, **size, **PNG)


@contextmanager
def saving(path: str | Path) -> Iterator[Path]:
    """A picture to write instead of ``path``: see :func:`foveate.files.replacing`.

    Raises:
        FoveateError: a picture that foveate did not write is there.
    """
    path = Path(path)
    if path.is_file() and not is_written(path):
        raise FoveateError(f"{str(path)!r} is there, and foveate did not write it: move it, or name another --out")
    with replacing(path) as waiting:
        yield waiting


def is_written(path: Path) -> bool:
    """Whether a file is a picture that foveate wrote."""
    try:
        if path.suffix.lower() in SIGNS:
            with path.open("rb") as file:
                start = file.read(ENDS)
                file.seek(max(len(start), path.stat().st_size - ENDS))
                return SIGNS[path.suffix.lower()] in start + file.read()
        if path.suffix.lower() != ".png":
            return False
        with Image.open(path) as image:
            return all(image.info.get(key) == value for key, value in MARK.items())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


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
class Curves:
    """Training curves for a page: each panel with its title as SVG, and the runs with their colours."""

    panels: list[tuple[str, str]]
    runs: list[tuple[str, str]]


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], panels: Sequence[tuple[str, str]]) -> Curves:
    """Training curves of several runs: a panel for each ``(figure, title)`` that any run has, in the colours of the page."""
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
