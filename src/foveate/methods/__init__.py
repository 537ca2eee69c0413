"""Extension point: ways to make a map; every file here is read on the first look-up in the registry."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
