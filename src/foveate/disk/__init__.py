"""Files: written whole or not at all, held by one run, read in any encoding, and told from those of the user."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
