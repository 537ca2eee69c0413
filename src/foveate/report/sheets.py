"""Sheets: pictures of maps that say what they show, as files: one overlay, four panels, many maps side by side."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from foveate.data.images import colours_of, cropped_away, to_image
from foveate.disk.written import MARK, PNG, saving, write_picture
from foveate.errors import FoveateError, printable, required
from foveate.overlay import HEAT, OPACITY, Shade, colours, on_photograph
from foveate.report.pictures import (
    INK,
    MUTED,
    SIGNED,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
ABREAST = 7  # panels in a line of a sheet
DPI = 110
MOST_CROPPED = 0.2  # of a photograph: where more is cropped away, its pictures say so
LEFT = "left: the same once the map is laid over the image as a mask, black where the map is 0"


@dataclass(frozen=True)
class Look:
    """How pictures are drawn.

    Attributes:
        colormap: ``foveate``, or any of matplotlib's; signed maps are red and blue.
        opacity: of the largest value of a map on the image, in (0, 1].
        dpi: dots an inch of sheets and of pictures of four panels; an overlay keeps the photograph's pixels.
        formats: of :data:`FORMATS`; the first is the one that is named in documents.

    Raises:
        FoveateError: one of them is none.
    """

    colormap: str = HEAT
    opacity: float = OPACITY
    dpi: int = DPI
    formats: tuple[str, ...] = ("png",)

    def __post_init__(self) -> None:
        colours(self.colormap)
        if not 0 < self.opacity <= 1:
            raise FoveateError(f"opacity {self.opacity:g} is not above 0 and at most 1: at 1 the colours are purest")
        if not 30 <= self.dpi <= 1200:
            raise FoveateError(f"{self.dpi} dpi is not between 30 and 1200: 110 suits a screen, 300 print")
        if not self.formats or not set(self.formats) <= set(FORMATS):
            raise FoveateError(f"formats {', '.join(self.formats)!r} are not of {', '.join(FORMATS)}")


PLAIN = Look()


@dataclass(frozen=True)
class Ground:
    """What maps are drawn on: a photograph, and the frame of what the network saw of it, in its pixels."""

    image: Image.Image
    frame: tuple[float, float, float, float]

    @classmethod
    def of(cls, x: Tensor) -> Ground:
        """What the network saw, ``[K,H,W]``, where there is no photograph around it."""
        image = to_image(x)
        return cls(image, (0, 0, image.width, image.height))

    @property
    def cropped(self) -> float:
        """Share of the photograph that the network never saw, in [0, 1]."""
        return cropped_away(self.frame, self.image.size)

    def within(self, side: float) -> Ground:
        """The same, of a size for a panel of ``side`` pixels."""
        factor = 2 * side / max(self.image.size)
        if factor >= 1:
            return self
        small = (max(1, round(self.image.width * factor)), max(1, round(self.image.height * factor)))
        across, down = small[0] / self.image.width, small[1] / self.image.height
        left, top, right, bottom = self.frame
        made = self.image.resize(small, Image.Resampling.BOX, reducing_gap=2)
        return Ground(made, (left * across, top * down, right * across, bottom * down))

    def under(self, shade: Shade | Tensor, look: Look) -> Image.Image:
        """The overlay of a map."""
        return on_photograph(self.image, shade, self.frame, colormap=look.colormap, opacity=look.opacity)

    @cached_property
    def framed(self) -> Image.Image:
        """The photograph, what the network did not see of it darker."""
        if self.cropped <= 0:
            return self.image
        left, top, right, bottom = (round(edge) for edge in self.frame)
        made = Image.fromarray((np.asarray(self.image) * np.float32(0.5)).astype(np.uint8))
        made.paste(self.image.crop((left, top, right, bottom)), (left, top))
        return made

    def behind(self, mask: Tensor) -> Image.Image:
        """What a mask ``[H,W]`` leaves of what the network saw, on grey."""
        left, top, right, bottom = (round(edge) for edge in self.frame)
        seen = np.asarray(self.image.crop((left, top, right, bottom)), np.float32)
        grown = Image.fromarray(mask.detach().float().clamp(0, 1).cpu().numpy()).resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR
        )
        made = Image.new("RGB", self.image.size, "#e9ecef")
        made.paste(Image.fromarray((seen * np.asarray(grown)[..., None]).round().astype(np.uint8)), (left, top))
        return made


@dataclass(frozen=True)
class About:
    """What a picture says of its image and of who looked at it.

    Attributes:
        layer: with its grid; empty where no method asked for one.
        label: the true class with its index; empty where it is not known.
        right: whether the model says the label.
        channels: of the image, where it is none of colours.
        crops: in how many the network saw it, where that is not at once.
    """

    file: str = ""
    model: str = ""
    layer: str = ""
    label: str = ""
    right: bool | None = None
    cropped: float = 0.0
    channels: int = 3
    crops: int = 0

    def lines(self) -> list[str]:
        """One sentence or list of facts per line, those that are known."""
        facts = [printable(self.file), printable(self.model), f"layer {self.layer}" if self.layer else ""]
        said = "" if self.right is None else ", and the model says so" if self.right else ", and the model says another"
        lines = ["   ·   ".join(fact for fact in facts if fact), f"label: {printable(self.label)}{said}" if self.label else ""]
        if self.cropped > MOST_CROPPED:
            lines.append(cropped_sentence(self.cropped))
        if self.crops:
            lines.append(crops_sentence(self.crops))
        return [line for line in (*lines, colours_of(self.channels)) if line]


NOTHING = About()


def cropped_sentence(share: float) -> str:
    """That the network saw only a part of a photograph, and what to do."""
    return f"the network never saw {100 * share:.0f} % of this photograph, what lies outside of the frame: see --crop"


def crops_sentence(count: int | str) -> str:
    """What numbers and maps are of an image that the network saw in crops."""
    return f"seen in {count} crops: p is the mean over them, and maps are averaged where they meet"


@dataclass(frozen=True)
class Panel:
    """A map ``[H,W]`` in [0, 1] on a sheet, and what is left behind it of the probability, or of what else is measured.

    Attributes:
        shade: how it is shown, where that is not at its own scale.
    """

    title: str
    saliency: Tensor
    after: float
    measure: str = "p"
    shade: Shade | None = None

    @cached_property
    def shown(self) -> Shade:
        return Shade.of(self.saliency) if self.shade is None else self.shade

    def caption(self) -> str:
        note = self.shown.note()
        more = f", {note}" if note else ""
        return f"{textwrap.shorten(self.title, 38, placeholder=' …')}\n{self.measure} = {self.after:.3f} left{more}"


def captioned(path: Path, ground: Ground, shade: Shade, title: str, facts: Sequence[str], look: Look = PLAIN) -> None:
    """Write the overlay of one map, in each format: the photograph's own pixels, and below them what they show."""
    required("a figure", "matplotlib")
    from matplotlib.figure import Figure

    picture = ground.under(shade, look)
    letters = min(36.0, max(11.0, picture.width / 75))  # height of a line in pixels
    dpi = 72 * letters / 9
    wide = max(picture.width, 480) / dpi
    room = int(0.94 * wide * dpi / (0.6 * letters))  # letters in a line
    lines = [(line, True) for line in textwrap.wrap(title, int(0.6 * room))]  # beside the bar
    for fact in facts:
        lines += [(line, False) for line in textwrap.wrap(fact, room if len(lines) > 1 else int(0.65 * room))]
    step = 1.45 * letters / dpi
    strip = max(len(lines), 3) * step + 0.7 * step
    for form in look.formats:
        above = 0.0 if form == "png" else picture.height / dpi
        figure = Figure(figsize=(wide, strip + above), dpi=dpi, facecolor="white")
        tall = strip + above
        for k, (line, first) in enumerate(lines):
            top = 1 - (above + (k + 0.35) * step) / tall
            style: dict[str, Any] = {"fontsize": 9, "color": INK if first else MUTED, "weight": "bold" if first else "normal"}
            figure.text(0.1 / wide, top, line, va="top", parse_math=False, **style)
        axes = figure.add_axes((0.66, (strip - 1.1 * step) / tall, 0.26, 0.6 * step / tall))
        _bar(figure, axes, shade, look, 8)
        if form == "png":
            made = Image.new("RGB", (round(wide * dpi), picture.height + round(strip * dpi)), "white")
            made.paste(picture, (0, 0))
            made.paste(_drawn(figure).resize((made.width, made.height - picture.height)), (0, picture.height))
            write_picture(made, path.with_name(f"{path.name}.png"), look.dpi)
        else:
            on = figure.add_axes((0, strip / tall, picture.width / dpi / wide, above / tall))
            on.imshow(picture, interpolation="none")
            on.axis("off")
            _save(figure, path, Look(look.colormap, look.opacity, look.dpi, (form,)))


def _drawn(figure: Figure) -> Image.Image:
    required("a figure", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _bar(figure: Figure, axes: Axes, shade: Shade, look: Look, size: float, upright: bool = False) -> None:
    """A colour bar with the map's own values at its ends."""
    required("a figure", "matplotlib")
    from matplotlib.cm import ScalarMappable

    known = shade.low is not None and shade.high is not None and shade.high > shade.low
    place = "vertical" if upright else "horizontal"
    bar = figure.colorbar(ScalarMappable(cmap=colours(look.colormap)), cax=axes, orientation=place)
    ends = [f"{shade.low:.2g}", f"{shade.high:.2g}{'+' if shade.speckled else ''}"] if known else ["least", "most"]
    bar.set_ticks([0, 1], labels=ends)
    bar.ax.tick_params(labelsize=size, colors=MUTED, length=2)
    bar.outline.set_visible(False)


def _save(figure: Figure, path: Path, look: Look) -> None:
    """Write a figure in every format of a look; ``path`` has no ending of its own."""
    metadata: dict[str, dict[str, Any]] = {
        "png": dict(MARK),
        "pdf": {"Creator": "foveate", "CreationDate": None},
        "svg": {"Creator": "foveate", "Date": None},
    }
    for form in look.formats:
        options: dict[str, Any] = {"pil_kwargs": PNG} if form == "png" else {}
        with saving(path.with_name(f"{path.name}.{form}")) as waiting, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in letters that matplotlib's font does not have
            figure.savefig(waiting, format=form, dpi=look.dpi, facecolor="white", metadata=metadata[form], **options)


def side_by_side(
    path: Path,
    ground: Ground,
    panel: Panel,
    raw: Tensor,
    *,
    signed: bool,
    title: str,
    before: float,
    note: str = "",
    about: About = NOTHING,
    limit: float | None = None,
    look: Look = PLAIN,
) -> None:
    """Write a picture of four panels: the input, its map, the overlay, and what remains when the map is the mask.

    The second panel shows the map before scaling, with its sign and a colour bar.

    Args:
        path: without an ending: one file for each format.
        panel: the map ``[H,W]`` in [0, 1], and what is left behind it.
        raw: ``[h,w]``.
        signed: negative values mean evidence against: red and blue, also where all happen to be positive.
        before: what the panel measures, on the image as it is.
        limit: the largest value of the colours; the map's own where it is None.
    """
    required("a figure", "matplotlib")
    from matplotlib.figure import Figure

    width, height = ground.image.size
    small = ground.within(2.9 * look.dpi)
    # Places in inches: an automatic layout draws every picture twice, and aligns no two of them.
    side, gap, bar_width, ticks, above = 2.9, 0.1, 0.1, 0.5, 0.62
    facts = about.lines()
    below = 0.36 + 0.17 * (len(facts) + 1)
    wide, tall = 4 * side + 5 * gap + 2 * (bar_width + ticks), side * height / width + below + above
    figure = Figure(figsize=(wide, tall), dpi=look.dpi)
    style: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
    shortened = textwrap.shorten(title, 110, placeholder=" …")
    figure.text(gap / wide, 1 - 0.1 / tall, shortened, fontsize=12.5, color=INK, weight="bold", **style)
    for k, line in enumerate([*facts, f"{panel.measure}: {MEASURES[panel.measure]}   ·   {LEFT}"]):
        shown = textwrap.shorten(line, 200, placeholder=" …")
        figure.text(gap / wide, (below - 0.33 - 0.17 * k) / tall, shown, fontsize=8, color=MUTED, **style)
    lefts = [gap + k * (side + gap) + (bar_width + ticks) * max(0, k - 1) for k in range(4)]
    upright = (below / tall, 1 - (below + above) / tall)
    axes: list[Axes] = [figure.add_axes((left / wide, upright[0], side / wide, upright[1])) for left in lefts]
    besides = [figure.add_axes(((lefts[k] + side + 0.06) / wide, upright[0], bar_width / wide, upright[1])) for k in (1, 2)]
    raw = raw.detach().float().cpu()
    most = (float(raw.abs().max()) if limit is None else limit) or 1.0
    negative = signed or bool((raw < 0).any())
    panels: tuple[Any, ...] = (small.framed, raw.numpy(), small.under(panel.shown, look), small.behind(panel.saliency))
    over = f"overlay, {panel.shown.note()}" if panel.shown.speckled else "overlay"
    captions = ("input", f"map, {raw.shape[0]} x {raw.shape[1]}", over, "what remains")
    left, top, right, bottom = ground.frame
    for axis, shown, caption in zip(axes, panels, captions, strict=True):
        if caption.startswith("map"):
            cmap, low = (SIGNED, -most) if negative else (colours(look.colormap), 0.0)
            extent = (left, right, bottom, top)
            drawn = axis.imshow(shown, cmap=cmap, vmin=low, vmax=most, extent=extent, interpolation="nearest")
            axis.set(xlim=(0, width), ylim=(height, 0), facecolor="#e9ecef")
            bar = figure.colorbar(drawn, cax=besides[0])
            besides[0].ticklabel_format(axis="y", scilimits=(-3, 4))
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
    _bar(figure, besides[1], panel.shown, look, 7, upright=True)
    of_two = " of the two classes" if panel.measure == "share" else ""
    axes[0].set_xlabel(f"{panel.measure} = {before:.3f}{of_two}", fontsize=9.5, color=INK, loc="left")
    axes[1].set_xlabel("red: for, blue: against" if negative else "", fontsize=9.5, color=MUTED, loc="left")
    axes[2].set_xlabel(note, fontsize=9.5, color=MUTED, loc="left")
    axes[3].set_xlabel(f"{panel.measure} = {panel.after:.3f} left", fontsize=9.5, color=INK, loc="left")
    _save(figure, path, look)


MEASURES = {"p": "the model's probability of the class", "share": "p of the class by p of the two that are told apart"}


def sheet(
    path: Path,
    ground: Ground,
    rows: Sequence[tuple[str, float, Mapping[str, Panel]]],
    *,
    about: About = NOTHING,
    look: Look = PLAIN,
) -> None:
    """Write a picture of several maps of one image: for each question its methods, the input in front of them.

    A method has the same place in all questions, empty where it has no answer; those that do not fit in a line go on in
    the next.

    Args:
        path: without an ending: one file for each format.
        rows: for each answer its question, the probability of its class (or what else its panels measure), and for each
            method its panel.
    """
    required("a figure", "matplotlib")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, _, panels in rows for name in panels))
    titles = {name: panel.title for _, _, panels in rows for name, panel in panels.items()}
    lines = math.ceil((1 + len(names)) / ABREAST)
    columns = math.ceil((1 + len(names)) / lines)
    width, gap, words, heading, between = 2.4, 0.12, 0.42, 0.34, 0.6  # inches
    height = width * ground.image.height / ground.image.width
    block = heading + lines * (words + height + gap)
    wide = gap + columns * (width + between)
    measures = list(dict.fromkeys(panel.measure for _, _, panels in rows for panel in panels.values()))
    explained = [*(f"{measure}: {MEASURES[measure]}" for measure in measures), LEFT]
    facts = [line for fact in (*about.lines(), *explained) for line in textwrap.wrap(fact, int(17 * wide))]
    below = 0.1 + 0.17 * len(facts)
    tall = len(rows) * block + below
    figure = Figure(figsize=(wide, tall), dpi=look.dpi)
    small = ground.within(width * look.dpi)
    style: dict[str, Any] = {"va": "top", "parse_math": False}
    for row, (question, before, panels) in enumerate(rows):
        top = row * block + 0.1
        measure = next(iter(panels.values())).measure if panels else "p"
        of_two = " of the two" if measure == "share" else ""
        asked = textwrap.shorten(question, int(11 * wide), placeholder=" …")
        figure.text(gap / wide, 1 - top / tall, asked, fontsize=11.5, color=INK, weight="bold", **style)
        for place, name in enumerate(["input", *names]):
            line, column = divmod(place, columns)
            panel = panels.get(name)
            left = gap + column * (width + between)
            bottom = row * block + heading + (line + 1) * (words + height) + line * gap
            axis = figure.add_axes((left / wide, 1 - bottom / tall, width / wide, height / tall))
            axis.axis("off")
            if place and panel is None:
                axis.text(0.5, 0.5, f"{titles[name]}: no answer", ha="center", va="center", fontsize=8.5, color=MUTED)
                continue
            axis.imshow(small.framed if panel is None else small.under(panel.shown, look))
            said = f"input\n{measure} = {before:.3f}{of_two}" if panel is None else panel.caption()
            axis.set_title(said, fontsize=8.5, color=MUTED, loc="left", pad=3, parse_math=False)
            if panel is not None:
                beside = ((left + width + 0.04) / wide, 1 - bottom / tall, 0.07 / wide, height / tall)
                _bar(figure, figure.add_axes(beside), panel.shown, look, 6, upright=True)
    for k, line_of_text in enumerate(facts):
        figure.text(gap / wide, (below - 0.02 - 0.17 * k) / tall, line_of_text, fontsize=8, color=MUTED, **style)
    _save(figure, path, look)
