"""Images: from files and pixels to tensors in [0, 1], and how boxes and masks follow."""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from foveate.disk.files import is_regular
from foveate.errors import FoveateError, ImageError

MOST_PIXELS = 200_000_000  # decoded, an image of this size takes 600 MB
LEAST_SIDE, MOST_SIDE = 8, 16384
CROPS = ("none", "resize", "centre", "ten")
STEP = 16  # pixels: the patches of most transformers, and no grid of cells that is cut off
ORIENTATION = 0x0112  # of EXIF
T = TypeVar("T")
ARRAYS = (".npy", ".npz")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def read(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, upright as its EXIF says; transparency is laid on white, 16 bits are scaled to 8.

    Raises:
        ImageError: missing, not a file, not an image, cut off, below 8 pixels a side, or above 200 megapixels.
    """
    return _opened(Path(path), path, lambda image: _to_rgb(ImageOps.exif_transpose(image)))


@dataclass(frozen=True)
class Bands:
    """An image of other channels than red, green and blue: each as a PIL image of floats in [0, 1]."""

    bands: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as PIL has them."""
        return self.bands[0].size


def read_bands(path: str | Path, channels: int) -> Bands:
    """An image of ``channels`` channels: ``.npy`` or ``.npz`` (``[H,W,K]`` or ``[K,H,W]``), or a TIFF with a page or band each.

    8 and 16 bits without a sign are scaled to [0, 1]; floats are in [0, 1] already.

    Raises:
        ImageError: it cannot be read, has other channels, or values that are not in [0, 1].
    """
    path = Path(path)
    how = f"save it as .npy, [H,W,{channels}], or as a TIFF of {channels} pages"
    if path.suffix.lower() in ARRAYS:
        if not is_regular(path):
            raise ImageError(f"{path} does not exist", path)
        try:
            loaded = np.load(path, allow_pickle=False)  # code in a file is never run
            names = getattr(loaded, "files", None)
            if names is not None and len(names) != 1:
                raise ImageError(f"{path} holds {len(names)} arrays, {', '.join(names[:6])}: an image is one", path)
            values: Any = loaded if names is None else loaded[names[0]]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{path} is damaged or holds more than numbers: {str(error).rstrip('.')}", path) from None
    else:
        try:
            values = _opened(path, path, lambda image: _bands_of(image, channels))
        except ImageError as error:
            if "format" not in str(error):
                raise
            raise ImageError(f"{error}, with {channels} channels: {how}", path) from None
    if channels == 1 and values.ndim == 2:
        values = values[..., None]
    if values.ndim == 3 and values.shape[2] != channels == values.shape[0]:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != channels:
        raise ImageError(f"{path} has shape {list(values.shape)}, and the model takes {channels} channel(s): {how}", path)
    _check_size(path, (values.shape[1], values.shape[0]))
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        values = values / np.float32(np.iinfo(values.dtype).max)
    elif values.dtype.kind not in "fb" or not (values.min() >= 0 and values.max() <= 1):
        reach = f"{values.dtype} from {values.min():g} to {values.max():g}" if values.dtype.kind in "fiub" else values.dtype
        raise ImageError(f"{path} holds {reach}: images are uint8, uint16, or floats in [0, 1]", path)
    return Bands(tuple(Image.fromarray(np.ascontiguousarray(band, np.float32), "F") for band in values.transpose(2, 0, 1)))


def _bands_of(image: Image.Image, channels: int) -> np.ndarray:
    """Pages of one band each as ``[H,W,K]``, where there are so many; else the bands of the first."""
    if getattr(image, "n_frames", 1) != channels:
        return np.asarray(image)
    pages = []
    for page in range(channels):
        image.seek(page)
        pages.append(np.asarray(image))
    return np.stack(pages, 2) if pages[0].ndim == 2 else pages[0]


def read_mask(path: Path, of: Path) -> Image.Image:
    """The mask image of an image file ``of``, as it is stored.

    Raises:
        ImageError: it cannot be read, for the same reasons as an image; its ``path`` is that of the image.
    """
    try:
        return _opened(path, of, lambda image: image.copy())
    except ImageError as error:
        raise ImageError(f"the mask of {of} cannot be read: {error}", of) from None


def upright(image: Image.Image, name: object = "the image") -> Image.Image:
    """A PIL image of any mode as 8-bit RGB, as :func:`read` gives a file: upright, transparency on white, 16 bits scaled.

    Raises:
        ImageError: its file is closed, cut off or damaged, or it is too small or too large.
    """
    _check_size(name, image.size)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name} is closed, damaged or cut off: {str(error).rstrip('.')}", name) from None


def _opened(path: Path, of: object, take: Callable[[Image.Image], T]) -> T:
    """What is taken from an image file while it is open; nothing but a regular file is: a named pipe would wait for ever."""
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not an image", of)
    if not is_regular(path):
        raise ImageError(f"{path} is a pipe or a device, not a file" if path.exists() else f"{path} does not exist", of)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(path, image.size)
                image.load()
                return take(image)
    except ImageError as error:
        error.path = str(of)
        raise
    except Image.DecompressionBombError as error:
        pixels = max(map(int, re.findall(r"\d+", str(error))), default=0)
        raise ImageError(
            f"{path} has {pixels // 10**6} megapixels, more than the {MOST_PIXELS // 10**6} that are read: "
            "make it smaller first",
            of,
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image in a format that can be read", of) from None
    except PermissionError:
        raise ImageError(f"{path} may not be read by this user", of) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} is damaged or cut off: {str(error).rstrip('.')}", of) from None


def _check_size(path: object, size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < LEAST_SIDE:
        raise ImageError(f"{path} has {width}x{height} pixels: an image needs at least {LEAST_SIDE} on each side")
    if width * height > MOST_PIXELS:
        raise ImageError(
            f"{path} has {width * height // 10**6} megapixels, more than the {MOST_PIXELS // 10**6} that are read: "
            "make it smaller first"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        largest = 65535.0 if image.mode != "F" or values.max() > 255 else (255.0 if values.max() > 1 else 1.0)
        return Image.fromarray(np.uint8(np.clip(values / largest * 255 + 0.5, 0, 255)), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def photograph(given: Image.Image | str | Path | np.ndarray | Tensor) -> Image.Image:
    """One photograph in any of its forms as 8-bit RGB, upright: a path, a PIL image, an array or a tensor.

    Raises:
        FoveateError: something else, or several.
        ImageError: a file that cannot be read.
    """
    if isinstance(given, (str, os.PathLike)):
        return read(given)
    if isinstance(given, Image.Image):
        return upright(given)
    if isinstance(given, Tensor) and given.layout == torch.strided:
        given = given.detach().cpu().numpy()
    if not isinstance(given, np.ndarray) or given.ndim not in (2, 3):
        what = f"of shape {list(given.shape)}" if isinstance(given, (np.ndarray, Tensor)) else f"a {type(given).__name__}"
        raise FoveateError(
            f"one photograph is a path, a PIL image or an array [H,W,3], and this is {what}: model.read takes several"
        )
    first = given.ndim == 3 and given.shape[0] in (1, 3, 4) and given.shape[-1] not in (1, 3, 4)
    return upright(from_array(np.moveaxis(given, 0, -1) if first else given))


def from_array(values: np.ndarray) -> Image.Image:
    """An array ``[H,W]`` or ``[H,W,C]`` as an image of 8 bits: floats in [0, 1], whole numbers of 8 or 16 bits, or bool.

    Raises:
        FoveateError: other values.
    """
    kind = values.dtype.kind
    if kind == "b":
        values = 255 * values.astype(np.uint8)
    elif kind in "ui":
        least, most = int(values.min()), int(values.max())
        if least < 0 or most > 65535:
            raise FoveateError(
                f"whole numbers of an image are from 0 to 255, or to 65535, and these are from {least} to {most}"
            )
        eight = values.dtype.itemsize == 1 or (most <= 255 and values.dtype.itemsize != 2)
        values = values.astype(np.uint8) if eight else (values / 257 + 0.5).astype(np.uint8)
    elif kind != "f":
        raise FoveateError(f"an array of {values.dtype} is no image: give numbers from 0 to 255, or floats in [0, 1]")
    elif not np.isfinite(values).all():
        raise FoveateError("the image holds NaN or infinity: mend it, or leave it out")
    else:
        low, high = float(values.min()), float(values.max())
        if low < -0.01 or high > 1.01:
            remedy = ": divide them by 255, or give array.astype('uint8')" if low >= 0 and high <= 255.5 else ""
            raise FoveateError(f"floats of an image are in [0, 1], and these are in [{low:.4g}, {high:.4g}]{remedy}")
        values = (np.clip(values.astype(np.float64), 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as ``[3,H,W]``, float32 in [0, 1]; a grey one as ``[1,H,W]``."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).float().div(255)


def as_rgb(x: Tensor) -> Tensor:
    """An image ``[K,H,W]`` of any number of channels as one that can be looked at, ``[3,H,W]``: see :func:`colours_of`.

    Raises:
        FoveateError: not of three dimensions, or without a channel.
    """
    if x.ndim != 3 or not len(x):
        raise FoveateError(f"an image to look at has shape [K,H,W], and this one has {list(x.shape)}")
    if len(x) == 1:
        return x.expand(3, -1, -1)
    if len(x) == 2:
        return x[[0, 1, 0]]
    if len(x) <= 4:
        return x[:3]
    return torch.stack([group.mean(0) for group in x.tensor_split(3)])


def colours_of(channels: int) -> str:
    """What red, green and blue of :func:`as_rgb` are, in words; nothing where there is nothing to say.

    >>> colours_of(13)
    'red, green, blue: means of channels 1-5, 6-9, 10-13 of 13'
    """
    if channels in (1, 3):
        return ""
    if channels == 2:
        return "magenta: channel 1, green: channel 2"
    if channels == 4:
        return "channels 1-3 of 4"
    groups = torch.arange(1, channels + 1).tensor_split(3)
    means = ", ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)
    return f"red, green, blue: means of channels {means} of {channels}"


def to_image(x: Tensor) -> Image.Image:
    """``[K,H,W]`` in [0, 1] as an RGB image; one of other than three channels as :func:`as_rgb` shows it."""
    pixels = (as_rgb(x.detach().float()).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy(), "RGB")


@dataclass(frozen=True)
class Preprocess:
    """From an image of any size to the network's: shorter side to ``resize``, then the centre ``crop``.

    Attributes:
        crop: height and width that the network sees.
        resize: length of the shorter side before the crop; None to squash the image to ``crop``.
        interpolation: ``bilinear``, ``bicubic``, ``nearest`` or ``lanczos``.
        mean, std: the normalisation that goes inside the model; of so many channels its images are.
    """

    crop: tuple[int, int] = (224, 224)
    resize: int | None = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (*self.mean, *self.std))) or any(value <= 0 for value in self.std):
            raise FoveateError(f"mean {self.mean} and std {self.std} normalise nothing: std is above 0, and both are finite")

    def sized(self, size: int) -> Preprocess:
        """The same for another input size, the share that is cropped away kept."""
        if size < LEAST_SIDE:
            raise FoveateError(f"size {size} is too small for an image: use at least {LEAST_SIDE} pixels")
        if size > MOST_SIDE:
            raise FoveateError(f"size {size} is too large for an image: use at most {MOST_SIDE} pixels")
        resize = None if self.resize is None else round(size * self.resize / min(self.crop))
        return replace(self, crop=(size, size), resize=resize)

    def cropped(self, how: str, size: tuple[int, int]) -> Preprocess:
        """The same with another crop, for a photograph of ``size`` (width, height).

        Args:
            how: ``none``: all of it at its own aspect, the shorter side as long as that of ``crop``, for models that take
                other sizes; both sides are rounded to multiples of 16. ``resize``: all of it, squashed to ``crop``.
                ``centre``: the shorter side to ``resize``, or to that of ``crop``, and the centre of it.
                ``ten``: as ``centre`` before its crop, for :class:`foveate.data.crops.Crops`.

        Raises:
            FoveateError: another word.
            ImageError: a photograph that is too long.
        """
        if how == "none":
            factor = min(self.crop) / min(size)
            width, height = (max(STEP, round(side * factor / STEP) * STEP) for side in size)
            return self._whole(width, height, size)
        if how == "resize":
            return replace(self, resize=None)
        if how in ("centre", "ten"):
            centre = self if self.resize is not None else replace(self, resize=min(self.crop))
            return centre if how == "centre" else self._whole(*centre._resized(size), size)
        raise FoveateError(f"crop {how!r} is unknown: use {', '.join(CROPS)}")

    def _whole(self, width: int, height: int, size: tuple[int, int]) -> Preprocess:
        if max(width, height) > MOST_SIDE:
            raise ImageError(f"{size[0]}x{size[1]} pixels are too long for one image of a network: use another crop")
        return replace(self, crop=(height, width), resize=None)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after the resize, never smaller than the crop."""
        width, height = size
        if self.resize is None:
            return self.crop[1], self.crop[0]
        short = max(self.resize, *self.crop) if self.resize < max(self.crop) else self.resize
        factor = short / min(size)
        # The longer side is cut off, not rounded, and the crop below rounded: a pixel off is another prediction.
        return (short, int(height * factor)) if width <= height else (int(width * factor), short)

    def _offset(self, width: int, height: int) -> tuple[int, int]:
        return round((width - self.crop[1]) / 2), round((height - self.crop[0]) / 2)

    def image(self, image: Image.Image) -> Image.Image:
        """The pixels that the network sees, as an image of size ``crop``."""
        width, height = self._resized(image.size)
        resized = image.resize((width, height), RESAMPLING[self.interpolation])
        left, top = self._offset(width, height)
        return resized.crop((left, top, left + self.crop[1], top + self.crop[0]))

    @property
    def channels(self) -> int:
        """How many channels the network takes."""
        return len(self.mean)

    def read(self, path: str | Path) -> Image.Image | Bands:
        """An image file as this takes it: any picture for one or three channels, arrays and many-paged TIFFs for others.

        Raises:
            ImageError: it cannot be read, or has other channels.
        """
        arrays = Path(path).suffix.lower() in ARRAYS
        return read_bands(path, self.channels) if arrays or self.channels not in (1, 3) else read(path)

    def __call__(self, image: Image.Image | Bands | str | Path | np.ndarray | Tensor) -> Tensor:
        """One photograph as ``[K,H,W]`` in [0, 1], of as many channels as the network takes; of one, colours are made grey.

        Args:
            image: a PIL image of any mode, a path, an array ``[H,W,3]`` or a tensor.

        Raises:
            ImageError: the image has other channels, or cannot be read.
            FoveateError: it is none.
        """
        if isinstance(image, (str, Path)):
            image = self.read(image)
        if not isinstance(image, (Bands, Image.Image)) or (
            isinstance(image, Image.Image) and (image.mode != "RGB" or image.getexif().get(ORIENTATION, 1) != 1)
        ):
            image = photograph(image)
        if isinstance(image, Bands):
            if len(image.bands) != self.channels:
                raise ImageError(f"the image has {len(image.bands)} channel(s), and the model takes {self.channels}")
            seen = [torch.from_numpy(np.array(self.image(band))) for band in image.bands]
            return torch.stack(seen).clamp(0, 1)  # bicubic goes beyond
        if self.channels not in (1, 3):
            raise ImageError(
                f"a picture has 1 or 3 channels, and the model takes {self.channels}: give an array, as .npy of "
                f"[H,W,{self.channels}]"
            )
        return to_tensor(self.image(image.convert("L") if self.channels == 1 else image))

    def frame(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """What the network sees of a photograph of ``size`` (width, height): ``left, top, right, bottom`` in its pixels.

        >>> Preprocess((224, 224), 256).frame((3000, 800))
        (1150.0, 50.0, 1850.0, 750.0)
        """
        width, height = self._resized(size)
        left, top = self._offset(width, height)
        across, down = size[0] / width, size[1] / height
        return left * across, top * down, (left + self.crop[1]) * across, (top + self.crop[0]) * down

    def mask(self, mask: Image.Image) -> Tensor:
        """A mask image as ``[H,W]`` bool: above half of its largest value is the object, so 0/1 and 0/255 are alike.

        Nearest neighbour, the same crop as the image.
        """
        values = np.array(mask if mask.mode in ("L", "1", "I", "I;16") else mask.convert("L")).astype(np.int64)
        binary = Image.fromarray(np.uint8(255 * (values > values.max() / 2)), "L")
        return torch.from_numpy(np.array(replace(self, interpolation="nearest").image(binary)) > 0)

    def boxes(self, boxes: Sequence[Sequence[float]], size: tuple[int, int], clip: bool = True) -> Tensor:
        """Boxes ``x0, y0, x1, y1`` in pixels of a file of ``size`` (width, height) as ``[n,4]`` in pixels of the crop.

        Clipped to what is left, where ``clip`` is not False; a box of which nothing is left has no area.

        Raises:
            ImageError: a box that no pixel of the file is in: it is of another file, or in other units.
        """
        for x0, y0, x1, y1 in boxes:
            if x0 >= size[0] or y0 >= size[1] or x1 <= 0 or y1 <= 0:
                raise ImageError(
                    f"box {x0:g} {y0:g} {x1:g} {y1:g} lies outside of the image, which has {size[0]}x{size[1]} pixels"
                )
        width, height = self._resized(size)
        left, top = self._offset(width, height)
        scaled = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scaled = scaled * torch.tensor([width / size[0], height / size[1]]).repeat(2) - torch.tensor([left, top]).repeat(2)
        return scaled if not clip else scaled.minimum(torch.tensor([self.crop[1], self.crop[0]]).repeat(2)).clamp(min=0)


def cropped_away(frame: Sequence[float], size: tuple[int, int]) -> float:
    """Share of a photograph of ``size`` (width, height) that lies outside of a frame: what the network never saw."""
    left, top, right, bottom = frame
    return max(0.0, 1 - (right - left) * (bottom - top) / (size[0] * size[1]))


def floor_resize(crop: int, share: float) -> int:
    """The shorter side before a centre crop that keeps ``share`` of it."""
    return math.floor(crop / share)
