"""The exceptions and warnings that foveate raises: one sentence that quotes what was given and says what to do."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

# The optional libraries that foveate imports, by the extra of pyproject.toml that installs them.
EXTRAS = {
    "cli": ("typer", "rich"),
    "evaluate": ("pandas", "pyarrow", "scipy"),
    "train": ("lightning", "torchmetrics"),
    "models": ("timm", "torchvision"),
    "report": ("matplotlib", "jinja2"),
    "captum": ("captum",),
    "grad-cam": ("pytorch_grad_cam",),
    "hugging-face": ("transformers", "accelerate"),
    "tensorboard": ("tensorboard",),
}
_EXTRA_OF = {package: extra for extra, packages in EXTRAS.items() for package in packages}


def printable(name: object) -> str:
    r"""A name, such as a path's, as text that any file and terminal in UTF-8 takes: bytes that are none become ``\xff``."""
    text = str(name)
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        raw = text.encode("utf-8", "surrogateescape")  # as Python decodes the names of files
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace")


class FoveateError(ValueError):
    """Something that was asked for cannot be done; the message is one sentence with the remedy."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class LayerError(FoveateError):
    """No layer, or not that layer, can carry a saliency map."""


class ImageError(FoveateError):
    """A file is not an image that can be read; ``path`` is the file."""

    def __init__(self, message: str, path: object = "") -> None:
        super().__init__(message)
        self.path = str(path)


class WriteError(FoveateError):
    """A file cannot be written: the disk is full, or the folder is not writable; what was there before is as it was."""


class DegenerateMapWarning(UserWarning):
    """A saliency map is constant or zero: it carries no information, and is scaled to 0."""


class SlowPathWarning(UserWarning):
    """The result is right, but a faster way could not be taken."""


class NotFiniteError(FoveateError):
    """A model or a loss gave NaN or infinity; ``rows`` are the images of the batch, where it was a model."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class TableWarning(UserWarning):
    """A table was read in another way than it stands there: its encoding, its delimiter, lines that repeat each other."""


class SplitWarning(UserWarning):
    """A folder has splits, such as train, val and test: which of them is taken, or what is the matter with one."""


class MapsWarning(UserWarning):
    """Maps from elsewhere and the images do not quite go together: an image has no map, or a map no image."""


def not_imported(what: str, package: str, error: ImportError) -> FoveateError:
    """Why ``what`` cannot have its ``package``: it is not installed, or what it imports itself is missing or broken."""
    missing = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if missing is not None and (missing == package or missing in _EXTRA_OF):
        install = f"'foveate[{_EXTRA_OF[missing]}]'" if missing in _EXTRA_OF else missing
        return FoveateError(f"{what} needs {missing}, which is not installed: pip install {install}")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return FoveateError(f"{what} needs {package}, which is installed and cannot be imported: {lines[0]}")


def required(what: str, *packages: str) -> None:
    """Import the optional ``packages`` that ``what`` needs.

    Raises:
        FoveateError: one cannot be imported; the message names it and the extra that installs it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise not_imported(what, package, error) from None
