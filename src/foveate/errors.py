"""The exceptions and warnings that foveate raises: one sentence that quotes what was given and says what to do."""

from __future__ import annotations


class FoveateError(ValueError):
    """Something that was asked for cannot be done; the message is one sentence with the remedy."""


class LayerError(FoveateError):
    """No layer, or not that layer, can carry a saliency map."""


class ImageError(FoveateError):
    """A file is not an image that can be read; ``path`` is the file."""

    def __init__(self, message: str, path: object = "") -> None:
        super().__init__(message)
        self.path = str(path)


class DegenerateMapWarning(UserWarning):
    """A saliency map is constant or zero: it carries no information, and is scaled to 0."""


class SlowPathWarning(UserWarning):
    """The result is right, but a faster way could not be taken."""


class NotFiniteError(FoveateError):
    """A model or a loss gave NaN or infinity."""


def not_imported(what: str, package: str, install: str, error: ImportError) -> FoveateError:
    """Why ``what`` cannot have its ``package``: it is not installed, or what it imports itself is not there or is broken.

    Args:
        install: what is given to ``pip install``.
    """
    if isinstance(error, ModuleNotFoundError) and error.name is not None and error.name.split(".")[0] == package:
        return FoveateError(f"{what} needs {package}, which is not installed: pip install {install}")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return FoveateError(f"{what} needs {package}, which is installed and cannot be imported: {lines[0]}")
