"""One run of any classifier, and running the rest of it or changed images again; nothing is left on the model."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
