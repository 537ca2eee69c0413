"""Maps from elsewhere: what another library computed is measured beside ours, and as ours are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

import foveate
from foveate import missing
from foveate.batch import Batch
from foveate.cli import app
from foveate.data.folder import Entry, Folder
from foveate.data.images import Preprocess
from foveate.errors import FoveateError, MapsWarning
from foveate.evaluation.elsewhere import elsewhere

METRICS = ["AD", "AG", "insertion_deletion", "sparsity", "EP"]
PREPROCESS = Preprocess((32, 32), 40)
SIZES = [(60, 40), (40, 60), (50, 50), (90, 45)]  # width, height


@pytest.fixture
def model():
    torch.manual_seed(0)
    return foveate.load("foveate:small_cnn", num_classes=2, size=32)


@pytest.fixture
def photos(tmp_path):
    """Four images of their own shapes in two folders, with a bright square that is the object."""
    rng, entries = np.random.default_rng(0), []
    for number, (width, height) in enumerate(SIZES):
        image = rng.integers(0, 120, (height, width, 3), np.uint8)
        top, left = height // 3, width // 3
        image[top : top + 15, left : left + 15] = 255
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        entries.append(Entry(path, number % 2, ((left, top, left + 15.0, top + 15.0),)))
    return Folder(tuple(entries), PREPROCESS, ("cat", "dog"), tmp_path / "photos")


def ours(model, data) -> torch.Tensor:
    x = torch.cat([batch.x for batch in data])
    return foveate.explain(model, x, "gradient").raw["gradient"]


def write(folder: Path, name: str, values: np.ndarray, form: str) -> None:
    path = folder / f"{name}.{form}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "npy":
        np.save(path, values)
    elif form == "npz":
        np.savez(path, whatever=values)
    elif form == "safetensors":
        save_file({"saliency": np.ascontiguousarray(values)}, path)
    else:
        Image.fromarray(values).save(path)


def same(results, one: str, other: str) -> None:
    for column in ("AD", "AG", "I", "D", "sparsity", "EP"):
        assert np.allclose(results.values[one, column], results.values[other, column], atol=1e-9, equal_nan=True), column


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_array_of_our_own_maps_has_our_own_values(model, photos, batch_size):
    maps = ours(model, photos)
    options = {"target": "pred", "batch_size": batch_size}
    for given in (maps, maps.numpy(), maps[:, None].double(), {"maps": maps}):
        results = foveate.measure(model, photos, "gradient", METRICS, maps=given, **options)
        assert results.methods == ["maps", "gradient"]
        same(results, "maps", "gradient")


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors"])
def test_files_are_found_by_the_names_of_the_images(model, photos, tmp_path, form):
    maps = ours(model, photos).numpy()
    for name, own in zip(("cat/0", "dog/1.png", "2", "sub/3"), maps, strict=True):  # with folders, with endings, without
        write(tmp_path / "theirs", name, own, form)
    results = foveate.measure(model, photos, "gradient", METRICS, maps=tmp_path / "theirs", target="pred")
    same(results, "theirs", "gradient")


def test_one_file_may_hold_the_maps_of_all_images(model, photos, tmp_path):
    maps = ours(model, photos).numpy()
    names = [photos.name_of(i) for i in range(4)]
    np.savez(tmp_path / "a.npz", **dict(zip(names, maps, strict=True)))
    save_file(
        {name.removesuffix(".png"): np.ascontiguousarray(own) for name, own in zip(names, maps, strict=True)},
        tmp_path / "b.safetensors",
    )
    np.save(tmp_path / "c.npy", maps)
    given = {"a": tmp_path / "a.npz", "b": str(tmp_path / "b.safetensors"), "c": tmp_path / "c.npy"}
    results = foveate.measure(model, photos, "gradient", METRICS, maps=given, target="pred")
    for name in given:
        same(results, name, "gradient")


@pytest.mark.parametrize(("kind", "most"), [(np.uint8, 255), (np.uint16, 65535)])
def test_grey_pictures_are_shares_of_the_largest_value(model, photos, tmp_path, kind, most):
    rng = np.random.default_rng(1)
    maps = rng.integers(0, most, (4, 8, 8)).astype(kind)
    for number, own in enumerate(maps):
        write(tmp_path / "theirs", str(number), own, "png")
    given = {"files": tmp_path / "theirs", "array": maps / most}
    same(foveate.measure(model, photos, "gradient", METRICS, maps=given), "files", "array")


def test_what_is_negative_speaks_against_the_class_as_in_our_own_maps(model, photos):
    maps = torch.rand(4, 8, 8) - 0.5
    given = {"signed": maps, "positive": maps.clamp(min=0)}
    results = foveate.measure(model, photos, "gradient", ["AD", "I"], maps=given)
    assert np.array_equal(results.values["signed", "AD"], results.values["positive", "AD"])


def test_a_map_of_the_stored_file_follows_the_crop(model, photos, tmp_path):
    """A ramp over the file is the ramp over what the network sees of it."""
    preprocess = photos.preprocess
    for number, (width, height) in enumerate(SIZES):
        down, across = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        write(tmp_path / "whole", str(number), down + across, "npy")
        left, top, right, bottom = preprocess.frame((width, height))
        y = (top + (np.arange(32) + 0.5) / 32 * (bottom - top)) / height
        x = (left + (np.arange(32) + 0.5) / 32 * (right - left)) / width
        write(tmp_path / "seen", str(number), y[:, None] + x[None], "npy")
    names = [photos.name_of(i) for i in range(4)]
    found = {}
    for name in ("whole", "seen"):
        (one,) = elsewhere(tmp_path / name)
        one.bind(photos, names)
        found[name] = torch.stack(one.maps(names, (32, 32)))
    inner = (slice(None), slice(2, -2), slice(2, -2))  # at the rim there is no neighbour to interpolate with
    assert torch.allclose(found["whole"][inner], found["seen"][inner], atol=0.1 * (1 / 45 + 1 / 90))  # a tenth of a pixel
    assert not torch.allclose(found["seen"][0], found["seen"][1], atol=0.1)


def test_what_a_square_map_of_a_square_file_covers_can_be_said(photos):
    names = [photos.name_of(2)]  # 50x50, of which the network sees 32 of 40
    ramp = torch.linspace(0, 1, 20).expand(1, 20, 20)
    found = {}
    for of in ("auto", "crop", "file"):
        (one,) = elsewhere(ramp, of)
        one.bind(photos, names)
        found[of] = one.maps(names, (32, 32))[0]
    assert torch.equal(found["auto"], found["crop"]) and found["crop"].shape == (20, 20)
    assert found["file"].shape == (32, 32) and found["file"].amin() > 0.05 and found["file"].amax() < 0.95


def test_what_has_no_map_or_no_numbers_is_missing_and_what_is_left_over_is_said(model, photos, tmp_path):
    maps = np.random.default_rng(0).random((4, 8, 8))
    maps[1, 2, 2] = np.nan
    for number in (0, 1, 2):
        write(tmp_path / "theirs", str(number), maps[number], "npy")
    write(tmp_path / "theirs", "stranger", maps[0], "npy")
    with pytest.warns(MapsWarning) as said:
        results = foveate.measure(model, photos, "gradient", ["AD", "cost", "class_sensitivity"], maps=tmp_path / "theirs")
    sentences = [str(one.message) for one in said]
    assert "theirs: 1 image(s) without a map: dog/3.png" in sentences
    assert "theirs: 1 map(s) of no image, passed over: stranger" in sentences
    assert np.isfinite(results.values["theirs", "AD"]).tolist() == [True, False, True, False]
    why = results.missing["theirs"]
    assert why["AD"] == {missing.NO_MAP: 1, missing.MAP: 1}
    assert why["T"] == why["class_sensitivity"] == {missing.ELSEWHERE: 4}
    assert np.isnan(results.values["theirs", "T"]).all() and np.isfinite(results.values["gradient", "T"]).all()


def test_images_that_come_one_by_one_find_their_maps_too(model, photos, tmp_path):
    write(tmp_path / "theirs", "b", np.eye(8), "npy")
    write(tmp_path / "theirs", "z", np.eye(8), "npy")
    batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), id=("a", "b"))
    with pytest.warns(MapsWarning) as said:
        results = foveate.measure(model, [batch], "gradient", ["AD"], maps=tmp_path / "theirs")
    assert np.isfinite(results.values["theirs", "AD"]).tolist() == [False, True]
    assert [str(one.message) for one in said if one.category is MapsWarning] == [
        "theirs: 1 image(s) without a map: a",
        "theirs: 1 map(s) of no image, passed over: z",
    ]
    with pytest.raises(FoveateError, match="3 maps are given, and there are 2 images"):
        foveate.measure(model, [batch], "gradient", ["AD"], maps=torch.rand(3, 8, 8))


def test_an_image_that_is_left_out_takes_its_map_with_it(model):
    x = torch.rand(4, 3, 32, 32)
    x[1, 0, 0, 0] = torch.nan
    batch, maps = Batch(x, torch.tensor([0, 1, 0, 1])), torch.rand(4, 8, 8)
    kept = [0, 2, 3]
    with pytest.warns(UserWarning, match="left out"):
        some = foveate.measure(model, batch, "gradient", ["AD"], maps=maps)
    rest = foveate.measure(model, batch.only(kept), "gradient", ["AD"], maps=maps[kept])
    assert np.array_equal(some.values["maps", "AD"], rest.values["maps", "AD"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (np.zeros((3, 8, 8)), "3 maps are given, and there are 4 images"),
        (np.zeros((4, 3, 8, 8)), r"not ndarray of shape \[4, 3, 8, 8\]"),
        ({"grad_cam": np.zeros((4, 8, 8))}, "'grad_cam', which is a method here"),
        ({"": np.zeros((4, 8, 8))}, "is no name for maps"),
        ("nowhere", "no maps in 'nowhere'"),
        (np.ones((4, 8, 20)), "has 8x20 values, which is not the shape of the image of 32x32"),
        ([None], "are an array"),
    ],
)
def test_what_are_no_maps_is_refused_in_a_sentence(model, photos, given, sentence):
    with pytest.raises(FoveateError, match=sentence):
        foveate.measure(model, photos, "gradient", ["AD"], maps=given)


@pytest.mark.parametrize(
    ("values", "form", "sentence"),
    [
        (np.zeros((8, 8, 3), np.uint8) + np.arange(3, dtype=np.uint8), "png", "is a picture in colours"),
        (np.zeros((3, 8, 8)), "npy", r"shape \[3, 8, 8\], and a map is \[h,w\]"),
        (np.array([["a"]]), "npy", "which is no map"),
        (np.array([[{}]], object), "npy", "holds no map that can be read"),
    ],
)
def test_files_that_are_no_maps_are_refused_with_their_name(model, photos, tmp_path, values, form, sentence):
    write(tmp_path / "theirs", "0", values, form)
    with pytest.raises(FoveateError, match=sentence), pytest.warns(MapsWarning):
        foveate.measure(model, photos, "gradient", ["AD"], maps=tmp_path / "theirs")


def test_names_that_fit_nothing_or_two_are_refused(model, photos, tmp_path):
    write(tmp_path / "theirs", "abc", np.ones((8, 8)), "npy")
    with pytest.raises(FoveateError, match=r"has the name of an image: there is abc, and the images are cat/0.png"):
        foveate.measure(model, photos, "gradient", ["AD"], maps=tmp_path / "theirs")
    for folder in ("a", "b"):
        write(tmp_path / "twice" / folder, "0", np.ones((8, 8)), "npy")
    with pytest.raises(FoveateError, match=r"a/0, b/0 are all called as the image cat/0.png"):
        foveate.measure(model, photos, "gradient", ["AD"], maps=tmp_path / "twice")


def test_the_command_puts_them_into_table_page_and_rows_and_knows_them_again(photos, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        write(tmp_path / "lime", str(number), rng.random((8, 8)), "npy")
        write(tmp_path / "other", str(number), rng.random((8, 8)).astype(np.float32), "safetensors")
    write(tmp_path / "lime", "stranger", rng.random((8, 8)), "npy")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    out = tmp_path / "run"
    call = ["evaluate", str(photos.root), "--model", "foveate:small_cnn", "--num-classes", "2", "--size", "32"]
    call += [
        "--classes",
        str(tmp_path / "names.txt"),
        "--methods",
        "gradient",
        "--metrics",
        "AD,T",
        "--out",
        str(out),
        "--json",
    ]
    weights = foveate.load("foveate:small_cnn", num_classes=2).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    call += ["--weights", str(tmp_path / "w.pt"), "--maps", str(tmp_path / "lime"), "--maps", f"theirs={tmp_path / 'other'}"]
    found = CliRunner().invoke(app, call)
    assert found.exit_code == 0, found.output
    assert "lime: 1 map(s) of no image, passed over: stranger" in " ".join(found.stderr.split())
    document = json.loads(found.stdout)
    table, costs = document["table"], document["costs"]
    assert [name for name in table if name != "(model)"] == ["lime", "theirs", "gradient", "centre", "fake_cam", "random"]
    assert table["theirs"]["AD"]["n"] == 4 and costs["gradient"]["T"]["n"] and not costs["lime"]["T"]["n"]
    assert document["missing"]["lime"]["T"] == {missing.ELSEWHERE: 4}
    assert "theirs" in (out / "report.html").read_text() and "lime" in (out / "table.md").read_text()
    again = CliRunner().invoke(app, [*call, "--resume"])
    assert again.exit_code == 0 and json.loads(again.stdout)["table"] == table
    write(tmp_path / "lime", "0", rng.random((8, 8)), "npy")
    changed = CliRunner().invoke(app, [*call, "--resume"])
    assert changed.exit_code == 2 and "maps was" in changed.stderr
