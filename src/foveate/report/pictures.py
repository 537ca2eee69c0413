"""Pictures: maps in colour, on the image, beside it; curves; as images, files and data URIs."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from foveate.errors import FoveateError
from foveate.files import replacing
from foveate.images import as_rgb, to_image
from foveate.maps import apply_mask, scale, upsample

HEAT = "inferno"
OPACITY = 0.85  # of the largest value
OUTSIDE = 0.55  # brightness of what the network did not see
ROWS = 256  # of a photograph that are drawn together
SIGNED = "RdBu_r"
ABREAST = 7  # panels in a line of a sheet
SPECKLE = 0.1  # of the largest: pixels below do not count as bright, however few are above
PNG = {"compress_level": 4}  # half the time of the default, and 3 % larger
MARK = {"Software": "foveate"}
INK, MUTED, ACCENT, WRONG = "#1c2733", "#66727f", "#0b7285", "#c2410c"


def heat(saliency: Tensor, colours: str = HEAT) -> Tensor:
    """A map ``[H,W]`` in [0, 1] in colours, ``[3,H,W]`` in [0, 1]."""
    from matplotlib import colormaps

    values = colormaps[colours](saliency.detach().float().clamp(0, 1).cpu().numpy())[..., :3]
    return torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1).float()


def is_speckled(saliency: Tensor) -> bool:
    """Whether a map ``[H,W]`` in [0, 1] is of single pixels, as gradients are: at its own scale it is not seen on an image.

    Its pixels differ from the mean of the 5 x 5 around them by a quarter of the mean of all; maps of cells do by a tenth.
    """
    saliency = saliency.detach().float()
    if min(saliency.shape) < 5:
        return False
    around = F.avg_pool2d(saliency[None, None], 5, 1)[0, 0]
    return bool((saliency[2:-2, 2:-2] - around).abs().mean() > 0.25 * saliency.mean())


def overlay(x: Tensor, saliency: Tensor, *, colormap: str = HEAT, opacity: float = OPACITY) -> Tensor:
    """The image ``[K,H,W]`` under its map ``[H,W]``: the more salient, the more of the heat, on a dimmed grey image.

    Of a map of single pixels (:func:`is_speckled`) the brightest 1 % are shown alike, on an image dimmed further.
    """
    seen, dim = visible(saliency)
    return _blended(as_rgb(x.detach().float().cpu()), seen, dim, colormap, opacity)


def visible(saliency: Tensor) -> tuple[Tensor, float]:
    """A map ``[H,W]`` as it is shown on an image, and what the image is multiplied by: 1, or less behind single pixels."""
    saliency = saliency.detach().float().clamp(0, 1).cpu()
    if not is_speckled(saliency):
        return saliency, 1.0
    pixels = saliency.flatten()
    bright = pixels.kthvalue(max(1, math.ceil(0.99 * len(pixels)))).values.clamp(min=SPECKLE)
    return (saliency / bright).clamp(max=1), 0.6


def _blended(x: Tensor, saliency: Tensor, dim: float, colormap: str, opacity: float) -> Tensor:
    """The image ``[3,H,W]``, multiplied by ``dim``, under a map ``[H,W]`` that :func:`visible` gave."""
    x = dim * x
    grey = x.mean(0, keepdim=True)
    quiet = (0.55 * x + 0.45 * grey) * 0.82
    share = (opacity if dim == 1 else min(1.0, opacity + 0.1)) * saliency**0.8
    lit = 0.74 * heat(saliency, colormap) + 0.26 * x
    return (quiet * (1 - share) + (quiet * 0.25 + lit * 0.9) * share).clamp(0, 1)


def on_photograph(
    image: Image.Image,
    saliency: Tensor,
    frame: Sequence[float],
    *,
    colormap: str = HEAT,
    opacity: float = OPACITY,
) -> Image.Image:
    """The overlay on a photograph as it is: at its own resolution and aspect, what the network saw of it in a frame.

    What lies outside of the frame is darker; no frame is drawn where all of the photograph was seen.

    Args:
        saliency: ``[H,W]`` in [0, 1], a map of what the network saw.
        frame: ``left, top, right, bottom`` of that in pixels of the photograph: :meth:`foveate.images.Preprocess.frame`.
    """
    width, height = image.size
    pixels = np.asarray(image.convert("RGB"))
    seen, dim = visible(saliency)
    left, top, right, bottom = frame
    # Where the centre of each pixel of the photograph lies on the map, from -1 to 1 over what was seen.
    across = ((torch.arange(width) + 0.5 - left) / (right - left) * 2 - 1).float()
    down = ((torch.arange(height) + 0.5 - top) / (bottom - top) * 2 - 1).float()
    drawn = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, ROWS):  # whole, a large photograph would take gigabytes of floats
        rows = down[start : start + ROWS]
        grid = torch.stack(torch.meshgrid(across, rows, indexing="xy"), -1)[None]
        here = F.grid_sample(seen[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
        outside = ((rows.abs() > 1)[:, None] | (across.abs() > 1)).float()
        x = torch.from_numpy(pixels[start : start + ROWS].copy()).permute(2, 0, 1).float().div(255)
        blended = _blended(x, here * (1 - outside), dim, colormap, opacity) * (1 - (1 - OUTSIDE) * outside)
        drawn[start : start + ROWS] = (blended * 255).round().byte().permute(1, 2, 0).numpy()
    made = Image.fromarray(drawn, "RGB")
    if cropped_away(frame, image.size) > 0:
        thick = max(1, round(max(image.size) / 600))
        draw = ImageDraw.Draw(made)
        edges = [round(left), round(top), round(right) - 1, round(bottom) - 1]
        draw.rectangle(edges, outline="white", width=thick)
        draw.rectangle([edges[0] + thick, edges[1] + thick, edges[2] - thick, edges[3] - thick], outline="black", width=1)
    return made


def cropped_away(frame: Sequence[float], size: tuple[int, int]) -> float:
    """Share of a photograph of ``size`` (width, height) that lies outside of a frame: what the network never saw."""
    left, top, right, bottom = frame
    return max(0.0, 1 - (right - left) * (bottom - top) / (size[0] * size[1]))


def write(image: Image.Image, path: str | Path) -> None:
    """Write an image as PNG that says where it comes from, so that a folder of photographs can be told from its pictures."""
    marks = PngInfo()
    for key, value in MARK.items():
        marks.add_text(key, value)
    with saving(path) as waiting:
        image.save(waiting, "PNG", pnginfo=marks, **PNG)


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
    if path.suffix.lower() != ".png":
        return False
    try:
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


def side_by_side(
    path: str | Path,
    x: Tensor,
    saliency: Tensor,
    raw: Tensor,
    *,
    signed: bool,
    title: str,
    before: float,
    after: float,
    measure: str = "p",
    note: str = "",
) -> None:
    """Write a picture of four panels: the input, its map, the overlay, and what remains when the map is the mask.

    The second panel shows the map before scaling, with its sign and a colour bar.

    Args:
        x: ``[3,H,W]``; saliency: ``[H,W]`` in [0, 1]; raw: ``[h,w]``.
        signed: negative values mean evidence against: red and blue, also where all happen to be positive.
        before, after: what ``measure`` names, the probability of the target, on the image and on what remains.
    """
    from matplotlib.figure import Figure

    height, width = x.shape[-2:]
    # Places in inches: an automatic layout draws every picture twice, and aligns no two of them.
    panel, gap, bar_width, ticks, below, above = 2.9, 0.1, 0.1, 0.5, 0.3, 0.62
    wide, tall = 4 * panel + 5 * gap + bar_width + ticks, panel * height / width + below + above
    figure = Figure(figsize=(wide, tall), dpi=110)
    figure.text(
        gap / wide,
        1 - 0.1 / tall,
        textwrap.shorten(title, 110, placeholder=" …"),
        ha="left",
        va="top",
        fontsize=12.5,
        color=INK,
        weight="bold",
    )
    lefts = [gap + k * (panel + gap) + (bar_width + ticks if k > 1 else 0) for k in range(4)]
    upright = (below / tall, 1 - (below + above) / tall)
    axes: list[Any] = [figure.add_axes((left / wide, upright[0], panel / wide, upright[1])) for left in lefts]
    beside = figure.add_axes(((lefts[1] + panel + 0.06) / wide, upright[0], bar_width / wide, upright[1]))
    raw = raw.detach().float().cpu()
    limit = float(raw.abs().max()) or 1.0
    negative = signed or bool((raw < 0).any())
    panels: tuple[Any, ...] = (
        to_image(x),
        raw.numpy(),
        to_image(overlay(x, saliency)),
        to_image(apply_mask(x[None], saliency[None])[0]),
    )
    over = "overlay, brightest 1 % alike" if is_speckled(saliency) else "overlay"
    captions = ("input", f"map, {raw.shape[0]} x {raw.shape[1]}", over, "what remains")
    for axis, shown, caption in zip(axes, panels, captions, strict=True):
        if caption.startswith("map"):
            colours, low = (SIGNED, -limit) if negative else (HEAT, 0.0)
            drawn = axis.imshow(
                shown, cmap=colours, vmin=low, vmax=limit, extent=(0, width, height, 0), interpolation="nearest"
            )
            bar = figure.colorbar(drawn, cax=beside)
            beside.ticklabel_format(axis="y", scilimits=(-3, 4))
            bar.ax.yaxis.get_offset_text().set_fontsize(7)
            bar.ax.tick_params(labelsize=7, colors=MUTED, length=2)
            bar.outline.set_visible(False)
        else:
            axis.imshow(shown)
        axis.set_title(caption, fontsize=9.5, color=MUTED, loc="left", pad=4)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    of_two = " of the two classes" if measure == "share" else ""
    axes[0].set_xlabel(f"{measure} = {before:.3f}{of_two}", fontsize=9.5, color=INK, loc="left")
    axes[1].set_xlabel("red: for, blue: against" if negative else "", fontsize=9.5, color=MUTED, loc="left")
    axes[2].set_xlabel(note, fontsize=9.5, color=MUTED, loc="left")
    axes[3].set_xlabel(f"{measure} = {after:.3f}", fontsize=9.5, color=INK, loc="left")
    with saving(path) as waiting:
        figure.savefig(waiting, format="png", facecolor="white", pil_kwargs=PNG, metadata=MARK)


@dataclass(frozen=True)
class Panel:
    """A map ``[H,W]`` in [0, 1] on a sheet, and what is left behind it of the probability, or of what else is measured."""

    title: str
    saliency: Tensor
    after: float
    measure: str = "p"

    def caption(self) -> str:
        more = ", brightest 1 % alike" if is_speckled(self.saliency) else "" if self.saliency.any() else ", an empty map"
        return f"{textwrap.shorten(self.title, 38, placeholder=' …')}\n{self.measure} = {self.after:.3f} left{more}"


def sheet(path: str | Path, x: Tensor, rows: Sequence[tuple[str, float, Mapping[str, Panel]]]) -> None:
    """Write a picture of several maps of one image: for each question its methods, the input in front of them.

    A method has the same place in all questions, empty where it has no answer; those that do not fit in a line go on in
    the next.

    Args:
        x: ``[3,H,W]``.
        rows: for each answer its question, the probability of its class (or what else its panels measure), and for each
            method its panel.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, _, panels in rows for name in panels))
    titles = {name: panel.title for _, _, panels in rows for name, panel in panels.items()}
    lines = math.ceil((1 + len(names)) / ABREAST)
    columns = math.ceil((1 + len(names)) / lines)
    width, gap, words, heading = 2.4, 0.12, 0.42, 0.34  # inches
    height = width * x.shape[-2] / x.shape[-1]
    block = heading + lines * (words + height + gap)
    wide, tall = gap + columns * (width + gap), len(rows) * block
    figure = Figure(figsize=(wide, tall), dpi=110)
    for row, (question, before, panels) in enumerate(rows):
        top = row * block + 0.1
        measure = next(iter(panels.values())).measure if panels else "p"
        of_two = " of the two" if measure == "share" else ""
        figure.text(gap / wide, 1 - top / tall, question, va="top", fontsize=11.5, color=INK, weight="bold")
        for place, name in enumerate(["input", *names]):
            line, column = divmod(place, columns)
            panel = panels.get(name)
            left, bottom = gap + column * (width + gap), row * block + heading + (line + 1) * (words + height) + line * gap
            axis = figure.add_axes((left / wide, 1 - bottom / tall, width / wide, height / tall))
            axis.axis("off")
            if place and panel is None:
                axis.text(0.5, 0.5, f"{titles[name]}: no answer", ha="center", va="center", fontsize=8.5, color=MUTED)
                continue
            axis.imshow(to_image(x if panel is None else overlay(x, panel.saliency)))
            said = f"input\n{measure} = {before:.3f}{of_two}" if panel is None else panel.caption()
            axis.set_title(said, fontsize=8.5, color=MUTED, loc="left", pad=3)
    with saving(path) as waiting:
        figure.savefig(waiting, format="png", facecolor="white", pil_kwargs=PNG, metadata=MARK)


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
