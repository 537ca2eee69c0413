"""Lazy: the modules of a package as attributes of it, imported when they are named: ``foveate.report.film.write``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import ModuleType


def submodules(package: str, path: Iterable[str]) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package, which find its modules by their names."""
    names = {module.name for module in pkgutil.iter_modules(path)}

    def find(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        own = vars(sys.modules[package])
        return sorted(names | {name for name in own if name.startswith("__")} | set(own.get("__all__", ())))

    return find, listed
