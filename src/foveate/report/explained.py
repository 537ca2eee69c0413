"""Explained: the images that were explained on one self-contained page, with all their maps and what is left behind each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveate.overlay import HEAT, Shade, ramp
from foveate.registry import is_control, title_of
from foveate.report.page import render
from foveate.report.pictures import Thumb, grey
from foveate.report.sheets import MOST_CROPPED, Ground

MOST = 200  # images on the page, so that it stays a file one can send
CELLS = 4000  # maps
THUMB = 320  # pixels
SMOOTH, FINE = 56, 112  # sides of the maps of a page: of cells, and of single pixels


def thumb(given: Tensor | Image.Image) -> Thumb:
    """What is shown of an image on the page."""
    return Thumb.of(given, THUMB, 82)


@dataclass
class ExplainedPage:
    """The page as it grows, image by image; those beyond :data:`MOST`, or :data:`CELLS` maps, are counted."""

    images: list[dict[str, Any]] = field(default_factory=list)
    passed_over: int = 0
    cells: int = 0

    def add(
        self, item: Mapping[str, Any], seen: Thumb, ground: Ground, answers: Sequence[tuple[str, Mapping[str, Shade]]]
    ) -> None:
        """Put an image on the page; where much of it is cropped away, with the whole photograph, that part dark.

        Args:
            item: the entry of the image in the document of ``foveate explain --json``.
            answers: each question in words, with the map of each method as it is shown.
        """
        count = sum(len(maps) for _, maps in answers)
        if len(self.images) == MOST or self.cells + count > CELLS:
            self.passed_over += 1
            return
        self.cells += count
        found, much = item.get("answers", [item]), item["cropped"] > MOST_CROPPED
        self.images.append(
            {
                "id": item["file"],
                "name": Path(item["file"]).name,
                "picture": seen.picture,
                "aspect": seen.aspect,
                "whole": asdict(thumb(ground.within(THUMB / 2).framed)) if much else None,
                "cropped": f"{100 * item['cropped']:.0f} % of the photograph is cropped away (dark)" if much else "",
                "top": [[name.split(",")[0], p] for _, name, p in item["top"]],
                "label": (item["label_name"] or "").split(",")[0],
                "wrong": item["right"] is False,
                "sheet": _beside(item.get("picture")),
                "answers": [
                    {"why": words, "maps": [_cell(name, document, shade) for name, shade in maps.items()]}
                    for (words, maps), document in zip(answers, found, strict=True)
                ],
            }
        )

    def write(self, path: Path, model: str, facts: Mapping[str, str]) -> Path:
        """Write the page.

        Args:
            model: how it is called; facts: what else is said below the heading, by name.
        """
        methods = list(dict.fromkeys(cell["method"] for i in self.images for a in i["answers"] for cell in a["maps"]))
        data = {
            "methods": [{"name": name, "title": title_of(name), "control": is_control(name)} for name in methods],
            "images": self.images,
            "ramp": ramp(HEAT),
        }
        content = {
            "model": model,
            "facts": facts,
            "count": len(self.images),
            "methods": len(methods),
            "passed_over": self.passed_over,
            "contrasts": any(cell["measure"] == "share" for i in self.images for a in i["answers"] for cell in a["maps"]),
            "several": any(len(image["answers"]) > 1 for image in self.images),
            "labelled": any(image["label"] for image in self.images),
            "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        }
        return render("explained.html.j2", path, content)


def _cell(name: str, document: Mapping[str, Any], shade: Shade) -> dict[str, Any]:
    values = document["maps"][name]
    measure = "share" if document["against"] is not None and values["share_after"] is not None else "p"
    notes = [shade.note(), values["remark"] or ""]
    return {
        "method": name,
        "against": (values["against_name"] or "").split(",")[0],
        "measure": measure,
        "before": round(values[f"{measure}_before"], 6),
        "after": round(values[f"{measure}_after"], 6),
        "note": "; ".join(note for note in notes if note),
        "picture": _beside(values.get("picture") or values.get("overlay")),
        "map": small(shade),
    }


def _beside(picture: str | None) -> str:
    """The address of a picture beside the page."""
    return "" if picture is None else quote(Path(picture).name)


def small(shade: Shade) -> dict[str, Any]:
    """A map as grey values that a page colours, as bright as it is in pictures."""
    height, width = shade.values.shape
    factor = min(1.0, (FINE if shade.speckled else SMOOTH) / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    pooled = (F.adaptive_max_pool2d if shade.speckled else F.adaptive_avg_pool2d)(shade.values[None], size)[0]
    return grey(pooled.clamp(0, 1))
