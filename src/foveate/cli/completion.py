"""Completion in a shell (``foveate --install-completion``): kinds, methods, metrics, recipes, and where a model is from."""

from __future__ import annotations

from pathlib import Path


def _last(incomplete: str, names: list[str]) -> list[str]:
    """Names for the last of a list that commas separate; what stands before it stays."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in names if name.lower().startswith(last.lower())]


def methods(incomplete: str) -> list[str]:
    from foveate.registry import METHODS

    return _last(incomplete, [*METHODS.groups, *METHODS.all()])


def metrics(incomplete: str) -> list[str]:
    from foveate.registry import METRICS

    return _last(incomplete, ["all", *(column for metric in METRICS.all().values() for column in metric.columns)])


def recipes(incomplete: str) -> list[str]:
    from foveate.training.recipe import RECIPES

    own = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    return [name for name in own if name.startswith(incomplete)] + _files(incomplete, (".yaml", ".yml"))


def models(incomplete: str) -> list[str]:
    """``timm:`` and the like; names behind it, once it is there, for reading them takes seconds; and files of Python."""
    source, colon, name = incomplete.partition(":")
    if not colon:
        return [word for word in ("timm:", "torchvision:", "foveate:") if word.startswith(source)] + _files(source, (".py",))
    if source == "timm":
        from foveate._torchvision import timm

        return [f"timm:{known}" for known in timm().list_models(f"{name}*")]
    if source == "torchvision":
        from foveate._torchvision import torchvision

        vision = torchvision().models
        return [f"torchvision:{known}" for known in vision.list_models(module=vision) if known.startswith(name)]
    from foveate.models.sources import OWN

    return [f"foveate:{known}" for known in OWN if source == "foveate" and known.startswith(name)]


def _files(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [f"{path}/" if path.is_dir() else str(path) for path in found if path.is_dir() or path.suffix in suffixes]
    return [name for name in names if name.startswith(incomplete)]
