"""The documents: their Python runs, their commands exist, their links lead somewhere, and what they quote is in the source."""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

import foveate
from foveate.cli import app
from foveate.data import scenes
from foveate.data.drawing import draw
from foveate.registry import LOSSES, METHODS, METRICS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.S | re.M)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    """What stands behind the language of each block, and its text."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [(info.strip(), text) for name, info, text in found if name == language]


def runs(path: Path) -> list[str]:
    return [text for info, text in blocks(path, "python") if not info]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents name: two photographs, and six in a folder for each class."""
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(6):
        animal = scenes.CLASSES[number % 2]
        picture = Image.fromarray(draw(animal, "grass", np.random.default_rng(number))[0])
        (folder / "photos" / animal).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "photos" / animal / f"{number}.jpg")
    picture.resize((300, 200)).save(folder / "photo.jpg")
    picture.save(folder / "other.jpg")
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page runs, without a network behind it."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("path", [path for path in PAGES if runs(path)], ids=named)
def test_the_python_of_a_page_runs(path: Path, folder: Path) -> None:
    """All blocks of a page in order, in one namespace; what needs a download or another library has a title that says so."""
    before = [register.all() for register in (METHODS, METRICS, LOSSES)]
    torch.manual_seed(0)
    space: dict[str, object] = {"__name__": "page"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for text in runs(path):
                exec(compile(text, named(path), "exec"), space)
    finally:
        for register, records in zip((METHODS, METRICS, LOSSES), before, strict=True):
            register._records.clear()
            register._records.update(records)


def test_few_blocks_are_left_out() -> None:
    left = [(named(path), info) for path in PAGES for info, _ in blocks(path, "python") if info]
    assert sorted(left) == sorted(LEFT_OUT), "a block that does not run: say why in its title, and list it here"
    assert sum(len(runs(path)) for path in PAGES) > 20


LEFT_OUT = [
    ("docs/ca_stream.md", 'title="needs a download"'),
    ("docs/start.md", 'title="needs a download"'),
    ("docs/guides/explain.md", 'title="needs Captum"'),
]


def commands(path: Path) -> list[list[str]]:
    """The words of each command line of foveate, lines that end with a backslash joined, comments and prompts left out."""
    text = "\n".join(text for _, text in blocks(path, "sh")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    lines = [line for line in words if line and line[0].rpartition("/")[2] == "foveate"]
    inline = re.findall(r"`(foveate [a-z][^`]*)`", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S))
    return lines + [shlex.split(line, comments=True) for line in inline]


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)], ids=named)
def test_the_commands_of_a_page_exist(path: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(path):
        name = words[1] if len(words) > 1 else "--help"
        options = {option.partition("=")[0] for option in words[1:] if option.startswith("--")}
        if name.startswith("--"):
            assert options <= {"--help", "--version", "--install-completion", "--show-completion"}, words
            continue
        if name == "COMMAND":  # any of them
            name = "list"
        assert name in known, words
        takes = {option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert options <= takes | {"--help"}, f"{words}: {sorted(options - takes)}"


OPTIONS = re.compile(r"`(--[a-z][a-z-]*)")


@pytest.mark.parametrize("path", [path for path in PAGES if OPTIONS.search(path.read_text(encoding="utf-8"))], ids=named)
def test_the_options_in_a_page_exist(path: Path) -> None:
    """Those in the text, of any command."""
    known = get_command(app).commands.values()  # type: ignore[attr-defined]
    takes = {
        option for command in known for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    takes |= {"--install-completion", "--help", "--give-back", "--again", "--device", "--strict", "--repository"}
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert set(OPTIONS.findall(text)) <= takes, sorted(set(OPTIONS.findall(text)) - takes)


@pytest.mark.parametrize("path", [path for path in PAGES if path.parent == ROOT], ids=named)
def test_links_lead_to_files(path: Path) -> None:
    """Those of README and CONTRIBUTING; make docs checks those of the site."""
    for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (path.parent / link).exists(), link


def test_troubleshooting_quotes_what_foveate_says() -> None:
    """Each heading is a message: its parts around an ellipsis stand in the source."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(foveate.__file__).parent.rglob("*.py")))
    joined = re.sub(r'"\s*\n?\s*f?"', "", source)  # a message over several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", page, re.M)
    assert len(headings) > 30
    for heading in headings:
        if heading != "operator torchvision::nms does not exist":  # torchvision's own
            for part in heading.split("…"):
                assert part.strip(" ,:") in joined, heading


def test_gallery_has_a_picture_of_each_method() -> None:
    pictures = {path.stem for path in (ROOT / "docs" / "gallery").glob("*.jpg")}
    assert pictures == {"photograph", *METHODS.all()}, "python docs/gallery.py makes them"
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "gallery").iterdir()) < 2**20
