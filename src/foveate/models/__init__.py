"""What can be explained and trained: classifiers from timm, torchvision or a file, and the networks of the talks."""

from foveate._lazy import submodules as _submodules
from foveate.models.load import Classifier, load

__getattr__, __dir__ = _submodules(__name__, __path__)

__all__ = ["Classifier", "load"]
