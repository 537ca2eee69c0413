"""Pictures: maps in colour, on the image, beside it; curves; as images, files and data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
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
from foveate.overlay import ramp as ramp

SIGNED = "RdBu_r"
PNG = {"compress_level": 4}  # half the time of the default, and 3 % larger
MARK = {"Software": "foveate"}
SIGNS = {".pdf": b"/Creator (foveate)", ".svg": b"<dc:title>foveate</dc:title>"}  # what MARK is in other formats
ENDS = 65536  # bytes at either end of a file in which they stand
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


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], panels: Sequence[tuple[str, str]]) -> str:
    """Training curves of several runs as one SVG: a panel for each ``(figure, title)`` that any run has."""
    from matplotlib.figure import Figure

    shown = [(key, title) for key, title in panels if any(key in line for history in runs.values() for line in history)]
    figure = Figure(figsize=(3.6 * len(shown), 2.7), layout="constrained")
    axes: Any = np.atleast_1d(figure.subplots(1, len(shown)))
    colours = (WRONG, ACCENT, "#7048e8", "#5c940d", "#1c7ed6", "#a61e4d")
    for axis, (key, title) in zip(axes, shown, strict=True):
        for (name, history), colour in zip(runs.items(), colours, strict=False):
            points = [(line["epoch"], line[key]) for line in history if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=name.replace("_", " "))
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_xlabel("epoch", fontsize=8.5, color=MUTED)
        axis.tick_params(labelsize=8, colors=MUTED)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(fontsize=8.5, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=False, facecolor="white", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
