"""Guided backpropagation as a context: ``foveate.guided.guided``; it lives in ``foveate.runtime``."""

from foveate.runtime.guided import guided as guided
