"""Images with labels, masks and boxes: from files, benchmarks and drawn scenes."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
