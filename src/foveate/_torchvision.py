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

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library that is collected takes its schemas with it


def torchvision() -> ModuleType:
    """The module torchvision, imported on first use; also what timm needs before it is imported."""
    try:
        import torchvision as module
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
        import torchvision as module
    return module


def timm() -> ModuleType:
    """The module timm, imported on first use."""
    torchvision()
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
