"""CA-Stream's own map: the raw attention of its token at a stage."""

from __future__ import annotations

from torch import Tensor

from foveate.errors import FoveateError
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.runtime.model import core
from foveate.targets import Target


@method(
    "ca_stream",
    title="CA-Stream attention",
    paper="Torres et al., CA-Stream, 2024, eq. 6",
    signed=True,
    whole=True,
    needs=("stream",),
)
def ca_stream(capture: Capture, layer: str | None, target: Target, *, stage: int = -1) -> Tensor:
    """``S = F_l q_l / sqrt(d_l)``: where the token that stands for pooling looks, ``[B,h,w]``; it ignores the class.

    Before the softmax, as the released code has it; the softmax of the same numbers has the same order.

    Args:
        stage: of the stream, from 0, or from the end as -1.

    Raises:
        FoveateError: the model has no such stream, or no such stage.
    """
    inner, _ = core(capture.model)
    paths = [name for name, module in inner.named_modules() if name.endswith(".attention") and ".stages." in f".{name}"]
    paths = [name for name in paths if hasattr(inner.get_submodule(name.rpartition(".")[0]), "pool")]
    if not paths:
        raise FoveateError(f"ca_stream needs a model with a CA-Stream, and this {type(inner).__name__} has none")
    if not -len(paths) <= stage < len(paths):
        raise FoveateError(f"stage {stage} is not one of the stream's {len(paths)}")
    return capture.again(capture.x, paths[stage]).activations(paths[stage])[:, 0].detach()
