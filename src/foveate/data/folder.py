"""Folders: images on disk with ``labels.csv``, or one folder a class."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from foveate.batch import Batch
from foveate.data import images
from foveate.data.images import Preprocess
from foveate.data.labels import BETWEEN
from foveate.data.layout import chosen_split, files_in, folders_in, split_named, split_of
from foveate.disk.tables import Line, Table, read_table
from foveate.errors import FoveateError, ImageError, TableWarning, printable

COLUMNS = ("file", "class_index", "name", "boxes_xyxy", "mask", "background")
MOST_CLASSES = 10**9
HOT = {"": False, "0": False, "0.0": False, "1": True, "1.0": True}  # cells of a class's own column


@dataclass(frozen=True)
class Entry:
    """One image of a folder: its file, and what ``labels.csv`` says about it."""

    path: Path
    label: int | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None
    mask: Path | None = None
    background: str | None = None
    mask_value: int | None = None  # the value of the object's pixels; above half of the largest where it is None
    place: str = ""  # where its boxes are from, for a sentence
    tag: str = ""  # its label, where images have several, each of which is an entry


@dataclass(frozen=True)
class Folder(Dataset[Batch]):
    """Images on disk, read one at a time.

    Attributes:
        entries: one per image, in a stable order.
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
        """What an image is called: its path below the folder, as text that every file and terminal takes."""
        path = self.entries[index].path
        name = printable(path.relative_to(self.root) if self.root in path.parents else path)
        return name + BETWEEN + printable(self.entries[index].tag) if self.entries[index].tag else name

    @property
    def several(self) -> bool:
        """Whether images have several labels, each of which is an entry."""
        return any(entry.tag for entry in self.entries)

    def _has(self, what: str) -> bool:
        """Whether any image has a mask or boxes: one without them in such data has an empty one, and is no number there."""
        known: dict[str, bool] = self.__dict__.setdefault("_known", {})
        if what not in known:
            known[what] = any(getattr(entry, what) is not None for entry in self.entries)
        return known[what]

    def __getitem__(self, index: int) -> Batch:
        """One image as a batch of one.

        Raises:
            ImageError: the file or its mask cannot be read, or one of its boxes cannot be.
        """
        entry = self.entries[index]
        image = self.preprocess.read(entry.path)
        mask = None
        if entry.mask is not None:
            opened = images.read_mask(entry.mask, entry.path)
            if opened.size != image.size:
                raise ImageError(
                    f"mask {entry.mask} has {opened.size[0]}x{opened.size[1]} pixels, and its image has "
                    f"{image.size[0]}x{image.size[1]}",
                    entry.path,
                )
            mask = self.preprocess.mask(opened if entry.mask_value is None else _only(opened, entry.mask_value))[None]
        boxes = None
        if self._has("boxes"):
            for box in entry.boxes or ():
                _check_box(box, image.size, entry)
            left = self.preprocess.boxes(entry.boxes or (), image.size, self.clip_boxes)
            inside = (left >= 0).all(1) & (left <= 1).all(1)  # less than a pixel is left: nothing
            boxes = (torch.where(inside[:, None], 0.0, left),)
        return Batch(
            x=self.preprocess(image)[None],
            y=None if entry.label is None else torch.tensor([entry.label]),
            mask=mask if mask is not None or not self._has("mask") else torch.zeros(1, *self.preprocess.crop, dtype=torch.bool),
            boxes=boxes,
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


def _check_box(box: Sequence[float], size: tuple[int, int], entry: Entry) -> None:
    width, height = size
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        reason = "holds no numbers to count with"
    elif x1 <= x0 or y1 <= y0:
        reason = "is turned round: a box is x0 y0 x1 y1 with x0 < x1 and y0 < y1"
    elif x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        reason = f"lies outside of the image of {width}x{height} pixels"
    elif max(x1, y1) <= 1:
        reason = f"looks like shares of the image: boxes are pixels of the stored file, which has {width}x{height}"
    else:
        return
    where = f"{entry.place}: the" if entry.place else "its"
    raise ImageError(f"{entry.path}: {where} box '{x0:g} {y0:g} {x1:g} {y1:g}' {reason}", entry.path)


def open_folder(root: str | Path, preprocess: Preprocess, encoding: str | None = None, split: str | None = None) -> Folder:
    """A folder with ``labels.csv`` (``file,class_index[,boxes_xyxy][,mask][,background]``), or a folder for each class in it.

    Without ``class_index`` the column ``name`` is used, its values in alphabetical order. Of a folder with splits (see
    :func:`foveate.data.layout.splits_in`) one is taken; its classes have the numbers that they have in the training split.

    Args:
        encoding: of ``labels.csv``, where it has no byte-order mark and is not UTF-8, such as ``cp1252``.
        split: which one: ``train``, ``val`` or ``test``; where it is None the first there is of test, val and train, which is
            said in a warning.

    Raises:
        FoveateError: no such folder or split, no images in it, splits with classes that training has not, or a line of
            ``labels.csv`` that cannot be read.
    """
    if not str(root):
        raise FoveateError("the data folder has no name: '' is none; '.' is the folder that you are in")
    given = split_named(Path(root))
    if not given.is_dir():
        raise FoveateError(f"data folder {str(root)!r} does not exist")
    chosen = chosen_split(given, split)
    whole = _open_whole(chosen, preprocess, encoding)
    train = (
        None
        if split_of(chosen) in (None, "train")
        else next((folder for folder in folders_in(chosen.resolve().parent) if split_of(folder) == "train"), None)
    )
    names = None if train is None or whole.class_names is None else _classes_of(train, encoding)
    if names and (chosen != given or set(whole.class_names or ()) <= set(names)):
        return numbered_alike(whole, names, chosen)
    return whole


def _open_whole(root: Path, preprocess: Preprocess, encoding: str | None) -> Folder:
    if (root / "labels.csv").exists():
        entries, names = read_labels(root / "labels.csv", encoding)
        return Folder(tuple(entries), preprocess, names, root)
    classes = folders_in(root)
    entries = [Entry(path, label) for label, folder in enumerate(classes) for path in files_in(folder, preprocess.channels)]
    if not entries:
        raise FoveateError(f"data folder {str(root)!r} has neither a labels.csv nor a folder of images for each class")
    return Folder(tuple(entries), preprocess, tuple(printable(folder.name) for folder in classes), root)


def _classes_of(root: Path, encoding: str | None) -> tuple[str, ...] | None:
    """The class names of a folder; no image is looked for."""
    table = root / "labels.csv"
    return read_labels(table, encoding)[1] if table.exists() else tuple(printable(folder.name) for folder in folders_in(root))


def numbered_alike(data: Folder, names: Sequence[str], where: object) -> Folder:
    """Classes by name with the numbers that they have in training, also where this split lacks some of them.

    Raises:
        FoveateError: a class that training has not.
    """
    own = data.class_names or ()
    if unknown := [name for name in own if name not in names]:
        raise FoveateError(f"{str(where)!r} has the class {unknown[0]!r}, and the training data has not")
    return replace(data.renumbered({i: names.index(name) for i, name in enumerate(own)}), class_names=tuple(names))


def read_labels(path: Path, encoding: str | None = None) -> tuple[list[Entry], tuple[str, ...] | None]:
    """The images of a ``labels.csv``, and class names where they are known.

    As spreadsheets write it, see :func:`foveate.disk.tables.read_table`. Lines of one image are taken together: boxes of
    several lines all count, and a line that repeats another does not; it is said.

    Raises:
        FoveateError: columns are missing, a value cannot be read, or two lines of an image disagree; the message has the line.
    """
    needs = "the columns file and class_index (or name)"
    table = read_table(path, COLUMNS, needs, encoding)
    labels, names = _labels_of(table, needs)
    several = any(len(of_line) != 1 for of_line in labels)
    found: dict[tuple[str, str], tuple[Line, Entry]] = {}
    moved, without = 0, 0
    repeated: list[int] = []
    for line, of_line in zip(table.lines, labels, strict=True):
        without += not of_line
        for label in of_line:
            tag = (names[label] if names else str(label)) if several else ""
            try:
                entry, elsewhere = _entry(table, line, label, tag)
            except ValueError as error:
                raise FoveateError(f"{table.place(line)}: {error}") from None
            moved += elsewhere
            key, first = (os.path.normpath(entry.path), tag), line
            if key in found:
                repeated += [line.number] * (not repeated or repeated[-1] != line.number)
                entry = _joined(table, found[key], (line, entry))
                first = found[key][0]
            found[key] = first, entry
    entries = [entry for _, entry in found.values()]
    if without:
        warnings.warn(f"{printable(path)}: {without} image(s) have no label, and are passed over", TableWarning, stacklevel=2)
    boxes = [box for entry in entries for box in entry.boxes or ()]
    if boxes and all(0 <= value <= 1 for box in boxes for value in box):
        place = next(entry.place for entry in entries if entry.boxes)
        raise FoveateError(
            f"{place}: boxes are pixels of the stored file, and these look like shares of it, such as {boxes[0]}: "
            "multiply x by the width and y by the height"
        )
    if repeated:
        lines = ", ".join(map(str, repeated[:5])) + (" and others" if len(repeated) > 5 else "")
        verb = "repeats" if len(repeated) == 1 else "repeat"
        warnings.warn(
            f"{printable(path)}: line {lines} {verb} an image that is listed above; each image counts once",
            TableWarning,
            stacklevel=2,
        )
    if moved:
        warnings.warn(
            f"{printable(path)}: {moved} path(s) are of another machine; the files of these names below its folder were taken",
            TableWarning,
            stacklevel=2,
        )
    return entries, names


def _labels_of(table: Table, needs: str) -> tuple[list[list[int]], tuple[str, ...] | None]:
    """The labels of each line, and class names where they are known.

    A cell of several indices or names has ``;`` between them. Without ``class_index`` and ``name``, columns of 0 and 1 are
    classes.

    Raises:
        FoveateError: no such columns, or a label that is none; the message has the line.
    """
    if "class_index" not in table.columns and "name" not in table.columns:
        classes = [name for name in dict.fromkeys(table.columns) if name and name not in COLUMNS]
        classes = [name for name in classes if {line.cells.get(name, "") for line in table.lines} <= set(HOT)]
        classes = [name for name in classes if any(HOT[line.cells.get(name, "")] for line in table.lines)]
        if len(classes) < 2:
            raise FoveateError(f"{table.path} needs a header with {needs}, and it has {', '.join(filter(None, table.columns))}")
        return [[i for i, name in enumerate(classes) if HOT[line.cells.get(name, "")]] for line in table.lines], tuple(classes)
    column = "class_index" if "class_index" in table.columns else "name"
    parts = [[part.strip() for part in line.cells[column].split(";") if part.strip()] or [""] for line in table.lines]
    if column == "name":  # a name may hold a semicolon: such a cell is several names where another cell has one of them
        cells = {line.cells[column]: set(own) for line, own in zip(table.lines, parts, strict=True)}
        lines_of = Counter(part for own in cells.values() for part in own)
        whole = [line.cells[column] for line in table.lines]
        parts = [own if any(lines_of[p] > 1 for p in own) else [cell] for own, cell in zip(parts, whole, strict=True)]
    names = tuple(sorted({part for own in parts for part in own})) if column == "name" else None
    index = {name: number for number, name in enumerate(names or ())}
    labels = []
    for line, own in zip(table.lines, parts, strict=True):
        try:
            if names is not None and own == [""]:
                raise ValueError("the class has no name")
            labels.append(list(dict.fromkeys(index[part] if names is not None else _index(part) for part in own)))
        except ValueError as error:
            raise FoveateError(f"{table.place(line)}: {error}") from None
    return labels, names


def _entry(table: Table, line: Line, label: int, tag: str) -> tuple[Entry, bool]:
    """The image of one line, and whether its path is that of another machine."""
    cells, root = line.cells, table.path.parent
    if not cells["file"]:
        raise ValueError("the file has no name")
    path, elsewhere = _file(root, cells["file"])
    mask = _file(root, cells["mask"])[0] if cells.get("mask") else None
    boxes = _boxes(cells.get("boxes_xyxy", ""))
    return Entry(path, label, boxes, mask, cells.get("background") or None, place=table.place(line), tag=tag), elsewhere


def _file(root: Path, name: str) -> tuple[Path, bool]:
    r"""The file of a cell; of a path of Windows (``C:\photos\a.jpg``) as much as is there below the folder."""
    path = root / name
    if os.name == "nt" or "\\" not in name or path.exists():
        return path, False
    foreign = PureWindowsPath(name)
    if not foreign.anchor:
        return root.joinpath(*foreign.parts), False
    parts = foreign.parts[1:]
    there = (root.joinpath(*parts[start:]) for start in range(len(parts)))
    found = next((path for path in there if path.is_file()), None)
    return (path, False) if found is None else (found, True)


def _joined(table: Table, first: tuple[Line, Entry], second: tuple[Line, Entry]) -> Entry:
    """Two lines of one image: their boxes together, where nothing else differs."""
    (above, old), (line, new) = first, second
    label = "class_index" if "class_index" in line.cells else "name"
    for column, same in ((label, old.label == new.label), ("mask", old.mask == new.mask), ("background", True)):
        before, now = above.cells.get(column, ""), line.cells.get(column, "")
        if not same or (column == "background" and before != now):
            raise FoveateError(
                f"{table.place(line)}: {line.cells['file']!r} stands in line {above.number} too, with the {column} {before!r} "
                f"instead of {now!r}: an image has one line"
            )
    boxes = (*(old.boxes or ()), *(box for box in new.boxes or () if box not in (old.boxes or ())))
    return replace(old, boxes=boxes or None)


def _index(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}(\.0*)?", text) or int(text.partition(".")[0]) > MOST_CLASSES:
        raise ValueError(f"class_index {text[:40]!r} is not a number from 0, nor several with semicolons, as 1;7")
    return int(text.partition(".")[0])


def _boxes(text: str) -> tuple[tuple[float, ...], ...] | None:
    r"""Boxes ``x0 y0 x1 y1``, with blanks or commas between; of four numbers between blanks a comma is that of decimals."""
    boxes = []
    for box in text.split(";"):
        parts = box.split()
        if len(parts) == 4 and any(re.fullmatch(r"-?\d+,\d+", part) for part in parts):
            parts = [part.replace(",", ".") for part in parts]
        else:
            parts = box.replace(",", " ").split()
        try:
            if parts:
                boxes.append(tuple(map(float, parts)))
        except ValueError:
            parts = []
        if box.strip() and len(parts) != 4:
            raise ValueError(f"a box is 'x0 y0 x1 y1', several are separated by ';', and this is {text[:80]!r}")
    return tuple(boxes) or None


def labels_beside(paths: Sequence[Path], encoding: str | None = None) -> list[list[int | str]]:
    """The labels of each image from a ``labels.csv`` in its folder or in one of the two above; empty where there is none.

    An index where the table has ``class_index``, a class name where it has only ``name``; ``encoding`` is as in
    :func:`open_folder`.
    """
    known: dict[Path, dict[Path, list[int | str]]] = {}
    found: list[list[int | str]] = []
    for path in paths:
        labels: list[int | str] = []
        for folder in list(path.resolve().parents)[:3]:
            table = folder / "labels.csv"
            if table not in known:
                lines, names = read_labels(table, encoding) if table.is_file() else ([], None)
                known[table] = {}
                for entry in lines:
                    if entry.label is not None:
                        label = names[entry.label] if names else entry.label
                        known[table].setdefault(entry.path.resolve(), []).append(label)
            if labels := known[table].get(path.resolve(), []):
                break
        found.append(labels)
    return found
