"""Inputs: what people hold is taken as what they mean, or refused in one sentence; never a raw error of torch or NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import foveate
import foveate.models.inputs
from foveate import Batch, FoveateError, explain, explain_each, load, measure, saliency
from foveate.data.images import read
from foveate.models.classifier import Classifier


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    return load("foveate:small_cnn")  # it takes 96 x 96, mean 0.5, std 0.25


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rows, columns = np.mgrid[:60, :90]
    return np.stack([rows * 4, columns * 2, 255 - rows * 2 - columns], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    Image.fromarray(pixels).save(root / "a.png")
    Image.fromarray(pixels[::-1].copy()).save(root / "more" / "b.png")
    return root


PHOTOGRAPHS: dict[str, Callable[[np.ndarray], Any]] = {
    "uint8": lambda a: a,
    "float64": lambda a: a / 255,
    "float32": lambda a: (a / 255).astype(np.float32),
    "big-endian": lambda a: (a / 255).astype(">f4"),
    "uint16": lambda a: a.astype(np.uint16) * 257,
    "int64": lambda a: a.astype(np.int64),
    "turned": lambda a: np.ascontiguousarray(a[::-1])[::-1],  # negative strides
    "a tensor, channels last": lambda a: torch.from_numpy(a),
    "a batch of one": lambda a: a[None],
    "a list of one": lambda a: [a],
    "PIL": Image.fromarray,
    "PIL, RGBA": lambda a: Image.fromarray(a).convert("RGBA"),
}


@pytest.mark.parametrize("form", PHOTOGRAPHS)
def test_a_photograph_is_the_same_in_every_form(form: str, model: Classifier, pixels: np.ndarray, folder: Path) -> None:
    expected = model.preprocess(read(folder / "a.png"))
    given = PHOTOGRAPHS[form](pixels)
    assert torch.equal(model.read(given)[0], expected)
    if not isinstance(given, list) and given is not None and form != "a batch of one":
        assert torch.equal(model.preprocess(given), expected)
    why = explain(model, given, "centre")
    assert why.seen.photographs[0] is not None
    assert why.overlay().size == (90, 60)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_pil_images_of_any_mode(mode: str, model: Classifier, pixels: np.ndarray, tmp_path: Path) -> None:
    if mode in ("I;16", "I"):
        image = Image.fromarray((pixels[..., 0].astype(np.int64) * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(pixels[..., 0]).convert(mode) if mode == "F" else Image.fromarray(pixels).convert(mode)
    assert image.mode == mode
    x = model.read(image)
    assert x.shape == (1, 3, 96, 96)
    assert x.std() > 0.05
    assert torch.equal(model.preprocess(image), x[0])


def test_a_photograph_lies_upright(model: Classifier, pixels: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    expected = model.preprocess(read(tmp_path / "turned.jpg"))
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert torch.equal(model.preprocess(opened), expected)
        assert torch.equal(model.read(opened)[0], expected)


def test_files_folders_and_mixed_lists(model: Classifier, pixels: np.ndarray, folder: Path) -> None:
    files = [folder / "a.png", folder / "more" / "b.png"]
    x = torch.stack([model.preprocess(read(file)) for file in files])
    for given in (
        str(folder),
        folder,
        files,
        list(map(str, files)),
        tuple(files),
        iter(files),
        np.array(list(map(str, files))),
    ):
        why = explain(model, given, "centre")
        assert torch.equal(why.seen.x, x)
        assert why.seen.names == tuple(map(str, files))
    assert torch.equal(model.read(*files), x)
    mixed = explain(model, [files[0], Image.fromarray(pixels), pixels, torch.rand(3, 96, 96)], "centre")
    assert torch.equal(mixed.seen.x[1], x[0]) and torch.equal(mixed.seen.x[2], x[0])
    assert mixed.seen.names == (str(files[0]), "image 1", "image 2", "image 3")


def test_pictures_that_foveate_wrote_are_no_photographs_of_a_folder(model: Classifier, folder: Path, tmp_path: Path) -> None:
    Image.open(folder / "a.png").save(tmp_path / "a.png")
    explain(model, tmp_path, "centre").save(tmp_path / "explained")
    assert explain(model, tmp_path, "centre").seen.names == (str(tmp_path / "a.png"),)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (torch.rand(3, 96, 96), (1, 3, 96, 96)),
        (torch.rand(2, 3, 40, 50), (2, 3, 40, 50)),
        (torch.rand(2, 3, 40, 50).half(), (2, 3, 40, 50)),
        (torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), (1, 3, 40, 50)),
        (torch.randint(0, 256, (2, 3, 40, 50)), (2, 3, 40, 50)),
        (torch.rand(40, 50), (1, 3, 40, 50)),
        (np.random.default_rng(0).random((3, 40, 50)), (1, 3, 40, 50)),
        ([torch.rand(3, 40, 50), torch.rand(3, 40, 50)], (2, 3, 40, 50)),
        (Batch(torch.rand(2, 3, 40, 50), torch.tensor([0, 1]), id=("a", "b")), (2, 3, 40, 50)),
    ],
)
def test_tensors_are_taken_as_they_are(given: Any, shape: tuple[int, ...], model: Classifier) -> None:
    why = explain(model, given, "centre")
    assert why.seen.x.shape == shape
    assert why.seen.x.min() >= 0 and 0.9 < why.seen.x.max() <= 1
    assert why["centre"].shape == (shape[0], *shape[2:])
    assert why.overlay().size == (shape[3], shape[2])


def test_a_tensor_is_not_copied(model: Classifier) -> None:
    x = torch.rand(2, 3, 40, 50)
    assert foveate.models.inputs.taken(model, x).x is x


def test_labels_come_with_a_batch(model: Classifier) -> None:
    batch = Batch(torch.rand(2, 3, 40, 50), torch.tensor([1, 0]))
    assert explain(model, batch, "centre", target="label").target.y.tolist() == [1, 0]
    assert explain(model, batch.x, "centre", target="label", labels=[1, 0]).target.y.tolist() == [1, 0]
    assert set(explain_each(model, batch, "centre")) == {"pred", "label", "second", "pred-label", "pred-second"}


class TestNormalised:
    def test_it_is_recognised_and_undone_where_that_is_said(self, model: Classifier) -> None:
        x = torch.rand(2, 3, 96, 96)
        normal = (x - 0.5) / 0.25
        for call in (explain, explain_each, saliency):
            with pytest.raises(FoveateError, match=r"look normalised \(their values are in \[-2\.00, 2\.00\].*normalised=True"):
                call(model, normal)
        assert torch.allclose(saliency(model, normal, normalised=True), saliency(model, x), atol=1e-4)
        array = normal[0].permute(1, 2, 0).numpy()
        with pytest.raises(FoveateError, match="look normalised"):
            explain(model, array)
        assert torch.allclose(
            explain(model, array, normalised=True).seen.x, model.read(x[0].permute(1, 2, 0).numpy()), atol=1 / 255
        )

    def test_noise_is_not_taken_for_it(self, model: Classifier) -> None:
        with pytest.warns(UserWarning, match=r"images are in \[0, 1\]"):
            explain(load("foveate:small_cnn"), (torch.rand(1, 3, 96, 96) + 0.1 * torch.randn(1, 3, 96, 96)).clamp(-0.3, 1.3))

    def test_what_cannot_be_undone(self, model: Classifier) -> None:
        with pytest.raises(FoveateError, match=r"not normalised with this model's mean and std: undone.*\[-0\.\d+, 2\.7"):
            explain(model, torch.linspace(-4, 9, 3 * 96 * 96).view(1, 3, 96, 96), normalised=True)
        with pytest.warns(UserWarning, match="already: leave it out"):
            explain(model, torch.rand(1, 3, 96, 96), normalised=True)
        with pytest.raises(FoveateError, match="this one has none: wrap it, model ="):
            explain(model.model, torch.rand(1, 3, 96, 96), normalised=True)


REFUSED: list[tuple[Any, str]] = [
    (None, "None is no image: give a path"),
    (3, "3 is no image"),
    (b"abc", "b'abc' is no image"),
    (object(), "of type object, is no image"),
    ([], "no image in a list of 0"),
    ({"image": 1}, "a dict with 'image' is no image: give its 'image'"),
    ("", "the path of an image is empty"),
    ("https://example.org/cat.jpg", "is an address, and nothing is downloaded"),
    ("/nowhere/cat.jpg", "/nowhere/cat.jpg does not exist"),
    (torch.rand(1, 3, 20, 20).to_sparse(), r"of shape \[1, 3, 20, 20\] that is sparse"),
    (torch.rand(1, 3, 20, 20).to(torch.complex64), "that is complex"),
    (torch.rand(1, 1, 3, 20, 20), r"a tensor of shape \[1, 1, 3, 20, 20\] is no image"),
    (torch.rand(7), r"a tensor of shape \[7\] is no image"),
    (torch.full((3, 20, 20), -4), "from 0 to 255, and these are from -4 to -4"),
    (torch.rand(1, 3, 20, 20) * 255, r"these go to 25\d.*: divide them by 255"),
    (np.full((20, 20, 3), 200.0), "these go to 200: divide them by 255"),
    (np.full((20, 20), 200.0), "floats of an image are in"),
    (np.full((20, 20, 3), np.nan), "NaN or infinity"),
    (np.zeros((20, 20, 3), complex), "an array of complex128 is no image"),
    (np.zeros(5), r"an array of shape \[5\] is no image"),
    (np.zeros((0, 20, 3)), r"an array of shape \[0, 20, 3\] is no image"),
    (np.zeros((5, 20, 3), np.uint8), "at least 8"),
    ([torch.rand(3, 20, 20), torch.rand(3, 30, 20)], r"'image 0' is \[3, 20, 20\] where 'image 1' is \[3, 30, 20\]"),
    ((torch.rand(2, 3, 20, 20), torch.tensor([0, 1])), r"explain\(model, x, labels=y\)"),
    (DataLoader(TensorDataset(torch.rand(2, 3, 20, 20))), "a DataLoader is not one batch"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_what_is_no_image_is_refused_in_one_sentence(given: Any, said: str, model: Classifier) -> None:
    for call in (explain, explain_each, saliency, lambda model, given: model.read(given)):
        with pytest.raises(FoveateError, match=said):
            call(model, given)


def test_a_closed_file_and_a_name_for_a_model(model: Classifier, folder: Path) -> None:
    image = Image.open(folder / "a.png")
    image.close()
    with pytest.raises(FoveateError, match=r"a\.png is closed, damaged or cut off"):
        explain(model, image)
    with pytest.raises(FoveateError, match=r"model = foveate\.load\('timm:resnet50'\)"):
        explain("timm:resnet50", folder)  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match=r"one photograph is a path.* and this is a list: model\.read takes several"):
        model.preprocess([folder / "a.png"] * 2)  # type: ignore[arg-type]


def test_a_model_that_does_not_say_its_size(folder: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match="cropped to 224 x 224, as for ImageNet"):
        assert explain(plain, folder / "a.png")["grad_cam"].shape == (1, 224, 224)
    plain.mean, plain.std, plain.input_size = (0.5,), (0.5,), (3, 64, 64)
    assert explain(plain, folder / "a.png")["grad_cam"].shape == (1, 64, 64)


# -- data of many images -------------------------------------------------------------------------------------------


class Pictures(Dataset[Any]):
    """As torchvision's data sets give them where no transform was named, or as Hugging Face's."""

    def __init__(self, image: Image.Image, as_dict: bool) -> None:
        self.image, self.as_dict = image, as_dict

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index >= 3:
            raise IndexError
        return {"image": self.image, "label": index % 2} if self.as_dict else (self.image, index % 2)


@pytest.fixture(scope="module")
def classes(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for name in ("orca", "an_extra", "leopard"):  # not in the order of the model's classes
        (root / name).mkdir()
    (root / "an_extra").rmdir()
    Image.fromarray(pixels).save(root / "leopard" / "a.png")
    Image.fromarray(pixels[::-1].copy()).save(root / "orca" / "b.png")
    return root


def measured(model: Classifier, data: Any, **options: Any) -> foveate.evaluation.results.Results:
    return measure(model, data, "centre", "AD", **options)


def test_a_folder_is_opened_and_numbered_as_the_model_is(model: Classifier, classes: Path) -> None:
    turned = load("foveate:small_cnn", class_names=["orca", "leopard"])
    for given in (str(classes), classes):
        assert measured(model, given).labels.tolist() == [0, 1]
        assert measured(turned, given).labels.tolist() == [1, 0]
    table = foveate.evaluate(model, classes, "centre", "AD")
    assert int(table.loc[("centre", "AD")]["n"]) == 2


def test_data_in_the_forms_that_people_have_it(model: Classifier, pixels: np.ndarray, folder: Path) -> None:
    x, y = torch.rand(2, 3, 96, 96), torch.tensor([0, 1])
    image = Image.fromarray(pixels)
    labelled: list[Any] = [(x, y), (x, [0, 1]), [(x[0], 0), (x[1], 1)], [Batch(x, y)], DataLoader(TensorDataset(x, y), 2)]
    labelled += [((part, y[:1]) for part in x.split(1)), DataLoader([{"pixel_values": x[0], "labels": 0}] * 2, 2)]  # type: ignore[arg-type]
    for data in labelled:
        assert len(measured(model, data, target="label")) == 2
    for as_dict in (False, True):
        assert measured(model, Pictures(image, as_dict)).labels.tolist() == [0, 1, 0]
    unlabelled: list[tuple[Any, int]] = [(x, 2), (pixels, 1), (image, 1), ([image, image], 2), (folder / "a.png", 1)]
    unlabelled += [([str(folder / "a.png"), folder / "more" / "b.png"], 2)]
    for data, count in unlabelled:
        assert len(measured(model, data, target="pred")) == count
    with pytest.warns(UserWarning, match=r"1 image\(s\) are left out, the first: /nowhere\.png does not exist"):
        assert len(measured(model, [folder / "a.png", "/nowhere.png"], target="pred")) == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "None is no image"),
        (3, "3 is no image"),
        ("/nowhere", "data folder '/nowhere' does not exist"),
        ([(torch.rand(3, 20, 20), "cat")], "labels are class indices"),
        ([{"x": torch.rand(3, 20, 20)}], "a dict with 'x': map it to"),
        ([7], r"data gives pairs of images and labels, and this is 7: give \(x, y\)"),
    ],
)
def test_what_is_no_data(data: Any, said: str, model: Classifier) -> None:
    with pytest.raises(FoveateError, match=said):
        measured(model, data)


def test_a_normalising_loader_is_recognised(model: Classifier) -> None:
    x: Tensor = torch.rand(2, 3, 96, 96)
    y = torch.tensor([0, 1])
    loader = DataLoader(TensorDataset((x - 0.5) / 0.25, y), 2)
    with pytest.raises(FoveateError, match="look normalised"):
        measured(model, loader)
    same = measured(model, (x, y)).values["centre", "AD"]
    np.testing.assert_allclose(measured(model, loader, normalised=True).values["centre", "AD"], same, atol=1e-4)
