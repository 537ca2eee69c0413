"""One photograph in several crops: which they are, how their maps are put together, and what the command says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate.cli import app
from foveate.data.crops import Crops, mean_logits
from foveate.data.images import read
from foveate.maps import prepare, upsample

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.std, self.input_size = (0.5,) * 3, (0.25,) * 3, (3, 32, 32)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        self.head = nn.Linear(8 * 64, 4)  # of one size alone

    def forward(self, x):
        return 9 * self.head(self.features(x).flatten(1))

def net():
    torch.manual_seed(0)
    return Net().eval()

def silent():
    model = net()
    torch.nn.init.zeros_(model.head.weight)
    return model
"""


class TestCrops:
    @pytest.mark.parametrize("size", [(36, 36), (37, 50), (64, 40), (32, 45), (33, 150), (200, 32)])
    def test_they_cover_the_image(self, size: tuple[int, int]) -> None:
        crops = Crops(size, (32, 32))
        seen = np.zeros(size, int)
        for top, left in crops.places:
            assert top >= 0 and left >= 0 and top + 32 <= size[0] and left + 32 <= size[1]
            seen[top : top + 32, left : left + 32] += 1
        assert seen.all()
        assert len(set(crops.places)) == len(crops.places) == len(crops) / 2

    def test_they_are_torchvisions_ten(self) -> None:
        from foveate._torchvision import torchvision

        torchvision()
        from torchvision.transforms.v2.functional import ten_crop

        x = torch.rand(3, 37, 50)
        theirs = list(ten_crop(x, [32, 32]))
        ours = Crops((37, 50), (32, 32)).cut(x)
        assert len(ours) == len(theirs) == 10
        # Theirs mirrors the image first, so that a centre which is no whole pixel is rounded to another side.
        exact = [own for i, own in enumerate(theirs) if i != 9]
        assert all(any(torch.equal(own, one) for one in ours) for own in exact)

    def test_maps_are_put_back_where_they_are_from(self) -> None:
        crops = Crops((40, 60), (32, 32))
        whole = torch.rand(40, 60)
        assert torch.allclose(crops.join(crops.cut(whole[None])[:, 0]), whole)

    def test_where_crops_meet_is_their_mean(self) -> None:
        crops = Crops((37, 50), (32, 32))
        raw = torch.randn(10, 4, 4)
        total, times = torch.zeros(37, 50), torch.zeros(37, 50)
        for k in range(10):
            top, left = crops.places[k % 5]
            own = upsample(raw[k : k + 1], (32, 32))[0]
            for i in range(32):
                for j in range(32):
                    total[top + i, left + j] += own[i, j if k < 5 else 31 - j]
                    times[top + i, left + j] += 1
        torch.testing.assert_close(crops.join(raw), total / times)

    @pytest.mark.parametrize("head", ["softmax", "binary", "multilabel"])
    def test_logits_of_mean_probabilities(self, head: Any) -> None:
        logits = 30 * torch.randn(7, 1 if head == "binary" else 5, dtype=torch.float64)
        p = logits.softmax(1) if head == "softmax" else logits.sigmoid()
        mean = mean_logits(logits, head)
        found = mean.softmax(1) if head == "softmax" else mean.sigmoid()
        torch.testing.assert_close(found, p.mean(0, keepdim=True))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETWORK)
    generator = np.random.default_rng(0)
    for name, size in (("a", (40, 60)), ("long", (40, 190))):
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text("file,class_index\na.png,0\nlong.png,1\n")
    return tmp_path


def explained(place: Path, *arguments: str, images: tuple[str, ...] = ("a.png",)) -> dict[str, Any]:
    given = [*(str(place / image) for image in images), "--model", f"{place / 'nets.py'}:net", "--crop", "ten"]
    result = CliRunner().invoke(app, ["explain", *given, "--out", str(place / "out"), "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


class TestCommand:
    def test_every_number_is_that_of_a_loop_over_the_crops(self, place: Path) -> None:
        found = explained(place, "--method", "grad_cam,gradient,contrastive_cam", "--pictures", "none")
        item = found["images"][0]
        model = foveate.load(f"{place / 'nets.py'}:net")
        way = model.preprocess.cropped("ten", (60, 40))
        x = way(read(place / "a.png"))  # [3,32,48], the shorter side that of the crop
        crops = Crops(tuple(x.shape[1:]), (32, 32))

        def p_of(image: torch.Tensor) -> torch.Tensor:
            rows = [model(part[None]).softmax(1)[0].double() for part in crops.cut(image)]
            return sum(rows) / len(rows)  # type: ignore[return-value]

        with torch.no_grad():
            p = p_of(x)
        order = p.argsort(descending=True).tolist()
        assert [row[0] for row in item["top"]] == order
        assert item["top"][0][2] == pytest.approx(float(p.max()), abs=1e-5)
        assert (item["target"], item["cropped"], item["right"]) == (order[0], 0, order[0] == 0)
        assert item["maps"]["contrastive_cam"]["against"] == order[1]
        assert item["grid"] == f"8x8 in each of {len(crops)} crops"
        for name in ("grad_cam", "gradient", "contrastive_cam"):
            own = {"against": order[1]} if name == "contrastive_cam" else {}
            raw = [foveate.explain(model, part[None], name, target=order[0], **own).raw[name] for part in crops.cut(x)]
            mask = prepare(crops.join(torch.cat(raw))[None], crops.size)[0]
            with torch.no_grad():
                after = p_of(x * mask)
            assert item["maps"][name]["p_before"] == pytest.approx(float(p[order[0]]), abs=1e-5)
            assert item["maps"][name]["p_after"] == pytest.approx(float(after[order[0]]), abs=1e-5), name

    def test_several_questions_and_pictures(self, place: Path) -> None:
        asked = ("--method", "grad_cam,contrastive_cam,centre", "--target", "pred,label,second")
        found = explained(place, *asked, images=("a.png", "long.png"))
        for item in found["images"]:
            first, second = item["top"][0][0], item["top"][1][0]
            asked_for = {(answer["target"], answer["against"]): answer for answer in item["answers"]}
            assert set(asked_for) >= {(first, None), (item["label"], None), (second, None), (first, second)}
            contrast = asked_for[first, second]
            top = {row[0]: row[2] for row in item["top"]}
            share = top[contrast["target"]] / (top[contrast["target"]] + top[contrast["against"]])
            assert contrast["maps"]["grad_cam"]["share_before"] == pytest.approx(share, abs=1e-4)
        page = (place / "out" / "index.html").read_text(encoding="utf-8")
        assert "ten, seen in several crops: p is the mean over them" in page
        names = {path.name for path in (place / "out").iterdir()}
        assert {"a.answers.png", "long.answers.png", "index.html"} <= names
        with Image.open(place / "out" / "long.pred.grad_cam.overlay.png") as picture:
            assert picture.width >= 190

    def test_one_run_of_the_crops_answers_every_question(self, place: Path) -> None:
        """Two questions and their contrast cost no forward pass that one does not, but for what is left after their maps."""
        import torch.nn as nn

        counts = []
        for target in ("pred", "pred,second"):
            seen: list[int] = []

            def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], seen: list[int] = seen) -> None:
                if type(module).__name__ == "Net":
                    seen.append(len(inputs[0]))

            handle = nn.modules.module.register_module_forward_pre_hook(count)
            try:
                found = explained(place, "--method", "grad_cam", "--target", target, "--pictures", "none")
            finally:
                handle.remove()
            crops = found["images"][0]["crops"]
            maps = sum(len(answer["maps"]) for answer in found["images"][0].get("answers", [found["images"][0]]))
            counts.append(sum(seen) - crops * maps)
        assert counts[0] == counts[1]

    def test_errors_are_those_of_the_mean(self, place: Path) -> None:
        said = [item["top"][0][0] for item in explained(place, images=("a.png", "long.png"))["images"]]
        found = explained(place, "--errors", images=("a.png", "long.png"))
        expected = [name for name, label, index in zip(("a.png", "long.png"), (0, 1), said, strict=True) if label != index]
        assert [Path(item["file"]).name for item in found["images"]] == expected

    def test_crops_in_which_nothing_speaks_are_counted(self, place: Path) -> None:
        given = [str(place / "a.png"), "--model", f"{place / 'nets.py'}:silent", "--crop", "ten", "--out", str(place / "out")]
        result = CliRunner().invoke(app, ["explain", *given, "--method", "hires_cam,centre", "--json", "--pictures", "none"])
        item = json.loads(result.stdout)["images"][0]
        count = item["crops"]
        assert item["maps"]["hires_cam"]["remark"] == f"nothing speaks for the class in {count} of {count} crops"
        assert item["maps"]["hires_cam"]["degenerate"] and item["maps"]["centre"]["remark"] is None

    def test_methods_that_cannot_are_named_once(self, place: Path) -> None:
        given = [str(place / "a.png"), "--model", f"{place / 'nets.py'}:net", "--crop", "ten", "--out", str(place / "out")]
        result = CliRunner().invoke(app, ["explain", *given, "--method", "cam,grad_cam", "--json"])
        assert result.exit_code != 0
        document = json.loads(result.stdout)
        assert list(document["refused"]) == ["cam"] and list(document["images"][0]["maps"]) == ["grad_cam"]
