"""Prevalence: what a data set's maps have in common, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from foveate import FoveateError, measure
from foveate.evaluation.prevalence import EVERY, prevalence
from foveate.evaluation.results import MAP, Results
from foveate.testing import example, networks


def results(maps: np.ndarray, labels: list[int], **columns: list[float]) -> Results:
    count = len(maps)
    values = {("m", MAP): maps.reshape(count, -1).astype(np.float32)}
    values |= {("m", name): np.array(column) for name, column in columns.items()}
    return Results([str(i) for i in range(count)], values, np.array(labels), np.array(labels), np.ones(count))


def spot(row: int, column: int, side: int = 4) -> np.ndarray:
    grid = np.zeros((side, side))
    grid[row, column] = 1
    return grid


def test_centres_and_drift() -> None:
    whole = results(np.stack([spot(0, 0), spot(0, 3), spot(3, 3)]), [0, 0, 1])
    found = prevalence(lambda: [whole], ["m"], "m")["m"]
    assert found.table.loc[0, ["x", "y"]].tolist() == [0.5, 0.125]
    assert found.table.loc[0, "drift"] == pytest.approx(0.375)
    assert found.table.loc[0, "wander"] == pytest.approx(0.375)
    assert found.table.loc[1, ["x", "y"]].tolist() == [0.875, 0.875]
    assert found.table.loc[EVERY, "n"] == 3
    assert found.mean[0][0, 0] == found.mean[0][0, 3] == 0.5
    assert found.spread[1].max() == 0


def test_distances_leave_the_image_itself_out() -> None:
    whole = results(np.stack([spot(0, 0), spot(0, 0), spot(3, 3), spot(1, 1)]), [0, 0, 0, 1])
    found = prevalence(lambda: [whole], ["m"], "m")["m"]
    assert found.distance[:3].tolist() == [0.5, 0.5, 1]
    assert np.isnan(found.distance[3])  # a class of one
    assert found.farthest(2) == [2, 0]
    alone = prevalence(lambda: [results(np.stack([spot(0, 0), spot(0, 0), spot(3, 3)]), [0, 1, 2])], ["m"], "m")["m"]
    assert alone.distance.tolist() == [0.5, 0.5, 1]  # no class has two: all others


def test_background() -> None:
    whole = results(np.stack([spot(0, 0)] * 4), [0] * 4, EP=[100, 80, 40, 20])
    found = prevalence(lambda: [whole], ["m"], "m")["m"]
    assert found.table.loc[EVERY, "background"] == pytest.approx(0.4)
    assert found.table.loc[EVERY, "mostly_background"] == 0.5
    assert "40 % [" in found.sentence()
    assert "on 50 % of the images it is more than half" in found.sentence()
    nothing = prevalence(lambda: [results(np.stack([spot(0, 0)] * 2), [0, 0])], ["m"], "m")["m"]
    assert "How much of it is background is not known" in nothing.sentence()
    masked = results(np.stack([spot(0, 0)]), [0], EP=[100.0], mass_inside=[0.25])
    assert prevalence(lambda: [masked], ["m"], "m")["m"].table.loc[EVERY, "background"] == 0.75  # masks before boxes


def test_maps_of_nothing_and_chunks() -> None:
    rng = np.random.default_rng(0)
    maps, labels = rng.random((9, 4, 4)), [0, 0, 0, 1, 1, 1, 2, 2, 2]
    maps[4] = 0
    whole = results(maps, labels, EP=rng.random(9).tolist())
    parts = [results(maps[a:b], labels[a:b], EP=whole.values["m", "EP"][a:b].tolist()) for a, b in ((0, 2), (2, 7), (7, 9))]
    one, several = (prevalence(lambda chunks=chunks: chunks, ["m"], "m")["m"] for chunks in ([whole], parts))
    assert one.table.loc[1, "n"] == 2
    assert np.isnan(one.distance[4])
    np.testing.assert_allclose(one.distance, several.distance)
    np.testing.assert_allclose(one.table.to_numpy(), several.table.to_numpy())
    np.testing.assert_allclose(one.spread[2], (maps[6:] / maps[6:].sum((1, 2), keepdims=True)).std(0), rtol=1e-5)


def test_images_without_labels_count_once() -> None:
    maps = np.stack([spot(0, 0), spot(0, 0), spot(3, 3)])
    found = prevalence(lambda: [results(maps, [-1, -1, -1])], ["m"], "m")["m"]
    assert found.distance.tolist() == [0.5, 0.5, 1]


def test_from_python() -> None:
    found = measure(networks()["gap"], [example(count=4)], "grad_cam", "AD", layer="features", keep_maps=True)
    assert prevalence(lambda: [found], ["grad_cam"])["grad_cam"].table.loc[EVERY, "n"] <= 4
    without = measure(networks()["gap"], [example(count=4)], "grad_cam", "AD", layer="features")
    with pytest.raises(FoveateError, match="keep_maps=True"):
        prevalence(lambda: [without], ["grad_cam"])
