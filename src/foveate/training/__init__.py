"""Train: from a recipe to a model, its film, its outcome, and runs side by side."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
