"""Images of several labels: each label is measured alone, whatever form the labels have."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import Batch, FoveateError
from foveate.cli import app
from foveate.data.folder import open_folder
from foveate.data.images import Preprocess
from foveate.errors import TableWarning
from foveate.evaluation.findings import findings
from foveate.models.small import small_cnn

METRICS = ["AD", "AG", "I", "D", "accuracy"]
HOT = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
NETWORK = """
import torch
from foveate.models.small import small_cnn


def build():
    torch.manual_seed(0)
    model = small_cnn(3).eval()
    model.mean, model.std, model.input_size, model.class_names = 0.5, 0.25, (3, 32, 32), ("cat", "dog", "bird")
    return model
"""


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_cnn(3).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "network.py").write_text(NETWORK)
    return folder


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_each_label_is_measured_as_if_it_were_alone(model: torch.nn.Module, kind: torch.dtype) -> None:
    model = copy.deepcopy(model).double()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.warns(UserWarning, match="1 image.* left out, the first: 1: it has no label"):
        found = foveate.measure(model, [Batch(x, HOT.to(kind))], "grad_cam", METRICS, head="multilabel")
    assert found.ids == ["0 # 0", "0 # 2", "2 # 1", "3 # 0", "3 # 1", "3 # 2"]
    for place, (row, label) in enumerate([(0, 0), (0, 2), (2, 1), (3, 0), (3, 1), (3, 2)]):
        alone = Batch(x[row : row + 1], torch.tensor([label]))
        one = foveate.measure(model, alone, "grad_cam", METRICS, head="multilabel")
        for key, values in one.values.items():
            assert np.allclose(values[0], found.values[key][place], atol=1e-3), key  # tied pixels may change places
        p = float(model(x[row : row + 1]).sigmoid()[0, label])
        assert found.values["(model)", "accuracy"][place] == 100 * (p > 0.5)
        assert found.confidence[place] == pytest.approx(p, abs=1e-5) or p <= 0.5
        assert (int(found.predicted[place]) == label) == (p > 0.5)
    assert "6 rows are labels of 3 images" in findings(found.table(), found)[1]


def test_pairs_of_a_loader(model: torch.nn.Module) -> None:
    x = torch.rand(4, 3, 32, 32)
    pairs = [(x[:2], HOT[[0, 2]].float()), (x[2:], HOT[[3, 0]].float())]
    assert len(foveate.measure(model, pairs, "grad_cam", "AD", head="multilabel")) == 8


def test_what_is_no_such_label_is_a_sentence(model: torch.nn.Module) -> None:
    x = torch.rand(4, 3, 32, 32)
    for y, head, match in (
        (HOT, None, "head 'multilabel' .--head multilabel. measures it label by label"),
        (2 * HOT, "multilabel", "are 0 or 1 for each class, and there is 2"),
        (torch.cat([HOT, HOT], 1), "multilabel", "labels are of 6 classes, and the model has 3 outputs"),
    ):
        with pytest.raises(FoveateError, match=match):
            foveate.measure(model, [Batch(x, y)], "grad_cam", "AD", head=head)  # type: ignore[arg-type]


def test_one_label_each_is_ordinary(model: torch.nn.Module) -> None:
    x, y = torch.rand(3, 3, 32, 32), torch.tensor([2, 0, 1])
    hot = foveate.measure(model, [Batch(x, torch.nn.functional.one_hot(y))], "grad_cam", "AD")
    plain = foveate.measure(model, [Batch(x, y)], "grad_cam", "AD")
    assert hot.ids == plain.ids
    assert np.array_equal(hot.values["grad_cam", "AD"], plain.values["grad_cam", "AD"])


TABLES = {
    "columns": "file,cat,dog,bird\n0.png,1,0,1\n1.png,0,0,0\n2.png,,1,\n3.png,1,1,1\n",
    "names": "file,name\n0.png,cat;bird\n2.png,dog\n3.png,cat; dog ;bird\n",
    "indices": "file,class_index\n0.png,0;2\n2.png,1\n3.png,0;1;2\n",
}


@pytest.mark.parametrize("form", TABLES)
def test_tables(photos: Path, form: str) -> None:
    (photos / "labels.csv").write_text(TABLES[form])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = open_folder(photos, Preprocess((32, 32), 32))
    assert data.several and len(data) == 6
    named = data.class_names or ("0", "1", "2")
    found = [(entry.path.name, str(entry.label) if form == "indices" else named[entry.label or 0]) for entry in data.entries]
    assert found == labelled(form)
    assert len({data.name_of(i) for i in range(6)}) == 6
    said = [str(w.message) for w in caught if issubclass(w.category, TableWarning)]
    assert bool([text for text in said if "1 image(s) have no label" in text]) == (form == "columns")


def test_one_label_a_line_stays_as_it_was(photos: Path) -> None:
    (photos / "labels.csv").write_text("file,cat,dog\n0.png,1,0\n1.png,0,1\n")
    data = open_folder(photos, Preprocess((32, 32), 32))
    assert not data.several and [data.name_of(i) for i in range(2)] == ["0.png", "1.png"]
    (photos / "labels.csv").write_text("file,width,height\n0.png,40,40\n")
    with pytest.raises(FoveateError, match=r"needs a header with the columns file and class_index .or name., and it has file"):
        open_folder(photos, Preprocess((32, 32), 32))


def test_a_name_may_hold_a_semicolon(photos: Path) -> None:
    (photos / "labels.csv").write_text("file,name\n0.png,a;b\n1.png,c\n2.png,a;b\n")
    data = open_folder(photos, Preprocess((32, 32), 32))
    assert data.class_names == ("a;b", "c") and not data.several


def test_what_needs_one_class_an_image_says_so(photos: Path) -> None:
    (photos / "labels.csv").write_text(TABLES["indices"])
    with pytest.raises(FoveateError, match="measures it label by label"):
        foveate.measure(small_cnn(3).eval(), open_folder(photos, Preprocess((32, 32), 32)), "grad_cam", "AD")
    call = ["train", "scenes_plain", "--data", str(photos), "--set", "epochs=1", "--out", str(photos.parent / "run")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 2 and "several classes" in done.stderr


@pytest.mark.parametrize("form", TABLES)
def test_explain_asks_which_label(photos: Path, form: str) -> None:
    """No label is chosen for an image of several; one that has one is explained."""
    (photos / "labels.csv").write_text(TABLES[form])
    call = ["explain", str(photos), "--model", f"{photos.parent / 'network.py'}:build", "--method", "grad_cam", "--json"]
    call += ["--out", str(photos.parent / "out"), "--pictures", "none", "--head", "multilabel"]
    plain = json.loads(CliRunner().invoke(app, call).stdout)
    expected = {"0.png": None, "1.png": None, "2.png": 1, "3.png": None}
    assert {Path(item["file"]).name: item["label"] for item in plain["images"]} == expected
    document = json.loads(CliRunner().invoke(app, [*call, "--target", "label"]).stdout)
    assert [Path(item["file"]).name for item in document["images"]] == ["2.png"]
    reasons = {Path(failure["file"]).name: failure["reason"] for failure in document["failures"]}
    names = "0, 2" if form == "indices" else "cat, bird"
    assert f"0.png has several labels ({names}): name the one to explain as --target" in reasons["0.png"]


@pytest.mark.parametrize("form", TABLES)
def test_on_the_command_line(photos: Path, form: str) -> None:
    (photos / "labels.csv").write_text(TABLES[form])
    out = photos.parent / "out"
    call = ["evaluate", str(photos), "--model", f"{photos.parent / 'network.py'}:build", "--methods", "grad_cam,centre"]
    call += ["--metrics", "AD,accuracy", "--out", str(out), "--json"]
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2 and "--head multilabel" in refused.stderr
    done = CliRunner().invoke(app, [*call, "--head", "multilabel"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["table"]["grad_cam"]["AD"]["n"] == document["accuracy"]["n"] == 6
    assert any("labels of 3 images" in sentence for sentence in document["findings"])
    assert any("of 6 labels right" in sentence for sentence in document["findings"])
    rows = pd.read_parquet(out / "rows")
    assert set(rows["id"]) == {f"{name} # {label}" for name, label in labelled(form)}
    again = CliRunner().invoke(app, [*call, "--head", "multilabel", "--resume"])
    assert json.loads(again.stdout)["table"] == document["table"]


def labelled(form: str) -> list[tuple[str, str]]:
    names = ("cat", "dog", "bird") if form != "indices" else ("0", "1", "2")
    return [("0.png", names[0]), ("0.png", names[2]), ("2.png", names[1]), *(("3.png", name) for name in names)]
