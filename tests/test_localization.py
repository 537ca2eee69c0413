"""Localization: every column by hand, on boxes that are not square, several, cut off or gone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foveate import Batch, Capture, FoveateError, measure
from foveate.data.boxes import intersection_over_union, largest_component, objects, predicted_box
from foveate.metrics.localization import localization


class Constant(nn.Module):
    """Says class 1 with probability 3/4, whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 1).double()
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * self.features(x).mean((2, 3)) + torch.tensor([0.0, math.log(3)], dtype=x.dtype)


def values(M: list[list[float]], boxes: list[list[float]], label: int = 1, **settings: Any) -> dict[str, float]:
    grid = torch.tensor(M, dtype=torch.float64)[None]
    x = torch.rand(1, 3, *grid.shape[1:], dtype=torch.float64)
    batch = Batch(x, torch.tensor([label]), boxes=(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),), id=("a",))
    found = localization(Capture(Constant(), x, "features"), grid, batch, **settings)
    return {name: float(column[0]) if column.ndim == 1 else column[0].tolist() for name, column in found.items()}


def block(height: int, width: int, rows: slice, columns: slice, value: float = 1.0) -> list[list[float]]:
    grid = torch.zeros(height, width, dtype=torch.float64)
    grid[rows, columns] = value
    return grid.tolist()


def test_a_map_that_is_the_box() -> None:
    """4 x 2 pixels of 6 x 10, wider than high: rows and columns must not be mixed up."""
    found = values(block(6, 10, slice(1, 3), slice(3, 7)), [[3, 1, 7, 3]])
    assert found["LE"] == found["OM"] == 0
    assert found["SP"] == found["EP"] == 100
    assert found["F1"] == pytest.approx(100, abs=1e-3)
    assert found["BA"] == [100.0] * 100
    assert found["SM"] == pytest.approx(math.log(8 / 60) - math.log(3 / 4))


def test_half_of_the_map_in_the_box() -> None:
    """Map: columns 2 to 5 of row 2. Box: columns 4 to 7, rows 1 to 3 (9 pixels, 2 of 4 mapped ones inside)."""
    found = values(block(6, 10, slice(2, 3), slice(2, 6)), [[4, 1, 7, 4]])
    assert found["EP"] == found["SP"] == 50
    precision, recall = 2 / 4, 2 / 9
    assert found["F1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall), abs=1e-3)
    assert found["LE"] == found["OM"] == 100  # 2 of 11 pixels are shared
    assert set(found["BA"]) == {0.0}


def test_a_wrong_prediction_counts_against_om_alone() -> None:
    found = values(block(6, 10, slice(1, 3), slice(3, 7)), [[3, 1, 7, 3]], label=0)
    assert (found["LE"], found["OM"]) == (0, 100)
    assert found["SM"] == pytest.approx(math.log(8 / 60) - math.log(1 / 4))


def test_several_boxes() -> None:
    """The best for LE, BA and F1; their union for EP and SP."""
    grid = torch.tensor(block(6, 10, slice(0, 2), slice(0, 2)))
    grid[4:6, 7:10] = 1  # the larger component
    found = values(grid.tolist(), [[0, 0, 2, 2], [7, 4, 10, 6], [4, 0, 6, 2]])
    assert found["LE"] == 0
    assert found["EP"] == found["SP"] == 100
    precision, recall = 6 / 10, 1
    assert found["F1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall), abs=1e-3)
    overlapping = values(block(4, 4, slice(0, 2), slice(0, 2)), [[0, 0, 2, 2], [0, 0, 2, 2]])
    assert overlapping["EP"] == 100  # and not 200


def test_a_box_that_reaches_beyond_the_image_ends_there() -> None:
    found = values(block(6, 10, slice(0, 3), slice(0, 4)), [[-5, -5, 4, 3]])
    assert found["LE"] == 0
    assert found["F1"] == pytest.approx(100, abs=1e-3)
    unclipped = values(block(6, 10, slice(0, 3), slice(0, 4)), [[-5, -5, 4, 3]], clip=False)
    assert unclipped["LE"] == 100  # 12 of 72


def test_a_box_of_which_nothing_is_left_is_no_number() -> None:
    for boxes in ([[12, 1, 15, 3]], [[3, 3, 3, 5]], []):
        found = values(block(6, 10, slice(1, 3), slice(3, 7)), boxes)
        assert all(np.isnan(value).all() for value in found.values())
    found = values(block(6, 10, slice(1, 3), slice(3, 7)), [[12, 1, 15, 3], [3, 1, 7, 3]])
    assert found["LE"] == 0


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_a_constant_map_predicts_nothing(value: float) -> None:
    grid = torch.full((6, 10), value).tolist()
    found = values(grid, [[0, 0, 5, 3]])
    assert found["LE"] == found["OM"] == 100
    assert found["SP"] == pytest.approx(25)  # all 60 pixels are maxima, 15 of them inside
    assert found["EP"] == pytest.approx(25 if value else 0)
    assert found["SM"] == pytest.approx(math.log(0.05) - math.log(3 / 4))
    whole = values(grid, [[0, 0, 10, 5]], empty="image")
    assert whole["LE"] == 0
    assert whole["SM"] == pytest.approx(0 - math.log(3 / 4))


def test_f1_of_a_constant_map_is_that_of_its_area() -> None:
    """2a / (1 + a), and the energy of it a: what shows that a published pair of these cannot be right."""
    found = values(torch.ones(10, 10).tolist(), [[0, 0, 8, 5]])
    assert found["F1"] == pytest.approx(100 * 2 * 0.4 / 1.4, abs=1e-3)
    assert found["EP"] == pytest.approx(40)


def test_ties() -> None:
    grid = torch.tensor(block(6, 10, slice(0, 1), slice(0, 4)))
    expected, any_, first = (values(grid.tolist(), [[1, 0, 3, 2]], ties=ties)["SP"] for ties in ("expected", "any", "first"))
    assert (expected, any_, first) == (50, 100, 0)


def test_the_published_code_swaps_the_axes() -> None:
    grid = block(10, 10, slice(0, 2), slice(5, 9))
    box = [[5, 0, 9, 2]]
    assert values(grid, box)["SP"] == values(grid, box)["EP"] == 100
    swapped = values(grid, box, swap_axes=True)
    assert swapped["SP"] == swapped["EP"] == 0
    legacy = values(grid, [[0, 5, 2, 9]], swap_axes=True, clip=False)
    assert legacy["EP"] == 100  # m[0:2, 5:9]
    assert values(grid, [[-20, 5, 5, 9]], swap_axes=True, clip=False)["EP"] == 100  # -20 reads from the start of 10
    assert values(grid, [[-3, 5, 2, 9]], swap_axes=True, clip=False)["EP"] == 0  # and -3 from the end: nothing is left
    short = values(block(6, 10, slice(1, 3), slice(3, 7)), [[3, 1, 7, 3]], short_box=True)
    assert short["LE"] == 100  # 3 of 8 pixels


def test_large_boxes_can_be_left_out() -> None:
    grid = block(6, 10, slice(0, 6), slice(0, 7))
    assert not math.isnan(values(grid, [[0, 0, 7, 6]])["LE"])
    assert math.isnan(values(grid, [[0, 0, 7, 6]], largest_share=0.5)["LE"])


def test_components() -> None:
    diagonal = np.eye(4) > 0
    assert largest_component(diagonal) == (0, 0, 1, 1)
    assert largest_component(diagonal, diagonal=True) == (0, 0, 4, 4)
    assert largest_component(np.zeros((3, 3)) > 0) == (0, 0, 0, 0)
    assert predicted_box(np.zeros((3, 5))) == (0, 0, 0, 0)
    assert predicted_box(np.zeros((3, 5)), "image") == (0, 0, 5, 3)
    assert intersection_over_union((0, 0, 2, 2), np.array([[1, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])).tolist() == [1 / 7, 1, 0]
    assert intersection_over_union((0, 0, 0, 0), np.array([[0, 0, 0, 0]])).tolist() == [0]


def test_masks_and_boxes() -> None:
    mask = torch.zeros(1, 6, 10, dtype=torch.bool)
    mask[0, 1, 3:7] = mask[0, 2, 5] = True
    batch = Batch(torch.rand(1, 3, 6, 10), torch.tensor([1]), mask, (torch.tensor([[0.0, 0, 2, 2]]),), ("a",))
    assert objects(batch, (6, 10))[0].boxes.tolist() == [[0, 0, 2, 2]]
    masked = objects(batch, (6, 10), "mask")[0]
    assert masked.boxes.tolist() == [[3, 1, 7, 3]]
    assert int(masked.areas.sum()) == 5
    M = mask.double()
    found = localization(Capture(Constant(), batch.x.double(), "features"), M, batch, region="mask")
    assert float(found["EP"]) == float(found["SP"]) == 100
    assert float(found["F1"]) == pytest.approx(100, abs=1e-3)
    for region, match in (("circle", "region 'circle' is unknown"), ("boxes", "needs boxes or masks")):
        with pytest.raises(FoveateError, match=match):
            objects(Batch(batch.x, mask=mask), (6, 10), region)
    with pytest.raises(FoveateError, match="do not fit maps of 3 x 3"):
        objects(Batch(batch.x, mask=mask), (3, 3))


def test_box_accuracy_is_the_best_threshold_over_the_data() -> None:
    """Two images that are right at different thresholds: each could have 100 alone, together they have 50."""
    from foveate.metrics.localization import best_threshold

    curves = np.array([[100.0, 0.0, 0.0], [0.0, 100.0, 0.0]])
    assert best_threshold(curves.mean(0)) == 50
    network, grid = Constant(), torch.rand(4, 3, 6, 10, dtype=torch.float64)
    boxes = tuple(torch.tensor([[2.0, 1, 8, 5]]) for _ in range(4))
    results = measure(
        network, [Batch(grid, torch.ones(4).long(), None, boxes, tuple("abcd"))], "random", "BA", layer="features"
    )
    curve = results.values["random", "BA"]
    assert curve.shape == (4, 100)
    assert results.table().loc[("random", "BA"), "mean"] == curve.mean(0).max()


def test_half_is_not_enough_for_le_and_is_for_ba() -> None:
    """4 x 4 pixels mapped, a box of 4 x 8: exactly .5. And 4 x 7, of which the map has 4/7."""
    grid = block(6, 10, slice(0, 4), slice(0, 4))
    half = values(grid, [[0, 0, 8, 4]])
    assert half["LE"] == 100
    assert half["BA"] == [100.0] * 100
    more = values(grid, [[0, 0, 7, 4]])
    assert more["LE"] == 0
    less = values(grid, [[0, 0, 8.5, 4]])
    assert set(less["BA"]) == {0.0}
