"""Capture: run the model once, keep logits, features and gradients; run the rest of it, or changed images, again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate import targets as T
from foveate.errors import FoveateError
from foveate.precision import Precision
from foveate.runtime import guided as G
from foveate.runtime import layers as L
from foveate.runtime.chunks import in_chunks
from foveate.runtime.feature import Feature, Passes
from foveate.runtime.gradients import Gradients
from foveate.runtime.linear_head import at_least_float32
from foveate.runtime.model import check_eval, check_images, check_logits, eager, hooked, modules_of, read_logits, unwrap
from foveate.runtime.runner import Runner
from foveate.runtime.tail import Tail, tail_after


class Capture(Gradients):
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
        super().__init__()
        self.model = unwrap(model)
        self.frozen = frozen
        self.passes = Passes()
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
        self._tails: dict[str, Tail] = {}
        self._linears: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._base: Tensor | None = None
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
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.x.shape[-2], self.x.shape[-1]

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
        if not self._tail_of(feature).cut:
            return self.chunk_size()
        return self._run.tail_size(self.activations(feature.name), self.size)

    def _tail_of(self, feature: Feature) -> Tail:
        if feature.name not in self._tails:
            self._tails[feature.name] = tail_after(self._run, feature, self.x.detach(), self.logits.detach())
        return self._tails[feature.name]

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
        run = self._tail_of(feature).run
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

    def _call_of(self, feature: Feature, known: bool) -> L.Call | None:
        """Which call of a layer saw the images; of other images of a run before it is asked only where there are several."""
        if feature.module is None or (known and len(feature.calls) == 1):
            return L.Call(-1, True)
        return L.run_of(self.model, self.x, self._run.detached, feature.name, feature.module)

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
            hooks: list[tuple[nn.Module, Callable[..., Any]]] = [
                (feature.module, feature.keep) for feature in self._features.values() if feature.module is not None
            ]
            hooks += [(module, self._keep_linear) for module in modules if isinstance(module, nn.Linear)]
            stack.enter_context(hooked(self.model, hooks))
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
