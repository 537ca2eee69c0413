"""Extension point: what is added to cross-entropy."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
