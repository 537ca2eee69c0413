"""What can be explained and trained: classifiers from timm, torchvision or a file, and the networks of the talks."""

from foveate.models.load import Classifier, load

__all__ = ["Classifier", "load"]
