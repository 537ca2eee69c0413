"""Folders: images on disk with ``labels.csv``, or one folder a class."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from foveate import images
from foveate.batch import Batch
from foveate.errors import FoveateError, ImageError
from foveate.images import Preprocess

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jpe")


@dataclass(frozen=True)
class Entry:
    """One image of a folder: its file, and what ``labels.csv`` says about it."""

    path: Path
    label: int | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None
    mask: Path | None = None
    background: str | None = None
    mask_value: int | None = None  # the value of the object's pixels; above half of the largest where it is None


@dataclass(frozen=True)
class Folder(Dataset[Batch]):
    """Images on disk, read one at a time.

    Attributes:
        entries: one an image, in a stable order.
        preprocess: from a file to what the network takes; boxes and masks follow.
        class_names: in index order, or None where only indices are known.
        clip_boxes: boxes end where the crop ends; False keeps them as they are.
    """

    entries: tuple[Entry, ...]
    preprocess: Preprocess
    class_names: tuple[str, ...] | None = None
    root: Path = Path()
    clip_boxes: bool = True

    def __len__(self) -> int:
        return len(self.entries)

    def name_of(self, index: int) -> str:
        """What an image is called: its path below the folder."""
        path = self.entries[index].path
        return str(path.relative_to(self.root)) if self.root in path.parents else str(path)

    def _has(self, what: str) -> bool:
        """Whether any image has a mask or boxes: one without them in such data has an empty one, and is no number there."""
        known: dict[str, bool] = self.__dict__.setdefault("_known", {})
        if what not in known:
            known[what] = any(getattr(entry, what) is not None for entry in self.entries)
        return known[what]

    def __getitem__(self, index: int) -> Batch:
        """One image as a batch of one.

        Raises:
            ImageError: the file cannot be read.
        """
        entry = self.entries[index]
        image = images.read(entry.path)
        mask = None
        if entry.mask is not None:
            try:
                with Image.open(entry.mask) as opened:
                    if opened.size != image.size:
                        raise ImageError(
                            f"mask {entry.mask} has {opened.size[0]}x{opened.size[1]} pixels, and its image has "
                            f"{image.size[0]}x{image.size[1]}",
                            entry.path,
                        )
                    values = opened if entry.mask_value is None else _only(opened, entry.mask_value)
                    mask = self.preprocess.mask(values)[None]
            except OSError:
                raise ImageError(f"mask {entry.mask} of {entry.path} cannot be read", entry.path) from None
        try:
            boxes = self.preprocess.boxes(entry.boxes or (), image.size, self.clip_boxes) if self._has("boxes") else None
        except ImageError as error:
            raise ImageError(f"{entry.path}: {error}", entry.path) from None
        return Batch(
            x=self.preprocess(image)[None],
            y=None if entry.label is None else torch.tensor([entry.label]),
            mask=mask if mask is not None or not self._has("mask") else torch.zeros(1, *self.preprocess.crop, dtype=torch.bool),
            boxes=None if boxes is None else (boxes,),
            id=(self.name_of(index),),
            background=None if entry.background is None else (entry.background,),
        )

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def renumbered(self, order: Mapping[int, int]) -> Folder:
        """The same images with labels in another numbering, such as that of a model which knows the classes by name."""
        entries = [replace(entry, label=None if entry.label is None else order[entry.label]) for entry in self.entries]
        return replace(self, entries=tuple(entries))


def _only(mask: Image.Image, value: int) -> Image.Image:
    return Image.fromarray(np.uint8(255 * (np.asarray(mask) == value)), "L")


def files_in(folder: Path) -> list[Path]:
    """The image files in a folder and in those below it, by name, but for hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def open_folder(root: str | Path, preprocess: Preprocess) -> Folder:
    """A folder with ``labels.csv`` (``file,class_index[,boxes_xyxy][,mask][,background]``), or a folder for each class in it.

    Without ``class_index`` the column ``name`` is used, its values in alphabetical order.

    Raises:
        FoveateError: no such folder, no images in it, or a line of ``labels.csv`` that cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FoveateError(f"data folder {str(root)!r} does not exist")
    if (root / "labels.csv").is_file():
        entries, names = read_labels(root / "labels.csv")
        return Folder(tuple(entries), preprocess, names, root)
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    entries = [Entry(path, label) for label, folder in enumerate(classes) for path in files_in(folder)]
    if not entries:
        raise FoveateError(f"data folder {str(root)!r} has neither a labels.csv nor a folder of images for each class")
    return Folder(tuple(entries), preprocess, tuple(folder.name for folder in classes), root)


def read_labels(path: Path) -> tuple[list[Entry], tuple[str, ...] | None]:
    """The lines of a ``labels.csv``, and class names where they are known.

    Raises:
        FoveateError: columns are missing, or a value cannot be read; the message has the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "file" not in rows[0] or not ({"class_index", "name"} & set(rows[0])):
        raise FoveateError(f"{path} needs a header with the columns file and class_index (or name), and at least one line")
    by_name = "class_index" not in rows[0]
    names = tuple(sorted({row["name"] for row in rows})) if by_name else None
    entries = []
    for number, row in enumerate(rows, 2):
        try:
            label = names.index(row["name"]) if names is not None else _index(row["class_index"])
            boxes = _boxes(row.get("boxes_xyxy") or "")
        except ValueError as error:
            raise FoveateError(f"{path}, line {number}: {error}") from None
        mask = path.parent / row["mask"] if row.get("mask") else None
        entries.append(Entry(path.parent / row["file"], label, boxes, mask, row.get("background") or None))
    return entries, names


def _index(text: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"class_index {text!r} is not a number from 0")
    return int(text)


def _boxes(text: str) -> tuple[tuple[float, ...], ...] | None:
    if not text.strip():
        return None
    boxes = tuple(tuple(float(value) for value in box.replace(",", " ").split()) for box in text.split(";") if box.strip())
    if any(len(box) != 4 for box in boxes):
        raise ValueError(f"a box is 'x0 y0 x1 y1', several are separated by ';', and this is {text!r}")
    return boxes


def labels_beside(paths: Sequence[Path]) -> list[int | str | None]:
    """The label of each image from a ``labels.csv`` in its folder or in one of the two above; None where there is none.

    An index where the table has ``class_index``, a class name where it has only ``name``.
    """
    known: dict[Path, dict[Path, int | str | None]] = {}
    found: list[int | str | None] = []
    for path in paths:
        label: int | str | None = None
        for folder in list(path.resolve().parents)[:3]:
            table = folder / "labels.csv"
            if table not in known:
                lines, names = read_labels(table) if table.is_file() else ([], None)
                known[table] = {
                    entry.path.resolve(): names[entry.label] if names and entry.label is not None else entry.label
                    for entry in lines
                }
            if (value := known[table].get(path.resolve())) is not None:
                label = value
                break
        found.append(label)
    return found
