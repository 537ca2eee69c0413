"""An assumed normalisation is tried against the others, a table says how its images went in, and one output is no class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from foveate import FoveateError, explain, load, measure
from foveate.batch import Batch
from foveate.cli import app
from foveate.models.classifier import Classifier
from foveate.models.normalisation import better_normalisation

FACTORY = """
import torch
from torch import nn

class Bright(nn.Module):
    # Class 1 where the image is brighter than the middle of a range of [-1, 1].
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2, 2)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([[1.0] * 3, [-1.0] * 3])[..., None, None])
            self.features.bias.zero_()
            self.head.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
            self.head.bias.zero_()
    def forward(self, x):
        return self.head(self.features(x).relu().mean((2, 3)))

def bright():
    return Bright().eval()
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path / 'net.py'}:bright"


def batches(count: int = 16) -> list[Batch]:
    y = torch.arange(count) % 2
    return [Batch((0.47 + 0.06 * y).view(-1, 1, 1, 1).expand(-1, 3, 8, 8), y)]


def test_another_normalisation_that_is_clearly_better_is_named(factory: str) -> None:
    classifier = load(factory)
    assert classifier.assumed
    before = {name: tensor.clone() for name, tensor in classifier._buffers.items() if tensor is not None}
    said = better_normalisation(classifier, batches())
    assert said is not None
    assert "of 16 images 8 are classified rightly with it, and 16 with [-1, 1] (--mean 0.5 --std 0.5)" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier._buffers.items() if tensor is not None)


def test_no_other_is_named_where_it_is_known_or_right_or_in_doubt(factory: str) -> None:
    assert better_normalisation(load(factory, mean=(0.45,) * 3, std=(0.2,) * 3), batches()) is None  # stated
    assert better_normalisation(load(factory), batches(6)) is None  # 3 of 6 against 6 of 6 may be chance
    assert better_normalisation(load(factory), [Batch(batches()[0].x)]) is None  # no labels
    x, y = torch.cat([torch.zeros(8, 3, 8, 8), torch.ones(8, 3, 8, 8)]), torch.arange(16) // 8
    assert better_normalisation(load(factory), [Batch(x, y)]) is None  # as good


def test_a_table_says_how_its_images_went_in(factory: str, tmp_path: Path) -> None:
    for label, level in enumerate((121, 134)):
        (tmp_path / "data" / f"{label}").mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((40, 40, 3), level + i % 2, np.uint8)).save(tmp_path / "data" / f"{label}" / f"{i}.png")
    call = ["evaluate", str(tmp_path / "data"), "--model", factory, "--size", "32", "--metrics", "AD", "--layer", "features"]
    result = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "out"), "--methods", "grad_cam", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["findings"]
    assert (
        "Images: shorter side 37, centre crop 32x32, bilinear; mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (assumed)." in said
    )
    assert any(s.startswith("The model gets 50.0 % [") for s in said)
    assert any("20 with [-1, 1] (--mean 0.5 --std 0.5)" in sentence for sentence in said)
    assert "The model gets 50.0 % [" in (tmp_path / "out" / "table.md").read_text()


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 100 + self.head(self.body(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("y", "why"),
    [(None, "the data has no labels"), (torch.tensor([0, 3]), "not all 0 or 1"), (torch.tensor([0.5, 1]), "not all")],
)
def test_one_output_is_not_measured_as_a_class_by_itself(y: Tensor | None, why: str) -> None:
    batch, model = Batch(torch.rand(2, 3, 12, 12), y), Regression().eval()
    with pytest.raises(FoveateError, match=rf"one output and .*{why}.*head='binary'"):
        measure(model, [batch], "grad_cam", ["AD"], target="pred")
    if y is None:
        assert measure(model, [batch], "grad_cam", ["AD"], target="pred", head="binary").values["grad_cam", "AD"].shape == (2,)
    assert explain(model, batch.x).raw["grad_cam"].shape == (2, 10, 10)


def test_labels_of_two_classes_say_that_it_is_one() -> None:
    results = measure(Regression().eval(), [Batch(torch.rand(2, 3, 12, 12), torch.tensor([1, 0]))], "grad_cam", ["AD"])
    assert results.values["grad_cam", "AD"].shape == (2,)


def test_a_classifier_of_anothers_making_assumes_nothing() -> None:
    from foveate.data.images import Preprocess

    assert not Classifier(Regression().eval(), Preprocess()).assumed


@pytest.fixture
def one_output(tmp_path: Path) -> str:
    """A model of one output, and two images."""
    (tmp_path / "one.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class One(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 1)\n"
        "    def forward(self, x):\n        return self.head(self.body(x).relu().mean((2, 3)))\n\n"
        "def one():\n    torch.manual_seed(0)\n    return One().eval()\n"
    )
    for i, name in enumerate("ab"):
        Image.fromarray(np.full((40, 40, 3), 90 + 70 * i, np.uint8)).save(tmp_path / f"{name}.png")
    return f"{tmp_path / 'one.py'}:one"


def called(one_output: str, command: str, *more: str) -> tuple[int, str, str]:
    """Status, and what stands on standard output and on standard error."""
    place = Path(one_output).parent
    images = [str(place / "a.png"), str(place / "b.png")] if command == "explain" else [str(place)]
    call = [command, *images, "--model", one_output, "--size", "32", "--layer", "body", "--out", str(place / "out"), *more]
    result = CliRunner().invoke(app, call)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("target", [None, "pred"])
def test_the_label_that_one_output_has_no_class_for_is_named(one_output: str, target: str | None) -> None:
    (Path(one_output).parent / "labels.csv").write_text("file,class_index\na.png,135\nb.png,1\n")
    more = [] if target is None else ["--target", target]
    status, _, said = called(one_output, "evaluate", "--metrics", "AD", "--methods", "grad_cam", *more)
    assert status == 2
    assert "one output" in said and "135, of image 'a.png'" in said and "--head binary" in said
    assert "measuring" not in said and "out of range" not in said


@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_one_output_that_is_taken_as_a_logit_is_said_once(one_output: str, command: str) -> None:
    (Path(one_output).parent / "labels.csv").write_text("file,class_index\na.png,0\nb.png,1\n")
    more = (
        ["--metrics", "AD", "--methods", "grad_cam", "--batch-size", "1"] if command == "evaluate" else ["--pictures", "none"]
    )
    status, _, said = called(one_output, command, *more)
    assert status == 0, said
    assert said.count("one output is taken as the logit of a binary classifier") == 1
    more += ["--overwrite"] if command == "evaluate" else []
    status, _, said = called(one_output, command, *more, "--head", "binary")
    assert status == 0 and "one output" not in said, said
