"""Images: from files and pixels to tensors in [0, 1], and how boxes and masks follow."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from foveate.errors import FoveateError, ImageError
from foveate.files import is_regular

MOST_PIXELS = 200_000_000  # decoded, an image of this size takes 600 MB
LEAST_SIDE, MOST_SIDE = 8, 16384
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


def read_mask(path: Path, of: Path) -> Image.Image:
    """The mask image of an image file ``of``, as it is stored.

    Raises:
        ImageError: it cannot be read, for the same reasons as an image; its ``path`` is that of the image.
    """
    try:
        return _opened(path, of, lambda image: image.copy())
    except ImageError as error:
        raise ImageError(f"the mask of {of} cannot be read: {error}", of) from None


def _opened(path: Path, of: object, take: Callable[[Image.Image], Image.Image]) -> Image.Image:
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


def _check_size(path: Path, size: tuple[int, int]) -> None:
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


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as ``[3,H,W]``, float32 in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float().div(255)


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
        mean, std: the normalisation that goes inside the model.
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

    def __call__(self, image: Image.Image) -> Tensor:
        """``[3,H,W]`` in [0, 1]."""
        return to_tensor(self.image(image))

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


def floor_resize(crop: int, share: float) -> int:
    """The shorter side before a centre crop that keeps ``share`` of it."""
    return math.floor(crop / share)
