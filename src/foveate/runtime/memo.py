"""Memo: what was found out about a model, kept while the model lives and has the same modules."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from foveate.runtime.model import modules_of


class Memo:
    """A dictionary for each model, emptied when one of its modules has been replaced, added or taken away.

    Modules are held by weak references: an ``id`` alone is soon given to another object.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[list[weakref.ref[nn.Module]], dict[Any, Any]]]
        self._known = weakref.WeakKeyDictionary()

    def of(self, model: nn.Module) -> dict[Any, Any]:
        """What is known about a model; empty at first."""
        modules = modules_of(model)
        references, known = self._known.get(model, ([], {}))
        same = len(references) == len(modules) and all(r() is m for r, m in zip(references, modules, strict=True))
        if not same:
            known = {}
            self._known[model] = ([weakref.ref(module) for module in modules], known)
        return known
