"""Inputs: what people hold (paths, folders, photographs, arrays, tensors) as what a model takes; the photographs are kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import IOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from foveate.batch import Batch
from foveate.errors import FoveateError, ImageError, printable
from foveate.runtime.model import Normalized, unwrap

if TYPE_CHECKING:
    from PIL import Image

    from foveate.data.images import Bands, Preprocess

COLOURS = (1, 3, 4)  # channels of a photograph: grey, RGB, RGB with transparency
FORMS = "give a path, a folder, a PIL image, an array [H,W,3], a list, or a tensor [B,3,H,W] or [3,H,W] with values in [0, 1]"


@dataclass(frozen=True)
class Taken:
    """Images as a model takes them, and what else is known of them.

    Attributes:
        x: ``[B,K,H,W]``.
        names: one per image.
        photographs: of each image the photograph that it was made of: a file, which is read again where it is needed, or
            the picture itself; None for a tensor.
        y: labels, where they came along in a :class:`foveate.Batch`.
        preprocess: how ``x`` was made of the photographs; None where there is none.
    """

    x: Tensor
    names: tuple[str, ...]
    photographs: tuple[Path | Image.Image | None, ...]
    y: Tensor | None = None
    preprocess: Preprocess | None = None


@dataclass(frozen=True)
class _Item:
    """One image on its way, or several of one tensor."""

    names: tuple[str, ...]
    x: Tensor | None = None
    photograph: Image.Image | Bands | None = None
    kept: Path | Image.Image | None = None
    y: Tensor | None = None


def taken(model: Any, given: Any, *, normalised: bool = False) -> Taken:
    """Whatever people hold as a batch for this model.

    A photograph (a file, a PIL image of any mode, an array or tensor with its channels last) is resized and cropped as the
    model wants it; a tensor with its channels first is taken as it is, whole numbers from 0 to 255 divided by 255.

    Args:
        given: a path, a folder of images, a PIL image, an array ``[H,W,3]``, ``[H,W]`` or ``[B,H,W,3]``, a tensor
            ``[B,K,H,W]`` or ``[K,H,W]``, a :class:`foveate.Batch`, or a list of any of them.
        normalised: tensors and arrays were normalised with the model's own mean and std, which is undone.

    Raises:
        FoveateError: nothing that can be an image, images of several sizes, or values that are not in [0, 1] but are those of
            a normalised image or go to 255.
        ImageError: a file that cannot be read.
    """
    if isinstance(model, (str, os.PathLike)):
        raise FoveateError(f"the model comes first, and {str(model)!r} is none yet: model = foveate.load({str(model)!r})")
    if _is_plain(given) and not _is_last(given.shape, model):
        x = in_range(model, given, normalised)
        return Taken(x, tuple(f"image {i}" for i in range(len(x))), (None,) * len(x))
    return _together(model, list(_items(model, given, normalised, "")), given)


def _is_plain(given: Any) -> bool:
    """Whether it is a tensor of images that can go to a model as it is."""
    return isinstance(given, Tensor) and given.ndim == 4 and given.is_floating_point() and given.layout == torch.strided


def _together(model: nn.Module, items: Sequence[_Item], given: object) -> Taken:
    if not items:
        raise FoveateError(f"there is no image in {_quoted(given)}: {FORMS}")
    preprocess = None
    if any(item.photograph is not None for item in items):
        from foveate.models.stated import preprocess_of

        preprocess = preprocess_of(model)
    parts: list[Tensor] = []
    for item in items:
        if item.x is not None:
            parts.append(item.x)
        elif preprocess is not None and item.photograph is not None:
            parts.append(preprocess(item.photograph)[None])
    first = parts[0]
    for part, item in zip(parts, items, strict=True):
        if part.shape[1:] != first.shape[1:]:
            raise FoveateError(
                f"images of one batch have one size, and {items[0].names[0]!r} is {list(first.shape[1:])} where "
                f"{item.names[0]!r} is {list(part.shape[1:])}: give them one at a time, or as photographs (paths, PIL images, "
                "arrays [H,W,3]), which are resized"
            )
    names = [name for item in items for name in item.names]
    if len(set(names)) < len(names) or any(name.startswith("image ") for name in names):
        names = [f"image {i}" if name.startswith("image ") else name for i, name in enumerate(names)]
    kept = [item.kept for item, part in zip(items, parts, strict=True) for _ in range(len(part))]
    labels = [item.y for item in items if item.y is not None]
    dtype = first.dtype if first.is_floating_point() else torch.float32
    x = first if len(parts) == 1 else torch.cat([part.to(first.device, dtype) for part in parts])
    return Taken(x, tuple(names), tuple(kept), torch.cat(labels) if len(labels) == len(items) else None, preprocess)


# -- one thing after the other -------------------------------------------------------------------------------------


def _items(model: nn.Module, given: Any, normalised: bool, where: str) -> Iterator[_Item]:
    """The images in whatever is given; ``where`` says which of a list it is."""
    from PIL import Image

    from foveate.data.images import upright

    if isinstance(given, (str, os.PathLike)):
        yield from _files(model, given)
    elif isinstance(given, Image.Image):
        name = getattr(given, "filename", "") or f"image {where}"
        yield _Item((printable(name),), photograph=upright(given, name), kept=given)
    elif isinstance(given, Batch):
        x = in_range(model, given.x, normalised)
        yield _Item(given.id or tuple(f"image {i}" for i in range(len(x))), x, y=given.y)
    elif isinstance(given, Tensor):
        yield from _of_tensor(model, given, normalised, where)
    elif isinstance(given, np.ndarray) and given.dtype.kind not in "OUS":
        yield from _of_array(model, given, normalised, where)
    elif isinstance(given, DataLoader) or (isinstance(given, Dataset) and not isinstance(given, Iterable)):
        kind = "DataLoader" if isinstance(given, DataLoader) else "data set"
        raise FoveateError(f"a {kind} is not one batch: explain images of it, or give it to foveate.evaluate as it is")
    elif isinstance(given, Mapping):
        near = next((key for key in ("image", "img", "pixel_values", "images", "x") if key in given), None)
        remedy = f"give its {near!r}" if near is not None else FORMS
        raise FoveateError(f"a dict with {', '.join(map(repr, list(given)[:6]))} is no image: {remedy}")
    elif isinstance(given, IOBase):
        raise FoveateError("an open file is no image: give its path, or PIL.Image.open of it")
    elif isinstance(given, (bytes, bytearray)) or not isinstance(given, Iterable):
        raise FoveateError(f"{_quoted(given)} is no image: {FORMS}")
    else:
        if isinstance(given, (tuple, list)) and len(given) == 2 and _is_label(given[1]) and not _is_label(given[0]):
            raise FoveateError("images with their labels are two arguments: explain(model, x, labels=y)")
        for number, item in enumerate(given):
            yield from _items(model, item, normalised, f"{where}.{number}" if where else str(number))


def _is_label(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim <= 1 and not (torch.is_floating_point(torch.as_tensor(value)) if value.dtype != object else True)
    return isinstance(value, int) or (isinstance(value, (list, tuple)) and bool(value) and all(type(v) is int for v in value))


def _files(model: nn.Module, given: str | os.PathLike[str]) -> Iterator[_Item]:
    """A file, or the images of a folder and of those below it, but for pictures that foveate wrote."""
    from foveate.data import images
    from foveate.data.layout import files_in
    from foveate.disk.written import is_written

    if "://" in str(given):
        raise ImageError(f"{str(given)!r} is an address, and nothing is downloaded: save the file first", given)
    path = Path(given)
    if not str(given):
        raise ImageError("the path of an image is empty: name a file or a folder", given)
    files = [path]
    preprocess = getattr(unwrap(model), "preprocess", None)
    if path.is_dir():
        channels = preprocess.channels if isinstance(preprocess, images.Preprocess) else 3
        files = [file for file in files_in(path, channels) if not is_written(file)]
        if not files:
            raise ImageError(f"{path} is a folder without images", path)
    for file in files:
        shown = preprocess.read(file) if isinstance(preprocess, images.Preprocess) else images.read(file)
        kept = file if not isinstance(shown, images.Bands) else None  # channels without colours: what was seen is drawn
        yield _Item((printable(file),), photograph=shown, kept=kept)


def _of_tensor(model: nn.Module, given: Tensor, normalised: bool, where: str) -> Iterator[_Item]:
    what = f"a tensor of shape {list(given.shape)}"
    if given.layout != torch.strided or given.is_quantized or given.is_complex():
        kind = "quantised" if given.is_quantized else "complex" if given.is_complex() else "sparse"
        raise FoveateError(f"{what} that is {kind} is no image: give its dense real values, as in x.to_dense()")
    if given.numel() == 0:
        raise FoveateError("the batch holds no image" if given.ndim and not len(given) else f"{what} has no pixels")
    if given.ndim in (3, 4) and _is_last(given.shape, model):
        yield from _of_array(model, given.detach().cpu().numpy(), normalised, where)
        return
    channels = channels_of(model)
    if given.ndim == 2:
        given = given.expand(channels, -1, -1)
    if given.ndim == 3 and given.shape[0] in (*COLOURS, channels):
        given = given[None]
    if given.ndim != 4:
        raise FoveateError(f"{what} is no image: {FORMS}")
    if not given.is_floating_point():
        low, high = (int(value) for value in given.aminmax()) if given.dtype != torch.bool else (0, 1)
        if low < 0 or high > 255:
            raise FoveateError(f"whole numbers of an image are from 0 to 255, and these are from {low} to {high}: {FORMS}")
        given = given.float() if given.dtype == torch.bool else given.float() / 255
    else:
        given = in_range(model, given, normalised)
    yield _Item((f"image {where or 0}",) if len(given) == 1 else tuple(f"image {i}" for i in range(len(given))), given)


def _of_array(model: nn.Module, given: np.ndarray, normalised: bool, where: str) -> Iterator[_Item]:
    from foveate.data.images import from_array, upright

    if given.ndim in (3, 4) and not _is_last(given.shape, model):
        yield from _of_tensor(model, torch.from_numpy(np.ascontiguousarray(_native(given))), normalised, where)
        return
    if given.ndim not in (2, 3, 4) or given.size == 0:
        raise FoveateError(f"an array of shape {list(given.shape)} is no image: {FORMS}")
    for number, own in enumerate(given if given.ndim == 4 else given[None]):
        image = from_array(_pixels(model, own, normalised))
        name = f"image {number if given.ndim == 4 else where}"
        yield _Item((name,), photograph=upright(image, name), kept=image)


def _native(values: np.ndarray) -> np.ndarray:
    """In the byte order of this machine, and in a type that torch has."""
    if values.dtype == np.uint16:
        return values.astype(np.int32)
    return values.astype(values.dtype.newbyteorder("=")) if not values.dtype.isnative else values


def _pixels(model: nn.Module, values: np.ndarray, normalised: bool) -> np.ndarray:
    """An array of a photograph, with the model's normalisation undone where it was normalised."""
    if values.dtype.kind != "f" or values.ndim < 3:
        return values
    x = torch.from_numpy(np.ascontiguousarray(_native(values))).movedim(-1, 0)[None].float()
    return values if not np.isfinite(values).all() else in_range(model, x, normalised)[0].movedim(0, -1).numpy()


# -- what a model says of its images --------------------------------------------------------------------------------


def channels_of(model: nn.Module) -> int:
    """How many channels a model takes, by the normalisation in it; 3 where nothing is known."""
    inner = unwrap(model)
    stated = getattr(getattr(inner, "preprocess", None), "channels", None)
    if isinstance(stated, int):
        return stated
    count = inner.mean.shape[1] if isinstance(inner, Normalized) else 3
    return count if count > 1 else 3  # one mean is for all channels


def _is_last(shape: Sequence[int], model: nn.Module) -> bool:
    """Whether channels come last, as in arrays of photographs."""
    if shape[-1] not in COLOURS or shape[-3] in COLOURS:
        return False
    return shape[-3] != channels_of(model)


def in_range(model: nn.Module, x: Tensor, normalised: bool = False) -> Tensor:
    """Images ``[B,K,H,W]`` in [0, 1]: as they are, or with the model's own normalisation undone.

    What is a little outside, as under noise, passes.

    Raises:
        FoveateError: the values are those of a normalised image, or of whole numbers to 255; ``normalised`` for a model that
            has no normalisation inside, or for images that were normalised otherwise.
    """
    inner = unwrap(model)
    if not isinstance(inner, Normalized):
        if normalised:
            raise FoveateError(
                "normalised=True undoes the normalisation that is inside a model, and this one has none: wrap it, "
                "model = foveate.normalized(model, mean, std)"
            )
        return x
    if not x.numel() or x.shape[-3] not in (inner.mean.shape[1], *(range(99) if inner.mean.shape[1] == 1 else ())):
        return x  # the model says what is wrong with it
    low, high = torch.stack(x.detach().aminmax()).tolist()
    outside = low < -0.01 or high > 1.01
    mean, std = inner.mean.to(x), inner.std.to(x)
    if normalised:
        undone = x * std + mean
        least, most = torch.stack(undone.detach().aminmax()).tolist()
        if least < -0.05 or most > 1.05:
            raise FoveateError(
                f"these images were not normalised with this model's mean and std: undone, their values are in "
                f"[{least:.2f}, {most:.2f}] and not in [0, 1]"
            )
        if not outside:
            warnings.warn(
                f"normalised=True undoes a normalisation, and these images are in [{low:.2f}, {high:.2f}] already: leave it "
                "out where they were not normalised",
                stacklevel=4,
            )
        return undone.clamp(0, 1)
    if not outside:
        return x
    if low >= 0 and 25 < high <= 255.5:
        raise FoveateError(f"images are in [0, 1], and these go to {high:g}: divide them by 255, or give them as uint8")
    if low >= 0 and high > 2:
        raise FoveateError(f"images are in [0, 1], and these go to {high:g}: give them before normalisation")
    floor, ceiling = ((edge - mean) / std for edge in (0.0, 1.0))
    far = low < 0.3 * float(floor.min()) or high > 1 + 0.3 * (float(ceiling.max()) - 1) > 1
    if far and bool((x >= floor - 0.02).all()) and bool((x <= ceiling + 0.02).all()):
        raise FoveateError(
            f"these images look normalised (their values are in [{low:.2f}, {high:.2f}]), and this model normalises by itself: "
            "give them in [0, 1], or say normalised=True and it is undone"
        )
    return x


def _quoted(given: object) -> str:
    if isinstance(given, (str, os.PathLike)):
        return repr(printable(given))
    if isinstance(given, (list, tuple)):
        return f"a {type(given).__name__} of {len(given)}"
    if given is None or isinstance(given, (bool, int, float, complex, bytes)):
        return repr(given)[:60]
    shape = getattr(given, "shape", None)
    return f"what was given, of type {type(given).__name__}" + (
        f" and shape {list(shape)}," if isinstance(shape, tuple) else ","
    )


# -- data of many images -------------------------------------------------------------------------------------------


def data_of(model: Any, data: Any, normalised: bool = False) -> Any:
    """Data as :func:`foveate.measure` goes through it: a folder by its path, files, or images at hand, with or without labels.

    A folder, or what else ``foveate evaluate`` takes by name (``scenes``, ``pets:FOLDER``), is opened with the model's own
    preprocessing, its classes in the model's numbering. A list of files is read one at a time.

    Raises:
        FoveateError: no such data, or classes that the model does not have.
    """
    from foveate.data.benchmarks import open_benchmark
    from foveate.data.folder import Entry, Folder
    from foveate.models.stated import preprocess_of

    if isinstance(data, Batch):
        return replace(data, x=in_range(model, data.x, normalised))
    if isinstance(data, (str, os.PathLike)) and not Path(data).is_file():
        return renumbered(open_benchmark(str(data), preprocess_of(model)), model, repr(printable(data)))
    if isinstance(data, (tuple, list)) and len(data) == 2 and _is_label(data[1]) and not _is_label(data[0]):
        return _labelled(model, data, normalised)
    listed = [data] if isinstance(data, (str, os.PathLike)) else data
    if isinstance(listed, (list, tuple)) and listed and all(isinstance(item, (str, os.PathLike)) for item in listed):
        return Folder(tuple(Entry(Path(item)) for item in listed), preprocess_of(model))
    if isinstance(listed, (list, tuple)) and listed and _is_image(listed[0]):
        return _batch(taken(model, data, normalised=normalised))
    if _is_image(data) or not isinstance(data, (Iterable, Dataset)) or isinstance(data, (Mapping, bytes)):
        return _batch(taken(model, data, normalised=normalised))
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        return _Natural(data, lambda item: _labelled(model, item, normalised))
    items: Any = data
    return (_labelled(model, item, normalised) for item in items)


@dataclass(frozen=True)
class _Natural(Dataset[Any]):
    """A data set of anybody's, its images as this model takes them."""

    whole: Any
    take: Callable[[Any], Any]

    @property
    def dataset(self) -> Any:
        """The data set itself, as of a ``Subset``."""
        return self.whole

    def __getattr__(self, name: str) -> Any:
        if name == "name_of":  # where the data set names its images
            return getattr(self.whole, name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Any:
        return self.take(self.whole[index])


def _is_image(given: Any) -> bool:
    from PIL import Image

    return isinstance(given, (Image.Image, Tensor, np.ndarray))


def _batch(found: Taken) -> Batch:
    return Batch(found.x, found.y, id=found.names)


def _labelled(model: nn.Module, item: Any, normalised: bool) -> Any:
    """An image or a batch with its labels, in the forms that data sets and loaders give: a Batch, a pair, a dict."""
    if isinstance(item, Batch):
        return replace(item, x=in_range(model, item.x, normalised)) if normalised else item
    if isinstance(item, Mapping):
        x = next((item[key] for key in ("image", "img", "pixel_values", "images", "x") if key in item), None)
        y = next((item[key] for key in ("label", "labels", "y", "target") if key in item), None)
        if x is None or y is None:
            keys = ", ".join(map(repr, list(item)[:6]))
            raise FoveateError(f"data gives pairs of images and labels, and this is a dict with {keys}: map it to (x, y)")
    elif isinstance(item, (tuple, list)) and len(item) >= 2:
        x, y = item[0], item[1]
    else:
        raise FoveateError(f"data gives pairs of images and labels, and this is {_quoted(item)}: give (x, y), or a Batch")
    single = isinstance(x, Tensor) and x.ndim == 3
    found = taken(model, x, normalised=normalised)
    try:
        y = y if isinstance(y, Tensor) else torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        raise FoveateError(f"labels are class indices, and these are {_quoted(y)} ({str(y)[:60]!r})") from None
    named = not all(name.startswith("image ") for name in found.names)
    y = y[None] if single or y.ndim == 0 else y
    return Batch(found.x, y, id=found.names if named else ())


def renumbered(data: Any, model: nn.Module, where: str) -> Any:
    """Data whose classes are known by name, with the labels of the model's classes of these names.

    Raises:
        FoveateError: the model has no class of a name, or several; or its names are not known and counts differ.
    """
    names = data.class_names
    if names is None:
        return data
    if getattr(model, "class_names", None) is None or not hasattr(model, "class_index"):
        linear = [m.out_features for m in model.modules() if type(m).__name__ == "Linear"]
        if not linear or linear[-1] != len(names):
            raise FoveateError(
                f"{where} has the classes {', '.join(names[:6])}, and the model's class names are not known: give "
                "--classes FILE, with one class name per line, in the order of the model's outputs (class_names in Python)"
            )
        return data
    try:
        return data.renumbered({index: model.class_index(name) for index, name in enumerate(names)})  # type: ignore[operator]
    except FoveateError as error:
        raise FoveateError(f"the classes of {where} are not the model's: {error}") from None
