"""Classifiers from timm, torchvision or a file, and the networks of the papers."""

from foveate._lazy import submodules as _submodules

__getattr__, __dir__ = _submodules(__name__, __path__, Classifier="classifier")

__all__ = ["Classifier"]
