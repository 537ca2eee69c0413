"""Page: the loop on one self-contained HTML file, from what each model scores to where it looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate._version import __version__
from foveate.disk.files import write_text
from foveate.errors import required

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ShownImage:
    """One image as a model sees it: pictures as data URIs, what was said, and whether that was right."""

    image: str
    overlay: str
    said: str
    probability: float
    right: bool
    inside: float


def filled(template: str, content: Mapping[str, Any]) -> str:
    """A template of this folder with its content; what is text stays text, whatever is in it."""
    required("a page", "jinja2")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    return environment.get_template(template).render({"version": __version__, **content})


def render(template: str, path: str | Path, content: Mapping[str, Any]) -> Path:
    """Fill a template of this folder and write the page; nothing in it is loaded from elsewhere."""
    write_text(path, filled(template, content))
    return Path(path)
