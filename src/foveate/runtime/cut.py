"""Cut: a model split after a layer with torch.fx, so that only what comes after it runs again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from foveate.runtime.memo import Memo
from foveate.runtime.model import core, read_logits


@dataclass(frozen=True)
class Cut:
    """A model cut after a layer: ``back`` from the layer's output to the logits, ``front`` for what else it reads."""

    back: fx.GraphModule
    front: fx.GraphModule | None


_cuts = Memo()


def cut_after(model: nn.Module, name: str) -> Cut | None:
    """The model cut after a layer with ``torch.fx``; None where it cannot be traced, or the layer runs twice."""
    known: dict[str, Cut | None] = _cuts.of(model)
    if name not in known:
        try:
            known[name] = _cut(model, name)
        except Exception:  # torch.fx raises whatever the model's own code raises on a proxy
            known[name] = None
    return known[name]


class _Tracer(fx.Tracer):
    def __init__(self, leaf: str) -> None:
        super().__init__()
        self.leaf = leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self.leaf or super().is_leaf_module(m, module_qualified_name)


def _cut(model: nn.Module, name: str) -> Cut | None:
    graph = _Tracer(name).trace(model)
    layer = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(layer) != 1:
        return None
    behind, outer, copies = {layer[0]}, [], {}
    back = fx.Graph()
    copies[layer[0]] = back.placeholder("activations")
    pending: list[fx.Node] = []
    for node in graph.nodes:
        if node not in behind and any(source in behind for source in node.all_input_nodes):
            behind.add(node)
            pending.append(node)
    for node in pending:
        for source in node.all_input_nodes:
            if source not in behind and source not in outer and source.op != "get_attr":
                outer.append(source)
    for i, source in enumerate(outer):
        copies[source] = back.placeholder(f"outer_{i}")
    for node in pending:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = back.node_copy(source, lambda n: copies[n])
        copies[node] = back.node_copy(node, lambda n: copies[n])
    front = None
    if outer:
        front_graph = fx.Graph()
        known: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node in behind and node is not layer[0]:
                continue
            if node.op != "output":
                known[node] = front_graph.node_copy(node, lambda n: known[n])
        front_graph.output(tuple(known[source] for source in outer))
        front = fx.GraphModule(model, front_graph)
        front_graph.eliminate_dead_code()
        front.recompile()
    return Cut(fx.GraphModule(model, back), front)


def make_tail(
    model: nn.Module, layer: str, raw: Tensor, x: Tensor, logits: Tensor
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What comes after a layer as a function ``(its output for N images, rows [N]) -> logits``; None where it cannot be cut.

    It is checked on the run at hand: from ``raw``, the layer's own output for ``x``, it must give ``logits``.

    Args:
        rows: which image of ``x`` each of the N belongs to, for what a tail reads from in front of the layer.
    """
    inner, prefix = core(model)
    cut = cut_after(model, prefix + layer if layer in dict(inner.named_modules()) else layer)
    if cut is None:
        return None
    with torch.no_grad():
        outer = cut.front(x) if cut.front is not None else ()
    # A number may be the size of the batch, which is another one when the tail runs.
    if not all(value is None or isinstance(value, bool) or _one_an_image(value, len(x)) for value in outer):
        return None

    # Cloned, so that an in-place layer at the start of the tail cannot overwrite what the caller gave.
    def run(native: Tensor, rows: Tensor) -> Tensor:
        detached = {name: parameter.detach() for name, parameter in cut.back.named_parameters()}
        inputs = [value[rows] if isinstance(value, Tensor) else value for value in outer]
        return read_logits(functional_call(cut.back, detached, (native.clone(), *inputs)))

    with torch.no_grad():
        again = run(raw, torch.arange(len(raw), device=raw.device))
    scale = logits.abs().amax().clamp(min=1e-12)
    same = again.shape == logits.shape and bool((again.to(logits.dtype) - logits).abs().amax() <= 1e-3 * scale)
    return run if same else None


def _one_an_image(value: object, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
