"""Explain: many methods on a batch from one run, and what each map answers."""

from foveate._lazy import submodules as _submodules
from foveate.explanation.answers import Answers, Explanation, read_explanation
from foveate.explanation.explain import explain, explain_each, saliency  # eager: the module has the name of the function

__getattr__, __dir__ = _submodules(__name__, __path__)

__all__ = ["Answers", "Explanation", "explain", "explain_each", "read_explanation", "saliency"]
