"""Surgery: changes of architecture that papers ask for, on copies of timm's and torchvision's networks."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from foveate.errors import FoveateError
from foveate.runtime.model import core

Model = TypeVar("Model", bound=nn.Module)


def contrastive_architecture(model: Model, *, last_stride: int = 1, bias: bool = False) -> Model:
    """A copy of a ResNet or ConvNeXt of timm or torchvision with the talk's changes: finer maps, a head without a bias.

    ``last_stride=1``: the last stage does not halve the grid, so that a map has 14x14 cells at 224 pixels instead of 7x7.
    ``bias=False``: evidence in the map is all evidence there is. In a ConvNeXt the norm after pooling moves in front
    of it, position by position, because only then the head is linear in the features; its weights are kept.

    The talk also removes the last batch norm and ReLU, so that the features it hooks are those that are pooled. That is
    not needed: foveate looks at the tensor that is pooled, whatever made it. (In torchvision's bottlenecks one module is
    called three times, and replacing it removes three ReLUs.)

    Raises:
        FoveateError: another kind of network, or a ``last_stride`` that is not 1 or 2.

    Source: Setpal, Crossing Cross-Entropy, 2024, section on architecture, and its code.
    """
    if last_stride not in (1, 2):
        raise FoveateError(f"last_stride {last_stride} is not 1 or 2")
    model = copy.deepcopy(model)
    inner, _ = core(model)
    stage, downsampling = _last_stage(inner)
    if last_stride == 1:
        _unstride(downsampling)
    _norm_before_pooling(inner, stage)
    if not bias:
        linear = [module for module in inner.modules() if isinstance(module, nn.Linear)][-1]
        linear.bias = None  # type: ignore[assignment]
    return model


def _last_stage(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The last stage, and the part of it that halves the grid."""
    layer4, stages, features = (getattr(model, name, None) for name in ("layer4", "stages", "features"))
    if isinstance(layer4, nn.Sequential):
        return layer4, layer4[0]
    if isinstance(stages, nn.Sequential) and isinstance(getattr(stages[-1], "downsample", None), nn.Module):
        return stages[-1], stages[-1].downsample  # type: ignore[return-value]
    if type(model).__module__.startswith("torchvision") and type(model).__name__ == "ConvNeXt":
        return features[-1], features[-2]  # type: ignore[index]
    raise FoveateError(
        f"the architecture of a {type(model).__name__} is not known here: ResNets and ConvNeXts of timm and torchvision are"
    )


def _unstride(part: nn.Module) -> None:
    changed = 0
    for parent in list(part.modules()):
        for name, module in list(parent.named_children()):
            blurs = "Blur" in type(module).__name__ and getattr(module, "stride", None) in (2, (2, 2))
            if blurs or (isinstance(module, nn.AvgPool2d) and module.stride in (2, (2, 2))):
                setattr(parent, name, _identity(module))
                changed += 1
            elif isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                module.stride = (1, 1)
                if module.kernel_size == (2, 2):
                    module.padding = "same"
                    module._reversed_padding_repeated_twice = [0, 1, 0, 1]
                changed += 1
    if not changed:
        raise FoveateError("the last stage of this network has no stride of 2 that could become 1")


def _identity(instead_of: nn.Module) -> nn.Module:
    return nn.Identity().train(instead_of.training)


def _norm_before_pooling(model: nn.Module, stage: nn.Module) -> None:
    """Of a ConvNeXt: pool(norm(x)) instead of norm(pool(x))."""
    head, classifier = getattr(model, "head", None), getattr(model, "classifier", None)
    norm = getattr(head, "norm", None)
    if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) and hasattr(model, "norm_pre"):
        model.norm_pre = norm
        head.norm = _identity(norm)  # type: ignore[union-attr]
    elif isinstance(classifier, nn.Sequential) and hasattr(model, "avgpool") and "Norm" in type(classifier[0]).__name__:
        model.features.append(classifier[0])  # type: ignore[operator,union-attr]
        classifier[0] = _identity(classifier[0])
