"""Images: every kind of file that people have, and every kind of broken one."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from foveate import FoveateError, ImageError
from foveate.data import images
from foveate.data.folder import files_in, labels_beside, open_folder
from foveate.data.images import Preprocess, colours_of, to_image
from foveate.models.classifier import Classifier
from foveate.models.load import load

RAMP = np.linspace(0, 255, 32 * 40).reshape(32, 40)


def rgb() -> Image.Image:
    return Image.fromarray(np.uint8(np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)), "RGB")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("P", "gif"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("1", "png"), ("LA", "png"), ("RGB", "webp")],
)
def test_modes_simply_work(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    rgb().convert(mode).save(path)
    image = images.read(path)
    assert (image.mode, image.size) == ("RGB", (40, 32))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.uint16(RAMP * 257)).save(path)
    values = np.asarray(images.read(path))[..., 0].astype(float)
    assert np.abs(values - RAMP).max() <= 1


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(path)
    assert np.asarray(images.read(path)).min() == 255


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb().save(path, exif=exif)
    assert images.read(path).size == (32, 40)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(np.random.default_rng(0).integers(0, 255, (64, 64, 3)))).save(buffer, "JPEG")
    return buffer.getvalue()[:600]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("text.jpg", b"this is not an image", "not an image in a format"),
        ("empty.png", b"", "not an image in a format"),
        ("cut.jpg", truncated(), "damaged or cut off"),
        ("tiny.png", png_header(1, 1), "1x1 pixels: an image needs at least 8"),
        ("huge.png", png_header(20000, 20000), "has 400 megapixels, more than the 200"),
        ("vast.png", png_header(60000, 60000), "has 3600 megapixels, more than the 200"),
    ],
)
def test_broken_files_get_a_sentence(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=match) as error:
        images.read(path)
    assert name in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        images.read(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        images.read(tmp_path)


def test_the_centre_crop_is_torchvisions() -> None:
    from foveate._torchvision import torchvision

    torchvision()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    rng = np.random.default_rng(0)
    theirs = Compose([Resize(256, InterpolationMode.BILINEAR, antialias=True), CenterCrop(224), ToTensor()])
    for height, width in ((375, 500), (334, 500), (500, 337), (427, 640), (224, 224), (301, 299)):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        assert torch.equal(Preprocess()(image), theirs(image))


def test_squash_and_size() -> None:
    assert Preprocess((20, 30), None)(rgb()).shape == (3, 20, 30)
    assert Preprocess((224, 224), 256).sized(112) == Preprocess((112, 112), 128)
    with pytest.raises(FoveateError, match="size 4 is too small"):
        Preprocess().sized(4)


def test_boxes_and_masks_follow_the_image() -> None:
    """A white rectangle on black: where its box goes, its mask goes and its pixels go."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[10:30, 40:90] = 255
    image = Image.fromarray(pixels)
    preprocess = Preprocess((48, 48), 60)
    x0, y0, x1, y1 = preprocess.boxes([[40, 10, 90, 30]], image.size)[0].round().int().tolist()
    assert (x0, y0, x1, y1) == (14, 4, 48, 24)  # clipped at the right edge of the crop
    mask = preprocess.mask(image)
    assert mask[y0:y1, x0:x1].all()
    assert int(mask.sum()) == (x1 - x0) * (y1 - y0)
    torch.testing.assert_close(preprocess(image)[0] > 0.5, mask)


@pytest.mark.parametrize("high", [1, 2, 255])
def test_masks_of_zeros_and_ones_are_masks(tmp_path: Path, high: int) -> None:
    values = np.zeros((32, 40), np.uint8)
    values[8:16, 10:30] = high
    assert int(Preprocess((32, 40), None).mask(Image.fromarray(values)).sum()) == 8 * 20
    Image.fromarray(values).resize((20, 16)).save(tmp_path / "small.png")
    rgb().save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,class_index,mask\na.png,1,small.png\n")
    with pytest.raises(ImageError, match="has 20x16 pixels, and its image has 40x32"):
        _ = open_folder(tmp_path, Preprocess((32, 32), 32))[0]


def test_a_box_outside_of_the_crop_has_no_area() -> None:
    x0, y0, x1, y1 = Preprocess((48, 48), 60).boxes([[0, 0, 10, 10]], (100, 60))[0].tolist()
    assert (x1 - x0) * (y1 - y0) == 0


class TestFolders:
    def make(self, root: Path) -> None:
        for name in ("a/1.png", "a/2.png", "b/1.png"):
            (root / name).parent.mkdir(exist_ok=True)
            rgb().save(root / name)

    def test_one_folder_a_class(self, tmp_path: Path) -> None:
        self.make(tmp_path)
        data = open_folder(tmp_path, Preprocess((24, 24), 24))
        assert data.class_names == ("a", "b")
        assert [int(batch.y) for batch in data] == [0, 0, 1]
        assert data[2].id == ("b/1.png",)
        assert data[0].x.shape == (1, 3, 24, 24)

    def test_labels_csv_with_boxes_and_masks(self, tmp_path: Path) -> None:
        self.make(tmp_path)
        Image.new("L", (40, 32), 255).save(tmp_path / "mask.png")
        (tmp_path / "labels.csv").write_text(
            "file,class_index,boxes_xyxy,mask\na/1.png,7,0 0 20 16;20 16 40 32,mask.png\nb/1.png,3,1 2 3 4,mask.png\n"
        )
        data = open_folder(tmp_path, Preprocess((32, 32), 32))
        assert [int(batch.y) for batch in data] == [7, 3]
        assert data[0].boxes[0].tolist() == [[0, 0, 16, 16], [16, 16, 32, 32]]
        assert data[0].mask.all()
        assert labels_beside([tmp_path / "a" / "1.png", tmp_path / "a" / "2.png"]) == [[7], []]

    def test_names_without_indices(self, tmp_path: Path) -> None:
        self.make(tmp_path)
        (tmp_path / "labels.csv").write_text("file,name\na/1.png,orca\nb/1.png,leopard\n")
        data = open_folder(tmp_path, Preprocess())
        assert data.class_names == ("leopard", "orca")
        assert [entry.label for entry in data.entries] == [1, 0]

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("name\nx\n", "columns file and class_index"),
            ("file,class_index\n", "at least one line"),
            ("file,class_index\na/1.png,cat\n", "line 2: class_index 'cat' is not a number"),
            ("file,class_index,boxes_xyxy\na/1.png,1,1 2 3\n", "line 2: a box is"),
        ],
    )
    def test_broken_labels(self, tmp_path: Path, text: str, match: str) -> None:
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(FoveateError, match=match):
            open_folder(tmp_path, Preprocess())

    def test_no_folder_and_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(FoveateError, match="does not exist"):
            open_folder(tmp_path / "none", Preprocess())
        with pytest.raises(FoveateError, match=r"neither a labels\.csv nor a folder of images"):
            open_folder(tmp_path, Preprocess())


class TestClassNames:
    NAMES = ("background", "n01440764 tench, Tinca tinca", "n02123045\ttabby")

    def classifier(self) -> Classifier:
        return Classifier(torch.nn.Flatten(), Preprocess(), class_names=self.NAMES)

    def test_ids_in_front_are_taken_off_line_by_line_and_known(self) -> None:
        made = self.classifier()
        assert made.class_names == ["background", "tench, Tinca tinca", "tabby"]
        assert made.wordnet_ids == [None, "n01440764", "n02123045"]
        for text, index in (("tinca tinca", 1), ("n02123045", 2), ("n01440764 tench", 1), ("n02123045 anything", 2)):
            assert made.class_index(text) == index
        with pytest.raises(FoveateError, match="no class is called 'n00000001'"):
            made.class_index("n00000001")

    def test_other_names_have_other_ids(self) -> None:
        made = self.classifier()
        made.class_names = ["cat", "dog"]
        assert made.wordnet_ids is None
        with pytest.raises(FoveateError, match="no class is called"):
            made.class_index("n01440764")

    def test_a_trained_model_is_loaded_with_its_ids(self, tmp_path: Path) -> None:
        record = {"outputs": 2, "class_names": ["tench", "tabby"], "wordnet_ids": ["n01440764", "n02123045"]}
        (tmp_path / "recipe.yaml").write_text("model: foveate:small_cnn\n")
        (tmp_path / "run.json").write_text(json.dumps(record))
        save_file(load("foveate:small_cnn", num_classes=2).model.state_dict(), tmp_path / "model.safetensors")
        made = load(str(tmp_path))
        assert (made.class_names, made.class_index("n02123045")) == (["tench", "tabby"], 1)


@pytest.mark.parametrize("size", [(3000, 800), (120, 500), (300, 300)])
@pytest.mark.parametrize("resize", [None, 64])
def test_the_frame_is_what_the_crop_shows(size: tuple[int, int], resize: int | None) -> None:
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([across, down, across], -1).round().astype(np.uint8))
    preprocess = Preprocess((56, 48), resize)
    left, top, right, bottom = preprocess.frame(size)
    seen = 255 * preprocess(picture)[:2].mean((1, 2))
    middle = torch.tensor([(left + right) / 2 / size[0], (top + bottom) / 2 / size[1]]) * 255
    assert torch.allclose(seen, middle, atol=2)
    if resize is None:
        assert (left, top, right, bottom) == (0, 0, *size)
    else:
        assert (right - left) / (bottom - top) == pytest.approx(48 / 56, rel=0.02)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 13])
def test_images_of_any_number_of_channels_can_be_looked_at(channels: int) -> None:
    x = torch.rand(channels, 5, 7, generator=torch.Generator().manual_seed(channels))
    shown = torch.from_numpy(np.array(to_image(x))).permute(2, 0, 1) / 255
    groups = [x[0], x[0], x[0]] if channels == 1 else [x[0], x[1], x[0]] if channels == 2 else [x[0], x[1], x[2]]
    if channels == 13:
        groups = [x[:5].mean(0), x[5:9].mean(0), x[9:].mean(0)]
    elif channels == 6:
        groups = [x[:2].mean(0), x[2:4].mean(0), x[4:].mean(0)]
    assert torch.allclose(shown, torch.stack(groups), atol=1 / 255)
    assert bool(colours_of(channels)) == (channels not in (1, 3))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"\[K,H,W\], and this one has \[5, 7\]"):
        to_image(torch.rand(5, 7))


class TestLinksToFolders:
    def test_a_link_to_a_folder_is_a_folder(self, tmp_path: Path) -> None:
        elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
        (elsewhere / "deep").mkdir(parents=True)
        (data / "dog").mkdir(parents=True)
        for path in (elsewhere / "a.png", elsewhere / "deep" / "b.png", data / "dog" / "c.png"):
            rgb().save(path)
        (data / "cat").symlink_to(elsewhere)  # a class
        (data / "dog" / "more").symlink_to(elsewhere / "deep")  # below one
        found = open_folder(data, Preprocess((32, 32), 32))
        assert [found.name_of(i) for i in range(len(found))] == ["cat/a.png", "cat/deep/b.png", "dog/c.png", "dog/more/b.png"]

    def test_a_link_to_a_folder_above_ends(self, tmp_path: Path) -> None:
        (tmp_path / "in" / "deeper").mkdir(parents=True)
        rgb().save(tmp_path / "in" / "a.png")
        (tmp_path / "in" / "deeper" / "round").symlink_to(tmp_path)
        (tmp_path / "in" / "deeper" / "nowhere").symlink_to(tmp_path / "none")
        assert files_in(tmp_path) == [tmp_path / "in" / "a.png"]
