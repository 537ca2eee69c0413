"""Gradients: what is differentiated of one run, by layers, by the image and by classes, in closed form where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from foveate import targets as T
from foveate.errors import FoveateError, LayerError
from foveate.runtime import guided as G
from foveate.runtime import layers as L
from foveate.runtime.chunks import in_chunks
from foveate.runtime.feature import Feature, Passes
from foveate.runtime.linear_head import LinearHead, at_least_float32, recognise_any
from foveate.runtime.runner import Pass, Runner


class Gradients:
    """The gradients of one run; a :class:`foveate.Capture` is one, and makes the run."""

    frozen: bool
    guided: bool
    from_image: bool
    passes: Passes
    x: Tensor
    logits: Tensor
    model: nn.Module
    _run: Runner
    _guide: G.Guide | None
    _closed_form: bool
    _leaf: Tensor | None
    _features: dict[str, Feature]
    _linears: list[tuple[Tensor, Tensor | None, Tensor]]

    def __init__(self) -> None:
        self._by_image: dict[T.Target, Tensor] = {}
        self._heads: dict[str, LinearHead | None] = {}

    @property
    def layer(self) -> str:
        """The first captured layer, the default of every method."""
        for name in self._features:
            return name
        raise LayerError("this run looked at no layer, and what was asked for needs one: name one, or 'auto'")

    @property
    def images(self) -> Tensor:
        """The batch for methods that change it: float32 or better, also of a model in half precision, without a graph."""
        return at_least_float32(self.x.detach())

    def activations(self, layer: str | None = None) -> Tensor:
        """Features of a layer as a grid, ``A [B,K,h,w]``, float32 or better; a node of the graph."""
        feature = self._feature(layer)
        return feature.grid(feature.raw)

    def chunk_size(self, kind: Pass = "forward") -> int:
        """How many changed images of this size run at once, ``forward``, ``backward`` or through the ``tail`` only."""
        return self._run.chunk_size((self.x.shape[-2], self.x.shape[-1]), kind)

    def grad(self, layer: str | None, target: T.Target) -> Tensor:
        """Gradient of the score by the features, ``G [B,K,h,w]``: one backward pass for all layers, kept per target.

        Images do not depend on each other in evaluation mode, so the scores are summed and differentiated once.
        Where the head is linear in the layer, ``G = (d score / d logits) W`` needs no backward pass at all.

        Raises:
            LayerError: the score does not depend on the grid of this layer.
        """
        feature = self._feature(layer)
        if target not in feature.gradients:
            self._differentiate(target)
        return feature.gradients[target]

    def _differentiate(self, target: T.Target) -> None:
        by_logits = self._by_logits(target)  # [B,C]
        autograd = []
        for feature in self._features.values():
            head = self.linear_head(feature.name) if self._closed_form else None
            if head is None:
                autograd.append(feature)
            else:
                gradient = head.gradient(by_logits)
                feature.gradients[target] = gradient.expand_as(self.activations(feature.name))
        if not autograd:
            return
        raws = [feature.raw for feature in autograd]
        self._check_graph(autograd[0])
        inner = nullcontext() if self._guide is None else self._guide.backward(guided=False)
        with torch.inference_mode(False), torch.enable_grad(), inner:
            results = torch.autograd.grad(
                self.logits,
                raws,
                by_logits,
                retain_graph=True,
                create_graph=not self.frozen,
                allow_unused=True,
            )
        self.passes.backward += len(self.x)
        for feature, gradient in zip(autograd, results, strict=True):
            feature.gradients[target] = self._grid(feature, gradient)

    def _check_graph(self, feature: Feature) -> None:
        if not self.logits.requires_grad:
            raise LayerError(f"the logits do not depend on layer {feature.name!r}: {self._advice(feature.name)}")

    def _grid(self, feature: Feature, gradient: Tensor | None) -> Tensor:
        """A gradient at a layer as a grid; an error where the layer cannot explain anything."""
        if gradient is None:
            raise LayerError(f"the score does not depend on layer {feature.name!r}: {self._advice(feature.name)}")
        grid = feature.grid(gradient)
        if feature.layout.prefix and gradient.any() and not grid.any():
            raise LayerError(
                f"the gradient at layer {feature.name!r} is exactly 0 on every patch, because the class token has already "
                f"gathered what it reads: {self._advice(feature.name)}"
            )
        return grid

    def guided_gradient(self, layer: str | None, target: T.Target) -> Tensor:
        """The same by guided backpropagation through the same run, ``[B,K,h,w]``, no graph; needs ``guided=True``."""
        feature = self._feature(layer)
        if self._guide is None:
            raise FoveateError("this run was not made for guided gradients: Capture(..., guided=True)")
        with torch.inference_mode(False), torch.enable_grad(), self._guide.backward():
            seed = self._by_logits(target).detach()
            (gradient,) = torch.autograd.grad(self.logits, feature.raw, seed, retain_graph=True, allow_unused=True)
        self.passes.backward += len(self.x)
        return self._grid(feature, gradient)

    def image_gradient(self, target: T.Target, images: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Gradient of the score by the image itself, ``[N,C,H,W]``: of this batch, kept per target, or of changed images.

        Changed images run in chunks, each forward and backward, so that no more than one graph is in memory; nothing is
        kept of them. Of a live capture the gradient is a differentiable function of the parameters.

        Args:
            images: ``[N,C,H,W]``; this batch where it is None.
            rows: the image of the batch that each was made from, ``[N]``; their order where it is None.
        """
        if images is None:
            if target not in self._by_image:
                own = self._to_image(target) if self.from_image else self.image_gradient(target, self.images)
                self._by_image[target] = own
            return self._by_image[target]
        if rows is None:
            rows = torch.arange(len(images), device=images.device)
        step = self.chunk_size("backward")
        return torch.cat(list(in_chunks(lambda part, row: self._run.gradient(part, target.rows(row)), step, images, rows)))

    def guided_image_gradient(self, target: T.Target) -> Tensor:
        """The same of this batch by guided backpropagation, ``[B,C,H,W]``, from the same run where it was made for it."""
        if self.guided and self.from_image:
            return self._to_image(target, guided=True)
        with G.guided():
            return self.image_gradient(target, self.images)

    def _to_image(self, target: T.Target, guided: bool = False) -> Tensor:
        assert self._leaf is not None  # the run began there
        way = nullcontext() if self._guide is None else self._guide.backward(guided)
        with torch.inference_mode(False), torch.enable_grad(), way:
            seed, live = self._by_logits(target), not self.frozen
            self._run.check_graph(self.logits, self._leaf)
            (gradient,) = torch.autograd.grad(self.logits, self._leaf, seed, retain_graph=True, create_graph=live)
        self.passes.backward += len(self.x)
        return at_least_float32(gradient)

    def _by_logits(self, target: T.Target) -> Tensor:
        """Gradient of the score by the logits, ``[B,C]``: what any score adds to the gradients of the logits."""
        with torch.inference_mode(False), torch.enable_grad():
            logits = self.logits if not self.frozen else self.logits.detach().requires_grad_(True)
            score = target(logits)
            if not score.requires_grad:
                raise FoveateError(f"the target {target.name!r} is not a differentiable function of the logits")
            (gradient,) = torch.autograd.grad(score.sum(), logits, create_graph=not self.frozen)
        return gradient

    def linear_head(self, layer: str | None = None) -> LinearHead | None:
        """The head after a layer where it is average pooling or flattening and one linear layer; None elsewhere.

        It is recognised by what it computes: the input of the last linear layer is compared with the pooled and with
        the flattened features of this run, and its output with the logits.
        """
        name = self._feature(layer).name
        if name not in self._heads:
            raw = self._feature(name).raw
            self._heads[name] = recognise_any(self.activations(name), raw, self._linears, self.logits)
        return self._heads[name]

    def class_maps(self, layer: str | None = None, classes: Sequence[int] | None = None) -> Tensor:
        """HiResCAM of every class, ``M [B,C,h,w]``: ``M_c = sum_k (d y_c / d A_k) * A_k``; differentiable when live.

        Closed form for linear heads; elsewhere one backward pass per class, after the layer only.

        Args:
            classes: only these, in this order.
        """
        activations = self.activations(layer)
        head = self.linear_head(layer) if self._closed_form else None
        columns = list(range(self.logits.shape[1])) if classes is None else list(classes)
        if head is not None:
            return (head if classes is None else head.of(columns)).maps(activations)
        feature = self._feature(layer)
        self._check_graph(feature)
        options: dict[str, Any] = {"retain_graph": True, "create_graph": not self.frozen, "allow_unused": True}
        maps = []
        for column in columns:
            with torch.inference_mode(False), torch.enable_grad():
                (gradient,) = torch.autograd.grad(self.logits[:, column].sum(), feature.raw, **options)
            self.passes.backward += len(self.x)
            maps.append((self._grid(feature, gradient) * activations).sum(1))
        return torch.stack(maps, 1)

    def _feature(self, layer: str | None) -> Feature:
        if layer is None:
            layer = self.layer
        if layer not in self._features:
            raise LayerError(f"layer {layer!r} was not captured: this run has {', '.join(self._features)}")
        return self._features[layer]

    def _advice(self, tried: str) -> str:
        return L.advice(self.model, self.x, self._run.detached, tried)
