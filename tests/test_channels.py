"""Networks of other than three channels, and what a model says of its input: size, channels and normalisation, each alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from foveate import FoveateError, ImageError, explain, load
from foveate.cli import app
from foveate.data.folder import open_folder
from foveate.data.images import Bands, Preprocess, read_bands

NETS = """
import torch
from torch import nn

def net(channels, **said):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model = nn.Sequential(*layers).eval()
    vars(model).update(said)
    return model

def sized(): return net(3, input_size=(3, 64, 48))
def side(): return net(3, input_size=64)
def grey(): return net(1)
def stated(): return net(1, input_size=(1, 32, 32), mean=[0.5], std=[0.25])
def six(): return net(6, input_size=(6, 32, 32))
def none(): return net(3, input_size=(3, 0, 48))

class Grey(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(1)
    def forward(self, x):
        return self.net(x.view(len(x), 3, *x.shape[2:]).mean(1, keepdim=True))

def own(): return Grey().eval()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.species, self.breed = net(3)[:4], nn.Linear(8, 2), nn.Linear(8, 4)
        self.input_size, self.class_names = 32, {"species": ["cat", "dog"], "breed": list("abcd")}
    def forward(self, x):
        features = self.body(x)
        return {"species": self.species(features), "breed": self.breed(features)}

def two(): return Two().eval()
def function(x): return x.mean((2, 3))
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return str(path)


def photograph(path: Path, mode: str = "RGB", seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_a_size_counts_without_a_mean(nets: str) -> None:
    for name, crop in (("sized", (64, 48)), ("side", (64, 64)), ("grey", (224, 224))):
        assert load(f"{nets}:{name}").preprocess.crop == crop
    assert any("ImageNet's mean and std are assumed" in note for note in load(f"{nets}:sized").notes)
    with pytest.raises(FoveateError, match=r"input_size \(3, 0, 48\) is not a size"):
        load(f"{nets}:none")


def test_channels_are_as_the_model_says_or_as_it_runs(nets: str) -> None:
    for name, mean in (("grey", (0.0,)), ("stated", (0.5,)), ("six", (0.0,) * 6)):
        assert load(f"{nets}:{name}").preprocess.mean == mean
    assert load(f"{nets}:own").preprocess.channels == 3
    assert load(f"{nets}:six", mean=[0.5], std=[0.2]).preprocess.std == (0.2,) * 6
    assert "takes 6 channel(s)" in load(f"{nets}:six").notes[0] and not load(f"{nets}:six").assumed
    with pytest.raises(FoveateError, match="mean has 2 numbers and std 3"):
        load(f"{nets}:six", mean=[0.5, 1], std=[0.2, 0.1, 0.3])


def test_timms_models_of_one_channel(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import timm\ndef grey(): return timm.create_model('resnet18', in_chans=1, num_classes=3).eval()"
    )
    model = load(f"{tmp_path / 'net.py'}:grey", size=64)
    assert model.preprocess.mean == pytest.approx((0.449,), abs=1e-3)  # ImageNet's, over the three
    photo = photograph(tmp_path / "photo.png", "L")
    assert explain(model, model.read(photo), "hires_cam").maps["hires_cam"].shape == (1, 64, 64)


def test_a_picture_is_grey_for_one_channel(tmp_path: Path) -> None:
    preprocess = Preprocess((40, 50), None, mean=(0.5,), std=(0.5,))
    path = photograph(tmp_path / "photo.png", "L")
    expected = torch.from_numpy(np.array(Image.open(path))).float() / 255
    torch.testing.assert_close(preprocess(preprocess.read(path))[0], expected)
    colours = preprocess(preprocess.read(photograph(tmp_path / "colours.png")))
    torch.testing.assert_close(colours, expected[None], atol=1 / 255, rtol=0)


def test_six_channels_from_arrays_and_pages(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 6), np.uint8)
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "wide.npy", pixels.astype(np.uint16) * 257)
    np.savez(tmp_path / "first.npz", image=(pixels / 255).transpose(2, 0, 1))
    pages = [Image.fromarray(pixels[..., i]) for i in range(6)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    preprocess = Preprocess((20, 30), None, mean=(0.0,) * 6, std=(1.0,) * 6)
    for path in sorted(tmp_path.iterdir()):
        x = preprocess(preprocess.read(path))
        torch.testing.assert_close(x, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    assert preprocess.read(tmp_path / "last.npy").size == (30, 20)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((20, 30, 5), np.uint8), r"shape \[20, 30, 5\], and the model takes 6 channel"),
        (np.full((20, 30, 6), 7.0), "holds float64 from 7 to 7: images are uint8"),
        (np.full((20, 30, 6), np.nan), "holds float64 from nan"),
        (np.zeros((20, 30, 6), np.int64), "holds int64"),
        (np.array([{"a": 1}]), "damaged or holds more than numbers"),
        (np.zeros((2, 3, 6), np.uint8), "at least 8"),
    ],
)
def test_arrays_that_are_no_image_are_refused(tmp_path: Path, values: np.ndarray, said: str) -> None:
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    with pytest.raises(ImageError, match=said):
        read_bands(tmp_path / "x.npy", 6)


def test_a_picture_is_no_image_of_six_channels(tmp_path: Path) -> None:
    preprocess = Preprocess((20, 30), None, mean=(0.0,) * 6, std=(1.0,) * 6)
    with pytest.raises(ImageError, match=r"photo.png has shape \[40, 50, 3\].*save it as .npy, \[H,W,6\]"):
        preprocess.read(photograph(tmp_path / "photo.png"))
    with pytest.raises(ImageError, match="a picture has 1 or 3 channels, and the model takes 6"):
        preprocess(Image.new("RGB", (20, 20)))
    with pytest.raises(ImageError, match="has 1 channel"):
        preprocess(Bands((Image.new("F", (20, 20)),)))
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(ImageError, match="holds 2 arrays, a, b"):
        preprocess.read(tmp_path / "two.npz")


def test_folders_hold_arrays_for_networks_that_take_them(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", np.zeros((20, 30, 6), np.uint8))
        photograph(tmp_path / name / "b.png")
    preprocess = Preprocess((20, 30), None, mean=(0.0,) * 6, std=(1.0,) * 6)
    assert open_folder(tmp_path, preprocess)[0].x.shape == (1, 6, 20, 30)
    assert [entry.path.name for entry in open_folder(tmp_path, Preprocess()).entries] == ["b.png", "b.png"]


class TestCommandLine:
    def run(self, *call: str) -> str:
        result = CliRunner().invoke(app, [*call])
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_one_and_six_channels_are_explained_and_drawn(self, nets: str, tmp_path: Path) -> None:
        photo, cube = photograph(tmp_path / "photo.png"), tmp_path / "cube.npy"
        np.save(cube, np.random.default_rng(0).integers(0, 256, (40, 50, 6), np.uint8))
        for model, file in (("stated", photo), ("six", cube)):
            out = tmp_path / model
            call = ("explain", str(file), "--model", f"{nets}:{model}", "--method", "gradient,rise,centre", "--out", str(out))
            found = json.loads(self.run(*call, "--set", "rise.masks=20", "--json"))
            assert set(found["images"][0]["maps"]) == {"gradient", "rise", "centre"}
            assert len(list(out.glob("*.png"))) >= 4

    def test_an_output_is_explained_with_its_own_names(self, nets: str, tmp_path: Path) -> None:
        call = (
            "explain",
            str(photograph(tmp_path / "a.png")),
            "--model",
            f"{nets}:two",
            "--out",
            str(tmp_path / "out"),
            "--json",
        )
        found = json.loads(self.run(*call, "--output", "breed", "--target", "c"))
        assert sorted(name for _, name, _ in found["images"][0]["top"]) == list("abcd")
        result = CliRunner().invoke(app, [*call, "--output", "bred"])
        assert result.exit_code == 2 and "did you mean breed?): the model returns species [1, 2], breed [1, 4]" in result.stderr
        assert "the first, 'species', is explained" in CliRunner().invoke(app, [*call]).stderr

    def test_an_output_is_evaluated(self, nets: str, tmp_path: Path) -> None:
        for name in "abcd":
            (tmp_path / "data" / name).mkdir(parents=True)
            photograph(tmp_path / "data" / name / f"{name}.png", seed=ord(name))
        call = ("evaluate", str(tmp_path / "data"), "--model", f"{nets}:two", "--methods", "gradient", "--metrics", "AD")
        self.run(*call, "--output", "breed", "--out", str(tmp_path / "out"))
        assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["output"] == "breed"

    def test_a_function_in_a_file_is_a_model(self, nets: str, tmp_path: Path) -> None:
        call = ("explain", str(photograph(tmp_path / "a.png")), "--model", f"{nets}:function", "--mean", "0", "--std", "1")
        call = (*call, "--out", str(tmp_path / "out"), "--json", "--pictures", "none")
        found = json.loads(self.run(*call, "--method", "occlusion", "--size", "32"))
        assert len(found["images"][0]["top"]) == 3
        result = CliRunner().invoke(app, [*call])
        assert result.exit_code == 2 and "a function of images has no layers" in result.stderr


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients", "rise", "caso", "fake_cam", "score_cam", "full_grad"])
def test_methods_take_any_number_of_channels(channels: int, method: str) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    own = {"rise": {"masks": 8}}
    found = explain(
        nn.Sequential(*layers).eval(),
        torch.rand(2, channels, 24, 20),
        method,
        settings={k: v for k, v in own.items() if k == method},
    )
    assert found.maps[method].shape == (2, 24, 20) and found.maps[method].isfinite().all()
