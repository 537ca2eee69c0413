"""Tables, pictures and pages, one file for each thing that is shown."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
