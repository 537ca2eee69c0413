"""foveate: where an image classifier looks, whether that picture is true, and how to make it look at the right thing.

Explain, measure, train, measure again. Importing foveate loads torch and nothing heavy; the rest comes on first use.
"""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

from foveate._version import __version__
from foveate.batch import Batch
from foveate.errors import DegenerateMapWarning, FoveateError, ImageError, LayerError, SlowPathWarning
from foveate.evaluation.evaluate import evaluate, measure  # eager: the module has the name of the function
from foveate.explanation.answers import Answers, Explanation, read_explanation
from foveate.explanation.explain import explain, explain_each, saliency
from foveate.registry import loss, method, metric
from foveate.runtime.capture import Capture
from foveate.runtime.memory import keep_memory
from foveate.runtime.model import Normalized, normalized
from foveate.targets import Target

if _typing.TYPE_CHECKING:
    from foveate import (  # noqa: F401
        data,
        evaluation,
        explanation,
        film,
        guided,
        losses,
        methods,
        metrics,
        models,
        report,
        runtime,
        testing,
        torchmetrics,
        training,
    )
    from foveate.losses.centre import cam_loss
    from foveate.methods.cam import contrastive_maps
    from foveate.models.castream import ca_stream
    from foveate.models.classifier import Classifier
    from foveate.models.load import load
    from foveate.models.surgery import contrastive_architecture
    from foveate.training.film import Film


_LAZY = {
    "Classifier": "foveate.models.classifier",
    "Film": "foveate.training.film",
    "ca_stream": "foveate.models.castream",
    "cam_loss": "foveate.losses.centre",
    "contrastive_architecture": "foveate.models.surgery",
    "contrastive_maps": "foveate.methods.cam",
    "load": "foveate.models.load",
}
# What people write in full after `import foveate` alone: foveate.report.film.write(...).
_MODULES = (
    "data",
    "evaluation",
    "explanation",
    "film",
    "guided",
    "losses",
    "methods",
    "metrics",
    "models",
    "report",
    "runtime",
    "testing",
    "torchmetrics",
    "training",
)

__all__ = [
    "Answers",
    "Batch",
    "Capture",
    "Classifier",
    "DegenerateMapWarning",
    "Explanation",
    "Film",
    "FoveateError",
    "ImageError",
    "LayerError",
    "Normalized",
    "SlowPathWarning",
    "Target",
    "__version__",
    "ca_stream",
    "cam_loss",
    "contrastive_architecture",
    "contrastive_maps",
    "evaluate",
    "explain",
    "explain_each",
    "keep_memory",
    "load",
    "loss",
    "measure",
    "method",
    "metric",
    "normalized",
    "read_explanation",
    "saliency",
]


if not _typing.TYPE_CHECKING:  # to a type checker it would say that there is every name

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            return getattr(_importlib.import_module(_LAZY[name]), name)
        if name in _MODULES:
            return _importlib.import_module(f"foveate.{name}")
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
