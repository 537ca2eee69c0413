"""NaN is never a value: not in logits, maps, masks or boxes; what has no value is left out, named and counted."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import foveate
from foveate import Batch, FoveateError, missing
from foveate.cli import app
from foveate.evaluation import runs
from foveate.metrics.recognition import average_drop, average_gain, average_increase
from foveate.metrics.sanity import spearman
from foveate.registry import METHODS, METRICS, Explained, Metric, Spent, method
from foveate.runtime.capture import Capture
from foveate.testing import SHAPE, example, networks

BAD = (float("nan"), float("inf"), float("-inf"))
COUNT = 3


class Sometimes(nn.Module):
    """A network that gives ``value`` on images other than those it knows, where their sum falls so."""

    def __init__(self, known: Tensor, value: float, share: float = 1.0) -> None:
        super().__init__()
        self.net = networks()["gap"]
        self.features = self.net.features
        self.known, self.value, self.share = known.sum((1, 2, 3)), value, share
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        sums = x.detach().sum((1, 2, 3))
        bad = ((sums[:, None] - self.known.to(sums)).abs() > 1e-6).all(1) & ((1e3 * sums).frac() < self.share)
        first = torch.zeros(x.shape[0], 4, dtype=torch.bool)
        first[:, 0] = bad
        return torch.where(first, torch.full((), self.value, dtype=x.dtype), self.net(x))


def boxed(count: int = COUNT) -> Batch:
    batch = example(count=count)
    boxes = tuple(torch.tensor([[2.0, 3, 14, 12]]) + i for i in range(count))
    return Batch(batch.x, batch.y, batch.mask, boxes, tuple(map(str, range(count))))


def of(record: Metric, network: nn.Module, M: Tensor, batch: Batch, raw: Tensor | None = None, **own: Any) -> dict[str, Tensor]:
    capture = Capture(network, batch.x, "features")
    if "explained" in record.function.__code__.co_varnames:
        hires = METHODS.get("hires_cam")
        target = capture.target("label", labels=batch.y)
        found = hires(capture, None, target).detach() if raw is None else raw
        own["explained"] = Explained(hires, found, target, {}, Spent(0.5, 3.0, 1.0, 1.0, 2.0))
    return record(capture, None if record.of_model else M, batch, **own)


def maps_of(count: int = COUNT) -> Tensor:
    return torch.rand(count, *SHAPE[2:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def honest(found: dict[str, Tensor], clean: dict[str, Tensor], lost: list[int], names: Any) -> None:
    """Every value is what it is without the fault, or none; of the images that have the fault there is none."""
    for name in names:
        values, wanted = found[name], clean[name]
        assert not torch.isinf(values).any()
        assert torch.isnan(values[lost]).all(), f"{name} of a spoilt image is {values[lost]}"
        rest = [i for i in range(len(values)) if i not in lost]
        torch.testing.assert_close(values[rest], wanted[rest], equal_nan=True, rtol=1e-8, atol=1e-8)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


RECORDS = {name: record for name, record in METRICS.all().items() if name not in ("cost", "size")}


@pytest.mark.parametrize("name", RECORDS)
class TestEveryColumn:
    @settings(max_examples=8, deadline=None)
    @given(value=st.sampled_from(BAD), place=st.integers(0, 17 * 23 - 1), row=st.integers(0, COUNT - 1))
    def test_of_a_map(self, name: str, value: float, place: int, row: int) -> None:
        record, M = RECORDS[name], maps_of()
        if record.of_model:
            return
        for batch in (boxed(), example(count=COUNT)):  # boxes, and masks
            clean = of(record, networks()["gap"], M, batch)
            spoilt = M.clone()
            spoilt.view(COUNT, -1)[row, place] = value
            honest(of(record, networks()["gap"], spoilt, batch), clean, [row], record.columns)

    @settings(max_examples=8, deadline=None)
    @given(value=st.sampled_from(BAD), place=st.integers(0, 9 * 12 - 1), row=st.integers(0, COUNT - 1))
    def test_of_a_raw_map(self, name: str, value: float, place: int, row: int) -> None:
        record, M, batch, network = RECORDS[name], maps_of(), boxed(), networks()["gap"]
        if "explained" not in record.function.__code__.co_varnames:
            return
        capture = Capture(network, batch.x, "features")
        raw = METHODS.get("hires_cam")(capture, None, capture.target("label", labels=batch.y)).detach()
        clean = of(record, network, M, batch, raw)
        spoilt = raw.clone()
        spoilt.view(COUNT, -1)[row, place] = value
        honest(of(record, network, M, batch, spoilt), clean, [row], record.columns)

    @settings(max_examples=8, deadline=None)
    @given(value=st.sampled_from(BAD), share=st.sampled_from([0.05, 0.5, 1.0]))
    def test_of_logits_on_changed_images(self, name: str, value: float, share: float) -> None:
        """No column of the images that met them counts, and none of the others changes."""
        record, M, batch = RECORDS[name], maps_of(), boxed()
        clean = of(record, networks()["gap"], M, batch)
        found = of(record, Sometimes(batch.x, value, share), M, batch)
        for column in record.columns:
            gone = torch.isnan(found[column])
            lost = (gone if gone.ndim == 1 else gone.any(1)).nonzero()[:, 0].tolist()
            honest(found, clean, lost, [column])
            if share == 1 and column in ("AD", "AG", "AI", "I", "D", "SM", "relative_foreground_sensitivity"):
                assert len(lost) == COUNT

    @settings(max_examples=8, deadline=None)
    @given(
        box=st.sampled_from([(9, 3, 4, 12), (2, 12, 14, 3), *((v, 3, 14, 12) for v in BAD), *((2, 3, v, 12) for v in BAD)]),
        row=st.integers(0, COUNT - 1),
    )
    def test_of_a_box(self, name: str, box: tuple[float, ...], row: int) -> None:
        record, M, batch, network = RECORDS[name], maps_of(), boxed(), networks()["gap"]
        if "region" not in record.needs:
            return
        assert batch.boxes is not None
        boxes = [*batch.boxes]
        boxes[row] = torch.cat([boxes[row], torch.tensor([box], dtype=torch.float32)])
        spoilt = Batch(batch.x, batch.y, batch.mask, tuple(boxes), batch.id)
        for clip in (True, False):
            honest(of(record, network, M, spoilt, clip=clip), of(record, network, M, batch, clip=clip), [row], record.columns)

    @settings(max_examples=8, deadline=None)
    @given(value=st.sampled_from(BAD), row=st.integers(0, COUNT - 1))
    def test_of_a_mask(self, name: str, value: float, row: int) -> None:
        record, M, batch, network = RECORDS[name], maps_of(), example(count=COUNT), networks()["gap"]
        if not {"mask", "region"} & set(record.needs):
            return
        assert batch.mask is not None
        mask = batch.mask.double()
        mask[row, 5, 5] = value
        spoilt = Batch(batch.x, batch.y, mask, None, batch.id)
        honest(of(record, network, M, spoilt), of(record, network, M, batch), [row], record.columns)


def test_a_comparison_with_nan_is_no_answer() -> None:
    nan, low = torch.tensor([float("nan")], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    for a, b in ((nan, low), (low, nan), (nan, nan), (torch.zeros_like(low), nan)):
        for formula in (average_drop, average_gain, average_increase):
            assert torch.isnan(formula(a, b)).all(), formula
    a = torch.rand(2, 4, 4)
    a[0, 1, 1] = float("nan")
    assert torch.isnan(spearman(a, torch.rand(2, 4, 4))).tolist() == [True, False]


class TestMeasure:
    """Through :func:`foveate.measure`: what is left out, what is counted, what is said."""

    def test_an_image_on_which_the_model_gives_nan(self) -> None:
        batch = boxed(4)
        clean = foveate.measure(networks()["gap"], [batch.only([0, 1, 3])], ["grad_cam", "random"], layer="features")
        network = Sometimes(batch.x[[0, 1, 3]], float("nan"))
        found = foveate.measure(network, [batch], ["grad_cam", "random"], layer="features")
        assert found.failures == [("2", "2: the model gives NaN or infinity")]
        assert found.ids == ["0", "1", "3"]
        np.testing.assert_allclose(found.values["grad_cam", "LE"], clean.values["grad_cam", "LE"])
        with pytest.raises(FoveateError, match="no image can be measured, the first: 2: the model gives NaN"):
            foveate.measure(network, [batch.only([2])], "grad_cam", layer="features")

    def test_an_image_that_holds_nan(self) -> None:
        batch = boxed(3)
        batch.x[1, 0, 3, 3] = float("inf")
        found = foveate.measure(networks()["gap"], [batch], "all-fast", "AD", layer="features")
        assert found.failures == [("1", "1: the image holds NaN or infinity")]
        assert len(found) == 2
        assert "grad_cam" in found.methods

    def test_groups_are_settled_by_an_image_that_can_be_run(self) -> None:
        batch = boxed(3)
        network = Sometimes(batch.x[2:], float("nan"))
        found = foveate.measure(network, [batch.only([i]) for i in range(3)], "all-fast", "LE", layer="features", batch_size=1)
        assert found.ids == ["2"]
        assert "attention_rollout" in found.left_out

    def test_values_are_counted_and_said(self) -> None:
        """Six images, NaN on half of the masked ones: every column has the same n, and it is said why."""
        batch = boxed(6)
        network = Sometimes(batch.x, float("nan"), 0.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = foveate.measure(network, [batch], "grad_cam", ["AD", "AG", "AI", "LE"], layer="features")
        frame = found.table()
        n = {column: int(frame.loc[("grad_cam", column), "n"]) for column in ("AD", "AG", "AI", "LE")}
        assert n["AD"] == n["AG"] == n["AI"] < n["LE"] == 6
        why = "the model gives NaN or infinity on changed images"
        said = f"AD, AG and AI of grad_cam: {6 - n['AD']} of 6 images have no value: {why}"
        assert any(str(warning.message) == said for warning in caught)
        found_too = foveate.evaluate(network, [batch], "grad_cam", ["AD", "AG", "AI"], layer="features").attrs["findings"]
        named = "Average Drop (AD), Average Gain (AG) and Average Increase (AI) of Grad-CAM"
        assert said.replace("AD, AG and AI of grad_cam", named) + "." in found_too

    def test_a_map_with_nan(self) -> None:
        @method("holed", title="Holed", paper="none", control=True)
        def holed(capture: Any, layer: str | None, target: Any) -> Tensor:
            """NaN in the map of the second image."""
            raw = METHODS.get("grad_cam")(capture, layer, target).clone()
            raw[1:2, 0, 0] = float("nan")
            return raw

        @method("fragile", title="Fragile", paper="none", control=True)
        def fragile(capture: Any, layer: str | None, target: Any) -> Tensor:
            """It runs brighter images, on some of which the model gives NaN."""
            capture.again(capture.x + 0.01)
            return METHODS.get("grad_cam")(capture, layer, target)

        try:
            batch = boxed(4)
            metrics = [name for name, record in RECORDS.items() if not record.of_model]
            found = foveate.measure(
                networks()["gap"], [batch], ["grad_cam", "holed"], metrics, layer="features", keep_maps=True
            )
            for (name, column), values in found.values.items():
                if name != "holed" or column.endswith("_curve") or column == "map":
                    continue
                wanted = found.values["grad_cam", column].copy()
                wanted[1] = np.nan
                if column not in ("class_sensitivity", "randomisation", "randomisation_ssim"):  # these run it again
                    np.testing.assert_allclose(values, wanted, err_msg=column)
                assert np.isnan(values[1]).all(), column
            assert found.missing["holed"]["AD"] == {"the map holds NaN or infinity": 1}
            flat = found.values["grad_cam", "map"].max(1) == 0
            assert found.degenerate["holed"] == flat[[0, 2, 3]].sum()  # a map that holds NaN is not a constant one
            network = Sometimes(torch.cat([batch.x, batch.x[[0, 3]] + 0.01]), float("nan"))
            found = foveate.measure(network, [batch], "fragile", ["LE", "sparsity"], layer="features")
            assert np.isnan(found.values["fragile", "LE"]).tolist() == [False, True, True, False]
            assert found.missing["fragile"]["LE"] == {"the map holds NaN or infinity": 2}
        finally:
            METHODS._records.pop("holed")
            METHODS._records.pop("fragile")

    def test_no_pass_more_for_clean_data(self) -> None:
        class Counted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.count = networks()["gap"], 0
                self.features = self.net.features

            def forward(self, x: Tensor) -> Tensor:
                self.count += len(x)
                return self.net(x)

        counted = Counted().eval()
        foveate.measure(counted, [boxed(4)], "grad_cam", ["AD", "AG", "AI"], layer="features")
        assert counted.count == 4 * 2 + 1  # the images, and the masked ones; one looks at how the layer is called


class TestCommand:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        rng = np.random.default_rng(0)
        for i in range(5):
            pixels = rng.integers(0, 200, (40, 48, 3), np.uint8)
            if i == 3:
                pixels[:] = 255
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / "labels.csv").write_text("file,class_index\n" + "\n".join(f"{i}.png,{i % 3}" for i in range(5)))
        (tmp_path / "nets.py").write_text(
            "import torch\nfrom torch import nn\n"
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.features = nn.Conv2d(3, 6, 5, 4)\n"
            "        self.head = nn.Linear(6, 3)\n"
            "    def forward(self, x):\n"
            "        y = self.head(self.features(x).relu().mean((2, 3)))\n"
            "        return torch.where((x.mean((1, 2, 3)) > .95)[:, None], torch.nan, y)\n"
            "def net():\n"
            "    torch.manual_seed(0)\n"
            "    return nn.Sequential(Net()).eval()\n"
        )
        return tmp_path

    def call(self, place: Path, *more: str) -> Any:
        arguments = ["evaluate", str(place), "--model", f"{place / 'nets.py'}:net", "--out", str(place / "out")]
        arguments += [
            "--batch-size",
            "2",
            "--size",
            "32",
            "--methods",
            "grad_cam",
            "--metrics",
            "AD",
            "--mean",
            "0",
            "--std",
            "1",
        ]
        return CliRunner().invoke(app, [*arguments, *more])

    def test_one_bad_image_does_not_end_the_run(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.call(place, "--json")
        assert result.exit_code == 1, result.stderr
        assert "left out: 3.png: the model gives NaN or infinity" in result.stderr
        document = json.loads(result.stdout)
        assert document["failures"] == [{"file": "3.png", "reason": "3.png: the model gives NaN or infinity"}]
        assert document["table"]["grad_cam"]["AD"]["n"] == 4
        assert runs.load(place / "out").ids == ["0.png", "1.png", "2.png", "4.png"]
        from foveate.evaluation.evaluate import Plan

        monkeypatch.setattr(Plan, "run", lambda *a: pytest.fail("measured again"))
        resumed = self.call(place, "--resume")
        assert resumed.exit_code == 1
        assert "left out: 3.png: the model gives NaN" in resumed.stderr

    def test_strict(self, place: Path) -> None:
        result = self.call(place, "--strict")
        assert result.exit_code == 2
        assert "3.png: the model gives NaN or infinity (--strict stops here)" in result.stderr

    def test_boxes_that_cannot_be(self, place: Path) -> None:
        lines = ["file,class_index,boxes_xyxy", *(f"{i}.png,0,4 4 20 30" for i in range(4)), "4.png,0,60 4 90 30"]
        (place / "labels.csv").write_text("\n".join(lines))
        result = self.call(place)
        assert result.exit_code == 1
        assert "labels.csv, line 6: the box '60 4 90 30' lies outside of the image of 48x40 pixels" in result.stderr


@pytest.mark.parametrize("box", ["30 10 20 40", "10 40 30 20", "nan 10 30 40", "10 10 inf 40"])
def test_boxes_in_xml_that_cannot_be(tmp_path: Path, box: str) -> None:
    from foveate.data.benchmarks import open_imagenet
    from foveate.data.images import Preprocess

    Image.new("RGB", (48, 40)).save(tmp_path / "a.JPEG")
    edges = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True))
    text = f"<annotation><object><name>n01440764</name><bndbox>{edges}</bndbox></object></annotation>"
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(FoveateError, match=rf"a.xml has a bndbox that cannot be: xmin ymin xmax ymax are {box}"):
        open_imagenet(tmp_path, Preprocess((32, 32), None))


def test_nan_is_no_class() -> None:
    """``argmax`` takes the place of a NaN for a class."""
    from foveate.training.groups import correct, decided

    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    assert decided(logits, "softmax").tolist() == [1, -1, -1]
    assert correct(decided(logits, "multilabel"), torch.tensor([[0, 1]] * 3)).tolist() == [True, False, False]


class TestABoxOutsideTheImage:
    """A box of another scale than the images is said; an object that the crop cut away is none to speak of."""

    def columns_of(self, box: list[float]) -> tuple[Any, list[str]]:
        batch = boxed()
        assert batch.boxes is not None
        batch = Batch(batch.x, batch.y, None, (torch.tensor([box]), *batch.boxes[1:]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = foveate.measure(networks()["gap"], [batch], "centre", "localization", layer="features")
        return found, [str(one.message) for one in caught]

    @pytest.mark.parametrize("box", [[50, 50, 60, 60], [-9, 2, -3, 8], [23, 0, 30, 5], [0, -4, 5, 0], [50, 50, 50, 50]])
    def test_is_counted_and_said(self, box: list[float]) -> None:
        found, said = self.columns_of(box)
        assert found.missing["centre"]["LE"] == {missing.OUTSIDE: 1}
        assert any(f"1 of {COUNT} images have no value: {missing.OUTSIDE}" in sentence for sentence in said), said
        assert np.isnan(found.values["centre", "LE"]).tolist() == [True, False, False]

    @pytest.mark.parametrize("box", [[0, 0, 0, 0], [23, 17, 23, 17], [5, 5, 5, 9]])
    def test_what_a_crop_leaves_is_quiet(self, box: list[float]) -> None:
        found, said = self.columns_of(box)
        assert found.missing["centre"]["LE"] == {missing.NOTHING: 1} and not said


def test_a_single_batch_is_data() -> None:
    batch, options = boxed(), {"methods": "centre", "metrics": "localization", "layer": "features"}
    whole = foveate.measure(networks()["gap"], [batch], **options)
    alone = foveate.measure(networks()["gap"], batch, **options)
    np.testing.assert_array_equal(alone.values["centre", "LE"], whole.values["centre", "LE"])
    assert foveate.evaluate(networks()["gap"], batch, **options).equals(whole.table(None))
