"""A real browser on the pages: what overflows, is cut off or overlaps, what axe-core says, what is asked of the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

WIDTHS = {"phone": 390, "laptop": 1280, "desktop": 1920}
SCHEMES = ("light", "dark")

LAYOUT = (Path(__file__).parent / "layout.js").read_text(encoding="utf-8")


def chromium() -> str | None:
    """The browser of this machine: CHROMIUM, or what a distribution installs; None where there is none."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> Iterator[tuple[Any, list[str]]]:
    """A page and what went wrong in it so far: errors of its scripts, and every request but the one for itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on(
        "console", lambda message: wrong.append(f"console: {message.text}") if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    own = path.resolve().as_uri()

    def requested(request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")) and request.url.partition("#")[0] != own:
            wrong.append(f"request: {request.url}")

    page.on("request", requested)
    page.goto(own)
    yield page, wrong
    context.close()


def layout(browser: Any, path: Path, width: int, scheme: str = "light") -> list[str]:
    """What a reader cannot see at a width, and what went wrong."""
    with opened(browser, path, width, scheme) as (page, wrong):
        found = page.evaluate(LAYOUT)
        if page.evaluate("window.hostile"):
            wrong.append("a hostile name ran as a script")
        return [*wrong, *found]


def accessibility(browser: Any, path: Path, scheme: str, width: int = 1280) -> list[str]:
    """The serious and critical faults that axe-core finds, one for each place."""
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    with opened(browser, path, width, scheme) as (page, _):
        page.evaluate(axe)
        found = page.evaluate("() => axe.run({resultTypes: ['violations']})")
    return [
        f"{rule['id']}: {node['html'][:100]} ({node['any'][0]['message'] if node['any'] else rule['help']})"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def contact_sheet(pages: Mapping[str, Path], path: Path) -> Path:
    """Every page at every width, light, and dark on the laptop, one below the other, beside each other."""
    columns = [*((name, width, "light") for name, width in WIDTHS.items()), ("dark", WIDTHS["laptop"], "dark")]
    shots = path.parent / "screenshots"
    shots.mkdir(exist_ok=True)
    rows = []
    with launched() as browser:
        for name, page_path in pages.items():
            row = []
            for label, width, scheme in columns:
                shot = shots / f"{name}.{label}.png"
                with opened(browser, page_path, width, scheme) as (page, _):
                    page.screenshot(path=shot, full_page=True)
                row.append(shot)
            rows.append((name, row))
    tall, wide = 640, {"phone": 160, "laptop": 400, "desktop": 560, "dark": 400}
    sheet = Image.new("RGB", (sum(wide.values()) + 10 * (len(wide) + 1), (tall + 34) * len(rows)), "#888")
    draw = ImageDraw.Draw(sheet)
    for line, (name, row) in enumerate(rows):
        left, top = 10, line * (tall + 34) + 24
        draw.text((10, top - 18), name, fill="white")
        for (label, _, _), shot in zip(columns, row, strict=True):
            with Image.open(shot) as image:
                small = image.convert("RGB")
                small = small.resize((wide[label], max(1, small.height * wide[label] // small.width)))
            sheet.paste(small.crop((0, 0, wide[label], min(tall, small.height))), (left, top))
            left += wide[label] + 10
    sheet.save(path)
    return path
