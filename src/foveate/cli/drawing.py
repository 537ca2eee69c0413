"""What is drawn of each image: asked for by options, drawn at once, or once the largest of all maps is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.report.explained import ExplainedPage
    from foveate.report.pictures import Thumb
    from foveate.report.sheets import About, Ground, Look, Panel

WRITTEN = ("all", "overlay", "sheet", "none")  # what pictures there are of an image
SCALES = ("own", "images", "methods", "common")


def parse_pictures(text: str) -> tuple[str, tuple[str, ...]]:
    """``--pictures``: what there is of an image, and in which formats: ``sheet,pdf`` is ``("sheet", ("pdf",))``.

    Raises:
        FoveateError: an unknown word, several kinds, or formats of no pictures.
    """
    from foveate.report.sheets import FORMATS

    words = list(dict.fromkeys(word.strip().lower() for word in text.split(",") if word.strip()))
    unknown = [word for word in words if word not in (*WRITTEN, *FORMATS)]
    if unknown or not words:
        wrong = ", ".join(unknown) if words else text
        raise FoveateError(f"--pictures {wrong!r} is unknown: use {', '.join(WRITTEN)}, and {', '.join(FORMATS)} for formats")
    kinds = [word for word in words if word in WRITTEN]
    formats = tuple(word for word in words if word in FORMATS)
    if len(kinds) > 1:
        raise FoveateError(f"--pictures {text!r} asks for {' and '.join(kinds)}: use one of them; all has overlays and sheets")
    if kinds == ["none"] and formats:
        raise FoveateError(f"--pictures {text!r} asks for no pictures and for a format: use one of them")
    return (kinds or ["all"])[0], formats or ("png",)


@dataclass(frozen=True)
class Drawn:
    """One map of an image, and what is said of it.

    Attributes:
        base: what its files are called, without an ending.
        title: what the map is of; ``name``: of its method, on a sheet.
        before, after: what ``measure`` names, on the image, and on what the map leaves of it.
    """

    base: Path
    title: str
    name: str
    raw: Tensor  # [h,w]
    size: tuple[int, int]
    signed: bool
    measure: str
    before: float
    after: float
    note: str = ""

    def panel(self, limit: float | None) -> Panel:
        from foveate.maps import prepare
        from foveate.overlay import Shade
        from foveate.report.sheets import Panel

        saliency = prepare(self.raw[None], self.size)[0]
        return Panel(self.name, saliency, self.after, self.measure, Shade.of_raw(self.raw, self.size, limit))

    def largest(self) -> float:
        """The value that has the last colour where the map is shown at its own scale."""
        from foveate.overlay import Shade

        return Shade.of_raw(self.raw, self.size).high or 0.0


@dataclass(frozen=True)
class Drawing:
    """All pictures of one image.

    Attributes:
        rows: for each question its words, the number before, and the maps by method.
        sheet: what the picture of all of them is called, without an ending; None for none.
        x: what the network saw, where the file is no photograph that can be shown.
        item: the entry of the image in the document; ``seen``: what the network saw, for the page.
    """

    path: Path
    frame: tuple[float, float, float, float] | None
    about: About
    rows: list[tuple[str, float, dict[str, Drawn]]]
    sheet: Path | None
    x: Tensor | None = None
    item: dict[str, Any] = field(default_factory=dict)
    seen: Thumb | None = None

    def ground(self) -> Ground:
        from foveate.data.images import read
        from foveate.report.sheets import Ground

        if self.x is not None or self.frame is None:
            assert self.x is not None
            return Ground.of(self.x)
        return Ground(read(self.path), self.frame)


@dataclass
class Studio:
    """Draws what is given to it.

    Attributes:
        kind: of :data:`WRITTEN`.
        scale: which maps have one scale: none (``own``), those of a method over all images (``images``), those of one image
            over its methods and questions (``methods``), or all (``common``).
    """

    kind: str = "all"
    scale: str = "own"
    look: Look | None = None
    kept: list[Drawing] = field(default_factory=list)
    page: ExplainedPage | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise FoveateError(f"--scale {self.scale!r} is unknown: use {', '.join(SCALES)}")

    @property
    def form(self) -> str:
        """The ending of the files that are named in the document."""
        return "png" if self.look is None else self.look.formats[0]

    def take(self, drawing: Drawing) -> None:
        """Draw an image now, or keep it until all maps of its scale are there."""
        self.kept.append(drawing)
        if self.scale in ("own", "methods"):
            self.finish()

    def finish(self) -> None:
        """Draw what is kept."""
        kept, self.kept = self.kept, []  # what cannot be drawn is not tried again
        limits: dict[tuple[object, ...], float] = {}
        if self.scale != "own":
            for number, drawing in enumerate(kept):
                for key, drawn in self._maps(number, drawing):
                    limits[key] = max(limits.get(key, 0.0), drawn.largest())
        for number, drawing in enumerate(kept):
            self._draw(number, drawing, limits)

    def _key(self, number: int, name: str) -> tuple[object, ...]:
        return {"own": (), "images": (name,), "methods": (number,), "common": ()}[self.scale]

    def _maps(self, number: int, drawing: Drawing) -> Iterator[tuple[tuple[object, ...], Drawn]]:
        for _, _, maps in drawing.rows:
            for name, drawn in maps.items():
                yield self._key(number, name), drawn

    def _draw(self, number: int, drawing: Drawing, limits: dict[tuple[object, ...], float]) -> None:
        from foveate.report import sheets

        look = self.look or sheets.Look()
        ground, rows = drawing.ground(), []
        for question, before, maps in drawing.rows:
            panels = {}
            for name, drawn in maps.items():
                limit = limits.get(self._key(number, name))
                panel = panels[name] = drawn.panel(limit)
                if self.kind in ("all", "overlay"):
                    left = f"{drawn.measure} = {drawn.before:.3f}; {drawn.after:.3f} left with the map as a mask"
                    said = [left, *drawing.about.lines(), panel.shown.note(), drawn.note]
                    target = drawn.base.with_name(f"{drawn.base.name}.overlay")
                    sheets.captioned(target, ground, panel.shown, drawn.title, said, look)
                if self.kind == "all":
                    words: dict[str, Any] = {"title": drawn.title, "before": drawn.before, "note": drawn.note}
                    more: dict[str, Any] = {"signed": drawn.signed, "about": drawing.about, "limit": limit, "look": look}
                    sheets.side_by_side(drawn.base, ground, panel, drawn.raw, **words, **more)
            rows.append((question, before, panels))
        if self.page is not None and drawing.seen is not None:
            shown = [(words, {name: panel.shown for name, panel in panels.items()}) for words, _, panels in rows]
            self.page.add(drawing.item, drawing.seen, ground, shown)
        if drawing.sheet is not None:
            sheets.sheet(drawing.sheet, ground, rows, about=drawing.about, look=look)


def crop_note(item: dict[str, Any]) -> str:
    """What is said of an image of which much is cropped away; empty of others."""
    from foveate.report.sheets import MOST_CROPPED, cropped_sentence

    return cropped_sentence(item["cropped"]) if item["cropped"] > MOST_CROPPED else ""


def named_class(name: str, index: int) -> str:
    """A class as pictures name it: the first of its synonyms, and its index."""
    return f"{printable(name.split(',')[0])} ({index})"
