"""Runs on disk: killed and resumed, on one process or two, compared, and as a page."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import FoveateError
from foveate.cli import app
from foveate.disk.files import locked
from foveate.evaluation import runs
from foveate.evaluation.compare import Limit, compare
from foveate.evaluation.evaluate import Plan
from foveate.evaluation.findings import advice, findings
from foveate.evaluation.results import Results, joined, read, write
from foveate.evaluation.statistics import disagreement, table
from foveate.report import tables
from foveate.testing import example, networks

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

def net():
    torch.manual_seed({seed})
    return Net().eval()
"""
CALL = ("--methods", "grad_cam,hires_cam,random,fake_cam", "--size", "32", "--batch-size", "3")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Fourteen pictures with boxes, one of which cannot be read, and two networks."""
    rng = np.random.default_rng(0)
    lines = ["file,class_index,boxes_xyxy"]
    for i in range(14):
        name = f"{i:02d} <b>&.png" if i == 3 else f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(tmp_path / name)
        lines.append(f"{name},{i % 3},{i} 4 {i + 20} 30")
    (tmp_path / "05.png").write_text("no picture")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    for name, seed in (("nets.py", 0), ("other.py", 1)):
        (tmp_path / name).write_text(NET.replace("{seed}", str(seed)))
    return tmp_path


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def evaluate(place: Path, out: str = "out", *more: Any, net: str = "nets.py") -> Any:
    return call("evaluate", place, "--model", f"{place / net}:net", "--out", place / out, *CALL, *more)


def values(folder: Path) -> pd.DataFrame:
    frame = runs.load(folder).frame()
    return frame[~frame.column.isin(["T", "memory"])].reset_index(drop=True)


def test_what_is_written(place: Path) -> None:
    result = evaluate(place, "out", "--json")
    assert result.exit_code == 1, result.stderr  # one picture could not be read
    document = json.loads(result.stdout)
    assert document["failures"][0]["file"].endswith("05.png")
    assert document["table"]["grad_cam"]["LE"]["n"] == 13
    assert set(document["costs"]["grad_cam"]) == {"T", "forwards", "backwards", "memory"}
    assert document["costs"]["grad_cam"]["forwards"]["mean"] == 1
    assert document["model"]["accuracy"]["n"] == 13
    assert document["protocol"]["metrics"]["localization"]["digest"]
    out = place / "out"
    written = {path.name for path in out.iterdir()}
    assert written == {"rows", "table.csv", "table.md", "prevalence.csv", "report.html", "run.json"}
    assert [path.name for path in sorted((out / "rows").iterdir())] == [f"{i:06d}.parquet" for i in range(5)]
    rows = pd.read_parquet(out / "rows")
    assert {"id", "method", "column", "value"} <= set(rows.columns)
    stored = pd.read_csv(out / "table.csv", index_col=["method", "column"])
    assert stored.loc[("grad_cam", "AD"), "mean"] == pytest.approx(document["table"]["grad_cam"]["AD"]["mean"])
    assert stored.loc[("grad_cam", "AD"), "protocol"] == document["protocol"]["metrics"]["recognition"]["digest"]
    record = json.loads((out / "run.json").read_text())
    assert record["finished"] is True
    assert record["images"] == 13
    assert "HiResCAM gave the same maps as Grad-CAM on every image." in record["findings"]


def test_a_finished_run_is_not_measured_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(place)
    before = values(place / "out")
    monkeypatch.setattr(Plan, "run", lambda *a: pytest.fail("measured again"))
    assert evaluate(place, "out", "--resume").exit_code == 1
    pd.testing.assert_frame_equal(values(place / "out"), before)


def test_an_interrupted_run_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(place, "whole")
    plain, done = Plan.run, []

    def stop(self: Plan, model: Any, batch: Any, number: int = 0) -> Results:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(number)
        return plain(self, model, batch, number)

    monkeypatch.setattr(Plan, "run", stop)
    assert evaluate(place).exit_code == 130
    assert len(list((place / "out" / "rows").glob("*.parquet"))) == 2
    refused = evaluate(place)
    assert refused.exit_code == 2
    assert "not finished: go on with --resume" in refused.stderr
    with pytest.raises(FoveateError, match="is not finished"):
        runs.load(place / "out")
    done.clear()
    done.extend([0, 0, 0])
    monkeypatch.setattr(Plan, "run", lambda *a: done.append(a[3]) or plain(*a))  # type: ignore[func-returns-value]
    assert evaluate(place, "out", "--resume").exit_code == 1
    assert done[3:] == [2, 3, 4]
    pd.testing.assert_frame_equal(values(place / "out"), values(place / "whole"))
    a, b = (json.loads((place / name / "run.json").read_text()) for name in ("out", "whole"))
    assert a["failures"] == b["failures"]
    assert a["degenerate"] == b["degenerate"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("--metrics", "AD"), 'metrics was "all", and is now "AD"'),
        (("--limit", "4"), "limit was null, and is now 4"),
        (("--protocol", "rise"), "protocol was"),
        (("--set", "insertion_deletion.kernel=5"), "protocol was"),
    ],
)
def test_another_call_is_not_resumed(place: Path, change: tuple[str, ...], match: str) -> None:
    evaluate(place)
    result = evaluate(place, "out", "--resume", *change)
    assert result.exit_code == 2
    assert match in result.stderr
    assert "cannot be resumed" in result.stderr


def test_other_weights_and_other_images_are_not_resumed(place: Path) -> None:
    evaluate(place)
    (place / "nets.py").write_text(NET.replace("{seed}", "7"))
    assert "weights was" in evaluate(place, "out", "--resume").stderr
    (place / "nets.py").write_text(NET.replace("{seed}", "0"))
    text = (place / "labels.csv").read_text()
    (place / "labels.csv").write_text(text.replace("13.png,1", "13.png,2"))
    assert "images was" in evaluate(place, "out", "--resume").stderr


def test_strict_stops_at_an_unreadable_image(place: Path) -> None:
    result = evaluate(place, "out", "--strict")
    assert result.exit_code == 2
    assert "05.png is not an image" in result.stderr
    assert "--strict stops here" in result.stderr


def test_damaged_files_are_named(place: Path) -> None:
    evaluate(place)
    (place / "out" / "rows" / "000001.parquet").write_bytes(b"nothing")
    result = evaluate(place, "out", "--resume")
    assert result.exit_code == 1  # the picture that cannot be read
    assert "their files are damaged, or were written by another version (the first: 000001.parquet)" in result.stderr
    (place / "out" / "run.json").write_text("{")
    refused = evaluate(place)
    assert refused.exit_code == 2
    assert "run.json is damaged: go on with --resume" in refused.stderr
    assert "is damaged: results that fit this call are taken" in evaluate(place, "out", "--resume").stderr


def process(place: Path, out: str, *more: str) -> subprocess.Popen[bytes]:
    code = "import sys; from foveate.cli import main; main()"
    arguments = ["evaluate", str(place), "--model", f"{place / 'nets.py'}:net", "--out", str(place / out), *CALL, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )


@pytest.mark.slow
def test_killed_at_ten_random_moments(place: Path) -> None:
    for i in range(14, 90):  # enough to be killed in the middle of
        shutil.copy(place / "00.png", place / f"{i}.png")
    lines = [f"{i}.png,{i % 3},1 4 20 30" for i in range(14, 90)]
    (place / "labels.csv").write_text((place / "labels.csv").read_text() + "\n" + "\n".join(lines))
    evaluate(place, "whole")
    rng, killed = np.random.default_rng(), 0
    begun = time.monotonic()
    process(place, "timed").wait(300)
    whole = time.monotonic() - begun
    for _ in range(10):
        run = process(place, "out", "--resume")
        try:
            run.wait(float(rng.uniform(0.4, 1)) * whole)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
    assert killed
    assert evaluate(place, "out", "--resume").exit_code == 1
    pd.testing.assert_frame_equal(values(place / "out"), values(place / "whole"))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(place: Path) -> None:
    evaluate(place, "one")
    script = Path(sys.executable).parent / "foveate"
    arguments = ["evaluate", place, "--model", f"{place / 'nets.py'}:net", "--out", place / "two", *CALL, "--devices", "2"]
    done = subprocess.run([str(script), *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert (place / "two" / "run.json").exists(), done.stdout + done.stderr
    pd.testing.assert_frame_equal(values(place / "two"), values(place / "one"))
    ids = runs.load(place / "two").ids
    assert len(ids) == len(set(ids)) == 13
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "foveate"]
    arguments[arguments.index("--out") + 1] = place / "torchrun"
    done = subprocess.run([*torchrun, *map(str, arguments[:-2])], capture_output=True, text=True, timeout=300)
    pd.testing.assert_frame_equal(values(place / "torchrun"), values(place / "one"))


class TestResults:
    def test_there_and_back(self, tmp_path: Path) -> None:
        part = Results(
            ["a", "b"],
            {("m", "AD"): np.array([1.5, np.nan]), ("m", "I_curve"): np.array([[0.5, 1], [0.25, 2]], np.float32)},
            np.array([1, -1]),
            np.array([0, 2]),
            np.array([0.5, 0.25]),
            {"m": 1},
            [("c.png", "cut off")],
            {"n": "no head"},
            {"o": "m"},
        )
        write(part, tmp_path / "0.parquet")
        again = read(tmp_path / "0.parquet")
        for key, array in part.values.items():
            np.testing.assert_array_equal(again.values[key], array)
        again.values, part.values = {}, {}
        for name in ("labels", "predicted", "confidence"):
            np.testing.assert_array_equal(getattr(again, name), getattr(part, name))
            setattr(again, name, None)
            setattr(part, name, None)
        assert again == part
        assert not list(tmp_path.glob(".*"))
        write(Results(failures=[("a", "b")]), tmp_path / "1.parquet")
        assert read(tmp_path / "1.parquet").failures == [("a", "b")]

    def test_parts_are_joined_by_image(self) -> None:
        one = Results(["a"], {("m", "AD"): np.array([1.0])}, *(np.zeros(1, int),) * 2, np.ones(1), same={"x": "m", "y": "m"})
        two = Results(["b"], {("m", "AG"): np.array([2.0])}, *(np.ones(1, int),) * 2, np.ones(1), same={"x": "m"})
        whole = joined([one, Results(failures=[("c", "d")]), two])
        assert whole.ids == ["a", "b"]
        np.testing.assert_array_equal(whole.values["m", "AD"], [1, np.nan])
        np.testing.assert_array_equal(whole.values["m", "AG"], [np.nan, 2])
        assert whole.same == {"x": "m"}
        assert whole.labels.tolist() == [0, 1]


def made(**methods: dict[str, np.ndarray]) -> Results:
    count = len(next(iter(next(iter(methods.values())).values())))
    data = {(method, column): array for method, columns in methods.items() for column, array in columns.items()}
    return Results([str(i) for i in range(count)], data, *(np.zeros(count, int),) * 2, np.ones(count))


class TestStatistics:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=300)

    def test_differences_are_paired(self) -> None:
        """Two methods that differ by .1 in every image: their intervals overlap, and one of them is better."""
        results = made(grad_cam={"AG": self.noise}, layer_cam={"AG": self.noise + 0.1})
        frame = table(results)
        line = frame.loc[("layer_cam", "AG")]
        assert frame.attrs["baseline"] == "grad_cam"
        assert line["difference"] == pytest.approx(0.1)
        assert (line["difference_low"], line["difference_high"]) == pytest.approx((0.1, 0.1))
        assert np.isnan(frame.loc[("grad_cam", "AG"), "difference"])
        assert (line["rank"], line["rank_last"]) == (1, 1)
        assert line["low"] < frame.loc[("grad_cam", "AG"), "high"]

    def test_ranks_go_the_way_of_the_column(self) -> None:
        columns = {
            name: {"AG": 50 + self.noise + shift, "AD": 50 + self.noise + shift}
            for name, shift in (("a", 0), ("b", 5), ("c", 5 + 0.01 * self.rng.normal(size=300)))
        }
        frame = table(made(**columns), "b")
        assert [frame.loc[(name, "AG"), "rank"] for name in "abc"] == [3, 1, 1]
        assert [frame.loc[(name, "AG"), "rank_last"] for name in "abc"] == [3, 2, 2]
        assert [frame.loc[(name, "AD"), "rank"] for name in "abc"] == [1, 2, 2]
        with pytest.raises(FoveateError, match="baseline 'opti_cam' is not in the table: it has a, b, c"):
            table(made(**columns), "opti_cam")

    def test_controls_that_win_are_named(self) -> None:
        good, bad = self.noise + 10, self.noise
        results = made(grad_cam={"LE": good, "AG": good}, layer_cam={"LE": good, "AG": good}, fake_cam={"LE": bad, "AG": bad})
        said = findings(table(results), results)
        assert said == [
            "Localization error (LE, lower is better): Fake-CAM, a control that ignores the model, is better (0.0) than the "
            "best method, Grad-CAM (10.0). On this data the column does not measure the explanation."
        ]
        half = made(grad_cam={"AG": good}, layer_cam={"AG": bad}, centre={"AG": bad + 3})
        assert findings(table(half), half) == [
            "Average Gain (AG, higher is better): Centre (3.0), a control that ignores the model, is better "
            "than 1 of 2 methods."
        ]

    def test_which_method_to_use(self) -> None:
        """The columns that tell methods from controls, who leads in them, and the cost; nothing where nothing is shown."""
        high, low = self.noise + 50, self.noise
        cost = lambda seconds: {"T": np.full(300, seconds)}  # noqa: E731
        columns: dict[str, dict[str, np.ndarray]] = {
            "grad_cam": {"AG": high, "LE": low + 5, **cost(0.04)},
            "opti_cam": {"AG": high + 5, "LE": low + 5, **cost(2.0)},
            "centre": {"AG": low, "LE": low, **cost(0.0)},
        }
        results = made(**columns)
        assert advice(table(results), results) == (
            "Average Gain (AG) means something on these 300 images: a method is better there than every control. In the "
            "other column a control is level with the best, or better. Opti-CAM leads in it: better "
            "than every control, and no other method is better. Cost of one image: Opti-CAM 2 s."
        )
        columns["layer_cam"] = {"AG": low + 1 + 80 * np.random.default_rng(4).normal(size=300), "LE": low + 5, **cost(0.04)}
        unsure = made(**columns)  # no other method is surely better than it, and it is not surely better than the control
        assert "Layer-CAM" not in advice(table(unsure), unsure)
        del columns["layer_cam"]
        columns["grad_cam"]["AG"] = columns["opti_cam"]["AG"]
        alike = made(**columns)
        assert "no difference is shown, so that the cost decides." in advice(table(alike), alike)
        assert advice(table(alike), alike).endswith("Cost of one image: Grad-CAM 0.04 s, Opti-CAM 2 s.")
        nothing = made(grad_cam={"AG": low}, opti_cam={"AG": low}, centre={"AG": high})
        assert advice(table(nothing), nothing).startswith("Nothing here says which method to use: in none of the 1 columns")
        for few in (made(grad_cam={"AG": high}, centre={"AG": low}), made(grad_cam={"AG": high}, opti_cam={"AG": low})):
            assert advice(table(few), few) == ""

    def test_what_no_method_is_told_apart_in_is_one_sentence(self) -> None:
        noise = {name: np.random.default_rng(i).normal(size=(2, 60)) for i, name in enumerate(("grad_cam", "centre"))}
        results = made(**{name: {"AD": a, "AG": b} for name, (a, b) in noise.items()})
        frame = table(results)
        assert findings(frame, results) == [
            "No method can be told apart from Centre, a control that ignores the model, in Average Drop (AD) and Average "
            "Gain (AG): what these columns say of a map may be chance."
        ]
        assert not any(tables.is_best(frame, *key) for key in frame.index)  # a mark on all of them says nothing
        few = made(**{name: {"AD": a[:8], "AG": b[:8]} for name, (a, b) in noise.items()})
        assert findings(table(few), few)[0].startswith("8 images are few: hardly any difference")
        fewer = made(**{name: {"AD": a[:4], "AG": b[:4]} for name, (a, b) in noise.items()})
        assert findings(table(fewer), fewer)[0].startswith("4 images are few: no difference")

    def test_columns_that_disagree(self) -> None:
        columns = {
            name: {"AG": self.noise + i, "AD": self.noise - i, "D": self.noise + i, "AI": self.noise}
            for i, name in enumerate("abcd")
        }
        correlation = disagreement(table(made(**columns)))
        assert correlation.loc["AG", "AD"] == pytest.approx(1)
        assert correlation.loc["AG", "D"] == pytest.approx(-1)
        assert "AI" not in correlation  # all methods agree there


class TestCompare:
    def test_two_networks(self, place: Path) -> None:
        evaluate(place, "one")
        evaluate(place, "two", net="other.py")
        result = compare([place / "one", place / "two"])
        a, b = values(place / "one"), values(place / "two")
        pick = [f[(f.method == "grad_cam") & (f.column == "AD")].value.to_numpy() for f in (a, b)]
        line = result.frame.loc[("grad_cam", "AD")]
        assert line["difference 1"] == pytest.approx((pick[1] - pick[0]).mean())
        assert line["low 1"] <= line["difference 1"] <= line["high 1"]
        page = place / "compared.html"
        done = call("compare", place / "one", place / "two", "--out", page, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["table"]["grad_cam"]["AD"]["n 1"] == 13
        assert "one against two" in page.read_text()
        page.write_text("kept")
        again = call("compare", place / "one", place / "two", "--out", page)
        assert again.exit_code == 2 and "is there already: name another file, or ask to overwrite it" in again.stderr
        assert page.read_text() == "kept"
        assert call("compare", place / "one", place / "two", "--out", page, "--overwrite").exit_code == 0
        assert "one against two" in page.read_text()

    def test_the_gate(self, place: Path) -> None:
        evaluate(place, "one")
        evaluate(place, "two", net="other.py")
        shift = compare([place / "one", place / "two"]).frame.loc[("grad_cam", "AD"), "difference 1"]
        first, second = ("one", "two") if shift > 0 else ("two", "one")  # AD, which is better down, goes up
        worse = call("compare", place / first, place / second, "--fail-under", f"grad_cam.AD={abs(shift) / 2}")
        assert worse.exit_code == 1
        assert "worse:" in worse.stderr
        assert call("compare", place / first, place / second, "--fail-under", f"grad_cam.AD={abs(shift) * 2}").exit_code == 0
        assert call("compare", place / second, place / first, "--fail-under", "grad_cam.AD=0").exit_code == 0

    def test_other_protocols_are_not_compared(self, place: Path) -> None:
        evaluate(place, "one")
        evaluate(place, "two", "--set", "insertion_deletion.kernel=5")
        result = compare([place / "one", place / "two"])
        assert np.isnan(result.frame.loc[("grad_cam", "I"), "difference 1"])
        assert result.frame.loc[("grad_cam", "AD"), "difference 1"] == 0
        assert any("insertion_deletion was measured by another protocol" in note for note in result.notes)
        done = call("compare", place / "one", place / "two", "--fail-under", "I=-1")
        assert done.exit_code == 2
        assert "fits nothing" in done.stderr

    def test_wrong_calls(self, place: Path) -> None:
        evaluate(place, "one")
        for arguments, match in (
            ((place / "one",), "nothing to compare"),
            ((place / "one", place), "is not a run of foveate evaluate"),
            ((place / "one", place / "one", "--out", "page.txt"), "name a file that ends in .html"),
            ((place / "one", place / "one", "--fail-under", "AG"), "is not COLUMN=CHANGE"),
            ((place / "one", place / "one", "--fail-under", "XX=1"), "there is no column 'XX'"),
            ((place / "one", place / "one", "--fail-under", "AG=2"), "a worse change is negative"),
        ):
            done = call("compare", *arguments)
            assert done.exit_code == 2, arguments
            assert match in done.stderr

    def test_limits(self) -> None:
        assert Limit.of("AG=-2").broken(-2.5)
        assert not Limit.of("AG=-2").broken(-1.5)
        assert Limit.of("AD=3").broken(4)
        assert Limit.of("captum.LRP.AD=3").method == "captum.LRP"


def test_devices_that_are_not_there(place: Path) -> None:
    assert evaluate(place, "out", "--devices", "0").exit_code == 2


def test_the_python_way() -> None:
    frame = foveate.evaluate(
        networks()["gap"], [example(count=6)], methods=["grad_cam", "random"], metrics="all", layer="features"
    )
    assert {"mean", "low", "high", "n", "difference", "rank"} <= set(frame.columns)
    assert frame.loc[("grad_cam", "I"), "n"] == 6
    assert frame.attrs["protocol"]["name"] == "foveate"
    assert frame.attrs["baseline"] == "grad_cam"


def test_groups_of_methods(place: Path) -> None:
    result = call(
        "evaluate", place, "--model", f"{place / 'nets.py'}:net", "--out", place / "out", "--methods", "all-fast",
        "--metrics", "AD", "--size", "32", "--json",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert "attention_rollout" in document["left_out"]
    assert {"grad_cam", "cam", "fake_cam", "gradient"} <= set(document["table"])
    assert not {"rise", "opti_cam", "score_cam"} & set(document["table"])
    named = call(
        "evaluate", place, "--model", f"{place / 'nets.py'}:net", "--out", place / "named", "--methods",
        "all-fast,attention_rollout", "--size", "32",
    )  # fmt: skip
    assert named.exit_code == 2
    assert "attention" in named.stderr


def test_a_capture_is_not_kept_by_what_was_measured_of_it() -> None:
    """Images of a batch that was measured are given back: memory does not grow with the data."""
    import gc
    import weakref

    from foveate import Capture
    from foveate.registry import METRICS

    batch = example(count=2)
    capture = Capture(networks()["gap"], batch.x, "features")
    METRICS.get("I")(capture, torch.rand(2, *batch.x.shape[2:]), batch)
    gone = weakref.ref(capture)
    del capture
    gc.collect()
    assert gone() is None


class TestTorchmetrics:
    def test_batches_add_up_to_the_table(self) -> None:
        from foveate.torchmetrics import SaliencyMetric, SaliencyMetrics

        network, batch = networks()["gap"], example(count=6)
        wanted = foveate.evaluate(network, [batch], ["grad_cam", "random"], ["AD", "mass_inside", "BA"], layer="features")
        network.train()
        metrics = SaliencyMetrics(network, ["grad_cam", "random"], ["AD", "mass_inside", "BA"], layer="features")
        for rows in (slice(0, 2), slice(2, 6)):
            metrics.update(batch.x[rows], batch.y[rows], batch.mask[rows])
        found = metrics.compute()
        assert network.training
        assert found
        for name, value in found.items():
            assert float(value) == pytest.approx(wanted.loc[tuple(name.split("/")), "mean"], rel=1e-6)
        one = SaliencyMetric(network, "ag", layer="features")
        assert one.higher_is_better is True
        one.update(batch.x, batch.y)
        one.reset()
        one.update(batch.x, batch.y)
        network.eval()
        table = foveate.evaluate(network, [batch], "grad_cam", "AG", layer="features")
        assert float(one.compute()) == pytest.approx(table.loc[("grad_cam", "AG"), "mean"])
        with pytest.raises(FoveateError, match="name one of them"):
            SaliencyMetric(network, "recognition")

    def test_it_can_be_the_first_import(self) -> None:
        code = "import foveate; print(foveate.torchmetrics.SaliencyMetric.__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "SaliencyMetric", done.stderr

    def test_in_a_collection(self) -> None:
        from torchmetrics import MetricCollection

        from foveate.torchmetrics import SaliencyMetric

        network, batch = networks()["gap"], example(count=3)
        both = MetricCollection(
            {column: SaliencyMetric(network, column, layer="features") for column in ("AD", "AG")}, compute_groups=False
        )
        both.update(batch.x, batch.y)
        assert set(both.compute()) == {"AD", "AG"}


class TestWhatAReviewerFound:
    """Each was wrong once."""

    def test_a_finished_run_is_kept_when_another_takes_its_place(self, place: Path) -> None:
        evaluate(place)
        before = values(place / "out")
        refused = evaluate(place, "out", "--metrics", "AD")
        assert (
            refused.exit_code == 2
            and "holds a run already (run.json): name another folder, or ask to resume it (--resume)" in refused.stderr
        )
        pd.testing.assert_frame_equal(values(place / "out"), before)
        result = evaluate(place, "out", "--metrics", "AD", "--overwrite")
        assert "is kept in" in result.stderr
        pd.testing.assert_frame_equal(values(place / "out" / "previous-1"), before)
        assert set(values(place / "out").column) == {"AD"}
        assert not (place / "out" / ".lock").exists()
        evaluate(place, "out", "--metrics", "AD", "--overwrite")
        assert not (place / "out" / "previous-2").exists()  # the same call again takes nothing away

    def test_another_normalisation_is_not_resumed(self, place: Path) -> None:
        evaluate(place)
        assert "weights was" in evaluate(place, "out", "--resume", "--mean", "0.1", "--std", "1").stderr

    def test_an_image_without_boxes_takes_none_from_its_neighbours(self, place: Path) -> None:
        lines = (place / "labels.csv").read_text().splitlines()
        lines[1] = "00.png,0,"
        (place / "labels.csv").write_text("\n".join(lines))
        for size in ("1", "3", "7"):
            evaluate(place, size, "--batch-size", size)
            whole = runs.load(place / size)
            assert np.isfinite(whole.values["grad_cam", "LE"]).sum() == 12
            assert np.isnan(whole.values["grad_cam", "LE"][whole.ids.index("00.png")])
            assert np.isfinite(whole.values["grad_cam", "AD"]).all()

    def test_the_gate_sees_what_is_gone_and_lets_controls_be(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).normal(size=20)
        first = made(grad_cam={"AG": noise}, opti_cam={"AG": noise}, centre={"AG": noise + 9})
        other = made(grad_cam={"AG": noise}, opti_cam={"AG": noise * np.nan}, centre={"AG": noise})
        for name, results in (("a", first), ("b", other)):
            (tmp_path / name / "rows").mkdir(parents=True)
            write(results, tmp_path / name / "rows" / "000000.parquet")
            runs.write_record(tmp_path / name, {"finished": True})
        result = compare([tmp_path / "a", tmp_path / "b"])
        assert result.failures([Limit.of("AG=-2")]) == ["AG of opti_cam has a value in a and none in b"]
        assert len(result.failures([Limit.of("centre.AG=-2")])) == 1
        assert Limit.of("AG=-1e-3").change == -0.001
        assert Limit.of("AG=-.5").change == -0.5

    def test_the_protocol_of_a_table_has_the_settings(self) -> None:
        digests = [
            foveate.evaluate(
                networks()["gap"], [example()], "random", "I", layer="features",
                settings={"insertion_deletion": {"kernel": kernel}},
            ).attrs["protocol"]["metrics"]["insertion_deletion"]["digest"]
            for kernel in (5, 11)
        ]  # fmt: skip
        assert digests[0] != digests[1]

    def test_differences_are_paired_where_values_are_missing(self) -> None:
        results = made(grad_cam={"AG": np.array([10, 20, 30, np.nan])}, layer_cam={"AG": np.array([10, 20, 30, 90.0])})
        line = table(results).loc[("layer_cam", "AG")]
        assert line["difference"] == 0
        assert np.isnan([line["difference_low"], line["difference_high"]]).all()  # of three images

    def test_a_baseline_is_looked_up_before_the_work(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Plan, "run", lambda *a: pytest.fail("measured"))
        result = evaluate(place, "out", "--baseline", "opti_cam")
        assert result.exit_code == 2
        assert "is not in the table: it has grad_cam, hires_cam, random, fake_cam" in result.stderr

    def test_two_processes_do_not_share_a_folder(self, place: Path) -> None:
        with locked(place / "out"):
            result = evaluate(place)
        assert result.exit_code == 2
        assert "another process is writing to" in result.stderr
        assert evaluate(place).exit_code == 1

    def test_a_mended_image_is_measured(self, place: Path) -> None:
        evaluate(place)
        shutil.copy(place / "04.png", place / "05.png")
        assert evaluate(place, "out", "--resume").exit_code == 0
        assert len(runs.load(place / "out")) == 14

    def test_controls_stand_in_every_table(self, place: Path) -> None:
        base = ("evaluate", place, "--model", f"{place / 'nets.py'}:net", "--size", "32", "--metrics", "AD", "--json")
        with_them = json.loads(call(*base, "--methods", "grad_cam", "--out", place / "a").stdout)
        assert set(with_them["table"]) == {"grad_cam", "fake_cam", "random", "centre"}
        without = json.loads(call(*base, "--methods", "grad_cam", "--no-controls", "--out", place / "b").stdout)
        assert set(without["table"]) == {"grad_cam"}
        assert without["findings"][0].startswith("13 images are few")
        assert without["findings"][1].startswith("There is no control in this table")

    def test_no_number_lies_outside_its_interval(self) -> None:
        from foveate.evaluation.prevalence import prevalence
        from foveate.evaluation.results import MAP

        maps = np.ones((6, 16), np.float32)
        maps[:3] = 0
        results = made(grad_cam={"EP": np.array([0, 0, 0, 90, 80, 70.0])})
        results.values["grad_cam", MAP] = maps
        said = prevalence(lambda: [results], ["grad_cam"], "grad_cam")["grad_cam"].sentence()
        assert said.startswith("20 % [0, 84]")

    def test_a_copied_metric_shares_the_model(self) -> None:
        from foveate.torchmetrics import SaliencyMetric

        metric = SaliencyMetric(networks()["gap"], "AG", layer="features")
        assert metric.clone().held.model is metric.held.model


def test_real_box_files(tmp_path: Path) -> None:
    """ImageNet's XML, trimaps of pets, and torchvision by name."""
    from foveate.data.benchmarks import open_benchmark
    from foveate.data.images import Preprocess

    square = Preprocess((32, 32), None)
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (40, 80, 3), np.uint8))
    (tmp_path / "in" / "val").mkdir(parents=True)
    (tmp_path / "in" / "xml").mkdir()
    pixels.save(tmp_path / "in" / "val" / "ILSVRC2012_val_00000001.JPEG")
    box = "<bndbox><xmin>{}</xmin><ymin>10</ymin><xmax>{}</xmax><ymax>30</ymax></bndbox>"
    objects = "".join(f"<object><name>n01440764</name>{box.format(a, b)}</object>" for a, b in ((20, 40), (0, 8)))
    (tmp_path / "in" / "xml" / "ILSVRC2012_val_00000001.xml").write_text(f"<annotation>{objects}</annotation>")
    batch = open_benchmark(f"imagenet:{tmp_path / 'in'}", square)[0]
    assert batch.y.tolist() == [0]
    assert batch.boxes[0].tolist() == [[8, 8, 16, 24], [0, 8, pytest.approx(3.2), 24]]
    pets = tmp_path / "pets"
    (pets / "images").mkdir(parents=True)
    (pets / "annotations" / "trimaps").mkdir(parents=True)
    trimap = np.full((40, 80), 2, np.uint8)
    trimap[10:30, 20:60], trimap[5:10] = 1, 3
    for number, name in enumerate(("Abyssinian_1", "beagle_2")):
        pixels.save(pets / "images" / f"{name}.jpg")
        if not number:
            Image.fromarray(trimap).save(pets / "annotations" / "trimaps" / f"{name}.png")
    (pets / "annotations" / "list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\nAbyssinian_1 1 1 1\nbeagle_2 2 2 1\n")
    breeds, species = (open_benchmark(f"{kind}:{pets}", square) for kind in ("pets", "species"))
    assert breeds.class_names == ("Abyssinian", "beagle")
    assert [int(species[i].y) for i in range(2)] == [0, 1]
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[8:24, 8:24] = True
    assert torch.equal(breeds[0].mask[0], expected)
    assert not breeds[1].mask.any()  # no trimap: no number, and nothing taken from the others
    for name, match in (
        (f"imagenet:{pets}", "has no images with XML boxes"),
        ("imagenet:/nowhere", "does not exist"),
        (f"pets:{tmp_path}", "annotations/list.txt is missing"),
        ("torchvision:Nothing", "torchvision has no data set 'Nothing'"),
        (f"torchvision:CIFAR10:{tmp_path}", "download=True"),
    ):
        with pytest.raises(FoveateError, match=match):
            open_benchmark(name, square)
