"""Explanations: what they say of themselves, the pictures they give, and that they can be kept and read back."""

from __future__ import annotations

import copy
import json
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import foveate
from foveate import Explanation, FoveateError, explain, explain_each, load, read_explanation
from foveate.errors import ImageError
from foveate.models.classifier import Classifier

METHODS = ["grad_cam", "hires_cam", "layer_cam", "contrastive_cam", "gradient", "fake_cam"]
HOSTILE = ["<script>alert(1)</script>", "\"'></style>{{7*7}} $x^$ =cmd()"]


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(1)
    return load("foveate:small_cnn")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path | Image.Image]:
    """Two files and two pictures in memory, wide and high."""
    root, made = tmp_path_factory.mktemp("photos"), list[Path | Image.Image]()
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate([(300, 90), (120, 200), (96, 96), (400, 300)]):
        small = Image.fromarray(draw.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        made.append(image)
        if number < 2:
            image.save(root / f"photo {number}.png")
            made[-1] = root / f"photo {number}.png"
    return made


@pytest.fixture(scope="module")
def why(model: Classifier, photographs: list[Path | Image.Image]) -> Explanation:
    return explain(model, photographs, METHODS)


class Page(HTMLParser):
    """Tags with their attributes, and the text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.words, self.open = list[tuple[str, dict[str, str | None]]](), "", list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


class TestWords:
    def test_a_few_lines(self, why: Explanation) -> None:
        lines = repr(why).splitlines()
        assert lines[0] == "Explanation of 4 images of 96 x 96 by foveate:small_cnn"
        assert lines[1] == f"  maps:   {', '.join(METHODS)}; layer {why.layer}"
        p = why.capture.logits.softmax(1).amax(1)
        name = why.seen.class_name(int(why.capture.pred[0]))
        assert lines[2] == f"  photo 0.png: says {name} with p = {p[0]:.3f}; why {name}"
        assert len(lines) <= 7

    def test_what_is_constant_or_left_out_is_said(self, model: Classifier) -> None:
        with pytest.warns(foveate.DegenerateMapWarning):
            flat = explain(model, torch.zeros(1, 3, 96, 96), ["gradient", "input_x_gradient"])
        assert "constant maps, which say nothing: 1 of input_x_gradient" in repr(flat)
        many = explain(model, torch.rand(1, 3, 96, 96), "all-fast")
        assert "left out: " in repr(many) and next(iter(many.left_out)) in repr(many)

    def test_a_contrast_and_a_callable(self, model: Classifier) -> None:
        x = torch.rand(1, 3, 96, 96)
        assert "why orca (1), and not leopard (0)" in repr(explain(model, x, target=1, against=0))
        assert "why a score of your own" in repr(explain(model, x, target=lambda logits: logits[:, 0]))
        answers = explain_each(model, x, labels=[0])
        assert isinstance(answers, dict)
        assert [line.split(":")[0].strip() for line in repr(answers).splitlines()[1:6]] == list(answers)

    def test_of_a_classifier_and_a_film(self, model: Classifier) -> None:
        text = repr(load("foveate:small_cnn", size=64, class_names=["a", "b"]))
        assert text.splitlines()[1:4] == [
            "  takes:   images in [0, 1], 64 x 64; inside, mean 0.5 and std 0.25",
            "  classes: 2: a, b",
            "  layer:   found when it is first asked for",
        ]
        assert "note:    the weights are random" in text
        fresh = load("foveate:small_cnn")
        found = explain(fresh, torch.rand(1, 3, 96, 96)).layer
        assert f"  layer:   {found}\n" in repr(fresh)
        film = foveate.Film(foveate.Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1])))
        assert "none yet: film.shoot(model, epoch)" in repr(film)
        film.shoot(model, 3)
        assert "frames: 1, epochs 3 to 3" in repr(film)


class TestFragment:
    def test_everything_is_in_it_and_nothing_outside_of_it_is_touched(self, why: Explanation) -> None:
        text = why._repr_html_()
        assert len(text) < 300_000
        page = Page(text)
        assert not page.open
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        assert len(images) == 4 * (1 + len(METHODS))
        assert all(image["alt"] and (image["src"] or "").startswith("data:image/") for image in images)
        assert "http" not in text and "<script" not in text and "<link" not in text
        style = text[text.index("<style>") + 7 : text.index("</style>")]
        assert all(line.startswith(".foveate-explanation") for line in style.split("\n") if line)
        assert [tag for tag, a in page.tags if tag == "input" and a["type"] == "radio"] == ["input"] * (1 + len(METHODS))
        ids = {a["id"] for tag, a in page.tags if tag == "input" and "id" in a}
        assert {a["for"] for tag, a in page.tags if tag == "label" and "for" in a} == ids
        assert not ids & {a.get("id") for _, a in Page(why._repr_html_()).tags}

    def test_what_it_says_is_so(self, why: Explanation) -> None:
        words = Page(why._repr_html_()).words
        p = why.capture.logits.softmax(1)
        said = re.findall(r"says (\w+) \((\d)\), p = ([\d.]+)", words)
        assert [(int(index), value) for _, index, value in said] == [(int(r.argmax()), f"{r.max():.3f}") for r in p]

    def test_hostile_names_are_inert(self, model: Classifier, tmp_path: Path) -> None:
        hostile = load("foveate:small_cnn", class_names=HOSTILE)
        name = tmp_path / "<img src=x onerror=alert(1)>'\".png"
        Image.effect_noise((96, 96), 60).save(name)
        answers = explain_each(hostile, [name], ["grad_cam", "fake_cam"], targets=["pred", "second"])
        page = Page(answers._repr_html_())
        assert not page.open
        assert {tag for tag, _ in page.tags} <= {
            "div",
            "style",
            "p",
            "b",
            "span",
            "input",
            "label",
            "figure",
            "figcaption",
            "img",
            "br",
        }
        assert not any(key.startswith("on") and key != "oninput" for _, attributes in page.tags for key in attributes)
        assert HOSTILE[0] in page.words and HOSTILE[1] in page.words
        assert "$x^$" in "".join(text.get_text() for axis in answers["pred"].figure().axes for text in axis.texts) or (
            "<script>" in answers["pred"].question(0)
        )

    def test_many_images_stay_small_and_that_is_said(self, model: Classifier) -> None:
        many = explain(
            model, torch.rand(40, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3), ["grad_cam", "fake_cam"]
        )
        text = many._repr_html_()
        assert len(text) < 300_000
        assert "19 more images are not shown here; explanation.save(folder) writes all" in Page(text).words

    def test_a_photograph_that_is_gone(self, model: Classifier, tmp_path: Path) -> None:
        Image.new("RGB", (200, 100), "teal").save(tmp_path / "a.png")
        gone = explain(model, tmp_path / "a.png", "centre")
        (tmp_path / "a.png").unlink()
        assert gone._repr_html_().count("<img ") == 2
        with pytest.raises(ImageError, match=r"a\.png does not exist"):
            gone.overlay()

    def test_the_table_of_evaluate_is_a_data_frame(self, model: Classifier) -> None:
        batch = foveate.Batch(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1]))
        table = foveate.evaluate(model, batch, ["grad_cam", "centre"], ["AD", "AG"])
        assert isinstance(table, pd.DataFrame)
        assert type(table[["mean"]]) is type(table.xs("AD", level="column")) is type(table.copy()) is pd.DataFrame
        assert pickle.loads(pickle.dumps(table)).attrs["findings"] == table.attrs["findings"]
        page = Page(table._repr_html_())
        assert not page.open
        assert f"{table.loc[('grad_cam', 'AD')]['mean']:.1f}" in page.words
        assert len([tag for tag, _ in page.tags if tag == "td"]) == 2 * 2


class TestPictures:
    def test_the_overlay_has_the_photographs_own_size(self, why: Explanation) -> None:
        assert [why.overlay("grad_cam", i).size for i in range(4)] == [(300, 90), (120, 200), (96, 96), (400, 300)]
        assert why.overlay("Grad-CAM", -1).size == (400, 300)
        photograph = why.photograph(3)
        assert photograph is not None and photograph.size == (400, 300)
        changed = np.abs(np.asarray(why.overlay("fake_cam", 0), float) - np.asarray(why.photograph(0), float)).mean()
        assert changed > 5

    @pytest.mark.parametrize("image", [4, -5, True, "0", 1.0])
    def test_no_such_image(self, image: object, why: Explanation) -> None:
        for call in (why.overlay, why.figure, why.photograph):
            with pytest.raises(FoveateError, match=r"is none of this explanation, which has 4, from 0"):
                call(image=image)  # type: ignore[operator]

    def test_no_such_method(self, why: Explanation) -> None:
        for call in (why.overlay, why.__getitem__):
            with pytest.raises(FoveateError, match="there is no map of 'rise': there are grad_cam"):
                call("rise")  # type: ignore[operator]
        with pytest.raises(FoveateError, match="maps are by method, and 3 is none"):
            why[3]  # type: ignore[index]

    def test_the_figure_shows_every_method_on_every_image(self, why: Explanation, tmp_path: Path) -> None:
        from matplotlib.figure import Figure

        made = why.figure()
        assert isinstance(made, Figure)
        titles = [axis.get_title(loc="left") for axis in made.axes if axis.get_images()]
        assert titles.count("Grad-CAM") == titles.count("Fake-CAM") == 4
        assert made._repr_png_().startswith(b"\x89PNG")
        assert sum(bool(axis.get_images()) for axis in why.figure(image=1).axes) == 1 + len(METHODS)


def same(a: Explanation, b: Explanation) -> None:
    """All that is known of maps, exactly."""
    assert list(a.maps) == list(b.maps) and repr(a) == repr(b)
    for name in a.maps:
        assert torch.equal(a.maps[name], b.maps[name]) and torch.equal(a.raw[name], b.raw[name])
        assert torch.equal(a.degenerate[name], b.degenerate[name]) and a.remarks[name] == b.remarks[name]
        assert torch.equal(a.targets[name].y, b.targets[name].y) and a.targets[name].name == b.targets[name].name
        first, second = a.completeness_error[name], b.completeness_error[name]
        assert (first is None) == (second is None) and (first is None or torch.equal(first, second))
        assert set(a.facts[name]) == set(b.facts[name])
    assert torch.equal(a.seen.x, b.seen.x) and torch.equal(a.seen.logits, b.seen.logits)
    assert (a.layer, a.seen.preprocess, a.seen.settings) == (b.layer, b.seen.preprocess, b.seen.settings)


class TestKept:
    def test_pickled(self, why: Explanation) -> None:
        for again in (pickle.loads(pickle.dumps(why)), copy.deepcopy(why)):
            same(again, why)
            assert torch.equal(again.target(again.seen.logits), why.target(why.seen.logits))
            assert torch.equal(
                again.targets["contrastive_cam"](again.seen.logits), why.targets["contrastive_cam"](why.seen.logits)
            )
            assert again.overlay("grad_cam", 3).tobytes() == why.overlay("grad_cam", 3).tobytes()
            with pytest.raises(FoveateError, match="the run of this explanation was not kept"):
                _ = again.capture

    def test_pickled_with_a_callable(self, model: Classifier) -> None:
        own = explain(model, torch.rand(1, 3, 64, 64), target=lambda logits: logits[:, 0] - 1)
        again = pickle.loads(pickle.dumps(own))
        same(again, own)
        with pytest.raises(FoveateError, match="is a function, which was not kept"):
            again.target(again.seen.logits)

    def test_saved_and_read_back(self, why: Explanation, tmp_path: Path) -> None:
        folder = why.save(tmp_path / "explained")
        again = read_explanation(folder)
        same(again, why)
        assert [again.overlay("grad_cam", i).tobytes() for i in range(4)] == [
            why.overlay("grad_cam", i).tobytes() for i in range(4)
        ]
        said = json.loads((folder / "manifest.json").read_text())
        assert said["versions"]["foveate"] == foveate.__version__ and said["versions"]["torch"] == str(torch.__version__)
        assert (said["model"], said["layer"], said["settings"]["fuse"]) == ("foveate:small_cnn", why.layer, "mean")
        assert [image["says"]["p"] for image in said["images"]] == pytest.approx(why.seen.logits.softmax(1).amax(1).tolist())
        with np.load(folder / "maps.npz") as arrays:
            assert np.array_equal(arrays["maps/grad_cam"], why["grad_cam"].numpy())
        for image, size in zip(said["images"], [(300, 90), (120, 200), (96, 96), (400, 300)], strict=True):
            for name in METHODS:
                with Image.open(folder / image["pictures"][name]) as picture:
                    assert picture.size == size
        assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json", *said["files"]])

    def test_any_settings_are_kept_in_words(self, model: Classifier, tmp_path: Path) -> None:
        own = explain(model, torch.rand(2, 3, 64, 64), "occlusion", settings={"occlusion": {"window": 32}}, score="probability")
        again = read_explanation(own.save(tmp_path / "a"))
        same(again, own)
        assert again.seen.settings["methods"] == {"occlusion": {"window": 32}}
        assert again.seen.photographs == (None, None)

    def test_written_again(self, why: Explanation, model: Classifier, tmp_path: Path) -> None:
        why.save(tmp_path)
        explain(model, torch.rand(1, 3, 64, 64), "centre").save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["image_0_centre.png", "manifest.json", "maps.npz"]
        answers = explain_each(model, torch.rand(1, 3, 64, 64), labels=[0])
        answers.save(tmp_path / "each")
        assert {path.name for path in (tmp_path / "each").iterdir()} == set(answers)

    @pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
    def test_somebody_elses_folder_is_left_alone(self, name: str, why: Explanation, tmp_path: Path) -> None:
        (tmp_path / name).write_text('{"kind": "mine"}')
        with pytest.raises(FoveateError, match="has files in it and is no folder of an explanation"):
            why.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == '{"kind": "mine"}'

    def test_a_manifest_cannot_name_what_is_deleted(self, why: Explanation, tmp_path: Path) -> None:
        folder, outside = tmp_path / "a", tmp_path / "b.png"
        why.save(folder)
        for place in (outside, folder / "mine.png"):
            Image.new("RGB", (9, 9)).save(place)
        said = json.loads((folder / "manifest.json").read_text())
        said["files"] += ["../b.png", "mine.png", str(outside)]
        (folder / "manifest.json").write_text(json.dumps(said))
        why.save(folder)
        assert outside.is_file() and (folder / "mine.png").is_file()

    @pytest.mark.parametrize("damage", ["cut", "no maps", "unfinished", "counts", "nothing"])
    def test_what_is_damaged_is_refused(self, damage: str, why: Explanation, tmp_path: Path) -> None:
        folder = why.save(tmp_path / "a")
        manifest, maps = folder / "manifest.json", folder / "maps.npz"
        said = json.loads(manifest.read_text())
        if damage == "cut":
            maps.write_bytes(maps.read_bytes()[:-2000])
        elif damage == "no maps":
            maps.unlink()
        elif damage == "unfinished":
            manifest.write_text(json.dumps({"kind": said["kind"], "finished": False}))
        elif damage == "counts":
            manifest.write_text(json.dumps({**said, "images": said["images"][1:]}))
        else:
            manifest.unlink()
        with pytest.raises(FoveateError, match=r"is damaged|was not written to its end|is no folder of an explanation"):
            read_explanation(folder)
