"""Capture: run the model once, keep logits, features and gradients; run the rest of it, or changed images, again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate import targets as T
from foveate.errors import FoveateError, LayerError
from foveate.precision import Precision
from foveate.runtime import guided as G
from foveate.runtime import layers as L
from foveate.runtime.chunks import in_chunks
from foveate.runtime.feature import Feature, Passes
from foveate.runtime.linear_head import LinearHead, at_least_float32, recognise_any
from foveate.runtime.model import check_eval, check_images, check_logits, eager, hooked, modules_of, read_logits, unwrap
from foveate.runtime.runner import Pass, Runner
from foveate.runtime.tail import tail_behind


class Capture:
    """One run of a classifier on a batch, from which every method and metric takes what it needs.

    Nothing stays on the model: hooks live inside the forward pass only, and parameters, buffers, modes and ``.grad``
    are as before, also when something raises.

    Args:
        model: any classifier; images in [0, 1] go in (see :func:`foveate.normalized`).
        x: ``[B,C,H,W]``; moved to the model's device and precision.
        layers: a dotted path or module, several of them, ``"auto"``, ``"input"`` for the image itself, or None where no
            method asks for one: any model that runs will then do, a scripted or quantised one too.
        frozen: post hoc: what comes before the layers runs without a graph, and gradients of parameters are never
            built. False for training: real parameters, and every map differentiable in them (``create_graph``).
        head: ``softmax``, ``binary`` or ``multilabel``; by the number of logits where it is None.
        layout: how to read the layers' outputs, where the automatic reading does not fit.
        precision: of changed images, scored or searched for by gradient steps: ``fp32``, or ``bf16`` through autocast.
        chunk: how many changed images run at once; by memory where it is None. Results do not depend on it.
        closed_form: use a linear head's closed form instead of autograd; both give the same.
        guided: run the model so that :meth:`guided_gradient` can be asked for; an attribute afterwards.
        from_image: begin the graph at the image, so that its gradient needs no second run; an attribute afterwards.
        any_range: images that are not in [0, 1], noisy ones say, are no reason for a warning.

    Attributes:
        x: the batch as the model saw it, ``[B,C,H,W]``.
        logits: ``[B,C]``, float32 or better, a node of the graph.
        layers: the paths of the captured layers; ``layer`` is the first.
        passes: how many images went forward and backward so far.
        autocast: what the caller's autocast cast to when the run was made; None without one.
        facts, remarks: what the method that ran last knows of its maps beyond them: ``{name: [B]}``; a sentence an image.

    Raises:
        FoveateError: wrong shape or type of images, a model in training mode (frozen), NaN logits, no logits.
        LayerError: an unknown layer, or one that did not run or has no spatial grid.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        layers: str | nn.Module | Sequence[str | nn.Module] | None = "auto",
        *,
        frozen: bool = True,
        head: T.Head | None = None,
        layout: L.Layout | None = None,
        precision: Precision = "fp32",
        chunk: int | None = None,
        closed_form: bool = True,
        guided: bool = False,
        from_image: bool = False,
        any_range: bool = False,
    ) -> None:
        self.model = unwrap(model)
        self.frozen = frozen
        self.passes = Passes()
        self.facts, self.remarks = dict[str, Tensor](), list[str]()
        # Training on several processes goes through the wrapper, which averages their gradients.
        live = model if isinstance(model, nn.parallel.DistributedDataParallel) else self.model
        self._run = Runner(self.model, live, frozen, precision, chunk, self.passes)
        self.autocast = self._run.autocast
        self._options: dict[str, Any] = {"frozen": frozen, "layout": layout, "precision": precision, "chunk": chunk}
        self._options |= {"closed_form": closed_form, "guided": guided, "from_image": from_image}
        self._closed_form = closed_form
        self.guided, self._guide = guided, G.Guide(twice=not frozen) if guided else None
        self.from_image = from_image
        self._leaf: Tensor | None = None
        self._by_image: dict[int, Tensor] = {}
        self._heads: dict[str, LinearHead | None] = {}
        self._tails: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        self._uncut: set[str] = set()
        self._linears: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._base: Tensor | None = None
        self._kept: list[T.Target] = []
        check_images(x, self.model if frozen and not any_range else None)
        modules = modules_of(self.model)
        if frozen:
            check_eval(modules)
        with torch.inference_mode(False):
            x = self._run.placed(x)
            x = x.clone() if x.is_inference() else x
            self.x = x.detach() if frozen else x
            self._features = {}
            for name, module in L.resolve(self.model, self.x, self._run.detached, layers):
                self._features[name] = Feature(name, module)
            self._forward(modules)
            for feature in self._features.values():
                seen = partial(self._call_of, feature, any_range)
                feature.settle(self.x, layout, self.model, seen, partial(self._advice, feature.name))
        self.head: T.Head = T.head_of(self.logits, head)

    # -- what is known after the run -------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the captured layers."""
        return tuple(self._features)

    @property
    def layer(self) -> str:
        """The first captured layer, the default of every method."""
        for name in self._features:
            return name
        raise LayerError("this run looked at no layer, and what was asked for needs one: name one, or 'auto'")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.x.shape[-2], self.x.shape[-1]

    @property
    def images(self) -> Tensor:
        """The batch for methods that change it: float32 or better, also of a model in half precision, without a graph."""
        return at_least_float32(self.x.detach())

    @property
    def classes(self) -> int:
        """Number of classes that can be named (2 for one binary logit)."""
        return T.num_classes(self.logits, self.head)

    @property
    def pred(self) -> Tensor:
        """The predicted class of each image, ``[B]``."""
        return T.predicted(self.logits, self.head)

    @property
    def precision(self) -> Precision:
        """In which changed images run, ``fp32`` or ``bf16``."""
        return self._run.precision

    def layout(self, layer: str | None = None) -> L.Layout:
        """How a captured layer's output lies in memory."""
        return self._feature(layer).layout

    def activations(self, layer: str | None = None) -> Tensor:
        """Features of a layer as a grid, ``A [B,K,h,w]``, float32 or better; a node of the graph."""
        feature = self._feature(layer)
        return feature.grid(feature.raw)

    def target(
        self, target: object = None, *, score: str = "logit", against: object = None, labels: T.Labels | None = None
    ) -> T.Target:
        """What a person writes as a :class:`Target` of this batch; see :func:`foveate.targets.resolve`."""
        with torch.inference_mode(False):
            return T.resolve(target, self.logits, score=score, against=against, labels=labels, head=self.head)

    def log_probability(self, y: Tensor, beside: Tensor | None = None) -> Tensor:
        """Log-probability of a class of each image, ``[B]``, float64; from :meth:`score`, which runs once, where need be.

        What is compared with masked images must come the same way as they do, or noise would count as a change; where
        nothing of ``beside [B]`` is so near, :attr:`logits` do.
        """
        if self._base is None and beside is not None and self._run.exact(f.raw for f in self._features.values()):
            own = T.log_probability(logits := self.logits.detach(), y, self.head)
            if T.apart(logits, own, beside):
                return own
        if self._base is None:
            self._base = self.score(self.images)
        return T.log_probability(self._base, y, self.head)

    # -- gradients -------------------------------------------------------------------------------------------------

    def grad(self, layer: str | None, target: T.Target) -> Tensor:
        """Gradient of the score by the features, ``G [B,K,h,w]``: one backward pass for all layers, kept per target.

        Images do not depend on each other in evaluation mode, so the scores are summed and differentiated once.
        Where the head is linear in the layer, ``G = (d score / d logits) W`` needs no backward pass at all.

        Raises:
            LayerError: the score does not depend on the grid of this layer.
        """
        feature = self._feature(layer)
        if id(target) not in feature.gradients:
            self._kept.append(target)  # keeps the identity that the results are stored under
            self._differentiate(target)
        return feature.gradients[id(target)]

    def _differentiate(self, target: T.Target) -> None:
        by_logits = self._by_logits(target)  # [B,C]
        autograd = []
        for feature in self._features.values():
            head = self.linear_head(feature.name) if self._closed_form else None
            if head is None:
                autograd.append(feature)
            else:
                gradient = head.gradient(by_logits)
                feature.gradients[id(target)] = gradient.expand_as(self.activations(feature.name))
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
            feature.gradients[id(target)] = self._grid(feature, gradient)

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
            if id(target) not in self._by_image:
                self._kept.append(target)
                own = self._to_image(target) if self.from_image else self.image_gradient(target, self.images)
                self._by_image[id(target)] = own
            return self._by_image[id(target)]
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

    def _call_of(self, feature: Feature, known: bool) -> L.Run | None:
        """Which call of a layer saw the images; of other images of a run before it is asked only where there are several."""
        if feature.module is None or (known and len(feature.calls) == 1):
            return L.Run(-1, True)
        return L.run_of(self.model, self.x, self._run.detached, feature.name, feature.module)

    def _advice(self, tried: str) -> str:
        return L.advice(self.model, self.x, self._run.detached, tried)

    # -- linear heads ----------------------------------------------------------------------------------------------

    def linear_head(self, layer: str | None = None) -> LinearHead | None:
        """The head behind a layer where it is average pooling or flattening and one linear layer; None elsewhere.

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

        Closed form for linear heads; elsewhere one backward pass a class, behind the layer only.

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

    # -- running it again ------------------------------------------------------------------------------------------

    def score(
        self,
        images: Tensor | Iterable[Tensor],
        target: T.Target | None = None,
        rows: Tensor | None = None,
        many: bool = False,
    ) -> Tensor:
        """Run changed images: their logits ``[N,C]``, or their scores ``[N]`` where a target is given.

        The one place where changed images are run: in chunks bounded by memory, without a graph, channels-last, in
        bf16 where the capture asks for it. A chunk that does not fit into memory is halved.

        Args:
            images: ``[N,C,H,W]``, or an iterable of such tensors, so that no more than one needs to exist at a time.
            target: what to score them with.
            rows: the image of the batch that each was made from, ``[N]``; their order where it is None.
            many: this is one of hundreds of images, worth folding batch norms into convolutions first; logits then differ
                by rounding from those of a call without.
        """
        pieces = list(self._run.logits(images, many))
        logits = torch.cat(pieces) if pieces else self.logits.detach()[:0]
        return self._scored(logits, target, rows)

    def differentiable(self, images: Tensor, cast: bool = False) -> Tensor:
        """Run changed images with a graph to them: logits ``[N,C]``, for methods that optimise what they change.

        All at once, because the graph of all is needed at once; parameters get no gradient where the capture is frozen.

        Args:
            cast: in bf16 where the capture asks for it: for a search of many steps, whose gradient may be rough.
        """
        return self._run.differentiable(images, cast)

    def again(
        self,
        x: Tensor,
        layers: str | nn.Module | Sequence[str | nn.Module] | None = None,
        model: nn.Module | None = None,
        **changed: Any,
    ) -> Capture:
        """The same capture of other images, layers or a changed model: options as they are or ``changed``, one count."""
        wanted, options = (list(self.layers) or None) if layers is None else layers, {**self._options, **changed}
        with self._run.as_caller():
            other = Capture(self._run.live if model is None else model, x, wanted, head=self.head, any_range=True, **options)
        self.passes.add(other.passes)
        other.passes = other._run.passes = self.passes
        return other

    def tail_size(self, layer: str | None = None) -> int:
        """How many changed features of a layer run at once in :meth:`tail`; fewer where the whole model has to run."""
        feature = self._feature(layer)
        self._make_tail(feature)
        if feature.name in self._uncut:
            return self.chunk_size()
        return self._run.tail_size(self.activations(feature.name), self.size)

    def _make_tail(self, feature: Feature) -> None:
        if feature.name not in self._tails:
            self._tails[feature.name], cut = tail_behind(self._run, feature, self.x.detach(), self.logits.detach())
            if not cut:
                self._uncut.add(feature.name)

    def chunk_size(self, kind: Pass = "forward") -> int:
        """How many changed images of this size run at once, ``forward``, ``backward`` or through the ``tail`` only."""
        return self._run.chunk_size(self.size, kind)

    def tail(
        self, activations: Tensor, layer: str | None = None, target: T.Target | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Run only what comes after a layer: logits ``[N,C]``, or scores ``[N]`` where a target is given.

        Args:
            activations: changed features as a grid, ``[N,K,h,w]``. Where they need a gradient the result has one, to
                them alone and never to the parameters; elsewhere they run in chunks without a graph.
            rows: the image of the batch that each belongs to, ``[N]``; their order where it is None.
        """
        check_eval(modules_of(self.model))
        feature = self._feature(layer)
        rows = torch.arange(len(activations), device=activations.device) if rows is None else rows
        if len(activations) != len(rows) or (len(rows) and int(rows.max()) >= len(self.x)):
            raise FoveateError(f"{len(activations)} feature maps need as many rows, each below {len(self.x)}")
        self._make_tail(feature)
        run = self._tails[feature.name]
        self.passes.tail += len(activations)
        if activations.requires_grad:
            with torch.inference_mode(False), torch.enable_grad():
                logits = run(activations, rows)
        else:
            with torch.inference_mode():
                pieces = list(in_chunks(run, self.tail_size(feature.name), activations, rows))
            logits = torch.cat(pieces).clone() if pieces else self.logits.detach()[:0]
        return self._scored(logits, target, rows)

    def _scored(self, logits: Tensor, target: T.Target | None, rows: Tensor | None) -> Tensor:
        if target is None:
            return logits
        count = len(target.y) if rows is None else len(rows)
        if len(logits) != count:
            raise FoveateError(
                f"{len(logits)} image(s) cannot be scored with a target of {count}: rows say which image each was made from"
            )
        return target(logits) if rows is None else target.rows(rows)(logits)

    # -- the run ---------------------------------------------------------------------------------------------------

    def _feature(self, layer: str | None) -> Feature:
        if layer is None:
            layer = self.layer
        if layer not in self._features:
            raise LayerError(f"layer {layer!r} was not captured: this run has {', '.join(self._features)}")
        return self._features[layer]

    def _forward(self, modules: Sequence[nn.Module]) -> None:
        x = self.x
        if self.from_image or L.INPUT in self._features:
            x = self._leaf = x.detach().clone().requires_grad_(True)
        if L.INPUT in self._features:
            self._features[L.INPUT].kept = x
            self._features[L.INPUT].read_as = L.Layout("nchw", *self.size)
        with ExitStack() as stack:
            stack.enter_context(self._run.lock)
            graph = not self.frozen or bool(self._features) or self.from_image
            stack.enter_context(torch.set_grad_enabled(graph))
            stack.enter_context(eager(modules))
            if self._guide is not None:
                stack.enter_context(self._guide.forward())
            for feature in self._features.values():
                if feature.module is not None:
                    stack.enter_context(hooked(feature.module, feature.keep))
            for module in modules:
                if isinstance(module, nn.Linear):
                    stack.enter_context(hooked(module, self._keep_linear))
            output = self._run.laid_out(self._from_the_start, x)
        self.logits = at_least_float32(read_logits(output))
        self.passes.forward += len(x)
        check_logits(self.logits, len(x), output, self.model)

    def _from_the_start(self, x: Tensor) -> Any:
        """Run the model with nothing kept of an attempt before."""
        self._linears.clear()
        for feature in self._features.values():
            feature.calls.clear()
        return self._run(x)

    def _keep_linear(self, module: nn.Linear, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 2 and inputs and isinstance(inputs[0], Tensor):
            self._linears.append((module.weight, module.bias, inputs[0]))
