"""Measure: methods x metrics x data, to every value of every image, to tables, findings and comparisons."""

from foveate._lazy import submodules as _submodules
from foveate.evaluation.evaluate import evaluate, measure  # eager: the module has the name of the function
from foveate.evaluation.protocol import Protocol
from foveate.evaluation.results import Results

__getattr__, __dir__ = _submodules(__name__, __path__)

__all__ = ["Protocol", "Results", "evaluate", "measure"]
