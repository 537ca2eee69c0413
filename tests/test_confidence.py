"""The confidence study: rows that are right and kept, trends that are told from none, a figure, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import reference
from foveate import Batch, Capture, load
from foveate.cli import app
from foveate.data import scenes
from foveate.evaluation.confidence_study import known, study, trend
from foveate.methods.second_order.solve import first_order, second_order
from foveate.report.confidence_study import draw
from test_second_order import CLASSES, images, network


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of few images draws no others."""
    monkeypatch.setitem(scenes.COUNTS, "test", {"leopard": 4, "orca": 4})


def rows(count: int, slope: float, seed: int = 0) -> pd.DataFrame:
    """Images of which the cosine depends on the confidence so much, with noise."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1, count)
    angle = np.clip(0.5 - slope * confidence + rng.normal(0, 0.1, count), 0, None)
    frame = pd.DataFrame({"confidence": confidence, "cosine": np.cos(angle), "cosine_dense": np.cos(2 * angle)})
    return frame.assign(ratio=10 * confidence, predicted=100 * confidence)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_rows_are_what_the_methods_say(tmp_path: Path) -> None:
    net, x = network(sure=20), images(5)
    data = [Batch(x[:3], torch.zeros(3).long(), id=("a", "b", "c")), Batch(x[3:], torch.zeros(2).long(), id=("d", "e"))]
    frame = study(net, data, tmp_path / "net.csv", unit="image")
    assert frame["id"].tolist() == list("abcde")
    capture = Capture(net, x)
    target = capture.target(None)
    second, first = second_order(capture, target), first_order(capture, target)
    p = capture.logits.detach().softmax(1).amax(1)
    for i, line in enumerate(frame.to_dict("records")):
        cosine = float(torch.nn.functional.cosine_similarity(second.delta[i].flatten(), first.delta[i].flatten(), 0))
        g, H = reference.hessian(net, x[i], int(target.y[i]))
        values = torch.linalg.eigvalsh(H)
        dense = torch.linalg.solve((values[-1] + 20) * torch.eye(len(g), dtype=g.dtype) - H, g)
        assert line["confidence"] == pytest.approx(float(p[i]))
        assert line["predicted"] == pytest.approx(CLASSES * float(p[i]))
        assert line["cosine"] == pytest.approx(cosine, abs=1e-6)
        assert line["cosine_dense"] == pytest.approx(float(dense @ g / dense.norm() / g.norm()), abs=1e-4)
        assert line["ratio"] == pytest.approx(float(values[-1] / values[-2]), rel=0.05)
        assert line["distance"] == pytest.approx((2 - 2 * cosine) ** 0.5, abs=1e-4)
    assert frame["cosine"].between(0.3, 1 - 1e-7).all()


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    net, x = network(), images(4)
    data = [Batch(x[i : i + 2], torch.zeros(2).long(), id=(str(i), str(i + 1))) for i in (0, 2)]
    file = tmp_path / "net.csv"
    whole = study(net, data, file, unit="image")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))

    def broken(x: torch.Tensor) -> torch.Tensor:
        assert not torch.equal(x[0], data[0].x[0]), "the first batch ran again"
        return type(net).forward(net, x)

    net.forward = broken  # type: ignore[method-assign]
    again = study(net, data, file, unit="image")
    columns = [name for name in whole if name != "seconds"]
    pd.testing.assert_frame_equal(again[columns], whole[columns])


@pytest.mark.parametrize(("slope", "words"), [(0.4, "rises"), (0.0, "shows no trend in"), (-0.4, "falls")])
def test_a_trend_is_told_from_none(slope: float, words: str) -> None:
    for seed in range(3):
        found = trend(rows(120, slope, seed))
        assert words in found.sentence("net"), seed
        assert found.correlation[1] <= found.correlation[0] <= found.correlation[2]
        assert found.ratio == pytest.approx(0.1) and found.ratio_correlation[0] == pytest.approx(1)
    assert "(Spearman" in found.sentence("net") and "120 images" in found.sentence("net")


def test_few_images_and_rounding_are_no_trend() -> None:
    assert np.isnan(trend(rows(2, 0.4)).correlation[0])
    assert "says nothing of a trend" in trend(rows(12, 0.4)).sentence("net")
    same = rows(60, 0.4)
    noise = same.assign(cosine=1 - 1e-14 * (1 - same["confidence"]), cosine_dense=1.0)
    assert "are the same on all 60 images" in trend(noise).sentence("net") and np.isnan(trend(noise).correlation[0])


def test_the_figure_shows_every_network(tmp_path: Path) -> None:
    frames = {"a": rows(30, 0.4), "b": rows(30, 0.0)}
    trends = {name: trend(frame) for name, frame in frames.items()}
    draw(frames, trends, tmp_path / "one.png")
    draw({"a": frames["a"]}, trends, tmp_path / "other.png")
    one, other = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("one.png", "other.png"))
    orange = (np.abs(one.astype(int) - np.array([0xC2, 0x41, 0x0C])).sum(2) < 60).sum()
    assert one.shape[1] > 1000 and orange > 100
    assert (np.abs(other.astype(int) - np.array([0xC2, 0x41, 0x0C])).sum(2) < 60).sum() < 20


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ("scenes", "--model", "foveate:small_cnn", "--limit", 3, "--out", out)
    assert scenes.CLASSES
    first = call("confidence", *data, "--name", "one")
    assert first.exit_code == 0, first.output
    assert "one: CASO and CAFO are the same" in first.output or "says nothing of a trend" in first.output
    assert (out / "confidence.png").stat().st_size > 10_000
    second = call("confidence", *data, "--name", "two", "--json")
    document = json.loads(second.stdout)
    assert set(document["networks"]) == {"one", "two"} == set(known(out))
    wrong = call("confidence", *data, "--name", "one", "--eta", 0.5)
    assert wrong.exit_code == 2 and "is of another call" in wrong.output
    assert "one figure cannot show both" in call("confidence", *data, "--name", "three", "--eta", 0.5).output
    (out / "labels.csv").write_text("file,class_index\n")
    assert set(known(out)) == {"one", "two"}
    assert "becomes a file's name" in call("confidence", *data, "--name", "../x").output
    assert "--unit 'pixel' is unknown" in call("confidence", *data, "--unit", "pixel").output


def test_rows_are_of_the_call_that_is_beside_them(tmp_path: Path) -> None:
    """Other weights under the same name, a record that is damaged or lost, another program's JSON."""
    call_of = ("scenes", "--model", "foveate:small_cnn", "--limit", 2, "--out", tmp_path, "--name", "one")
    (tmp_path / "notes.json").write_text("[1, 2]")

    torch.manual_seed(0)
    assert call("confidence", *call_of).exit_code == 0
    record = tmp_path / "one.json"
    held = record.read_text()
    for changed, match in (
        (held.replace('"digest": "', '"digest": "0'), "is of another call, of other weights or images"),
        ("{", "is not of foveate confidence"),
        (None, "is there already, and not of foveate confidence"),
    ):
        record.unlink() if changed is None else record.write_text(changed)
        refused = call("confidence", *call_of)
        assert refused.exit_code == 2
        assert match in " ".join(refused.output.split())


def test_an_image_on_which_the_model_gives_nan_is_left_out(tmp_path: Path) -> None:
    net, x = network(), images(4)
    plain = type(net).forward
    net.forward = lambda y: torch.where((y == x[1]).all(3).all(2).all(1)[:, None], torch.nan, plain(net, y))  # type: ignore[method-assign]
    lost: list[tuple[str, str]] = []
    found = study(net, [Batch(x, torch.zeros(4).long(), id=tuple("abcd"))], tmp_path / "net.csv", unit="image", failures=lost)
    assert found["id"].tolist() == ["a", "c", "d"]
    assert lost == [("b", "b: the model gives NaN or infinity")]


def test_a_study_by_another_call_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    call = [
        "confidence",
        "scenes",
        "--model",
        "foveate:small_cnn",
        "--limit",
        "2",
        "--name",
        "net",
        "-o",
        str(tmp_path / "out"),
    ]
    net = tmp_path / "net.safetensors"
    save_file(load("foveate:small_cnn").model.state_dict(), net)
    call += ["--weights", str(net)]
    assert CliRunner().invoke(app, call).exit_code == 0
    before = (tmp_path / "out" / "net.csv").read_bytes()
    refused = CliRunner().invoke(app, [*call, "--mean", "0.1", "--std", "1"])
    assert refused.exit_code == 2 and "or ask to overwrite it" in refused.output
    assert (tmp_path / "out" / "net.csv").read_bytes() == before
    assert CliRunner().invoke(app, [*call, "--mean", "0.1", "--std", "1", "--overwrite"]).exit_code == 0
    assert (tmp_path / "out" / "net.csv").read_bytes() != before
