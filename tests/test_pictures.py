"""Pictures: what is seen on them, for maps of cells and maps of single pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import maps
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
    assert not pictures.is_speckled(cells(side, hot))


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


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (6, 1), (7, 2), (20, 3)])
def test_a_sheet_goes_on_in_the_next_line(tmp_path: Path, count: int, lines: int) -> None:
    x = torch.rand(3, 64, 64) * 0.2
    panels = {f"method {k}": (torch.zeros(64, 64), 0.5) for k in range(count)}
    pictures.sheet(tmp_path / "sheet.png", x, [("why", 0.9, panels), ("why not", 0.1, panels)])
    dark = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")) < 100
    filled = dark.mean(1) > 0.5
    starts = int(np.sum(filled[1:] & ~filled[:-1]))
    assert starts == 2 * lines
