"""CA-Stream: cross-attention pooling beside a frozen backbone, whose raw attention is a map of its own."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.runtime.cut import cut_after
from foveate.runtime.layers import find, first_tensor
from foveate.runtime.model import hooked, read_logits


class Attention(nn.Module):
    """The raw attention of a token to the cells of a stage, ``F q / sqrt(d)``, ``[B,1,h,w]``, in float32; no parameters."""

    def forward(self, features: Tensor, query: Tensor) -> Tensor:
        """``features [B,d,h,w]`` and ``query [B,d]``: logits over positions, before the softmax."""
        with torch.autocast(features.device.type, enabled=False):  # post-ReLU features of 2048 channels overflow half precision
            F_, q = features.float(), query.float()
            if features.dtype == torch.float64:
                F_, q = features, query.double()
            result: Tensor = torch.einsum("bdhw,bd->bhw", F_, q)[:, None] * features.shape[1] ** -0.5
            return result


class Stage(nn.Module):
    """One cross-attention: ``q' = W F' softmax(F q / sqrt(d)) + b``."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.attention = Attention()
        self.project = nn.Linear(dim, out)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def pool(self, features: Tensor, query: Tensor) -> Tensor:
        """``F' a``, ``a = softmax(F q / sqrt(d))`` over positions, ``[B,d]``: average pooling where q is 0 or F constant."""
        logits = self.attention(features, query)
        weights = logits.flatten(2).softmax(2)[:, 0]  # [B,hw]
        return torch.einsum("bdn,bn->bd", features.flatten(2).to(weights.dtype), weights).to(features.dtype)

    def forward(self, features: Tensor, query: Tensor) -> Tensor:
        return self.project(self.pool(features, query))  # type: ignore[no-any-return]


class Stream(nn.Module):
    """The stream: a token that gathers from each stage, ``q_0`` first, the projection of the last one for the classifier.

    Args:
        dims: channels of each stage's features; the last projection is square.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.token = nn.Parameter(1 + torch.randn(1, dims[0]))  # the code's N(1, 1)
        self.stages = nn.ModuleList(Stage(dim, out) for dim, out in zip(dims, [*dims[1:], dims[-1]], strict=True))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """What stands for the pooled features, ``[B,d]``, from the features of each stage ``[B,d_l,h_l,w_l]``."""
        query = self.token.expand(features[0].shape[0], -1).to(features[0].dtype)
        for stage, F_l in zip(self.stages, features, strict=True):
            query = stage(F_l, query)
        return query


class CAStream(nn.Module):
    """A classifier whose average pooling is replaced by a stream of cross-attention; its backbone is frozen for real.

    ``a_l = softmax(F_l q_l / sqrt(d_l))``, ``q_{l+1} = W_l F_l' a_l + b_l``; the backbone's own classifier reads the last
    ``q`` where it read the pooled features. The raw attention of each stage is the layer ``stream.stages.K.attention``
    and the method ``ca_stream``.

    The backbone stays in evaluation mode, also under ``.train()``, and none of its parameters needs a gradient: only the
    stream learns, unless :meth:`unfreeze` is called.

    Args:
        backbone: a convolutional classifier.
        stages: paths of the modules whose outputs the stream reads, from early to late; those of the thesis for ResNets
            and ConvNeXts, and for others the last module of each resolution.
        size: of the image that is run once to learn the channels of each stage.

    Raises:
        FoveateError: a stage has no grid of channels first; what comes after the last is not pooling and a classifier.

    Source: Torres et al., CA-Stream, 2024, eq. 6 to 9, dimensions and initialisation from its code. Deviations: attention
    logits are kept in float32; biases start at 0; batch norms do not drift, and all of the stream is trained, where the
    released code trains the token alone.
    """

    def __init__(self, backbone: nn.Module, stages: Sequence[str] | None = None, size: tuple[int, int] = (224, 224)) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        first = next(backbone.parameters())
        # Not zeros: on a black image a wrong head can give the right logits.
        example = torch.linspace(-1, 1, 3 * size[0] * size[1]).sin().view(1, 3, *size).to(first.device, first.dtype)
        self.names = stages_of(backbone, example) if stages is None else checked(backbone, stages)
        with torch.no_grad():
            features, logits = self._features(example)
        for name, F_l in zip(self.names, features, strict=True):
            if F_l.ndim != 4:
                raise FoveateError(
                    f"stage {name!r} gives {list(F_l.shape)}, and a stream reads convolutional features [B,d,h,w]: "
                    "transformers, which have attention of their own, are not supported"
                )
        # By its kind and not as a function: a copy, or a classifier that is exchanged, then has its own.
        self.head = head_of(backbone, self.names[-1], features[-1], logits)
        self.stream = Stream([F_l.shape[1] for F_l in features]).to(first.device, first.dtype)
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        self.frozen = True
        self.eval()

    def _features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                tensor = first_tensor(output)
                assert tensor is not None  # a stage of a convolutional network gives a tensor
                found[name] = tensor.clone()  # an in-place ReLU after the stage must not overwrite it

            return hook

        modules = dict(self.backbone.named_modules())
        with hooked(self.backbone, [(modules[name], keep(name)) for name in self.names]):
            logits = read_logits(self.backbone(x))
        return [found[name] for name in self.names], logits

    def features(self, x: Tensor) -> list[Tensor]:
        """The features of each stage, ``[B,d_l,h_l,w_l]``: they do not change while the backbone is frozen."""
        return self._features(x)[0]

    def classify(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``[B,C]`` from the features of each stage."""
        return run_head(self.backbone, self.head, self.stream(features)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen and self.backbone.training:  # somebody has called backbone.train()
            self.backbone.eval()
        return self.classify(self.features(x))

    def train(self, mode: bool = True) -> CAStream:
        """Training mode for the stream; the backbone stays in evaluation mode while it is frozen."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def unfreeze(self) -> None:
        """Let the backbone learn too, for fine-tuning."""
        self.frozen = False
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(True)
        self.train(self.training)

    @property
    def share(self) -> float:
        """Parameters of the stream over those of the backbone."""
        count = sum(p.numel() for p in self.stream.parameters())
        return count / sum(p.numel() for p in self.backbone.parameters())


def stages_of(backbone: nn.Module, example: Tensor) -> tuple[str, ...]:
    """The stages of the thesis for ResNets and ConvNeXts; else the last child of ``features`` at each resolution.

    The last is named by its outermost module, which is where a class activation map looks as well.

    Of timm's pyramids the last stage is what is pooled; a network of another kind has that one alone.
    """
    modules = dict(backbone.named_modules())
    if {"maxpool", "layer1", "layer2", "layer3", "layer4"} <= set(modules):
        return ("maxpool", "layer1", "layer2", "layer3", "layer4")
    if {"stem", "stages.1.downsample", "stages.2.downsample", "stages.3"} <= set(modules):  # timm's ConvNeXt
        return ("stem", "stages.1.downsample", "stages.2.downsample", "stages")
    if type(backbone).__name__ == "ConvNeXt" and "features.7" in modules:  # torchvision's
        return ("features.0", "features.2", "features.4", "features")
    if {"stem", "stages.0", "stages.1", "features"} <= set(modules) and "features.0" not in modules:  # foveate's small CNN
        return ("stem", "stages.0", "stages.1", "features")
    pooled = find(backbone, example)
    if (info := getattr(backbone, "feature_info", None)) is not None:
        names = [item["module"] for item in getattr(info, "info", info)]
        if all(name in modules for name in names):
            return (*[name for name in names[:-1] if name != pooled], pooled)
    features = modules.get("features")
    if isinstance(features, nn.Sequential):
        last: dict[tuple[int, ...], str] = {}
        with torch.no_grad():
            x = example
            for name, child in features.named_children():
                x = child(x)
                if isinstance(x, Tensor) and x.ndim == 4:
                    last[x.shape[-2], x.shape[-1]] = f"features.{name}"
        return (*list(last.values())[:-1], pooled)
    return (pooled,)  # the thesis' ablation: one cross-attention in place of pooling


def checked(backbone: nn.Module, stages: Sequence[str]) -> tuple[str, ...]:
    """Stages as a person names them.

    Raises:
        FoveateError: none, one twice, or one that the backbone does not have.
    """
    if isinstance(stages, str) or not stages:
        raise FoveateError(f"stages {stages!r} must be a list of paths, such as ['layer3', 'layer4']")
    modules = [name for name, _ in backbone.named_modules() if name]
    for name in stages:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, 3, 0.5) or [part for part in modules if "." not in part][:12]
            raise FoveateError(f"stage {name!r} is not in the backbone: there are {', '.join(near)}")
    if len(set(stages)) < len(stages):
        raise FoveateError(f"stages {list(stages)} name one module twice")
    return tuple(stages)


def head_of(backbone: nn.Module, last: str, features: Tensor, logits: Tensor) -> str:
    """How to run the backbone's pooling and classifier on ``[B,d,h,w]``, for :func:`run_head`.

    It gives the logits of this run, and on random features the same as on their means: at 1 x 1 cells pooling then
    changes nothing, and what follows is run as the backbone runs it.

    Raises:
        FoveateError: what comes after the last stage is not pooling and a classifier.
    """
    kinds = ["forward_head"] if hasattr(backbone, "forward_head") else []
    kinds += ["classifier"] if hasattr(backbone, "avgpool") and hasattr(backbone, "classifier") else []
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    kinds += [f"linear:{linear[-1]}"] if linear else []
    kinds.append(f"cut:{last}")
    generator = torch.Generator().manual_seed(0)
    random = 3 * torch.randn(2, *features.shape[1:], generator=generator).to(features)
    for kind in kinds:
        try:
            with torch.no_grad():
                again, whole = (run_head(backbone, kind, f) for f in (features, random))
                pooled = run_head(backbone, kind, F.adaptive_avg_pool2d(random, 1))
        except Exception:  # whatever a model's own code raises on another shape
            continue
        if _same(again, logits) and _same(whole, pooled):
            return kind
    raise FoveateError(
        f"what comes after {last!r} in a {type(backbone).__name__} is not average pooling and a classifier: name stages from "
        "early to late, the last of them what is pooled"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-3 * (b - b.mean()).abs().max())


def run_head(backbone: nn.Module, kind: str, x: Tensor) -> Tensor:
    """Logits from ``[B,d,h,w]`` by the backbone's own pooling and classifier."""
    name, _, place = kind.partition(":")
    if name == "forward_head":  # timm's
        before = getattr(backbone, "norm_pre", nn.Identity())
        return read_logits(backbone.forward_head(before(x)))  # type: ignore[operator]
    if name == "classifier":  # torchvision's
        return read_logits(backbone.classifier(backbone.avgpool(x)))  # type: ignore[operator]
    if name == "linear":
        return read_logits(backbone.get_submodule(place)(x.mean((2, 3))))
    cut = cut_after(backbone, place)
    if cut is None or cut.front is not None:
        raise FoveateError(f"a {type(backbone).__name__} cannot be cut after {place!r}")
    return read_logits(cut.back(x))


def ca_stream(model: nn.Module, stages: Sequence[str] | None = None, size: tuple[int, int] | None = None) -> Any:
    """A CA-Stream beside a copy of a classifier: of one from :func:`foveate.load`, one with the same normalisation and names.

    Raises:
        FoveateError: see :class:`CAStream`; the model has a stream already.
    """
    from foveate.models.classifier import Classifier

    if any(isinstance(module, CAStream) for module in model.modules()):
        raise FoveateError("this model has a CA-Stream already")
    model = copy.deepcopy(model)  # its parameters will need no gradient, and the caller's stay as they are
    if not isinstance(model, Classifier):
        return CAStream(model, stages, size or (224, 224))
    made = CAStream(model.model, stages, size or model.preprocess.crop)
    classifier = Classifier(made, model.preprocess, f"ca_stream:{model.name}", model.class_names, model.notes, model.assumed)
    classifier.wordnet_ids = model.wordnet_ids
    return classifier
