"""The command line: what it writes and prints, and a sentence for everything that people get wrong."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import every_page
import foveate
from foveate.cli import app
from foveate.data import scenes
from foveate.errors import FoveateError
from foveate.models.load import load
from foveate.models.small import small_cnn
from foveate.report import sheets

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.mean, self.std, self.input_size = (0.5,) * 3, (0.25,) * 3, (3, 64, 64)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Linear(8, classes)
        if classes == 3:
            self.class_names = ["tabby, tabby cat", "Persian cat", "orca"]

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net().eval()

def thousand():
    torch.manual_seed(0)
    return Net(1000).eval()

def single():
    torch.manual_seed(0)
    return Net(1).eval()

def silent():
    model = net()
    torch.nn.init.zeros_(model.classifier.weight)
    return model

def training():
    return Net()

def broken():
    raise KeyError("weights")

def number():
    return 3
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a factory, images and a labels.csv."""
    (tmp_path / "nets.py").write_text(FACTORY)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text("file,class_index\na.png,2\nb.png,1\n")
    (tmp_path / "text.jpg").write_text("this is not an image")
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def explain(place: Path, *arguments: object, images: tuple[str, ...] = ("a.png",), model: str = "net") -> Result:
    paths = [place / name for name in images]
    return call("explain", *paths, "--model", f"{place / 'nets.py'}:{model}", "--out", place / "out", *arguments)


def sentence(result: Result) -> str:
    """The error of a wrong call: one line, no traceback, nothing on standard output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("foveate:")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


class TestExplain:
    def test_pictures_and_document(self, place: Path) -> None:
        result = explain(place, "--method", "grad_cam", "--method", "hires_cam", "--json", images=("a.png", "b.png"))
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert [Path(item["file"]).name for item in document["images"]] == ["a.png", "b.png"]
        for item in document["images"]:
            assert item["target"] == item["top"][0][0]
            assert [p for _, _, p in item["top"]] == sorted((p for _, _, p in item["top"]), reverse=True)
            assert set(item["maps"]) == {"grad_cam", "hires_cam"}
            assert item["maps"]["grad_cam"]["completeness_error"] is None
            assert item["maps"]["hires_cam"]["completeness_error"] < 1e-4
            for values in item["maps"].values():
                assert values["p_before"] == pytest.approx(item["top"][0][2], abs=1e-5)
                assert 0 <= values["p_after"] <= 1
                assert values["seconds"] >= 0
                assert Image.open(values["picture"]).width > 1000
                overlay = np.asarray(Image.open(values["overlay"]).convert("RGB"))
                assert (overlay[:70, 90:] == 255).all()  # the photograph's own 90 x 70 pixels, above what they show
                assert (overlay[70:] < 128).any()

    def test_the_table(self, place: Path) -> None:
        result = explain(place)
        assert result.exit_code == 0
        for word in (
            "tabby",
            "Persian cat",
            "orca",
            "grad_cam",
            "hires_cam",
            "error: of completeness",
            "at layer features (32x32)",
        ):
            assert word in result.stdout

    def test_a_row_of_a_sheet_has_one_measure(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a contrast the share, for controls too; of one class p, also for a method that makes a contrast of it."""
        from foveate.report import sheets

        rows: list[tuple[str, set[str]]] = []
        monkeypatch.setattr(
            sheets,
            "sheet",
            lambda _, __, given, **___: rows.extend((w, {p.measure for p in ps.values()}) for w, _, ps in given),
        )
        asked = ("--method", "grad_cam,contrastive_cam,fake_cam", "--target", "pred,second", "--pictures", "sheet")
        assert explain(place, *asked).exit_code == 0
        assert [measures for _, measures in rows] == [{"p"}, {"p"}, {"share"}], rows
        page = (place / "out" / "index.html").read_text(encoding="utf-8")
        assert "Share: p of the class" in page
        explain(place, "--method", "grad_cam")
        assert "Share: p of the class" not in (place / "out" / "index.html").read_text(encoding="utf-8")

    def test_pictures_of_an_earlier_call_are_named(self, place: Path) -> None:
        first = explain(place, "--methods", "grad_cam,cam", images=("a.png", "b.png"))
        assert first.exit_code == 0 and "earlier call" not in first.stderr
        again = explain(place, "--method", "grad_cam", images=("a.png",))
        made = len(list((place / "out").glob("a.grad_cam*.png")))
        stay = len(list((place / "out").glob("*.png"))) - made
        assert f"{stay} picture(s) of an earlier call stay in" in again.stderr

    def test_the_widest_table_fits_80_columns(self, capsys: pytest.CaptureFixture[str]) -> None:
        from rich.console import Console

        from foveate.cli.explain import _print_answer

        values = {"against": 1, "against_name": "African grey parrot", "p_before": 0.997, "p_after": 0.123, "share_before": 0.9}
        values |= {"share_after": 0.8, "completeness_error": 2e-7, "seconds": 12.3456, "degenerate": False, "remark": None}
        answer = {"question": "pred", "target": 2, "target_name": "owl", "against": None, "against_name": None}
        names = ("extremal_perturbation", "integrated_gradients")
        _print_answer(Console(width=80, highlight=False), {**answer, "maps": dict.fromkeys(names, values)}, {"layer": None})
        said = capsys.readouterr().out
        assert "…" not in said and max(map(len, said.splitlines())) <= 80
        for word in (*names, "0.997 → 0.123", "0.900 → 0.800", "2.0e-07", "12345.6"):
            assert word in said

    @pytest.mark.parametrize("asked", [("--method", "grad_cam, hires_cam,"), ("--method", "grad_cam", "--method", "hires_cam")])
    def test_several_methods_with_commas_or_repeated(self, place: Path, asked: tuple[str, ...]) -> None:
        assert list(json.loads(explain(place, *asked, "--json").stdout)["images"][0]["maps"]) == ["grad_cam", "hires_cam"]
        assert "--method ',' names none" in sentence(explain(place, "--method", ","))

    def test_groups_of_methods_leave_out_what_the_model_cannot_have(self, place: Path) -> None:
        result = explain(place, "--method", "ALL_fast", "--layer", "features.0", "--json", "--pictures", "none")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert {"grad_cam", "gradient", "fake_cam"} <= set(document["images"][0]["maps"])
        assert not {"cam", "rise", "opti_cam"} & set(document["images"][0]["maps"])
        assert "global average pooling" in document["left_out"]["cam"]
        assert document["failures"] == []
        assert "note: left out cam needs a head" in result.stderr
        asked = explain(place, "--method", "all-fast,cam", "--layer", "features.0", "--json", "--pictures", "none")
        assert asked.exit_code == 1
        assert list(json.loads(asked.stdout)["refused"]) == ["cam"]
        assert "did you mean all-fast" in sentence(explain(place, "--method", "all-fst"))

    def test_a_method_left_out_of_one_answer_is_named_with_it(self, place: Path) -> None:
        asked = ("--method", "all-fast", "--target", "pred,second", "--set", "finer_cam.similar=1", "--json")
        document = json.loads(explain(place, *asked, "--pictures", "none").stdout)
        assert "finer_cam for pred-second" in document["left_out"]
        assert "attention_rollout" in document["left_out"]
        assert not [name for name in document["left_out"] if name.startswith("attention_rollout for")]
        result = explain(place, "--method", "cam", "--target", "pred,second", "--layer", "features.0", "--method", "centre")
        assert result.stderr.count("cam needs a head") == 1

    def test_maps_of_several_methods_are_on_one_picture(self, place: Path) -> None:
        item = json.loads(explain(place, "--method", "all-fast", "--json").stdout)["images"][0]
        assert item["picture"].endswith("a.methods.png")
        assert Image.open(item["picture"]).width > 1500
        assert "picture" not in json.loads(explain(place, "--method", "cam", "--json").stdout)["images"][0]

    @pytest.mark.parametrize(
        ("kind", "written"),
        [
            ("all", {"a.methods.png", "a.cam.png", "a.cam.overlay.png", "a.grad_cam.png", "a.grad_cam.overlay.png"}),
            ("overlay", {"a.cam.overlay.png", "a.grad_cam.overlay.png"}),
            ("sheet", {"a.methods.png"}),
            ("none", set()),
        ],
    )
    def test_pictures_as_asked(self, place: Path, kind: str, written: set[str]) -> None:
        result = explain(place, "--method", "cam,grad_cam", "--pictures", kind, "--json")
        page = {"index.html"} if written else set()
        assert {path.name for path in (place / "out").iterdir()} == written | page
        item = json.loads(result.stdout)["images"][0]
        named = {item.get("picture"), *(values.get(key) for values in item["maps"].values() for key in ("picture", "overlay"))}
        assert {Path(name).name for name in named if name} == written
        assert "--pictures 'few' is unknown: use all, overlay, sheet, none" in sentence(explain(place, "--pictures", "few"))

    def test_formats_combine_with_what_is_written(self, place: Path) -> None:
        asked = ("--method", "cam,grad_cam", "--pictures", "sheet,pdf,svg", "--json")
        item = json.loads(explain(place, *asked).stdout)["images"][0]
        assert {path.name for path in (place / "out").iterdir()} == {"a.methods.pdf", "a.methods.svg", "index.html"}
        assert item["picture"].endswith("a.methods.pdf")
        assert "asks for sheet and overlay" in sentence(explain(place, "--pictures", "sheet,overlay"))
        assert "no pictures and for a format" in sentence(explain(place, "--pictures", "none,pdf"))
        for wrong in (("--colormap", "infernal"), ("--opacity", "2"), ("--dpi", "3"), ("--scale", "mine"), ("--crop", "half")):
            assert wrong[1] in sentence(explain(place, *wrong))

    @pytest.mark.parametrize("scale", ["own", "images", "methods", "common"])
    def test_one_scale(self, place: Path, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from foveate.report import sheets

        limits: dict[str, float | None] = {}
        monkeypatch.setattr(sheets, "side_by_side", lambda base, *_, limit, **__: limits.update({base.name: limit}))
        asked = ("--method", "cam,gradient", "--scale", scale, "--json")
        assert explain(place, *asked, images=("a.png", "b.png")).exit_code == 0
        groups = {
            "own": [],
            "images": [("a.cam", "b.cam"), ("a.gradient", "b.gradient")],
            "methods": [("a.cam", "a.gradient"), ("b.cam", "b.gradient")],
            "common": [("a.cam", "a.gradient", "b.cam", "b.gradient")],
        }[scale]
        assert len(limits) == 4
        assert len(set(limits.values())) == max(1, len(groups))
        assert all(len({limits[name] for name in names}) == 1 for names in groups)
        assert (limits["a.cam"] is None) == (scale == "own")

    def test_labels_and_what_is_cropped_away(self, place: Path) -> None:
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (80, 300, 3), dtype=np.uint8)).save(place / "wide.png")
        result = explain(place, "--method", "cam", "--json", images=("a.png", "wide.png"))
        known, wide = json.loads(result.stdout)["images"]
        assert (known["label"], known["label_name"], known["right"]) == (2, "orca", known["top"][0][0] == 2)
        assert (wide["label"], wide["right"]) == (None, None)
        assert wide["cropped"] > 0.7
        assert f"never saw {100 * wide['cropped']:.0f} %" in explain(place, images=("wide.png",)).stdout
        (place / "labels.csv").write_text("nonsense")
        assert explain(place, "--method", "cam").exit_code == 0
        for crop in ("none", "resize"):
            found = json.loads(explain(place, "--method", "cam", "--crop", crop, "--json", images=("wide.png",)).stdout)
            assert found["images"][0]["cropped"] == 0
            assert found["images"][0]["grid"].startswith("32x" if crop == "resize" else "32x120")

    def test_p_after_is_the_masked_probability(self, place: Path) -> None:
        document = json.loads(explain(place, "--method", "grad_cam", "--json").stdout)
        from foveate import load, saliency

        model = load(f"{place / 'nets.py'}:net")
        x = model.read(place / "a.png")
        p = model(x * saliency(model, x)[:, None]).softmax(1)[0, document["images"][0]["target"]]
        assert document["images"][0]["maps"]["grad_cam"]["p_after"] == pytest.approx(float(p), rel=1e-4)

    @pytest.mark.parametrize(("target", "index"), [("orca", 2), ("1", 1), ("tabby", 0), ("persian", 1), ("label", 2)])
    def test_targets(self, place: Path, target: str, index: int) -> None:
        document = json.loads(explain(place, "--target", target, "--json").stdout)
        assert document["images"][0]["target"] == index

    def test_against(self, place: Path) -> None:
        arguments = ("--target", "orca", "--against", "tabby", "--method", "contrastive_cam", "--method", "grad_cam", "--json")
        maps = json.loads(explain(place, *arguments).stdout)["images"][0]["maps"]
        assert {values["against"] for values in maps.values()} == {0}
        assert maps["contrastive_cam"]["completeness_error"] < 1e-4
        assert "against_0" in maps["grad_cam"]["picture"]

    def test_several_targets_and_their_contrasts(self, place: Path) -> None:
        result = explain(place, "--target", "pred,label,second", "--method", "grad_cam", "--json", images=("a.png", "b.png"))
        assert result.exit_code == 0, result.output
        for item, label in zip(json.loads(result.stdout)["images"], (2, 1), strict=True):
            pred, second = item["top"][0][0], item["top"][1][0]
            asked = [(answer["target"], answer["against"]) for answer in item["answers"]]
            expected = [(pred, None), (label, None), (second, None), (pred, label if label != pred else second), (pred, second)]
            assert asked == list(dict.fromkeys(expected))
            assert item["maps"] == item["answers"][0]["maps"]
            assert Image.open(item["picture"]).width > 500
            pictures = [answer["maps"]["grad_cam"]["picture"] for answer in item["answers"]]
            assert len(set(pictures)) == len(pictures)
            assert all(Path(picture).exists() for picture in pictures)

    def test_the_words_of_several_answers(self, place: Path) -> None:
        result = explain(place, "--target", "pred,label", "--method", "grad_cam")
        assert result.exit_code == 0
        assert "predicted: why" in result.stdout
        assert ", not " in result.stdout
        assert "a.answers.png" in result.stdout.replace("\n", "")

    def test_a_contrast_has_the_share_of_its_class_among_the_two(self, place: Path) -> None:
        result = explain(place, "--target", "pred,second", "--method", "hires_cam,contrastive_cam,centre", "--json")
        item = json.loads(result.stdout)["images"][0]
        (first, _, p), (second, _, q) = item["top"][:2]
        plain, contrast = item["answers"][0], item["answers"][-1]
        assert (contrast["target"], contrast["against"]) == (first, second)
        assert plain["maps"]["hires_cam"]["share_before"] is None
        assert plain["maps"]["centre"]["share_after"] is None
        for maps in ({"contrastive_cam": plain["maps"]["contrastive_cam"]}, contrast["maps"]):
            assert all(values["share_before"] == pytest.approx(p / (p + q), abs=1e-5) for values in maps.values())
        classifier = load(f"{place / 'nets.py'}:net")
        x = classifier.read(place / "a.png")
        found = foveate.explain(classifier, x, "hires_cam", target=first, against=second)
        logits = classifier(x * found["hires_cam"][:, None])[0]
        share = (logits[first] - logits[second]).sigmoid()
        assert contrast["maps"]["hires_cam"]["share_after"] == pytest.approx(float(share), rel=1e-4)
        shown = explain(place, "--against", "strongest", "--method", "hires_cam")
        assert f"{p / (p + q):.3f} → {float(share):.3f}" in shown.stdout
        assert "p of the two that are told apart" in shown.stdout
        assert "share before" in shown.stdout
        assert "share before" not in explain(place, "--method", "hires_cam").stdout

    def test_a_method_that_refuses_contrasts_leaves_the_other_answers(self, place: Path) -> None:
        result = explain(place, "--target", "pred,second", "--method", "finer_cam", "--set", "finer_cam.similar=1", "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert [answer["question"] for answer in document["images"][0]["answers"]] == ["pred", "second"]
        assert list(document["left_out"]) == ["finer_cam for pred-second"]
        assert "left out for pred-second: finer_cam tells" in result.stderr
        assert document["failures"] == []

    def test_only_errors(self, place: Path) -> None:
        top = json.loads(explain(place, "--json", images=("a.png", "b.png")).stdout)["images"]
        lines = [f"{name}.png,{item['top'][wrong][0]}" for name, item, wrong in zip("ab", top, (0, 1), strict=True)]
        (place / "labels.csv").write_text("file,class_index\n" + "\n".join(lines) + "\n")
        shown = json.loads(explain(place, "--errors", "--json", images=("a.png", "b.png")).stdout)["images"]
        assert [Path(item["file"]).name for item in shown] == ["b.png"]
        none = explain(place, "--errors", "--json")
        assert none.exit_code == 0
        assert json.loads(none.stdout)["images"] == []
        assert "--errors: the model gets all 1 image(s) right" in none.stderr

    def test_settings_and_precision(self, place: Path) -> None:
        maps = {}
        for steps in (1, 30):
            arguments = ("--method", "opti_cam", "--set", f"opti_cam.steps={steps}", "--json")
            maps[steps] = json.loads(explain(place, *arguments).stdout)["images"][0]["maps"]["opti_cam"]
        assert maps[1]["p_after"] != maps[30]["p_after"]
        half = json.loads(explain(place, "--method", "score_cam", "--precision", "bf16", "--json").stdout)
        assert "score_cam" in half["images"][0]["maps"]
        none = explain(place, "--method", "opti_cam", "--set", "opti_cam.steps=2", "--set", "opti_cam.patience=none", "--json")
        assert none.exit_code == 0
        few = ("--method", "extremal_perturbation", "--set", "extremal_perturbation.steps=2", "--json")
        maps = [
            json.loads(explain(place, *few, "--set", f"extremal_perturbation.areas={areas}").stdout)["images"][0]["maps"]
            for areas in ("0.1,0.2", "[0.1, 0.2]", "0.1")
        ]
        after = [found["extremal_perturbation"]["p_after"] for found in maps]
        assert after[0] == after[1] != after[2]
        assert "--set 'steps=3' is not METHOD.SETTING=VALUE" in sentence(explain(place, "--set", "steps=3"))
        assert "opti_cam has no setting 'step'" in sentence(explain(place, "--method", "opti_cam", "--set", "opti_cam.step=3"))
        assert "--precision 'fp8' is unknown" in sentence(explain(place, "--precision", "fp8"))

    def test_maps_of_several_layers_and_wrapped_methods(self, place: Path) -> None:
        arguments = (
            "--layer",
            "features.0,features",
            "--fuse",
            "max",
            "--method",
            "grad_cam",
            "--method",
            "grad_cam:augmented",
        )
        item = json.loads(explain(place, *arguments, "--json").stdout)["images"][0]
        assert item["layer"] == "features.0, features"
        assert set(item["maps"]) == {"grad_cam", "grad_cam:augmented"}
        assert all(Path(values["picture"]).exists() for values in item["maps"].values())
        assert "fusion 'sum' is unknown" in sentence(explain(place, "--layer", "features.0,features", "--fuse", "sum"))

    def test_contrasts_are_asked_for_once(self, place: Path) -> None:
        result = explain(place, "--target", "pred,second", "--against", "1")
        assert "asks for contrasts itself: leave out --against" in sentence(result)

    def test_files_of_the_same_name_do_not_overwrite_each_other(self, place: Path) -> None:
        (place / "more").mkdir()
        (place / "more" / "a.png").write_bytes((place / "b.png").read_bytes())
        explain(place, images=("a.png", "more/a.png"))
        assert (place / "out" / "a.grad_cam.png").exists()
        assert (place / "out" / "a_2.grad_cam.png").exists()

    def test_a_folder_is_its_images_but_not_what_was_written_there(self, place: Path) -> None:
        (place / "more").mkdir()
        Image.open(place / "a.png").save(place / "more" / "a.JPG")
        (place / "more" / "._a.jpg").write_text("what macOS leaves")
        (place / "folder.png").mkdir()
        for out in ("out", "other", ".", "more"):
            result = explain(place, "--method", "cam,hires_cam", "--json", "--out", place / out, images=(".", "a.png"))
            document = json.loads(result.stdout)
            assert [Path(item["file"]).name for item in document["images"]] == ["a.png", "b.png", "a.JPG"], out
            assert [Path(failure["file"]).name for failure in document["failures"]] == ["text.jpg"]
            assert result.exit_code == 1
        assert (place / "out" / "a_2.cam.png").exists()
        (place / "none").mkdir()
        assert "none is a folder without images" in sentence(explain(place, images=("none",)))
        both = explain(place, "--method", "cam", "--json", images=("none", "a.png"))
        assert both.exit_code == 1
        assert len(json.loads(both.stdout)["images"]) == 1

    def test_labels_from_folders_of_classes(self, place: Path) -> None:
        for name in ("orca", "Persian_cat/kittens", "holiday"):
            (place / name).mkdir(parents=True)
            Image.open(place / "a.png").save(place / name / "1.png")
        result = explain(
            place, "--method", "cam", "--target", "label", "--json", images=("orca", "Persian_cat", "holiday", "b.png")
        )
        document = json.loads(result.stdout)
        assert [item["target"] for item in document["images"]] == [2, 1, 1]
        assert [Path(failure["file"]).parent.name for failure in document["failures"]] == ["holiday"]
        assert "its folder is no class" in document["failures"][0]["reason"]

    def test_a_contrast_of_one_logit_has_no_share_but_p(self, place: Path) -> None:
        result = explain(place, "--target", "1", "--against", "0", "--method", "grad_cam", "--json", model="single")
        values = json.loads(result.stdout)["images"][0]["maps"]["grad_cam"]
        assert values["share_before"] is None
        assert Path(values["picture"]).exists()
        assert "nan" not in explain(place, "--target", "1", "--against", "0", "--method", "grad_cam", model="single").stdout

    def test_labels_from_folders_named_by_wordnet(self, place: Path) -> None:
        """As ImageNet's own folders are: ids that come with a list of classes, or those of its thousand classes."""
        (place / "classes.txt").write_text("n02123045 tabby, tabby cat\nn02123394 Persian cat\nn02071294 orca\n")
        for name in ("n02071294", "n02123394", "n01440764"):
            (place / name).mkdir()
            Image.open(place / "a.png").save(place / name / "1.png")
        folders = ("n02071294", "n02123394", "n01440764")
        wanted = ("--method", "cam", "--target", "label", "--json")
        document = json.loads(explain(place, *wanted, "--classes", place / "classes.txt", images=folders).stdout)
        assert [(item["target"], item["target_name"]) for item in document["images"]] == [(2, "orca"), (1, "Persian cat")]
        assert [Path(failure["file"]).parent.name for failure in document["failures"]] == ["n01440764"]
        document = json.loads(explain(place, *wanted, images=folders, model="thousand").stdout)
        assert [item["target"] for item in document["images"]] == [148, 283, 0]
        shutil.rmtree(place / "n01440764")
        for name in folders[:2]:
            (place / "data" / name).mkdir(parents=True)
            Image.open(place / "b.png").save(place / "data" / name / "1.png")
        both = []
        for text in (None, "file,class_index\nn02071294/1.png,148\nn02123394/1.png,283\n"):
            if text is not None:
                (place / "data" / "labels.csv").write_text(text)
            result = call(
                "evaluate", place / "data", "--model", f"{place / 'nets.py'}:thousand", "--methods", "cam", "--metrics", "AD",
                "--out", place / "out", "--overwrite", "--json",
            )  # fmt: skip
            both.append(json.loads(result.stdout)["table"]["cam"])
        assert both[0] == both[1]

    @pytest.mark.parametrize(
        ("table", "why"),
        [
            ("file,class_index\na.png,2\nb.png,7\n", "is 7, and the model has 3 classes"),
            ("file,name\na.png,orca\nb.png,horse\n", "horse"),
        ],
    )
    def test_a_wrong_label_costs_its_image_alone(self, place: Path, table: str, why: str) -> None:
        (place / "labels.csv").write_text(table)
        result = explain(place, "--method", "cam", "--target", "label", "--json", images=("a.png", "b.png"))
        document = json.loads(result.stdout)
        assert [Path(item["file"]).name for item in document["images"]] == ["a.png"]
        assert why in document["failures"][0]["reason"]
        assert "b.png" in document["failures"][0]["reason"]

    @pytest.mark.parametrize("as_json", [False, True])
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), FoveateError("the disk is full")])
    def test_what_is_done_is_there_after_an_interruption(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool, error: BaseException
    ) -> None:
        write = sheets.write_picture

        def interrupted(image: Image.Image, path: Path, dpi: int) -> None:
            if path.name.startswith("b.hires"):
                raise error
            write(image, path, dpi)

        monkeypatch.setattr(sheets, "write_picture", interrupted)
        result = explain(place, *(["--json"] if as_json else []), images=("a.png", "b.png"))
        assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 2)
        assert "after 1 of 2 image(s)" in result.stderr
        assert (place / "out" / "a.methods.png").exists()
        if as_json:
            document = json.loads(result.stdout)
            assert len(document["images"]) == 1
            assert document["complete"] is False
        else:
            assert "why" in result.stdout

    def test_a_constant_map_is_said_beside_its_image(self, place: Path) -> None:
        result = explain(place, "--method", "hires_cam,centre", images=("a.png", "b.png"), model="silent")
        notes = [line for line in result.stdout.splitlines() if "map is constant" in line]
        assert notes[:1] == [
            "hires_cam: the map is constant, nothing here speaks for the class: try another target, layer or method"
        ]
        assert len(notes) == 2
        assert result.stdout.index("a.png") < result.stdout.index(notes[0]) < result.stdout.index("b.png")
        assert "constant" not in result.stderr

    def test_images_are_read_a_batch_at_a_time(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from foveate.cli.images import Pictures

        sizes = []
        read = Pictures.read

        def counted(self: Pictures, rows: range, *rest: object) -> object:
            sizes.append(len(rows))
            return read(self, rows, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(Pictures, "read", counted)
        monkeypatch.setattr(importlib.import_module("foveate.cli.explain"), "AT_ONCE", 2)
        for name in ("c", "d"):
            Image.open(place / "a.png").save(place / f"{name}.png")
        result = explain(place, "--method", "cam", "--json", images=("a.png", "b.png", "text.jpg", "c.png", "d.png"))
        assert sizes == [1, 2, 2]  # the first image is not kept waiting for others
        assert len(json.loads(result.stdout)["images"]) == 4
        assert json.loads(result.stdout)["complete"] is True

    def test_a_method_that_the_model_cannot_have_is_left_out(self, place: Path) -> None:
        result = explain(place, "--method", "cam", "--method", "grad_cam", "--layer", "features.0", "--json")
        assert result.exit_code == 1
        assert list(json.loads(result.stdout)["images"][0]["maps"]) == ["grad_cam"]
        assert "cam needs a head of global average pooling" in result.stderr

    def test_other_heads(self, place: Path) -> None:
        top = json.loads(explain(place, "--head", "multilabel", "--json").stdout)["images"][0]["top"]
        assert abs(sum(p for *_, p in top) - 1) > 0.05

    def test_labels_by_name_are_the_models_classes(self, place: Path) -> None:
        (place / "labels.csv").write_text("file,name\na.png,orca\nb.png,tabby\n")
        document = json.loads(explain(place, "--target", "label", "--json", images=("a.png", "b.png")).stdout)
        assert [item["target"] for item in document["images"]] == [2, 0]

    def test_failures_are_listed_and_the_rest_is_done(self, place: Path) -> None:
        result = explain(place, "--json", images=("text.jpg", "a.png", "none.png"))
        assert result.exit_code == 1
        document = json.loads(result.stdout)
        assert len(document["images"]) == 1
        assert [Path(failure["file"]).name for failure in document["failures"]] == ["text.jpg", "none.png"]
        assert "not an image in a format" in result.stderr

    def test_sixteen_bit_and_other_modes(self, place: Path) -> None:
        names = []
        for mode in ("L", "P", "CMYK"):
            names.append(f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
            Image.open(place / "a.png").convert(mode).save(place / names[-1])
        Image.fromarray(np.uint16(np.random.default_rng(0).integers(0, 65535, (70, 90)))).save(place / "deep.png")
        result = explain(place, "--json", images=(*names, "deep.png"))
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["images"]) == 4

    @pytest.mark.parametrize(
        ("images", "arguments", "match"),
        [
            (("none.png",), (), "none.png does not exist"),
            (("text.jpg",), (), "text.jpg is not an image"),
            (("a.png",), ("--layer", "feature"), "layer 'feature' is not in the model: did you mean features"),
            (("a.png",), ("--layer", "classifier"), "layer 'classifier' has no spatial grid"),
            (("a.png",), ("--target", "3"), "target 3 is out of range: the model has 3 classes, 0 to 2"),
            (("a.png",), ("--target", "cat"), "class 'cat' may be any of 2 classes"),
            (("a.png",), ("--target", "orka"), "no class is called 'orka': did you mean orca?"),
            (("a.png",), ("--target", "1", "--against", "1"), "class 1 is asked against itself"),
            (("a.png",), ("--method", "gradcamm"), "method 'gradcamm' is unknown: did you mean grad_cam"),
            (("a.png",), ("--weights", "none.pt"), "weights file 'none.pt' does not exist"),
            (("a.png",), ("--size", "2"), "size 2 is too small"),
            (("a.png",), ("--mean", "x"), "--mean 'x' is not one number, or one per channel"),
            (("a.png",), ("--mean", "0.5"), "mean and std (--mean, --std) belong together"),
            (("a.png",), ("--classes", "none.txt"), "class file 'none.txt' cannot be read"),
            (("a.png",), ("--pretrained",), "your own factory"),
            (("a.png",), ("--target=--5",), "no class is called '--5'"),
            (("a.png",), ("--head", "sigmoid"), "head 'sigmoid' is unknown"),
            (("a.png",), ("--method", "cam", "--layer", "features.0"), "cam needs a head"),
        ],
    )
    def test_wrong_calls(self, place: Path, images: tuple[str, ...], arguments: tuple[str, ...], match: str) -> None:
        assert match in sentence(explain(place, *arguments, images=images))

    @pytest.mark.parametrize(
        ("factory", "match"),
        [
            ("training", "is in training mode: return model.eval()"),
            ("broken", "raised KeyError: 'weights'"),
            ("number", "returned a int, and a torch.nn.Module or a function of images is needed"),
            ("nett", "has no 'nett': did you mean net or"),
        ],
    )
    def test_wrong_factories(self, place: Path, factory: str, match: str) -> None:
        assert match in sentence(explain(place, model=factory))

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            ("timm:resnet5", "timm has no model 'resnet5': did you mean"),
            ("torchvision:resnet19", "torchvision has no model 'resnet19': did you mean"),
            ("resnet18", "not of the form timm:NAME"),
            ("keras:resnet", "model source 'keras' is unknown"),
            ("none.py:net", "model file 'none.py' does not exist"),
        ],
    )
    def test_unknown_models(self, place: Path, model: str, match: str) -> None:
        assert match in sentence(call("explain", place / "a.png", "--model", model))

    def test_weights(self, place: Path) -> None:
        model = small_cnn()
        state = model.state_dict()
        save_file(state, place / "good.safetensors")
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, place / "good.pt")
        torch.save(model, place / "pickled.pt")
        save_file({**state, "classifier.bias": torch.tensor([float("nan"), 0.0])}, place / "nan.safetensors")
        save_file({**state, "classifier.bias": torch.zeros(3)}, place / "shape.safetensors")
        save_file({key: value for key, value in state.items() if "stem" not in key}, place / "missing.safetensors")
        (place / "broken.safetensors").write_bytes(b"\x00" * 20)
        torch.save([1, 2], place / "list.pt")

        def run(name: str) -> Result:
            return call(
                "explain",
                place / "a.png",
                "--model",
                "foveate:small_cnn",
                "--weights",
                place / name,
                "--out",
                place / "out",
                "--json",
            )

        for name in ("good.safetensors", "good.pt"):
            assert run(name).exit_code == 0
        for name, match in (
            ("pickled.pt", "holds more than tensors, and code in it is not run"),
            ("nan.safetensors", "holds NaN or infinity in 'classifier.bias'"),
            ("shape.safetensors", "1 have another shape, such as 'classifier.bias': [3] in the file, [2] in the model"),
            ("missing.safetensors", "2 of"),
            ("broken.safetensors", "cannot be read"),
            ("list.pt", "holds no state dict"),
        ):
            assert match in sentence(run(name)), name

    def test_random_weights_are_mentioned(self, place: Path) -> None:
        result = call("explain", place / "a.png", "--model", "foveate:small_cnn", "--out", place / "out")
        assert "the weights are random" in result.stderr

    def test_that_weights_are_random_comes_first(self, place: Path) -> None:
        """Before what is said while the model runs: a map of such a network is often constant."""
        options = ("--model", "foveate:small_cnn", "--out", place / "out")
        calls = [("explain", place / "a.png", "--num-classes", "1", "--method", "gradient")]
        calls += [("evaluate", place, "--num-classes", "3", "--metrics", name, "--overwrite") for name in ("AD", "AG")]
        for words in calls:
            result = call(*words, *options)
            notes = [line for line in result.stderr.splitlines() if line.startswith("note:")]
            assert "the weights are random" in notes[0], result.stderr
            if words[0] == "explain" or "AG" in words:
                assert len(notes) > 1, result.stderr

    def test_debug_shows_the_traceback(self, place: Path) -> None:
        result = explain(place, "--target", "9", "--debug")
        assert "out of range" in str(result.exception)


class TestEvaluate:
    def test_a_folder(self, place: Path) -> None:
        arguments = ("--model", f"{place / 'nets.py'}:net", "--methods", "grad_cam,fake_cam", "--out", place / "out", "--json")
        result = call("evaluate", place, *arguments)
        assert result.exit_code == 0, result.output
        table = json.loads(result.stdout)["table"]
        assert set(table) == {"grad_cam", "fake_cam"}
        assert table["grad_cam"]["AD"]["n"] == 2
        assert table["grad_cam"]["AD"]["low"] <= table["grad_cam"]["AD"]["mean"] <= table["grad_cam"]["AD"]["high"]
        written = {str(path.relative_to(place / "out")) for path in (place / "out").rglob("*") if path.is_file()}
        assert written == {"rows/000000.parquet", "table.csv", "table.md", "prevalence.csv", "report.html", "run.json"}

    def test_unreadable_images_are_left_out_and_listed(self, place: Path) -> None:
        (place / "labels.csv").write_text("file,class_index\na.png,2\ntext.jpg,1\nb.png,1\n")
        result = call(
            "evaluate", place, "--model", f"{place / 'nets.py'}:net", "--methods", "grad_cam", "--out", place / "out", "--json"
        )
        assert result.exit_code == 1
        document = json.loads(result.stdout)
        assert document["table"]["grad_cam"]["AD"]["n"] == 2
        assert "text.jpg" in document["failures"][0]["reason"]
        assert Path(document["failures"][0]["file"]).name == "text.jpg"

    def test_classes_by_name(self, place: Path) -> None:
        """Folders and names are the model's classes of these names, and unknown ones are an error."""
        model = f"{place / 'nets.py'}:net"
        for text, match in (
            ("file,name\na.png,orca\nb.png,dolphin\n", "no class is called 'dolphin'"),
            ("file,name\na.png,cat\n", "may be any of 2"),
        ):
            (place / "labels.csv").write_text(text)
            assert match in sentence(call("evaluate", place, "--model", model, "--out", place / "out"))
        tables = []
        for text in ("file,name\na.png,orca\nb.png,tabby\n", "file,class_index\na.png,2\nb.png,0\n"):
            (place / "labels.csv").write_text(text)
            done = call("evaluate", place, "--model", model, "--out", place / "out", "--overwrite", "--json")
            tables.append(json.loads(done.stdout)["table"])
        assert tables[0] == tables[1]

    def test_the_scenes_are_not_for_any_model(self, place: Path) -> None:
        match = "the classes of scenes are not the model's: no class is called 'leopard'"
        assert match in sentence(call("evaluate", "scenes", "--model", f"{place / 'nets.py'}:net", "--out", place / "out"))

    def test_a_file_as_folder(self, place: Path) -> None:
        model = f"{place / 'nets.py'}:net"
        assert "is a file, or in one" in sentence(call("evaluate", place, "--model", model, "--out", place / "a.png"))
        assert "is a file, or in one" in sentence(
            call("explain", place / "b.png", "--model", model, "--out", place / "a.png" / "x")
        )

    def test_wrong_calls(self, place: Path) -> None:
        model = f"{place / 'nets.py'}:net"
        for arguments, match in (
            ((place / "none",), "does not exist"),
            ((place, "--methods", "grad"), "method 'grad' is unknown"),
            ((place, "--metrics", "XX"), "metric 'XX' is unknown"),
            ((place, "--metrics", "mass_inside"), "needs mask, and this data has none"),
            ((place, "--precision", "fp8"), "--precision 'fp8'"),
        ):
            assert match in sentence(call("evaluate", *arguments, "--model", model, "--out", place / "out"))


class TestList:
    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("methods", "grad_cam"),
            ("metrics", "AD"),
            ("losses", "cam_loss"),
            ("recipes", "scenes_cam_loss"),
            ("models", "timm:resnet50"),
        ],
    )
    def test_json(self, kind: str, name: str) -> None:
        result = call("list", kind, "--json")
        lines = json.loads(result.stdout)
        assert name in [line["name"] for line in lines]
        assert all("paper" in line for line in lines)

    def test_unknown(self) -> None:
        assert "no list of 'weights'" in sentence(call("list", "weights"))


class TestTrain:
    RECIPE = "model: foveate:small_cnn\ndata: scenes\nsize: 32\nepochs: 2\nlosses:\n  - name: cam_loss\n"

    @pytest.fixture(autouse=True)
    def few_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scenes, "COUNTS", {split: {"leopard": 12, "orca": 8} for split in scenes.SPLITS})

    def test_a_run_and_its_resumption(self, place: Path) -> None:
        (place / "recipe.yaml").write_text(self.RECIPE)
        result = call("train", place / "recipe.yaml", "--out", place / "run", "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert set(document["accuracy"]) == {"train", "val", "test"}
        written = {path.name for path in (place / "run").iterdir()}
        files = {"model.safetensors", "recipe.yaml", "history.csv", "run.json", "film.npz", "report.html"}
        assert written == {*files, "checkpoints"}
        again = call("train", place / "run" / "recipe.yaml", "--out", place / "again", "--json")
        assert json.loads(again.stdout)["accuracy"] == document["accuracy"]
        recipe = place / "run" / "recipe.yaml"
        assert "holds a run already" in sentence(call("train", recipe, "--out", place / "run"))
        assert call("train", recipe, "--out", place / "run", "--overwrite", "--json").exit_code == 0
        for change in ("losses=[]", "seed=1", "epochs=3"):
            refusal = sentence(call("train", recipe, "--out", place / "run", "--resume", "--set", change))
            assert f"was started with {change.split('=')[0]}" in refusal
        finished = call("train", recipe, "--out", place / "run", "--resume", "--json")
        assert json.loads(finished.stdout)["accuracy"] == document["accuracy"]

    def test_with_its_progress_bar(self, place: Path) -> None:
        (place / "recipe.yaml").write_text(self.RECIPE)
        result = call("train", place / "recipe.yaml", "--out", place / "run")
        assert result.exit_code == 0, result.output
        assert "accuracy: train" in result.stdout
        assert "2/2" in result.stderr

    def test_the_demo(self, place: Path) -> None:
        """The whole loop on few images, twice into the same folder; its page is read back in test_pages.py."""
        for _ in range(2):
            with mock.patch.dict(scenes.COUNTS, every_page.COUNTS), every_page.short_demo():
                document = json.loads(call("demo", "--out", place / "demo", "--seed", 3, "--json").stdout)
        assert set(document["runs"]) == {"plain", "cam_loss"}
        for run in document["runs"].values():
            assert set(run["accuracy"]) == {"train", "val", "test"}
            assert 0 <= run["mass_inside"] <= 1
        page = Path(document["report"]).read_text(encoding="utf-8")
        for word in ("swapped", "ContrastiveCAM", "From wrong to right", "foveate demo --seed 3", "<svg"):
            assert word in page

    @pytest.mark.parametrize(
        ("recipe", "arguments", "match"),
        [
            ("epochs: 0\n", (), "epochs: input should be greater than or equal to 1, and it is 0"),
            ("epoch: 3\n", (), "epoch is no key of a recipe: did you mean epochs?"),
            ("losses: [{name: camloss2}]\n", (), "loss 'camloss2' is unknown"),
            (
                "losses: [{name: cam_loss, settings: {sigmaa: 1}}]\n",
                (),
                "cam_loss has no setting 'sigmaa': it has method, sigma",
            ),
            ("- a\n", (), "is not a list of 'key: value' lines"),
            ("a: [\n", (), "is not YAML"),
            ("epochs: 1\n", ("--set", "epochs"), "--set 'epochs' is not of the form key=value"),
            ("epochs: 1\n", ("--set", "augment.flop=true"), "augment.flop"),
            ("epochs: 1\n", ("--resume",), "no run to resume"),
            ("epochs: 1\nmodel: timm:resnet5\n", (), "timm has no model"),
        ],
    )
    def test_wrong_recipes(self, place: Path, recipe: str, arguments: tuple[str, ...], match: str) -> None:
        (place / "recipe.yaml").write_text(recipe)
        assert match in sentence(call("train", place / "recipe.yaml", "--out", place / "run", *arguments))

    def test_an_unknown_recipe_lists_the_known(self) -> None:
        assert "scenes_cam_loss" in sentence(call("train", "scenes_camloss"))


def test_a_factory_that_imports_torchvision_by_itself(place: Path) -> None:
    """In a new process, where nothing has imported it before."""
    (place / "own.py").write_text(
        "from torchvision.models import squeezenet1_1\n\ndef net():\n    return squeezenet1_1(weights=None).eval()\n"
    )
    command = [sys.executable, "-m", "foveate", "explain", str(place / "a.png"), "--model", f"{place / 'own.py'}:net"]
    result = subprocess.run([*command, "--out", str(place / "out")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_call_without_model_says_so() -> None:
    result = call("explain", "a.png")
    assert result.exit_code == 2
    assert "--model" in result.stderr


def test_the_installed_command(place: Path) -> None:
    """Through a new process: the entry point, the exit status, and no traceback."""
    command = [sys.executable, "-m", "foveate", "explain", str(place / "none.png"), "--model", f"{place / 'nets.py'}:net"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("foveate: ")
    assert "Traceback" not in result.stderr


class TestANameThatIsNotUtf8:
    @pytest.mark.parametrize("pictures", ["all", "overlay", "sheet"])
    def test_what_is_printed_and_in_json_is_text(self, place: Path, pictures: str) -> None:
        name = os.fsdecode(b"caf\xe9.png")
        try:
            (place / "a.png").rename(place / name)
        except OSError:
            pytest.skip("this file system takes UTF-8 alone")
        out = place / os.fsdecode(b"to\xe9")
        for more in (["--json"], []):
            result = explain(place, "--pictures", pictures, "--out", str(out), *more, images=(name,))
            assert result.exit_code == 0, result.output
            assert "udce9" not in result.stdout + result.stderr
            assert r"caf\xe9" in result.stdout.replace("\\\\", "\\")  # JSON doubles it
        assert any(path.name.startswith(os.fsdecode(b"caf\xe9.")) for path in out.iterdir())


def test_a_class_file_that_is_asked_for_is_described(place: Path) -> None:
    for name in ("cat", "dog"):
        (place / "data" / name).mkdir(parents=True)
        shutil.copy(place / "a.png", place / "data" / name / "1.png")
    result = call("evaluate", place / "data", "--model", f"{place / 'nets.py'}:single", "--out", place / "out")
    said = sentence(result)
    assert "has the classes cat, dog" in said
    assert "--classes FILE" in said and "one class name per line, in the order of the model's outputs" in said
