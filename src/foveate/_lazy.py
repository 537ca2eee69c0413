"""Lazy: the modules of a package and the names that it hands out, imported when named: ``foveate.report.film.write``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from typing import Any


def submodules(package: str, path: Iterable[str], **handed_out: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package, which find its modules by their names.

    Args:
        handed_out: other names of the package, each with the module that has it.
    """
    names = {module.name for module in pkgutil.iter_modules(path)}

    def find(name: str) -> Any:
        if name in handed_out:
            return getattr(importlib.import_module(f"{package}.{handed_out[name]}"), name)
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        own = vars(sys.modules[package])
        return sorted(names | {name for name in own if name.startswith("__")} | set(own.get("__all__", ())))

    return find, listed
