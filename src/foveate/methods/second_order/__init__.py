"""The solver behind CAFO and CASO: curvature, sparse maximisation, solutions."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__)
