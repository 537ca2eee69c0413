"""Metrics: the contract, replicas, extremes, and the protocol around them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from foveate import Batch, Capture, FoveateError, evaluate, measure
from foveate.evaluation.evaluate import choose
from foveate.metrics.model import foreground_sensitivity
from foveate.metrics.recognition import average_drop, average_gain, average_increase, recognition
from foveate.registry import METRICS, Column, Metric
from foveate.targets import apart
from foveate.testing import SHAPE, check_metric, example, measured, measured_on, networks

LOG_P = st.floats(-30, -1e-9)


def test_every_metric_has_a_replica() -> None:
    assert set(reference.METRICS) == set(METRICS.all())


@pytest.mark.parametrize("name", list(METRICS.all()))
def test_contract(name: str) -> None:
    check_metric(name)


def test_a_column_outside_its_range_is_found() -> None:
    def twice(capture: Capture, M: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return {"mean_map": 2 * M.double().mean((1, 2))}

    record = Metric("twice", "Twice", twice, "nobody", {"mean_map": Column("up", range=(0, 0.9))})
    with pytest.raises(AssertionError, match=r"mean_map promises \[0, 0.9\] and gives"):
        check_metric(record)


@pytest.mark.parametrize("kind", ["gap", "inplace", "tokens"])
@pytest.mark.parametrize("name", list(METRICS.all()))
def test_equals_its_replica(name: str, kind: str) -> None:
    network, batch = networks()[kind], example(seed=9, count=4)
    M = torch.rand(4, *SHAPE[2:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = measured(METRICS.get(name), network, M, batch)
    for i in range(4):
        expected = reference.METRICS[name](network, batch.x[i], M[i], int(batch.y[i]), batch.mask[i])
        assert set(METRICS.get(name).columns) <= set(expected)
        for column, value in expected.items():
            assert values[column][i].tolist() == pytest.approx(value, rel=1e-7, abs=1e-9, nan_ok=True), column


@pytest.mark.parametrize("name", list(METRICS.all()))
def test_autocast_is_the_models_and_not_the_metrics(name: str) -> None:
    """The model runs as it did for the capture, and what is computed around it in full precision, wherever it is asked."""
    network, batch = networks()["inplace"].float(), example(seed=9, count=3)
    batch = replace(batch, x=batch.x.float())
    M = torch.rand(3, *SHAPE[2:], generator=torch.Generator().manual_seed(0))
    for made in (False, True):
        found = []
        for called in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=made):
                capture = Capture(network, batch.x, "features")
            with torch.autocast("cpu", torch.bfloat16, enabled=called):
                found.append(measured_on(capture, METRICS.get(name), M, batch))
        for column, values in found[0].items():
            assert torch.equal(values.nan_to_num(-1), found[1][column].nan_to_num(-1)), (column, made)


def test_a_map_of_ones_changes_nothing() -> None:
    """Not even by rounding: both go through the model the same way, in any chunk and precision."""
    batch = example(count=6)
    for dtype, precision in ((torch.float32, "fp32"), (torch.float32, "bf16"), (torch.bfloat16, "fp32")):
        network = networks()["inplace"].to(dtype)
        for chunk in (1, 4, None):
            capture = Capture(network, batch.x.to(dtype), "features", chunk=chunk, precision=precision)
            values = recognition(capture, torch.ones(6, *SHAPE[2:]), batch)
            assert all((column == 0).all() for column in values.values())


def test_images_run_again_only_where_rounding_could_count() -> None:
    batch = example(count=6)
    capture = Capture(networks()["inplace"], batch.x, "features")
    M = torch.zeros(6, *SHAPE[2:], dtype=torch.float64)
    first = recognition(capture, M, batch)
    assert capture.passes.forward == 6 + 6  # the run that the capture began with, and the masked images
    M[2] = 1
    second = recognition(capture, M, batch)
    assert capture.passes.forward == 12 + 6 + 6 and all((column[2] == 0).all() for column in second.values())
    for column, values in first.items():
        torch.testing.assert_close(values[[0, 1, 3, 4, 5]], second[column][[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("kind", ["autocast inside", "autocast outside", "two precisions", "nearly nothing"])
def test_a_map_of_ones_changes_nothing_however_the_model_computes(kind: str) -> None:
    network = networks()["gap"].float()
    features, classifier = network.features, network.classifier

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast inside"):
            grown = features(x).mean((2, 3))
            return classifier(grown.to(classifier.weight.dtype)).float() * (1e-6 if kind == "nearly nothing" else 1)

    network.forward = forward
    if kind == "two precisions":
        classifier.bfloat16()
    for count in (1, 6):
        batch = example(count=count)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast outside"):
            capture = Capture(network, batch.x.float(), "features", closed_form=False)
            values = recognition(capture, torch.ones(count, *SHAPE[2:]), batch)
            if kind != "nearly nothing":
                assert not capture._run.exact(f.raw for f in capture._features.values())
        assert capture.passes.forward == 3 * count and all((column == 0).all() for column in values.values())


def test_near_is_meant_in_log_odds() -> None:
    odds = torch.tensor([-20.0, 0.0, 20.0], dtype=torch.float64)
    logits = torch.tensor([[1.0, -50.0], [-50.0, 50.0], [50.0, 1.0]])  # that may differ by 1e-3
    for change in ([2e-3, 2e-3, 2e-3], [-2e-3, 2e-3, 2e-3], [2e-3, 2e-3, 5e-4], [5e-4, 2e-3, 2e-3], [2e-3, -5e-4, 2e-3]):
        moved = odds + torch.tensor(change, dtype=torch.float64)
        assert apart(logits, F.logsigmoid(odds), F.logsigmoid(moved)) == (5e-4 not in map(abs, change))
        assert apart(logits / 10, F.logsigmoid(odds), F.logsigmoid(moved))
    sure = torch.tensor([0.0], dtype=torch.float64)
    for other, answer in ((-1e-9, True), (0.0, False), (-1e-15, False)):
        assert apart(logits[:1], sure, torch.tensor([other], dtype=torch.float64)) == answer


def test_a_map_of_zeros_shows_every_image_as_black() -> None:
    network, batch = networks()["gap"], example(count=3)
    capture = Capture(network, batch.x, "features")
    values = recognition(capture, torch.zeros(3, *SHAPE[2:], dtype=torch.float64), batch)
    black = network(torch.zeros(1, *SHAPE[1:], dtype=torch.float64)).softmax(1)[0, batch.y]
    p = network(batch.x).softmax(1).gather(1, batch.y[:, None])[:, 0]
    torch.testing.assert_close(values["AD"], 100 * ((p - black) / p).clamp(min=0).detach())


@settings(max_examples=100, deadline=None)
@given(LOG_P, LOG_P)
def test_bounds_and_exclusions(p: float, o: float) -> None:
    log_p, log_o = torch.tensor([p], dtype=torch.float64), torch.tensor([o], dtype=torch.float64)
    drop, gain, increase = (float(f(log_p, log_o)) for f in (average_drop, average_gain, average_increase))
    assert 0 <= drop <= 100
    assert 0 <= gain <= 100
    assert increase in (0, 100)
    assert not (drop > 0 and gain > 0)
    assert gain <= increase


def test_a_sure_class_keeps_its_digits() -> None:
    """1 - p of a logit of 40 is 4e-18: nothing of it is left in float32, nor in 1 - exp(log p)."""
    logits = torch.tensor([[20.0, 0.0], [40.0, 0.0]])
    from foveate.targets import log_probability

    y = torch.zeros(2, dtype=torch.long)
    log_p = log_probability(logits, y, "softmax")
    gain = average_gain(log_p, torch.zeros(2, dtype=torch.float64))
    assert float(gain[0]) == pytest.approx(100, rel=1e-6)
    assert float(gain[1]) == 0


def test_the_class_is_a_choice() -> None:
    network, batch = networks()["gap"], example(count=5)
    capture = Capture(network, batch.x, "features")
    M = torch.rand(5, *SHAPE[2:], dtype=torch.float64)
    wrong = Batch(batch.x, (capture.pred + 1) % 4)
    label, pred = (recognition(capture, M, wrong, target=target) for target in ("label", "pred"))
    assert not all(torch.equal(label[column], pred[column]) for column in pred)
    same = recognition(capture, M, Batch(batch.x, capture.pred))
    assert all(torch.equal(same[column], pred[column]) for column in pred)


@pytest.mark.parametrize(
    ("x", "M"),
    [(torch.rand(1, *SHAPE[1:]) * 3 - 1, torch.rand(1, *SHAPE[2:])), (torch.rand(1, *SHAPE[1:]), -torch.rand(1, *SHAPE[2:]))],
)
def test_values_outside_of_the_unit_interval_are_refused(x: torch.Tensor, M: torch.Tensor) -> None:
    capture = Capture(networks()["gap"], x.double(), "features")
    with pytest.raises(FoveateError, match=r"need x and maps in \[0, 1\]"):
        recognition(capture, M.double(), Batch(x, torch.tensor([0])))


def test_masks_are_needed_where_they_are_needed() -> None:
    capture = Capture(networks()["gap"], example().x, "features")
    with pytest.raises(FoveateError, match="needs a mask"):
        METRICS.get("mass_inside")(capture, torch.rand(2, *SHAPE[2:]), Batch(example().x))
    with pytest.raises(FoveateError, match=r"masks of shape \[2, 3, 3\]"):
        METRICS.get("mass_inside")(capture, torch.rand(2, *SHAPE[2:]), Batch(example().x, mask=torch.ones(2, 3, 3) > 0))


class TestEvaluate:
    def test_rows_and_table(self) -> None:
        network, data = networks()["gap"], [example(seed=i, count=4) for i in range(3)]
        data = [Batch(b.x, b.y, b.mask, id=tuple(f"{i}-{name}" for name in b.id)) for i, b in enumerate(data)]
        metrics = ["AD", "AG", "AI", "mass_inside"]
        rows = measure(network, data, ["grad_cam", "random"], metrics, layer="features").frame()
        assert list(rows.columns) == ["id", "method", "column", "value"]
        assert len(rows) == 12 * 2 * 4
        assert not rows.duplicated(["id", "method", "column"]).any()
        table = evaluate(network, data, ["grad_cam", "random"], metrics, layer="features")
        by_hand = rows[(rows.method == "random") & (rows.column == "AD")].value.mean()
        line = table.loc[("random", "AD")]
        assert line["mean"] == pytest.approx(by_hand)
        assert line["low"] < line["mean"] < line["high"]
        assert line["n"] == 12

    def test_batches_of_any_size_give_the_same_rows(self) -> None:
        network, whole = networks()["inplace"], example(count=6)
        singles = [Batch(whole.x[i : i + 1], whole.y[i : i + 1], whole.mask[i : i + 1], id=(str(i),)) for i in range(6)]
        tables = [
            measure(network, data, "hires_cam", ["all", "randomisation"], layer="features", batch_size=4).frame()
            for data in ([whole], singles)
        ]
        tables = [table[~table.column.isin(["T", "memory"])] for table in tables]
        pd.testing.assert_frame_equal(*(table.sort_values(["id", "column"], ignore_index=True) for table in tables))

    def test_constant_maps_are_counted_and_mentioned(self) -> None:
        network, batch = networks()["gap"], example()
        with torch.no_grad():
            network.classifier.weight.copy_(-network.classifier.weight.abs())
        with pytest.warns(UserWarning, match="2 of hires_cam"):
            table = evaluate(network, [batch], ["hires_cam", "random"], layer="features")
        assert table.attrs["degenerate"] == {"hires_cam": 2, "random": 0}
        assert "2 of 2 maps of HiResCAM are constant; they count as maps of zeros." in table.attrs["findings"]

    def test_batches_without_names_and_other_heads(self) -> None:
        network, batch = networks()["gap"], example()
        rows = measure(network, [Batch(batch.x, batch.y)] * 2, layer="features", head="multilabel").frame()
        assert sorted(rows.id.unique()) == ["0", "1", "2", "3"]
        softmax = measure(network, [Batch(batch.x, batch.y)] * 2, layer="features").frame()
        assert not np.allclose(rows.value, softmax.value)
        with pytest.raises(FoveateError, match="target '5' is unknown: a table explains"):
            evaluate(network, [batch], layer="features", target="5")

    def test_a_method_named_twice_counts_once_and_none_is_an_error(self) -> None:
        metrics = ["AD", "AG", "AI", "mass_inside"]
        rows = measure(networks()["gap"], [example()], ["grad_cam", "GradCAM"], metrics, layer="features").frame()
        assert len(rows) == 2 * 4
        with pytest.raises(FoveateError, match="no method was named"):
            evaluate(networks()["gap"], [example()], [])

    def test_single_images_of_several_sizes(self) -> None:
        data = [(torch.rand(3, size, 23, dtype=torch.float64), 1) for size in (17, 17, 21, 17)]
        rows = measure(networks()["gap"], data, layer="features").frame()
        assert sorted(rows.id.unique()) == ["0", "1", "2", "3"]

    def test_pairs_of_a_loader(self) -> None:
        whole = example(count=4)
        data = [(whole.x[:2], whole.y[:2]), (whole.x[2:], whole.y[2:])]
        rows = measure(networks()["gap"], data, layer="features").frame()
        assert sorted(rows.id.unique()) == ["0", "1", "2", "3"]
        assert {"AD", "AG", "AI", "I", "D", "sparsity", "T", "accuracy"} <= set(rows.column)
        assert not {"LE", "mass_inside", "randomisation"} & set(rows.column)

    def test_columns_can_be_named(self) -> None:
        rows = measure(networks()["gap"], [example()], "grad_cam", ["AG", "mass_inside"], layer="features").frame()
        assert set(rows.column) == {"AG", "mass_inside"}
        with pytest.raises(FoveateError, match="metric 'AF' is unknown"):
            evaluate(networks()["gap"], [example()], "grad_cam", "AF", layer="features")
        with pytest.raises(FoveateError, match="'mass_inside' needs mask, and this data has none"):
            evaluate(
                networks()["gap"], [Batch(example().x, example().y, id=("a", "b"))], "grad_cam", "mass_inside", layer="features"
            )

    def test_methods_share_one_forward_beside_the_masked_ones(self) -> None:
        network, calls = networks()["inplace"], []
        network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
        whole = example(count=4)
        data = [Batch(whole.x, whole.y, whole.mask, id=tuple("abcd"))]
        methods = ["grad_cam", "hires_cam", "layer_cam"]
        measure(network, data, methods, ["AD", "AG", "AI", "mass_inside", "I", "D"], layer="features")
        pixels = SHAPE[2] * SHAPE[3]
        inner = -(-pixels // -(-pixels // 28)) - 1  # images of a curve between its two ends, which are known
        masked = 3 * (4 + 2 * 4 * inner)  # AD, AG and AI share one
        # The capture that all share; the images through score; the curves' ends; one image twice a set of curves, to see
        # which batch norms can be folded; one image to see whether the layer depends on it, once for a model. Nothing runs
        # for what a method costs, which was not asked for.
        assert sum(calls) == 4 + 4 + masked + 4 + 1 + 2 + 1


def test_noise_on_the_object_is_noise_on_the_object() -> None:
    """A network that asks whether the left half is even: noise there changes its mind, noise elsewhere does not."""

    class Evenness(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = torch.nn.Identity()
            self.head = torch.nn.Linear(1, 2).double()
            self.eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spread = self.features(x)[..., :4].flatten(1).std(1, keepdim=True)
            return torch.cat([torch.full_like(spread, 0.05), spread], 1) + 0 * self.head(spread)

    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    batch = Batch(torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64), torch.tensor([0]), mask)
    record = METRICS.get("relative_foreground_sensitivity")
    found = record(Capture(Evenness(), batch.x, "features"), None, batch)["relative_foreground_sensitivity"]
    assert found.tolist() == [[1, 0]]
    assert record.pooled["relative_foreground_sensitivity"](found.numpy().mean(0)) == 1
    assert record.pooled["relative_foreground_sensitivity"](np.array([0.4, 0.8])) == pytest.approx(-0.5)


def test_equal_maps_share_their_scores_and_nothing_else() -> None:
    """Grad-CAM and HiResCAM are one map behind average pooling; only the second promises to add up to the logit."""
    names = ["grad_cam", "hires_cam", "contrastive_cam"]
    results = measure(networks()["gap"], [example(count=4)], names, "all", layer="features")
    assert results.same == {"hires_cam": "grad_cam"}
    assert results.values["contrastive_cam", "completeness_error"].max() < 1e-9  # to the contrast, not to the logit
    assert np.array_equal(results.values["grad_cam", "AD"], results.values["hires_cam", "AD"])
    assert np.isnan(results.values["grad_cam", "completeness_error"]).all()
    assert results.values["hires_cam", "completeness_error"].max() < 1e-9


COLUMNS = [(record, short, column) for record in METRICS.all().values() for short, column in record.columns.items()]


class TestColumns:
    """What a reader is told of a column: its long name, its words and its range."""

    @pytest.mark.parametrize(("record", "short", "column"), COLUMNS, ids=[short for _, short, _ in COLUMNS])
    def test_every_column_has_its_words(self, record: Metric, short: str, column: Column) -> None:
        assert column.title and column.formula and column.about.endswith("?")
        if record.statistic == "mean" and record.name != "size":
            assert column.name == "accuracy" or (column.good and column.bad), f"{short} has no examples"

    @pytest.mark.parametrize(("record", "short", "column"), COLUMNS, ids=[short for _, short, _ in COLUMNS])
    def test_long_and_short_names_are_the_same(self, record: Metric, short: str, column: Column) -> None:
        assert METRICS.get(column.name) is METRICS.get(short) is record
        assert record.column(short) == record.column(column.name) == record.column(column.name.upper()) == short

    def test_a_long_name_is_one_column(self) -> None:
        batch = Batch(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
        for name, column in (("average_drop", "AD"), ("Deletion", "D"), ("average-increase", "AI")):
            assert [(r.name, c) for r, c in choose(name, batch)] == [(METRICS.get(column).name, [column])]
        assert choose("recognition", batch)[0][1] == ["AD", "AG", "AI"]

    def test_a_group_is_those_of_its_columns_that_apply(self) -> None:
        bare = Batch(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
        masked = replace(bare, mask=torch.ones(2, 16, 16, dtype=torch.bool))
        columns = lambda name, batch: [c for _, found in choose(name, batch) for c in found]  # noqa: E731
        assert columns("faithfulness", bare) == ["I", "D", "AD", "AG", "AI"]
        assert "mass_inside" in columns("localization", masked) and "OM" in columns("localization", masked)
        assert {"randomisation", "class_sensitivity"} <= set(columns("sanity", bare))
        with pytest.raises(FoveateError, match="needs boxes or masks"):
            choose("localization", bare)
        with pytest.raises(FoveateError, match="did you mean faithfulness"):
            evaluate(networks()["gap"], [example(count=2)], "centre", "faithfullness")

    def test_the_examples_are_true(self) -> None:
        log = lambda *values: torch.tensor(values, dtype=torch.float64).log()  # noqa: E731
        assert average_drop(log(0.9, 0.9), log(0.81, 0.09)).tolist() == pytest.approx([10, 90])
        assert average_gain(log(0.6), log(0.8)).tolist() == pytest.approx([50])
        assert math.log(0.1) - math.log(0.9) == pytest.approx(-2.2, abs=0.01)
        assert -math.log(0.5) == pytest.approx(0.69, abs=0.01)
        assert foreground_sensitivity(np.array([0.9, 0.5])) == pytest.approx(0.67, abs=0.01)
