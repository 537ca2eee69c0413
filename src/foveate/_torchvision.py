"""torchvision beside a PyTorch build that its compiled operators were not made for: importable all the same.

With PyTorch's CPU build, PyPI's torchvision cannot load its compiled operators, and its import fails because it
registers shapes for operators that do not exist. Nothing here uses those operators, so their schemas are declared, only
when the import fails in this way, and the import is tried again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from foveate.errors import required

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library that is collected takes its schemas with it


def mend() -> None:
    """Make torchvision importable for the libraries that import it; nothing where it is not installed."""
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
        import torchvision  # noqa: F401


def torchvision(what: str = "this model") -> ModuleType:
    """The module torchvision, imported on first use.

    Raises:
        FoveateError: ``what`` needs it, and it is not installed.
    """
    mend()
    required(what, "torchvision")
    import torchvision as module

    return module  # type: ignore[no-any-return]


def timm(what: str = "this model") -> ModuleType:
    """The module timm, imported on first use.

    Raises:
        FoveateError: ``what`` needs it, and it is not installed.
    """
    mend()
    required(what, "timm")
    import timm as module

    return module


@contextmanager
def only_tensors() -> Iterator[None]:
    """Within, ``torch.load`` runs no code also where a library asks it to, as torchvision does with what it downloads."""
    force, never = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (force, never) if name in os.environ}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update(before)
