"""Pictures: what is seen on them, for maps of cells and maps of single pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import maps
from foveate.data.images import Preprocess, cropped_away, to_image, to_tensor
from foveate.disk.written import is_written, write_picture
from foveate.errors import FoveateError
from foveate.overlay import HEAT, ROWS, Shade, is_speckled, on_photograph, overlay
from foveate.overlay import ramp as ramp_of
from foveate.report import pictures, sheets


def cells(side: int, hot: int = 1) -> Tensor:
    """A map of ``side x side`` cells, some of them salient, at the size of an image of 224 pixels."""
    raw = torch.zeros(1, side * side)
    raw[0, torch.randperm(side * side, generator=torch.Generator().manual_seed(0))[:hot]] = 1
    return maps.prepare(raw.view(1, side, side), (224, 224))[0]


def pixels(power: float) -> Tensor:
    """Values of single pixels with a heavy tail, as gradients have it."""
    noise = torch.rand(224, 224, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** power
    return (noise / noise.max()).float()


@pytest.mark.parametrize(("side", "hot"), [(7, 1), (7, 12), (14, 1), (14, 40), (28, 1), (28, 300)])
def test_maps_of_cells_are_not_speckled_and_shown_as_they_are(side: int, hot: int) -> None:
    saliency, x = cells(side, hot), torch.full((3, 224, 224), 0.5)
    assert not is_speckled(saliency)
    shown = overlay(x, saliency)
    half = (saliency - 0.5).abs().flatten().argmin()
    one = overlay(x, torch.full_like(saliency, float(saliency.flatten()[half])))
    assert shown.flatten(1)[:, half].allclose(one.flatten(1)[:, half])  # a value has one colour, whatever is around it


@pytest.mark.parametrize("power", [80.0, 300.0])
def test_maps_of_pixels_are_brightened_until_they_are_seen(power: float) -> None:
    saliency, x = pixels(power), torch.full((3, 224, 224), 0.5)
    assert is_speckled(saliency)
    shown = overlay(x, saliency)
    ground = shown.flatten(1).median(1).values[:, None, None]
    assert ((shown - ground).abs().amax(0) > 0.3).float().mean() > 0.007
    order = saliency.flatten().argsort()
    assert shown.flatten(1)[:, order[-1]].allclose(shown.flatten(1)[:, order[-300]])  # the brightest are alike


def test_a_single_pixel_and_nothing_at_all() -> None:
    one = torch.zeros(224, 224)
    assert not is_speckled(one)
    assert not is_speckled(torch.ones(3, 3))
    one[100, 50] = 1
    assert is_speckled(one)
    shown = overlay(torch.full((3, 224, 224), 0.5), one)
    assert int(((shown - shown[:, :1, :1]).abs().amax(0) > 0.05).sum()) == 1


def panels(count: int, *, hole: int | None = None) -> dict[str, sheets.Panel]:
    hot = [torch.full((64, 64), k / count) for k in range(1, count + 1)]
    return {f"m{k}": sheets.Panel(f"method {k}", M, 0.5) for k, M in enumerate(hot) if k != hole}


@pytest.mark.parametrize(("count", "lines", "columns"), [(1, 1, 2), (6, 1, 7), (7, 2, 4), (20, 3, 7)])
def test_a_sheet_has_each_map_and_goes_on_in_the_next_line(tmp_path: Path, count: int, lines: int, columns: int) -> None:
    x = torch.zeros(3, 64, 64)
    sheets.sheet(tmp_path / "sheet", sheets.Ground.of(x), [("why", 0.9, panels(count)), ("why not", 0.1, panels(count))])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert sheet.shape[1] == pytest.approx(110 * (0.12 + columns * 3.0), abs=2)
    words = sheet.shape[0] - 2 * 110 * (0.34 + lines * (0.42 + 2.4 + 0.12))
    assert 110 * 0.3 < words < 110  # what p and left mean
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3)}
    for k in range(1, count + 1):
        expected = (overlay(x, torch.full((64, 64), k / count))[:, 0, 0] * 255).round().int().tolist()
        assert any(max(abs(a - b) for a, b in zip(colour, expected, strict=True)) <= 2 for colour in colours), k


def test_a_method_without_an_answer_leaves_its_place_empty(tmp_path: Path) -> None:
    x = torch.zeros(3, 64, 64)
    sheets.sheet(tmp_path / "sheet", sheets.Ground.of(x), [("why", 0.9, panels(3)), ("why not", 0.1, panels(3, hole=0))])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).astype(int)
    block = round(110 * (0.34 + 0.42 + 2.4 + 0.12))
    above, below = sheet[:block], sheet[block : 2 * block]
    middles = [int(110 * (0.12 + k * 3.0 + 0.4)) for k in range(4)]
    height = int(110 * (0.34 + 0.42 + 1.0))
    assert above[height, middles[1]] < 200
    assert below[height, middles[1]] == 255  # white: no answer
    assert [below[height, middle] for middle in middles[2:]] == [above[height, middle] for middle in middles[2:]]


@pytest.mark.parametrize(
    ("saliency", "words"),
    [
        (torch.full((64, 64), 0.5), "p = 0.500 left"),
        (torch.zeros(64, 64), ", an empty map"),
        (pixels(80.0), "brightest 1 % alike"),
    ],
)
def test_captions(saliency: Tensor, words: str) -> None:
    assert sheets.Panel("Grad-CAM", saliency, 0.5).caption().endswith(words)
    assert len(sheets.Panel("long " * 30, saliency, 0.5).caption().splitlines()[0]) <= 38


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32)])
def test_four_panels(tmp_path: Path, size: tuple[int, int]) -> None:
    raw = torch.arange(12.0).view(3, 4) - 5
    saliency = maps.prepare(raw[None], size)[0]
    x = torch.full((3, *size), 0.25)
    panel = sheets.Panel("Grad-CAM", saliency, 0.5)
    title = "Grad-CAM: orca " * 20
    sheets.side_by_side(tmp_path / "four", sheets.Ground.of(x), panel, raw, signed=True, title=title, before=0.9)
    image = np.asarray(Image.open(tmp_path / "four.png").convert("RGB")).astype(int)
    wide, height = int(110 * 2.9), int(110 * 2.9 * size[0] / size[1])
    bottom = int(110 * 0.62) + height // 2
    assert (image[bottom, 15 : wide - 15] == 64).all()  # the input as it is
    second = image[bottom, wide + 40 : 2 * wide - 15]
    assert (second[:, 0] != second[:, 2]).any()  # red and blue


def test_pictures_are_known_again(tmp_path: Path) -> None:
    x = torch.rand(3, 64, 64)
    write_picture(pictures.enlarge(x, 1), tmp_path / "own.png")
    sheets.sheet(tmp_path / "sheet", sheets.Ground.of(x), [("why", 0.5, panels(1))])
    look = sheets.Look(formats=("pdf", "svg", "png"))
    sheets.captioned(tmp_path / "overlay", sheets.Ground.of(x), Shade.of(x[0]), "Grad-CAM", ["a.jpg"], look)
    (tmp_path / "other.svg").write_text("<svg><title>foveate</title></svg>")
    (tmp_path / "other.pdf").write_text("%PDF foveate")
    pictures.enlarge(x, 1).save(tmp_path / "other.png")
    pictures.enlarge(x, 1).save(tmp_path / "other.jpg")
    (tmp_path / "broken.png").write_text("no picture")
    found = {path.name for path in tmp_path.iterdir() if is_written(path)}
    assert found == {"own.png", "sheet.png", "overlay.png", "overlay.pdf", "overlay.svg"}


class TestOnAPhotograph:
    """The overlay is of the photograph as it is, not of what the network saw of it."""

    def test_panorama(self) -> None:
        photo = Image.new("RGB", (300, 80), (100, 120, 140))
        saliency = torch.zeros(56, 56)
        saliency[:28, :28] = 1
        left, top, right, bottom = frame = Preprocess((56, 56), 64).frame(photo.size)
        shown = np.asarray(on_photograph(photo, saliency, frame)).astype(int)
        assert shown.shape == (80, 300, 3)
        hot, cold = shown[round(top) + 9, round(left) + 9], shown[round(bottom) - 9, round(right) - 9]
        outside = shown[40, 20]
        assert np.abs(hot - cold).max() > 40
        assert (outside < cold).all() and (shown[:, : int(left) - 1] == shown[0, 0]).all()
        assert (shown[round(top)] == 255).all(1).sum() >= right - left - 2  # the frame
        one = overlay(torch.tensor([100, 120, 140])[:, None, None].expand(3, 56, 56) / 255, saliency)
        assert np.abs(hot - 255 * one[:, 5, 5].numpy()).max() <= 1

    def test_no_frame_where_all_was_seen_and_rows_join(self) -> None:
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2 * ROWS + 7, 40, 3), dtype=np.uint8))
        saliency = torch.ones(8, 8)
        frame = Preprocess((8, 8), None).frame(photo.size)
        shown = on_photograph(photo, saliency, frame)
        whole = overlay(to_tensor(photo), torch.ones(photo.height, photo.width))
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(to_image(whole)).astype(int)).max() <= 1
        assert cropped_away(frame, photo.size) == 0
        assert cropped_away((1150, 50, 1850, 750), (3000, 800)) == pytest.approx(1 - 700 * 700 / 3000 / 800)


def test_every_picture_says_what_it_shows(tmp_path: Path) -> None:
    """Read back from SVG, in which text is text."""
    about = sheets.About("a $x$.jpg", "timm:net", "blocks.1 (7x7)", "tabby (281)", False, 0.4, 4)
    x, raw = torch.rand(4, 32, 32), torch.rand(4, 4) - 0.3
    shade = Shade.of_raw(raw, (32, 32))
    panel = sheets.Panel("Grad-CAM", maps.prepare(raw[None], (32, 32))[0], 0.25, shade=shade)
    look, ground = sheets.Look(formats=("svg",)), sheets.Ground.of(x)
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        words: dict[str, Any] = {"title": "Grad-CAM: orca (2)", "before": 0.9, "about": about, "look": look}
        sheets.side_by_side(tmp_path / "four", ground, panel, raw, signed=True, **words)
        sheets.sheet(tmp_path / "sheet", ground, [("why orca (2)", 0.9, {"grad_cam": panel})], about=about, look=look)
        sheets.captioned(tmp_path / "one", ground, shade, "Grad-CAM: orca (2)", ["p = 0.900; 0.250 left", *about.lines()], look)
    for name in ("four", "sheet", "one"):
        text = " ".join((tmp_path / f"{name}.svg").read_text().split())
        for said in ("a $x$.jpg", "timm:net", "blocks.1 (7x7)", "tabby (281), and the model says another", "Grad-CAM"):
            assert said in text, (name, said)
        for said in ("orca (2)", "0.900", "0.250", "left", "40 %", "channels 1-3 of 4", f"{shade.high:.2g}"):
            assert said in text, (name, said)


def test_one_scale_shows_smaller_maps_darker() -> None:
    large, small = torch.tensor([[0.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -3.0]])
    own = Shade.of_raw(small, (2, 2))
    assert (own.low, own.high, float(own.values.max())) == (0, 1, 1)
    common = Shade.of_raw(small, (2, 2), Shade.of_raw(large, (2, 2)).high)
    assert (common.low, common.high, float(common.values.max())) == (0, 4, 0.25)
    assert not Shade.of_raw(small, (2, 2), 0.0).values.any()
    flat = Shade.of_raw(torch.ones(2, 2), (4, 4))
    assert not flat.values.any()
    assert flat.note() == "an empty map"


def test_colours() -> None:
    text = ramp_of(HEAT)
    assert len(text) == 6 * 256
    ramp = [tuple(bytes.fromhex(text[i : i + 6])) for i in range(0, len(text), 6)]
    assert (ramp[0], ramp[-1]) == ((6, 18, 63), (255, 48, 224))
    lightness = [0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2 for r, g, b in ramp]
    assert lightness == sorted(lightness)  # told apart without colour
    with pytest.raises(FoveateError, match=r"'viridiss' is unknown: did you mean viridis"):
        ramp_of("viridiss")
    for wrong in ({"opacity": 0}, {"opacity": 1.5}, {"dpi": 3}, {"formats": ("gif",)}):
        with pytest.raises(FoveateError):
            sheets.Look(**wrong)  # type: ignore[arg-type]


def test_gradients_are_seen_in_the_gallery() -> None:
    """The mean over a cell of a map of single pixels is far below 1; a map of cells stays as it is."""
    from foveate.report.evaluation import _visible

    def pooled(M: Tensor) -> np.ndarray:
        return torch.nn.functional.adaptive_avg_pool2d(M[None, None], 28).flatten().numpy()

    speckled = pooled(pixels(80.0))
    assert speckled.max() < 0.5
    shown, alike = _visible(speckled)
    assert alike
    assert (shown == 1).mean() == pytest.approx(0.01, abs=0.005)
    assert np.corrcoef(shown, speckled)[0, 1] > 0.9
    for coarse in (pooled(cells(7, hot=8)), pooled(cells(14)), pooled(cells(28))):
        same, alike = _visible(coarse)
        assert not alike
        np.testing.assert_array_equal(same, coarse)
    assert not _visible(np.zeros(784))[1]
