"""Shown: who draws an object where a notebook asks it to, found by name, so that imports still point one way."""

from __future__ import annotations

import importlib
from typing import Any


def drawn(module: str) -> Any:
    """A module of ``foveate.report``, loaded when something is looked at and not before."""
    return importlib.import_module(f"foveate.report.{module}")


def listed(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many others there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
