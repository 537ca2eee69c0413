"""The images that a call names: files and folders of them, labels beside them, read as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import FoveateError, ImageError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.data.crops import Crops
    from foveate.models.classifier import Classifier


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, the name of what is written of it, and its label where one is asked for."""

    path: Path
    stem: str
    x: Tensor  # [C,H,W]
    label: int | None = None
    frame: tuple[float, float, float, float] | None = None  # of what the model saw, in pixels of the file
    cropped: float = 0.0  # share of the file that it did not see
    shown: Tensor | None = None  # x, where the file itself is no photograph
    crops: Crops | None = None  # in which the model sees x, where that is not at once


@dataclass(frozen=True)
class Pictures:
    """Images by path; only those of one batch are in memory.

    Attributes:
        stems: one per image, none twice: files of the same name in different folders get a number.
        labels: the class of each, or why there is none.
        labelled: whether an image without a label is a failure.
        crop: of :data:`foveate.data.images.CROPS`, or None for the model's own.
        failures: images that cannot be read, or have no label, with the reason; it grows as they are read.
    """

    paths: list[Path]
    stems: list[str]
    labels: list[int | str]
    labelled: bool = False
    crop: str | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def named(
        cls,
        names: Sequence[str],
        classifier: Classifier,
        labelled: bool,
        encoding: str | None = None,
        crop: str | None = None,
    ) -> Pictures:
        """The images of files and folders, each once; in folders, what foveate wrote is no image.

        Raises:
            FoveateError: a ``labels.csv`` that cannot be read, where labels are asked for.
        """
        paths = list({path.resolve(): path for name in names for path in _files(Path(name), classifier)}.values())
        labels: list[int | str]
        try:
            labels = _labels(paths, classifier, encoding)
        except FoveateError as error:
            if labelled:
                raise
            labels = [str(error)] * len(paths)
        return cls(paths, _stems(paths), labels, labelled, crop)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Iterable[int], classifier: Classifier) -> list[Picture]:
        """Images that can be read; the others go to ``failures``."""
        from foveate.data import images
        from foveate.data.crops import Crops

        found = []
        for row in rows:
            path, label = self.paths[row], self.labels[row]
            try:
                if path.is_dir():
                    raise ImageError(f"{path} is a folder without images")
                photograph = classifier.preprocess.read(path)
                if isinstance(label, str) and self.labelled:
                    raise ImageError(label)
                own, size = classifier.preprocess, photograph.size
                way = own if self.crop is None else own.cropped(self.crop, size)
                frame, known = way.frame(size), None if isinstance(label, str) else label
                x, cropped = way(photograph), images.cropped_away(frame, size)
                shown = x if isinstance(photograph, images.Bands) else None
                crops = Crops(way.crop, own.crop) if self.crop == "ten" else None
                found.append(Picture(path, self.stems[row], x, known, frame, cropped, shown, crops))
            except ImageError as error:
                self.failures.append((str(path), str(error)))
        return found


def _files(path: Path, classifier: Classifier) -> list[Path]:
    """A file, or the images of a folder or of one of its splits; an empty one stays as it is, and fails when it is read."""
    from foveate.data.layout import chosen_split, files_in, split_named
    from foveate.disk.written import is_written

    path = split_named(path)
    with suppress(FoveateError):  # images need no classes: folders that are no splits are all taken
        path = chosen_split(path)
    if not path.is_dir():
        return [path]
    return [file for file in files_in(path, classifier.preprocess.channels) if not is_written(file)] or [path]


def _stems(paths: Sequence[Path]) -> list[str]:
    taken: dict[str, None] = {}
    for path in paths:
        stem, number = path.stem, 2
        while stem in taken:
            stem, number = f"{path.stem}_{number}", number + 1
        taken[stem] = None
    return list(taken)


def _labels(paths: Sequence[Path], classifier: Classifier, encoding: str | None) -> list[int | str]:
    """The class of each image by the ``labels.csv`` beside it, or by its folder where that has the name of a class."""
    from foveate.data.folder import labels_beside

    labels: list[int | str] = []
    called = cache(classifier.classes_called)  # folders are few, images many
    for path, beside in zip(paths, labels_beside(paths, encoding), strict=True):
        count = None if classifier.class_names is None else len(classifier.class_names)
        if len(beside) > 1:
            several = ", ".join(printable(str(one)) for one in beside)
            labels.append(f"{printable(path)} has several labels ({several}): name the one to explain as --target")
            continue
        label = beside[0] if beside else None
        if label is None:
            around = [called(folder.name) for folder in list(path.resolve().parents)[:2]]
            label = next((classes[0] for classes in around if len(classes) == 1), None)
        try:
            found = classifier.class_index(label) if isinstance(label, str) else label
        except FoveateError as error:
            labels.append(f"{printable(path)}: its label in labels.csv: {error}")
            continue
        if found is None:
            labels.append(
                f"{printable(path)} has no label: no labels.csv beside it has a line for it, and its folder is no class's name"
            )
        elif count is not None and found >= count:
            labels.append(f"{printable(path)}: its label in labels.csv is {found}, and the model has {count} classes, from 0")
        else:
            labels.append(found)
    return labels
