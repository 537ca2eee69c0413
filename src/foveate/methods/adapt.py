"""Adapters: attributions of Captum and of pytorch-grad-cam as methods, in the same tables as ours.

By name, ``captum.Lime`` or ``pytorch_grad_cam.EigenCAM``, or as an object: ``adapt(captum.attr.Lime)``.
"""

from __future__ import annotations

import importlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate._torchvision import mend
from foveate.errors import FoveateError, not_imported
from foveate.methods.gradient import Colour, over_colour
from foveate.precision import casting
from foveate.registry import METHODS, Method
from foveate.runtime import layers as L
from foveate.runtime.capture import Capture
from foveate.runtime.linear_head import at_least_float32
from foveate.runtime.model import eager, modules_of, read_logits, unwrap
from foveate.targets import Target

Segments = Callable[[Tensor], Tensor]
FOLDERS = {"captum": "captum.attr", "pytorch_grad_cam": "pytorch_grad_cam"}
# What is given to them here: no setting.
OURS = {"self", "inputs", "target", "targets", "input_tensor", "additional_forward_args", "feature_mask", "args", "kwargs"}


def adapt(
    attribution: Any,
    name: str | None = None,
    *,
    colour: Colour = "sum",
    cells: int = 14,
    segments: Segments | None = None,
    seed: int = 0,
    **options: Any,
) -> Method:
    """An attribution of Captum or a CAM of pytorch-grad-cam as a :class:`Method`.

    A class is built for the model that is explained, and for its layer where it asks for one; an object is used as it
    is, and must have been built for the same model. Images are in [0, 1]; masked or missing is black. What the model
    returns is read as everywhere (a tuple, ``.logits``), and any score of any head can be explained; objects for Captum
    are asked for logits alone. What ``attribute`` or the call takes are settings, as are the arguments here:
    ``--set captum.Lime.n_samples=2000``; for pytorch-grad-cam only ``seed`` of these has a meaning.

    Args:
        attribution: a class or an object of ``captum.attr`` or ``pytorch_grad_cam``.
        name: in tables; ``captum.Lime`` where it is None.
        colour: how attributions of three channels become one map: ``sum``, ``sum_abs``, ``max_abs``.
        cells: methods that switch segments on and off (LIME, KernelSHAP) get a grid of so many cells a side,
        segments: or what this returns: ``x [B,C,H,W]`` to integer labels from 0, ``[B,H,W]`` (scikit-image's, say).
        seed: of methods that draw samples, each image alone, so that a batch gives what single images give.
        **options: of ``attribute`` (Captum) or of the call (pytorch-grad-cam), such as ``n_samples``.

    Raises:
        FoveateError: neither of the two; built for another model; a score that such an object cannot be asked for.
    """
    kind = attribution if inspect.isclass(attribution) else type(attribution)
    library = next((c.__module__.split(".")[0] for c in kind.__mro__ if c.__module__.split(".")[0] in FOLDERS), None)
    if library is None:
        raise FoveateError(
            f"{kind.__name__} is neither from captum.attr nor from pytorch_grad_cam: register a function instead"
        )
    title = name or f"{library}.{kind.__name__}"

    def function(capture: Capture, layer: str | None, target: Target, **settings: Any) -> Tensor:
        own = {**defaults, **settings}
        given = {key: own.pop(key) for key in ours if key in own}
        with torch.inference_mode(False), torch.enable_grad(), _kept(capture.model), eager(modules_of(capture.model)):
            try:
                if library == "captum":
                    return _captum(attribution, capture, layer, target, **given, options=own)
                return _pytorch_grad_cam(attribution, capture, layer, target, given["seed"], own)
            except (FoveateError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise FoveateError(f"{title} cannot explain this model: {reason}") from error

    ours: dict[str, Any] = {"seed": seed}
    if library == "captum":
        ours |= {"colour": colour, "cells": cells, "segments": segments}
    defaults = {**ours, **options}
    settable = list(dict.fromkeys([*defaults, *_options_of(attribution)]))
    positional = list(inspect.signature(function).parameters.values())[:3]
    own = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(key)) for key in settable]
    function.__signature__ = inspect.Signature(positional + own)  # type: ignore[attr-defined]
    function.__annotations__ |= {"seed": int} | ({"colour": Colour, "cells": int} if library == "captum" else {})
    function.__doc__ = f"{kind.__name__} of {library}."
    return Method(title, title, function, f"{library}", signed=library == "captum")


def _options_of(attribution: Any) -> list[str]:
    """What a person may set of theirs: what ``attribute`` takes (Captum), or the call (pytorch-grad-cam)."""
    call = getattr(attribution, "attribute", None) or (
        attribution.__call__ if inspect.isclass(attribution) else type(attribution).__call__
    )
    try:
        return [key for key in inspect.signature(call).parameters if key not in OURS]
    except (TypeError, ValueError):
        return []


class _Asked(nn.Module):
    """A model as other people's code can ask it: its logits ``[N,C]``, or the score ``[N]`` of one image in many forms."""

    def __init__(self, capture: Capture, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.training = capture.model, capture.model.training
        self.autocast = autocast
        self.score: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        with casting(x.device.type, self.autocast):
            logits = at_least_float32(read_logits(self.model(x)))
        return logits if self.score is None else self.score(logits)


@contextmanager
def _seeded(seed: int, x: Tensor) -> Iterator[None]:
    """The generators of torch, numpy and Python from one seed; as they were afterwards."""
    arrays, numbers = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(arrays)
            random.setstate(numbers)


def _captum(
    attribution: Any,
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    colour: Colour,
    cells: int,
    segments: Segments | None,
    seed: int,
    options: dict[str, Any],
) -> Tensor:
    plain = target.name == "logit" and capture.head != "binary"
    if not plain and not inspect.isclass(attribution):
        raise FoveateError(
            f"an object of Captum explains one output of its model, and a {target.name!r} of a {capture.head} head is none: "
            f"give the class {type(attribution).__name__}"
        )
    asked = _Asked(capture, capture.autocast)
    explainer = _built(attribution, capture, layer, asked)
    if type(explainer).__name__ in ("FeaturePermutation", "LayerFeaturePermutation"):
        raise FoveateError(
            "permuting features mixes the images of a batch, so that each map depends on the others: use 'occlusion'"
        )
    taken = inspect.signature(explainer.attribute).parameters
    x = capture.images
    # Baselines that are no image's own; DeepLiftShap asks for two at least.
    shap = type(explainer).__name__ in ("GradientShap", "DeepLiftShap")
    given: dict[str, Any] = {"target": target.y} if plain else {}
    if "feature_mask" in taken:
        labels = _grid(capture.size, cells).expand(len(x), -1, -1) if segments is None else segments(x)
        given["feature_mask"] = labels.to(x.device)[:, None].expand_as(x).contiguous()
    if "baselines" in taken and taken["baselines"].default is inspect.Parameter.empty:
        given["baselines"] = torch.zeros_like(x[:1].expand(2, -1, -1, -1) if shap else x)
    if "sliding_window_shapes" in taken:
        window = [max(2, side // 7) for side in capture.size]
        given |= {"sliding_window_shapes": (x.shape[1], *window), "strides": (x.shape[1], *(side // 2 for side in window))}
    if "perturbations_per_eval" in taken:
        given["perturbations_per_eval"] = capture.chunk_size()
    if "internal_batch_size" in taken:
        given["internal_batch_size"] = max(len(x), capture.chunk_size("backward"))
    if type(explainer).__name__ in ("Lime", "KernelShap"):
        given["n_samples"] = 1000  # Captum's default of 50 cannot fit a model of more segments than that
    given |= options
    # Other scores are functions of the logits of one image, in whatever number Captum repeats it.
    alone = not plain or any(word in taken for word in ("n_samples", "nt_samples", "stdevs"))
    parts = []
    for rows in [slice(i, i + 1) for i in range(len(x))] if alone else [slice(None)]:
        own = {k: v for k, v in given.items() if isinstance(v, Tensor) and len(v) == len(x) and not (shap and k == "baselines")}
        here = given | {k: v[rows] for k, v in own.items()}
        asked.score = None if plain else _score_of(target, rows.start, x.device)
        with _seeded(seed, x), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts.append(explainer.attribute(x[rows].clone().requires_grad_(True), **here))
    values = torch.cat([part[0] if isinstance(part, tuple) else part for part in parts]).detach().to(x)
    if values.shape[-2:] == x.shape[-2:]:
        return over_colour(values.expand_as(x) if values.shape[1] == 1 else values, colour if values.shape[1] > 1 else "sum")
    return L.to_grid(values, capture.layout(layer)).sum(1)


def _score_of(target: Target, row: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The score of one image of the batch, ``logits [N,C] -> [N]``, for any number of copies of it."""
    return lambda logits: target.rows(torch.full((len(logits),), row, device=device))(logits)


def _pytorch_grad_cam(
    attribution: Any, capture: Capture, layer: str | None, target: Target, seed: int, options: Mapping[str, Any]
) -> Tensor:
    explainer = _built(attribution, capture, layer, _Asked(capture))  # numpy, where it goes, has no bfloat16

    def score_of(row: int) -> Callable[[Tensor], Tensor]:
        score = _score_of(target, row, capture.x.device)
        return lambda output: score(output[None] if output.ndim == 1 else output)[0]

    try:
        with _seeded(seed, capture.x):
            result = explainer(
                input_tensor=capture.images.clone().requires_grad_(True),
                targets=[score_of(row) for row in range(len(capture.x))],
                **options,
            )
    finally:
        kept = getattr(getattr(explainer, "base_cam", explainer), "activations_and_grads", None)
        if inspect.isclass(attribution) and kept is not None:
            kept.release()
    return torch.as_tensor(result).to(capture.images)


def _built(attribution: Any, capture: Capture, layer: str | None, asked: nn.Module) -> Any:
    """The explainer for the model at hand: made of a class, or the object itself when it is for this model."""
    if not inspect.isclass(attribution):
        owner = next((v for v in (getattr(attribution, a, None) for a in ("model", "forward_func")) if v is not None), None)
        if isinstance(owner, nn.Module) and unwrap(owner) is not capture.model:
            raise FoveateError(
                f"the {type(attribution).__name__} given was built for another model than the one that is explained: build it "
                "with the same one, with the normalisation inside, or give its class"
            )
        return attribution
    taken = inspect.signature(attribution).parameters
    module = None
    if "layer" in taken or "target_layers" in taken:
        module = L.get(capture.model, layer or capture.layer)
    options: dict[str, Any] = {}
    build: Any = attribution
    if "layer" in taken:
        options["layer"] = module
    if "target_layers" in taken:
        options["target_layers"] = [module]
    if "reshape_transform" in taken and capture.layout(layer).kind != "nchw":
        options["reshape_transform"] = lambda raw: L.to_grid(raw, capture.layout(layer))
    if attribution.__name__ == "Lime":
        options |= _as_lime()
    if next(iter(taken), "") not in ("model", "forward_func") or any(
        p.default is p.empty for k, p in list(taken.items())[1:] if k not in options and p.kind is p.POSITIONAL_OR_KEYWORD
    ):
        raise FoveateError(f"{attribution.__name__} needs more than a model to be built: build it and give the object")
    return build(asked, **options)


def _as_lime() -> dict[str, Any]:
    """LIME as its paper and code have it: a ridge, weighted by the cosine distance to the whole image.

    Captum's own default is a lasso, which leaves nothing of the small effects of image segments.
    """
    lime = importlib.import_module("captum.attr._core.lime")
    linear = importlib.import_module("captum._utils.models.linear_model")
    similarity = lime.get_exp_kernel_similarity_function("cosine", kernel_width=0.25)
    return {"interpretable_model": linear.SkLearnRidge(alpha=1.0), "similarity_func": similarity}


def _grid(size: tuple[int, int], cells: int) -> Tensor:
    """Labels of a regular grid of about ``cells x cells``, ``[H,W]``."""
    rows, columns = (torch.arange(side) * min(cells, side) // side for side in size)
    return rows[:, None] * min(cells, size[1]) + columns[None, :]


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """What other people's code leaves on a model, taken away again: gradients, hooks, replaced modules, attributes, modes."""
    modules = [(m, {k: (v, v.copy() if isinstance(v, dict) else v) for k, v in vars(m).items()}) for m in model.modules()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    for p, *_ in parameters:
        p.grad = None
    try:
        yield
    finally:
        for module, state in modules:
            own = vars(module)
            for name in own.keys() - state.keys():
                del own[name]
            for name, (value, content) in state.items():
                if isinstance(value, dict):
                    value.clear()
                    value.update(content)
                own[name] = value
        for p, grad, flag in parameters:
            p.grad = grad
            p.requires_grad_(flag)


def by_name(name: str) -> Method | None:
    """The method that ``captum.Lime`` names; None for other names.

    Raises:
        FoveateError: the library is not installed, cannot be imported, or has no such class.
    """
    library, _, kind = name.partition(".")
    if library not in FOLDERS or not kind:
        return None
    mend()  # theirs imports torchvision
    try:
        module = importlib.import_module(FOLDERS[library])
    except ImportError as error:
        raise not_imported(repr(name), library, error) from None
    if not inspect.isclass(getattr(module, kind, None)):
        raise FoveateError(f"{FOLDERS[library]} has no class {kind!r}")
    return adapt(getattr(module, kind), name)


METHODS.fallbacks.append(by_name)
