"""Pictures: what is seen on them, for maps of cells and maps of single pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import maps
from foveate.images import Preprocess, to_image, to_tensor
from foveate.report import pictures


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
    assert not pictures.is_speckled(saliency)
    shown = pictures.overlay(x, saliency)
    half = (saliency - 0.5).abs().flatten().argmin()
    one = pictures.overlay(x, torch.full_like(saliency, float(saliency.flatten()[half])))
    assert shown.flatten(1)[:, half].allclose(one.flatten(1)[:, half])  # a value has one colour, whatever is around it


@pytest.mark.parametrize("power", [80.0, 300.0])
def test_maps_of_pixels_are_brightened_until_they_are_seen(power: float) -> None:
    saliency, x = pixels(power), torch.full((3, 224, 224), 0.5)
    assert pictures.is_speckled(saliency)
    shown = pictures.overlay(x, saliency)
    ground = shown.flatten(1).median(1).values[:, None, None]
    assert ((shown - ground).abs().amax(0) > 0.3).float().mean() > 0.007
    order = saliency.flatten().argsort()
    assert shown.flatten(1)[:, order[-1]].allclose(shown.flatten(1)[:, order[-300]])  # the brightest are alike


def test_a_single_pixel_and_nothing_at_all() -> None:
    one = torch.zeros(224, 224)
    assert not pictures.is_speckled(one)
    assert not pictures.is_speckled(torch.ones(3, 3))
    one[100, 50] = 1
    assert pictures.is_speckled(one)
    shown = pictures.overlay(torch.full((3, 224, 224), 0.5), one)
    assert int(((shown - shown[:, :1, :1]).abs().amax(0) > 0.05).sum()) == 1


def panels(count: int, *, hole: int | None = None) -> dict[str, pictures.Panel]:
    hot = [torch.full((64, 64), k / count) for k in range(1, count + 1)]
    return {f"m{k}": pictures.Panel(f"method {k}", M, 0.5) for k, M in enumerate(hot) if k != hole}


@pytest.mark.parametrize(("count", "lines", "columns"), [(1, 1, 2), (6, 1, 7), (7, 2, 4), (20, 3, 7)])
def test_a_sheet_has_each_map_and_goes_on_in_the_next_line(tmp_path: Path, count: int, lines: int, columns: int) -> None:
    x = torch.zeros(3, 64, 64)
    pictures.sheet(tmp_path / "sheet.png", x, [("why", 0.9, panels(count)), ("why not", 0.1, panels(count))])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert sheet.shape[1] == pytest.approx(110 * (0.12 + columns * 2.52), abs=2)
    assert sheet.shape[0] == pytest.approx(2 * 110 * (0.34 + lines * (0.42 + 2.4 + 0.12)), abs=2)
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3)}
    for k in range(1, count + 1):
        expected = (pictures.overlay(x, torch.full((64, 64), k / count))[:, 0, 0] * 255).round().int().tolist()
        assert any(max(abs(a - b) for a, b in zip(colour, expected, strict=True)) <= 2 for colour in colours), k


def test_a_method_without_an_answer_leaves_its_place_empty(tmp_path: Path) -> None:
    x = torch.zeros(3, 64, 64)
    pictures.sheet(tmp_path / "sheet.png", x, [("why", 0.9, panels(3)), ("why not", 0.1, panels(3, hole=0))])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).astype(int)
    above, below = np.array_split(sheet, 2)
    middles = [int(110 * (0.12 + k * 2.52 + 0.4)) for k in range(4)]
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
    assert pictures.Panel("Grad-CAM", saliency, 0.5).caption().endswith(words)
    assert len(pictures.Panel("long " * 30, saliency, 0.5).caption().splitlines()[0]) <= 38


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32)])
def test_four_panels(tmp_path: Path, size: tuple[int, int]) -> None:
    raw = torch.arange(12.0).view(3, 4) - 5
    saliency = maps.prepare(raw[None], size)[0]
    x = torch.full((3, *size), 0.25)
    words = {"signed": True, "title": "Grad-CAM: orca " * 20, "before": 0.9, "after": 0.5}
    pictures.side_by_side(tmp_path / "four.png", x, saliency, raw, **words)  # type: ignore[arg-type]
    image = np.asarray(Image.open(tmp_path / "four.png").convert("RGB")).astype(int)
    panel, height = int(110 * 2.9), int(110 * 2.9 * size[0] / size[1])
    assert image.shape[0] == pytest.approx(height + 110 * 0.92, abs=3)
    bottom = image.shape[0] - int(110 * 0.3) - height // 2
    assert (image[bottom, 15 : panel - 15] == 64).all()  # the input as it is
    second = image[bottom, panel + 40 : 2 * panel - 15]
    assert (second[:, 0] != second[:, 2]).any()  # red and blue


def test_pictures_are_known_again(tmp_path: Path) -> None:
    x = torch.rand(3, 64, 64)
    pictures.write(pictures.enlarge(x, 1), tmp_path / "own.png")
    pictures.sheet(tmp_path / "sheet.png", x, [("why", 0.5, panels(1))])
    pictures.enlarge(x, 1).save(tmp_path / "other.png")
    pictures.enlarge(x, 1).save(tmp_path / "other.jpg")
    (tmp_path / "broken.png").write_text("no picture")
    found = {path.name for path in tmp_path.iterdir() if pictures.is_written(path)}
    assert found == {"own.png", "sheet.png"}


class TestOnAPhotograph:
    """The overlay is of the photograph as it is, not of what the network saw of it."""

    def test_panorama(self) -> None:
        photo = Image.new("RGB", (300, 80), (100, 120, 140))
        saliency = torch.zeros(56, 56)
        saliency[:28, :28] = 1
        left, top, right, bottom = frame = Preprocess((56, 56), 64).frame(photo.size)
        shown = np.asarray(pictures.on_photograph(photo, saliency, frame)).astype(int)
        assert shown.shape == (80, 300, 3)
        hot, cold = shown[round(top) + 9, round(left) + 9], shown[round(bottom) - 9, round(right) - 9]
        outside = shown[40, 20]
        assert np.abs(hot - cold).max() > 40
        assert (outside < cold).all() and (shown[:, : int(left) - 1] == shown[0, 0]).all()
        assert (shown[round(top)] == 255).all(1).sum() >= right - left - 2  # the frame
        one = pictures.overlay(torch.tensor([100, 120, 140])[:, None, None].expand(3, 56, 56) / 255, saliency)
        assert np.abs(hot - 255 * one[:, 5, 5].numpy()).max() <= 1

    def test_no_frame_where_all_was_seen_and_rows_join(self) -> None:
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2 * pictures.ROWS + 7, 40, 3), dtype=np.uint8))
        saliency = torch.ones(8, 8)
        frame = Preprocess((8, 8), None).frame(photo.size)
        shown = pictures.on_photograph(photo, saliency, frame)
        whole = pictures.overlay(to_tensor(photo), torch.ones(photo.height, photo.width))
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(to_image(whole)).astype(int)).max() <= 1
        assert pictures.cropped_away(frame, photo.size) == 0
        assert pictures.cropped_away((1150, 50, 1850, 750), (3000, 800)) == pytest.approx(1 - 700 * 700 / 3000 / 800)
