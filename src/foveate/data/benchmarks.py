"""Benchmarks: data sets as they lie on disk after download: ImageNet validation, Oxford-IIIT Pet, torchvision's by name."""

from __future__ import annotations

import inspect
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from foveate.batch import Batch
from foveate.data import scenes
from foveate.data.folder import Entry, Folder, open_folder
from foveate.data.imagenet import wordnet_ids
from foveate.data.images import Preprocess
from foveate.data.layout import SUFFIXES, walked
from foveate.disk.text import read_bytes, read_lines
from foveate.errors import FoveateError
from foveate.missing import impossible

FOREGROUND = 1  # of a trimap of Oxford-IIIT Pet: 2 is background, 3 the border between


def open_benchmark(
    name: str,
    preprocess: Preprocess,
    *,
    clip_boxes: bool = True,
    train: bool = False,
    encoding: str | None = None,
    split: str | None = None,
) -> Any:
    """Data by what a person may call it.

    ``scenes``; ``imagenet:FOLDER``; ``pets:FOLDER`` (37 breeds) and ``species:FOLDER`` (cat or dog); ``torchvision:NAME`` or
    ``torchvision:NAME:FOLDER``; anything else is a folder with ``labels.csv``, or with a folder for each class, or with such
    folders as splits.

    Args:
        clip_boxes: boxes end at the crop; False keeps them as they are, as some published code does.
        train: the part for training, of data that has one.
        encoding: of a folder's ``labels.csv``, see :func:`foveate.data.folder.open_folder`.
        split: of a folder that has several; ``train`` is that for training.

    Raises:
        FoveateError: no such data, or a folder that is laid out otherwise; the message says how.
    """
    if name == "scenes":
        return scenes.make("train" if train else "test", 0, preprocess.crop[0])
    kind, colon, where = name.partition(":")
    openers: dict[str, Callable[[str, Preprocess], Any]] = {
        "imagenet": open_imagenet,
        "pets": open_pets,
        "species": lambda where, preprocess: open_pets(where, preprocess, species=True),
        "torchvision": lambda where, preprocess: open_torchvision(where, preprocess, train=train),
    }
    if colon and kind in openers and not Path(name).exists():
        source = openers[kind](where, preprocess)
    else:
        source = open_folder(name, preprocess, encoding, "train" if train else split)
    return replace(source, clip_boxes=False) if isinstance(source, Folder) and not clip_boxes else source


def open_imagenet(where: str | Path, preprocess: Preprocess) -> Folder:
    """ILSVRC-2012 validation images with the boxes and the class of their XML files, anywhere below one folder.

    Raises:
        FoveateError: no XML files of its images, or a class that is not one of the 1000.
    """
    root = _folder(where, "imagenet")
    files = sorted(walked(root))
    found = {path.stem: path for path in files if path.suffix == ".xml"}
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES and path.stem in found]
    if not pictures:
        raise FoveateError(
            f"{str(root)!r} has no images with XML boxes: ILSVRC2012_val_00000001.JPEG and ILSVRC2012_val_00000001.xml are "
            "looked for, each anywhere below it"
        )
    index = {wnid: number for number, wnid in enumerate(wordnet_ids())}
    entries = []
    for path in pictures:
        wnid, boxes = _read_xml(found[path.stem])
        if wnid not in index:
            raise FoveateError(f"{found[path.stem]} is of {wnid!r}, which is not one of the 1000 classes")
        entries.append(Entry(path, index[wnid], boxes, place=str(found[path.stem])))
    return Folder(tuple(entries), preprocess, None, root)


def _read_xml(path: Path) -> tuple[str, tuple[tuple[float, ...], ...] | None]:
    raw = read_bytes(path)
    try:
        objects = ET.fromstring(raw).findall("object")
        boxes = tuple(
            tuple(float(item.findtext(f"bndbox/{edge}") or "") for edge in ("xmin", "ymin", "xmax", "ymax")) for item in objects
        )
        name = objects[0].findtext("name") or ""
    except (ET.ParseError, LookupError, ValueError):  # LookupError: an encoding that nobody knows, or no object
        raise FoveateError(f"{path} has no object with a bndbox of four numbers") from None
    for box in boxes:
        if impossible(torch.tensor(box, dtype=torch.float64)):
            edges = " ".join(f"{edge:g}" for edge in box)
            raise FoveateError(f"{path} has a bndbox that cannot be: xmin ymin xmax ymax are {edges}: mend it")
    return name, boxes or None


def open_pets(where: str | Path, preprocess: Preprocess, *, species: bool = False) -> Folder:
    """Oxford-IIIT Pet: ``images/``, and ``annotations/`` with ``list.txt`` and ``trimaps/``; the border counts as background.

    Args:
        species: two classes, cat and dog, instead of 37 breeds.

    Raises:
        FoveateError: another layout, or a line of ``list.txt`` that cannot be read.
    """
    root = _folder(where, "pets")
    table = root / "annotations" / "list.txt"
    if not table.is_file():
        raise FoveateError(f"{str(root)!r} is not Oxford-IIIT Pet as it is unpacked: annotations/list.txt is missing")
    entries, breeds = [], {}
    for number, line in enumerate(read_lines(table), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 4 or not all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts[1:]) or "0" in parts[1:3]:
            raise FoveateError(f"{table}, line {number}: a line is 'name class species breed', and this is {line!r}")
        breed, kind = int(parts[1]) - 1, int(parts[2]) - 1
        breeds[breed] = parts[0].rsplit("_", 1)[0].replace("_", " ")
        mask = root / "annotations" / "trimaps" / f"{parts[0]}.png"
        entries.append(
            Entry(
                root / "images" / f"{parts[0]}.jpg",
                kind if species else breed,
                None,
                mask if mask.is_file() else None,
                mask_value=FOREGROUND,
            )
        )
    names = ("cat", "dog") if species else tuple(breeds.get(i, f"breed {i + 1}") for i in range(max(breeds, default=-1) + 1))
    return Folder(tuple(entries), preprocess, names, root)


@dataclass(frozen=True)
class Vision(Dataset[Batch]):
    """A data set of torchvision, with images as a network takes them."""

    source: Any
    preprocess: Preprocess
    class_names: tuple[str, ...] | None
    order: Mapping[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image, label = self.source[index]
        if not isinstance(image, Image.Image):
            raise FoveateError(f"{type(self.source).__name__} does not hold images")
        label = int(label) if self.order is None else self.order[int(label)]
        return Batch(self.preprocess(image.convert("RGB"))[None], torch.tensor([label]), id=(str(index),))

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def labels(self) -> list[int] | None:
        """The labels, where the data set knows them without reading an image."""
        known = next((getattr(self.source, n) for n in ("targets", "_labels", "labels") if hasattr(self.source, n)), None)
        if known is None or len(known) != len(self):
            return None
        return [int(label) if self.order is None else self.order[int(label)] for label in known]

    def renumbered(self, order: Mapping[int, int]) -> Vision:
        """The same images with labels in another numbering."""
        return replace(self, order=order)


def open_torchvision(where: str, preprocess: Preprocess, train: bool = False) -> Vision:
    """``NAME`` or ``NAME:FOLDER``: a classification data set of torchvision, already downloaded; its test part, or ``train``.

    Raises:
        FoveateError: no such data set, or it is not in the folder.
    """
    from foveate._torchvision import torchvision

    name, _, root = where.partition(":")
    root = root or "data"
    kinds = torchvision(f"the data {where!r}").datasets
    if name not in kinds.__all__:
        known = ", ".join(n for n in ("CIFAR10", "CIFAR100", "Flowers102", "Food101", "ImageNet", "OxfordIIITPet", "STL10"))
        raise FoveateError(f"torchvision has no data set {name!r}: it has {known}, and others")
    if name.startswith("LSUN"):
        raise FoveateError(
            f"torchvision keeps an index of {name} as a pickle, and code in it is not run: use a folder of images"
        )
    kind = getattr(kinds, name)
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"train": train} if "train" in parameters else {}
    reason = ""
    wanted = ("train", "trainval", None) if train else ("test", "val", None)
    for split in wanted if "split" in parameters else (None,):
        try:
            source = kind(root, **options, **({} if split is None else {"split": split}))
        except ImportError as error:
            raise FoveateError(f"torchvision's {name} cannot be opened: {error}: install what it needs") from None
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
            continue
        names = getattr(source, "classes", None)
        if not len(source) or not isinstance(source[0][0], Image.Image) or not isinstance(source[0][1], int):
            raise FoveateError(f"torchvision's {name} does not give an image and a class index: it is no classification data")
        return Vision(source, preprocess, tuple(map(str, names)) if names else None)
    raise FoveateError(
        f'{name} cannot be opened in {root!r}: {reason} To fetch it: python -c "from torchvision.datasets import {name}; '
        f"{name}('{root}', download=True)\""
    )


def _folder(where: str | Path, kind: str) -> Path:
    root = Path(where)
    if not root.is_dir():
        raise FoveateError(f"data folder {str(where)!r} does not exist: '{kind}:FOLDER' names where it was unpacked")
    return root
