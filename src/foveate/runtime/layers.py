"""Layers: which layer to look at, and how its output becomes a grid ``[B,K,h,w]``."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError, LayerError
from foveate.runtime.memo import Memo
from foveate.runtime.model import Function, core, detached, eager, evaluating, hooked, modules_of, read_logits, swapped

INPUT = "input"  # the name of the image itself where a layer is asked for
MOST_PREFIX_TOKENS = 9


@dataclass(frozen=True)
class Layout:
    """How the output of a layer lies in memory: ``nchw``, ``nhwc`` or ``tokens`` (with ``prefix`` tokens in front)."""

    kind: Literal["nchw", "nhwc", "tokens"]
    height: int
    width: int
    prefix: int = 0

    def __str__(self) -> str:
        grid = f"{self.height}x{self.width}"
        if self.kind == "tokens":
            return f"{grid} tokens" + (f" after {self.prefix} prefix token(s)" if self.prefix else "")
        return grid if self.kind == "nchw" else f"{grid} channels-last"


def to_grid(raw: Tensor, layout: Layout) -> Tensor:
    """The output of a layer as a grid, ``[B,K,h,w]``; prefix tokens are left out."""
    if layout.kind == "nchw":
        return raw
    if layout.kind == "nhwc":
        return raw.permute(0, 3, 1, 2)
    grid = raw[:, layout.prefix :].transpose(1, 2)  # [B,K,N]
    return grid.reshape(*grid.shape[:2], layout.height, layout.width)


def from_grid(grid: Tensor, raw: Tensor, layout: Layout) -> Tensor:
    """The reverse of :func:`to_grid`; prefix tokens come from ``raw``, the layer's own output for the same images."""
    if layout.kind == "nchw":
        return grid
    if layout.kind == "nhwc":
        return grid.permute(0, 2, 3, 1)
    return torch.cat([raw[:, : layout.prefix], grid.flatten(2).transpose(1, 2)], 1)


def get(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path, with or without the ``model.`` of a normalisation wrapper.

    Raises:
        LayerError: no such path; the message has the nearest ones.
    """
    inner, _ = core(model)
    for root in (inner, model):
        with suppress(AttributeError):
            if name:
                return root.get_submodule(name)
    names = [known for known, _ in inner.named_modules() if known]
    near = difflib.get_close_matches(name, names, 4, 0.6)
    parts = [part for part in names if "." not in part]
    hint = f"did you mean {', '.join(near)}?" if near else f"its parts are {', '.join(parts[:12])}"
    raise LayerError(f"layer {name!r} is not in the model: {hint}")


def resolve(
    model: nn.Module,
    x: Tensor,
    run: Callable[[Tensor], Any],
    given: str | nn.Module | Sequence[str | nn.Module] | None,
) -> list[tuple[str, nn.Module | None]]:
    """What a person writes for a layer, or several, as paths and modules; no module for the image itself.

    None is for those who need no layer.

    Raises:
        LayerError: none was given, or one that the model does not have.
    """
    if given is None:
        return []
    if isinstance(core(model)[0], torch.jit.ScriptModule):
        raise LayerError(
            "a TorchScript model cannot be looked into: give the module that it was scripted or traced from, or take a method "
            f"that asks for no layer: {WITHOUT_LAYERS}"
        )
    if isinstance(core(model)[0], Function) and given != INPUT and not modules_of(core(model)[0])[1:]:
        raise LayerError(
            "a function of images has no layers that can be looked at: give the module that it calls, or take a method that "
            f"asks for no layer: {WITHOUT_LAYERS}"
        )
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, nn.Module)) else [given]
    if not items:
        raise LayerError("no layer was given: name one, or 'auto'")
    if wrong := [item for item in items if not isinstance(item, (str, nn.Module))]:
        raise LayerError(f"a layer is a path such as 'layer4', a module or 'auto', and this is {wrong[0]!r}")
    resolved: list[tuple[str, nn.Module | None]] = []
    for item in items:
        if isinstance(item, nn.Module):
            resolved.append((name_of(model, item), item))
        elif item == INPUT:
            resolved.append((item, None))
        else:
            name = find(model, x, run) if item == "auto" else item
            resolved.append((name, get(model, name)))
    return resolved


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted path of a module in the user's own model.

    Raises:
        LayerError: the module is not part of the model.
    """
    inner, _ = core(model)
    for name, candidate in inner.named_modules():
        if candidate is module:
            return name  # type: ignore[no-any-return]
    raise LayerError(f"the layer given, a {type(module).__name__}, is not a module of this model: name it by its path")


def first_tensor(output: Any) -> Tensor | None:
    """The tensor in what a layer returns: itself, or the first of a tuple or list."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def with_first(output: Any, tensor: Tensor) -> Any:
    """What a layer returned, with its tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return type(output)(tensor, *output[1:])
    return type(output)([tensor, *output[1:]])


def layout_of(shape: torch.Size, image: tuple[int, int], module: nn.Module, model: nn.Module) -> Layout | None:
    """How an output of ``shape`` maps onto an image of ``image`` pixels; None where it has no spatial grid.

    Four dimensions are read as channels-first or channels-last, whichever keeps the image's proportions; where both
    do, by the kind of the module. Three dimensions are tokens: the number of prefix tokens comes from the model
    (``num_prefix_tokens``), else from the patch grids that fit.
    """
    if len(shape) == 4:
        first = _proportional(shape[2], shape[3], image)
        last = _proportional(shape[1], shape[2], image)
        if first == last:
            last = _channels_last(module)
        if last:
            return Layout("nhwc", shape[1], shape[2])
        return Layout("nchw", shape[2], shape[3])
    if len(shape) == 3:
        return token_layout(shape[1], image, model)
    return None


def _proportional(height: int, width: int, image: tuple[int, int]) -> bool:
    if not (1 <= height <= image[0] and 1 <= width <= image[1]):
        return False
    stride = (image[0] * image[1] / (height * width)) ** 0.5
    result: bool = abs(height - image[0] / stride) < 1.01 and abs(width - image[1] / stride) < 1.01
    return result


def _channels_last(module: nn.Module) -> bool:
    leaves = [m for m in module.modules() if not any(True for _ in m.children())]
    return bool(leaves) and isinstance(leaves[-1], (nn.LayerNorm, nn.Linear))


def token_layout(count: int, image: tuple[int, int], model: nn.Module) -> Layout | None:
    """The one grid of square patches that fits; None where none does, or several do and none of them tiles the image."""
    inner, _ = core(model)
    known = getattr(inner, "num_prefix_tokens", None)
    fitting: dict[tuple[int, int, int], bool] = {}
    for patch in range(1, max(image) + 1):
        for up in (0, patch - 1):  # a last patch that is cut off or padded
            height, width = (image[0] + up) // patch, (image[1] + up) // patch
            prefix = count - height * width
            if height * width >= 2 and 0 <= prefix <= MOST_PREFIX_TOKENS and (known is None or prefix == known):
                tiles = image[0] % patch == 0 and image[1] % patch == 0
                fitting[height, width, prefix] = fitting.get((height, width, prefix), False) or tiles
    tiling = [grid for grid, tiles in fitting.items() if tiles]
    sure = tiling if tiling else list(fitting)
    return Layout("tokens", *sure[0]) if len(sure) == 1 else None


@dataclass
class _Event:
    """One module that has run: its place in the model, what it was given and what it gave."""

    name: str
    module: nn.Module
    given: Tensor | None
    output: Tensor  # a view of what it returned, which all that runs afterwards reads
    layout: Layout | None
    number: int  # of earlier calls of the module
    root: int  # the event whose tensor this one handed on, perhaps its own


class _NoGradient(LayerError):
    """Nothing in the model has a gradient to the image."""


@dataclass(frozen=True)
class Call:
    """Which call of a layer to look at: its number, and whether another one would do as well."""

    number: int
    alone: bool


_found = Memo()
_runs = Memo()
WITHOUT_GRADIENTS = "'rise' and 'occlusion' need neither a layer nor a gradient"
WITHOUT_LAYERS = f"'gradient' and 'integrated_gradients' need no layer, and {WITHOUT_GRADIENTS}"
_NORMS = ("norm", "batchnorm", "bn")


def already_found(model: nn.Module, size: tuple[int, ...]) -> str | None:
    """What :func:`find` has found for images of this ``size [K,H,W]``; None before it was asked. Nothing is run."""
    return _found.of(model).get(tuple(size))


def find(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any] | None = None) -> str:
    """The layer that a class activation map should look at: the last one with a grid that the logits depend on.

    One image runs forward and backward once with a look at every layer. Of all layers before the classifier, the last
    grid is taken that depends on the image and that what the classifier reads depends on; pooling layers are passed over
    (a map after a max-pool is full of holes), and the outermost module is named: ``layer4``, not ``layer4.2.relu``,
    which runs three times. A layer with a grid is the classifier only where its channels are the classes: everything of
    the logits goes through it, and each logit depends on a channel of its own (SqueezeNet); a head may have no parameters
    at all, or be missing. In a transformer that classifies from its class token, the patches of the last block's output
    have a gradient of exactly 0: the choice is then the last norm in front of an attention. It is kept for as long as
    the model lives.

    Raises:
        LayerError: no layer has a grid and a gradient.
    """
    key = (*x.shape[1:],)
    known: dict[tuple[int, ...], str] = _found.of(model)
    if key in known:
        return known[key]
    events, logits = _trace(model, x[:1], forward or model)
    name = type(core(model)[0]).__name__
    nodes, counted = upstream(logits), Counter(event.name for event in events)
    if not _sees_image(nodes):
        raise _NoGradient(
            f"no layer of this {name} has a gradient: it runs under torch.no_grad, is quantised, or detaches what it "
            f"computes: {WITHOUT_GRADIENTS}"
        )
    events = [event for event in events if event.output.requires_grad and event.output.grad_fn in nodes]
    events, read = _before_classifier(core(model)[0], events, logits)
    roots = {event.root for event in events if _passes_over(event.module)}
    candidates = [
        event
        for event in events
        if event.layout is not None
        and event.layout.height * event.layout.width > 1
        and event.root not in roots
        and not _beside_the_stream(event)
    ]
    if candidates:
        generator = torch.Generator().manual_seed(0)
        score = (read * torch.randn(read.shape, generator=generator).to(read)).sum()
        gradients = torch.autograd.grad(score, [event.output for event in candidates], allow_unused=True)
        for event, gradient in zip(reversed(candidates), reversed(gradients), strict=True):
            if event.layout is None or gradient is None or not to_grid(gradient, event.layout).any():
                continue
            same = [other for other in candidates if other.root == event.root]
            depth = min(other.name.count(".") for other in same)
            chosen = known[key] = [other.name for other in same if other.name.count(".") == depth][-1]
            if counted[chosen] == 1:
                _runs.of(model)[chosen] = Call(0, True)
            return chosen
    unread = any(event.layout is None and event.output.ndim in (3, 4) for event in events)
    raise LayerError(
        f"no layer of this {name} has both a spatial grid and a gradient at the image size {x.shape[-2]}x{x.shape[-1]}: "
        + ("name one and give its layout, or take another method: " if unread else "")
        + WITHOUT_LAYERS
    )


def advice(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any], tried: str) -> str:
    """What works for a model where the layer ``tried`` does not: another one, or methods that need none."""
    try:
        found = find(model, x, forward)
    except _NoGradient:
        return f"no other has a gradient either; {WITHOUT_GRADIENTS}"
    except FoveateError:
        found = tried
    return f"try {found!r}" if found != tried else f"no other layer will do; {WITHOUT_LAYERS}"


def _before_classifier(inner: nn.Module, events: list[_Event], logits: Tensor) -> tuple[list[_Event], Tensor]:
    """The events in front of the classifier, and what it reads; where it is no layer, all of them, and the logits.

    What it reads and not what it says: networks are often initialised with a classifier of zeros.
    """
    owners = [i for i, event in enumerate(events) if any(p is not None for p in event.module._parameters.values())]
    if not owners:
        return events, logits
    last = events[owners[-1]]
    alone = not _sees_image(upstream(logits, last.output))
    if last.layout is None or last.layout.height * last.layout.width == 1:
        source = last.given
        reads = alone and source is not None and source.requires_grad and source.ndim == 2
        return events, source if reads and source is not None else logits
    # timm's word for a network without a head, and what people put in the place of one.
    headless = getattr(inner, "num_classes", None) == 0 or any(
        isinstance(event.module, nn.Identity) and event.output.ndim == 2 for event in events[owners[-1] :]
    )
    if alone and not headless and _is_classes(last, logits):
        return events[: owners[-1]], logits
    return events, logits


def _is_classes(event: _Event, logits: Tensor) -> bool:
    """Whether the channels of a layer are the classes: each logit depends on a channel of its own, and on no other."""
    name = type(event.module).__name__.lower()
    if event.layout is None or any(word in name for word in _NORMS):
        return False
    columns = logits.shape[1]
    if to_grid(event.output, event.layout).shape[1] != columns:
        return False
    for column in {0, columns - 1}:
        (gradient,) = torch.autograd.grad(logits[:, column].sum(), event.output, retain_graph=True, allow_unused=True)
        if gradient is None:
            return False
        used = to_grid(gradient, event.layout).ne(0).any(3).any(2).any(0)  # [K]
        used[column] = False
        if used.any():
            return False
    return True


def upstream(tensor: Tensor, but: Tensor | None = None) -> set[Any]:
    """The nodes of the graph that a gradient of ``tensor`` reaches, on ways that do not lead through ``but``.

    An operation without a derivative, of a quantised layer say, ends a way: the gradient is lost there in silence.
    """
    seen, waiting = set[Any](), [tensor.grad_fn]
    end = None if but is None else but.grad_fn
    while waiting:
        node = waiting.pop()
        if node is None or node is end or node in seen or "NotImplemented" in node.name():
            continue
        seen.add(node)
        waiting += [source for source, _ in node.next_functions]
    return seen


def reaches(output: Tensor, source: Tensor) -> bool:
    """Whether a gradient of ``output`` reaches ``source``."""
    return any(node is source.grad_fn or getattr(node, "variable", None) is source for node in upstream(output))


def _sees_image(nodes: set[Any]) -> bool:
    return any(hasattr(node, "variable") for node in nodes)  # no other leaf of such a run has a gradient


def run_of(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any], name: str, module: nn.Module) -> Call | None:
    """Which call of a layer to look at: the last one that depends on the image and that the logits depend on, if any do.

    None where none of its calls depends on the image: it looks at another picture, or at a table of prototypes. One image
    runs forward once, and backward where the layer runs several times; it is kept for as long as the model lives.
    """
    known: dict[str, Call | None] = _runs.of(model)
    if name not in known:
        try:
            events, logits = _trace(model, x[:1], forward, {name: module})
        except FoveateError:  # it takes no single image, and has run for these
            return Call(-1, False)
        seeing = [event for event in events if event.output.requires_grad]
        if len(events) > 1 and len(seeing) > 1 and logits.requires_grad:
            nodes = upstream(logits)
            seeing = [event for event in seeing if event.output.grad_fn in nodes] or seeing
        if not events:  # it does not run for this image, which is said elsewhere
            return Call(-1, True)
        blind = not logits.requires_grad and not seeing  # under no_grad nobody can tell
        known[name] = Call(-1, len(events) == 1) if blind else Call(seeing[-1].number, len(seeing) == 1) if seeing else None
    return known[name]


def _trace(
    model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any], only: Mapping[str, nn.Module] | None = None
) -> tuple[list[_Event], Tensor]:
    """Run one image with a look at every module, or some; what each gave, in the order in which they finished.

    No parameter takes part in the graph, so that whatever has a gradient depends on the image.
    """
    inner, _ = core(model)
    image = (x.shape[-2], x.shape[-1])
    events: list[_Event] = []
    roots: dict[int, int] = {}  # by the id of a view, which its event keeps
    runs: dict[str, int] = {}

    def look(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            number = runs[name] = runs.get(name, -1) + 1
            tensor = first_tensor(output)
            if tensor is None or not tensor.is_floating_point():
                return None
            # What is read afterwards: a module may return beside its result what it was given or used inside.
            view = tensor.view_as(tensor) if tensor.requires_grad else tensor
            root = roots.setdefault(id(view), roots.get(id(tensor), len(events)))
            layout = None if only else layout_of(tensor.shape, image, module, model)
            events.append(_Event(name, module, first_tensor(inputs), view, layout, number, root))
            return with_first(output, view)

        return hook

    hooks = [(module, look(name)) for name, module in (inner.named_modules() if only is None else only.items()) if name]
    modules = modules_of(model)
    with hooked(model, hooks), torch.enable_grad(), eager(modules), evaluating(model), swapped(list(detached(modules))):
        logits = read_logits(forward(x.detach().clone().requires_grad_(True).clone()))
    return events, logits


def _passes_over(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Pool" in name and next(module.parameters(), None) is None


def _beside_the_stream(event: _Event) -> bool:
    """Whether an event is a side path or a part of a block, not the stream of features itself."""
    parts = event.name.lower().split(".")
    name = type(event.module).__name__.lower()
    if isinstance(event.module, nn.Identity) or "dropout" in name or "droppath" in name:
        return True
    if event.output.ndim == 4 and not any(word in part for part in parts for word in ("attn", "attention", "mlp")):
        return False
    if any(word in part for part in parts[:-1] for word in ("attn", "attention", "mlp")):
        return True
    if any(word in parts[-1] for word in ("attn", "attention", "mlp")):
        return True
    return not ("norm" in name or any(True for _ in event.module.children()))


def describe(layer: str, layout: Layout, channels: int) -> str:
    """One line on a layer for reports: ``layer4 (2048 x 7x7)``."""
    return f"{layer} ({channels} x {layout})"


def check_grid(layer: str, raw: Tensor, layout: Layout | None, advice: Callable[[], str]) -> Layout:
    """The layout of a layer that was named, when it has a grid of more than one cell.

    Raises:
        LayerError: it has none; the message quotes the shape and says what works instead.
    """
    if layout is not None and layout.height * layout.width > 1:
        return layout
    given = ", or give its layout" if raw.ndim in (3, 4) else ""
    raise LayerError(
        f"layer {layer!r} has no spatial grid that can be told from its shape {list(raw.shape)}: {advice()}{given}"
    )
