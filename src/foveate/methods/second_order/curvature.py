"""Curvature: the Hessian of the loss by the image, as products with it, as factors, and as a few eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from foveate.errors import FoveateError
from foveate.runtime.capture import Capture
from foveate.runtime.memo import Memo
from foveate.runtime.noise import gaussian
from foveate.targets import SCORES, Target

Multiply = Callable[[Tensor], Tensor]
TRACE_DRAWS = 16
SAFETY = 2.0  # times the estimate of a trace from so many draws, whose standard deviation is at most .35 of it
LEAST_STEPS = 5  # of Lanczos' iteration: fewer can settle on a vector that the start happened to be near to
SECOND = 0.05  # relative accuracy of the second eigenvalue, where it is asked for
BLOCK = 2**14  # values of each column that are in float64 at once
LANCZOS_STEPS = 40
LANCZOS_TOLERANCE = 1e-3  # of the largest eigenvalue, relative
_SMOOTH = {
    *("gelu", "silu", "mish", "softplus", "sigmoid", "tanh", "softmax", "log_softmax", "elu", "elu_", "selu", "celu", "exp"),
    *("hardswish", "layer_norm", "group_norm", "instance_norm", "normalize", "scaled_dot_product_attention", "sqrt", "rsqrt"),
    *("multi_head_attention_forward", "pow", "square", "silu_", "logsigmoid", "softsign", "cos", "sin"),
}
_networks = Memo()


class _Pass:
    """One run of some images with its graph: their loss, its gradient, and what multiplies with its Hessian."""

    def __init__(self, capture: Capture, target: Target, images: Tensor, rows: Tensor, twice: bool) -> None:
        # The fused kernels of attention have no second derivative.
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self.x = images.detach().clone().requires_grad_(True)
            self.logits = capture.differentiable(self.x)
            loss = _loss(target.rows(rows), self.logits.double(), capture.head)
            if not loss.requires_grad:
                raise FoveateError("the loss does not depend on the image: something in the model detaches it")
            (self.gradient,) = torch.autograd.grad(loss.sum(), self.x, create_graph=twice, retain_graph=True)
        capture.passes.backward += len(images)
        self.capture = capture
        if twice:
            _check_twice(self.gradient)

    def multiply(self, v: Tensor) -> Tensor:
        """``H v``, both ``[N,C,H,W]``."""
        if not self.gradient.requires_grad:
            return torch.zeros_like(v)
        try:
            (product,) = torch.autograd.grad(self.gradient, self.x, v, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise FoveateError(f"the model cannot be differentiated twice: {str(error).splitlines()[0]}") from error
        self.capture.passes.backward += 2 * len(v)  # through the forward pass, and through the backward pass
        return torch.zeros_like(v) if product is None else product

    def pull(self, by_logits: Tensor) -> Tensor:
        """``W u``: the gradient of ``sum_c u_c z_c`` by the image, for ``u [N,C]``; ``[N,C,H,W]``."""
        by = by_logits.to(self.logits.dtype)
        (gradient,) = torch.autograd.grad(self.logits, self.x, by, retain_graph=True)
        self.capture.passes.backward += len(by)
        return gradient


def _check_twice(gradient: Tensor) -> None:
    """Refuse a gradient of which a part cannot be differentiated again: it would silently count as constant.

    Raises:
        FoveateError: a function of the model is marked as differentiable once.
    """
    seen, waiting = set(), [gradient.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise FoveateError("the model cannot be differentiated twice: one of its functions has a backward pass that cannot")
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)


class Curvature:
    """Gradient ``g`` and Hessian ``H`` of ``l = -log p_y(x)`` by the image, for some images of a batch, each for itself.

    Of several copies of each image both are means over the copies, of the one label. Vectors are flat, ``[n,d]`` with
    ``d = 3 H W``; ``unit [1,3,1,1]`` says in what they are measured (1 in the image's own [0, 1], the standard deviation
    of the normalisation in what the network sees after it).

    Args:
        rows: which images of the batch, ``[n]``.
        images: their copies, ``[n,k,3,H,W]``.
        twice: whether products with H will be asked for; False needs half the memory.

    Attributes:
        gradient: ``g [n,d]``.
        products: how many products with H each image took so far.

    Raises:
        FoveateError: a score that has no probability, a model that cannot be differentiated twice.
    """

    def __init__(
        self, capture: Capture, target: Target, rows: Tensor, images: Tensor, unit: Tensor, *, twice: bool = True
    ) -> None:
        self.capture, self.target, self.twice, self.unit = capture, target, twice, unit
        self.count, self.copies = images.shape[:2]
        self.images, self.rows = images.flatten(0, 1), rows.repeat_interleave(self.copies)
        self.products = 0
        self._held: _Pass | None = None
        self.gradient = self._mean(lambda part, piece: part.gradient.detach())

    def _mean(self, what: Callable[[_Pass, slice], Tensor]) -> Tensor:
        """A result of every copy, ``[N,C,H,W]``, in the unit; its mean over the copies of each image, ``[n,d]``.

        One graph is kept where all copies fit into one chunk, and rebuilt for every use where they do not.
        """
        step = self.capture.chunk_size("backward")
        step = max(1, step // 2) if self.twice else step  # a graph of two passes holds twice as much
        pieces = []
        for start in range(0, len(self.images), step):
            piece = slice(start, start + step)
            part = self._held
            if part is None:
                part = _Pass(self.capture, self.target, self.images[piece], self.rows[piece], self.twice)
                self._held = part if len(self.images) <= step else None
            pieces.append(what(part, piece))
        values = torch.cat(pieces) * self.unit
        return values.flatten(1).view(self.count, self.copies, -1).mean(1)

    def multiply(self, v: Tensor) -> Tensor:
        """``H v`` of each image, ``[n,d]``: one product, by double backpropagation; any network."""
        each = (v.view(self.count, *self.images.shape[1:]) * self.unit).repeat_interleave(self.copies, 0)
        self.products += 1
        return self._mean(lambda part, piece: part.multiply(each[piece]).detach())

    def factors(self, share: float) -> Factors:
        """``B`` with ``H = B B^T`` of a piecewise-linear network: a backward pass for each class that counts.

        ``H = W (diag p - p p^T) W^T``, ``W = d logits / d x``, and ``diag p - p p^T = sum_j p_j (e_j - p)(e_j - p)^T``: class
        j adds the column ``sqrt(p_j) (w_j - sum_i p_i w_i)``. Classes are taken from the likeliest on, until those left
        out have at most ``share`` of what the likeliest leaves, ``1 - p_1``: of a sure prediction that rest is small, and all
        of the curvature comes from it. What they would have added is positive semi-definite, so that its
        trace bounds its norm; the trace is estimated with 16 backward passes, and doubled for the scatter of the estimate.

        Source: Singla et al., ICML 2019, theorem on the Hessian of ReLU networks; see :func:`smooth_parts` for which
        networks it holds.
        """
        columns, lefts = [], []
        step = self.capture.chunk_size("backward")
        for start in range(0, len(self.images), step):
            piece = slice(start, start + step)
            part = self._held or _Pass(self.capture, self.target, self.images[piece], self.rows[piece], False)
            root = _Root(self.target.rows(self.rows[piece]), part.logits, self.capture.head, share)
            # Written in place: of a thousand classes they are hundreds of megabytes per image.
            pulled = self.gradient.new_empty(len(part.logits), root.width, self.gradient.shape[1])  # [N,r,d]
            for j in range(root.width):
                pulled[:, j] = (part.pull(root.column(j)) * self.unit).flatten(1)
            columns.append(pulled)
            left = torch.zeros(len(part.logits), dtype=torch.float64, device=part.logits.device)
            for number in () if root.complete else range(TRACE_DRAWS):
                signs = torch.sign(gaussian(0, [number], part.logits.shape[1:], part.logits)[0].double() + 1e-30)
                pulled = part.pull(root.rest(signs)) * self.unit
                left += pulled.flatten(1).double().square().sum(1) * (SAFETY / TRACE_DRAWS)
            lefts.append(left)
        widest = max(column.shape[1] for column in columns)
        if len(columns) == 1:
            (every,) = columns
        else:
            every = torch.cat([F.pad(column, (0, 0, 0, widest - column.shape[1])) for column in columns])
        every = every.view(self.count, self.copies * widest, -1)
        if self.copies > 1:
            every = every.div_(self.copies**0.5)
        classes = (every != 0).any(2).sum(1) // self.copies
        return Factors(every, classes, torch.cat(lefts).view(self.count, self.copies).mean(1))


@dataclass(frozen=True)
class Factors:
    """``H = B B^T``, but for what was left out.

    Attributes:
        columns: ``B^T [n,r,d]``; rows beyond an image's own number are 0.
        classes: how many classes each image kept, ``[n]``.
        left_out: twice the estimated trace of what they leave out, which bounds its norm, ``[n]``; 0 where nothing is.
    """

    columns: Tensor
    classes: Tensor
    left_out: Tensor

    def spectrum(self) -> Spectrum:
        """The eigenvectors and eigenvalues of ``B B^T`` that are not 0, by those of ``B^T B``: exact, ``r x r``."""
        # A part at a time: the columns in float64 are twice as many megabytes.
        gram = sum(part.double() @ part.double().transpose(1, 2) for part in self.columns.split(BLOCK, 2))  # [n,r,r]
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0)
        kept = values > values[:, -1:] * 1e-12
        turn = torch.where(kept, values.rsqrt(), torch.zeros_like(values))[:, None, :] * vectors
        eigenvectors = torch.empty_like(self.columns)
        for part, into in zip(self.columns.split(BLOCK, 2), eigenvectors.split(BLOCK, 2), strict=True):
            into.copy_(turn.transpose(1, 2) @ part.double())
        values = torch.where(kept, values, torch.zeros_like(values))
        zero = torch.zeros_like(values[:, 0])
        return Spectrum(values.flip(1), eigenvectors.flip(1), self.left_out.to(zero), zero, zero.long())


@dataclass(frozen=True)
class Spectrum:
    """Some eigenvalues of H with their eigenvectors, largest first.

    Attributes:
        values: ``[n,k]``; 0 beyond an image's own number.
        vectors: ``[n,k,d]``, orthonormal; 0 where the value is.
        error: how far the largest value may be off: the residual of Lanczos' iteration, or what factors leave out, ``[n]``.
        second_error: the same of the second value, ``[n]``.
        products: with H, that it took, ``[n]``.
    """

    values: Tensor
    vectors: Tensor
    error: Tensor
    second_error: Tensor
    products: Tensor

    @property
    def largest(self) -> Tensor:
        """``L [n]``, the largest eigenvalue with its error added, to be on the safe side; 0 where all are negative."""
        return (self.values[:, 0] + self.error).clamp(min=0)

    @property
    def second(self) -> Tensor:
        """The second eigenvalue, ``[n]``; 0 where there is none, NaN where it is not known to 5 %."""
        if self.values.shape[1] < 2:
            return torch.zeros_like(self.values[:, 0])
        unknown = self.second_error > SECOND * self.values[:, 1].abs()
        return self.values[:, 1].masked_fill(unknown, float("nan"))

    def multiply(self, v: Tensor) -> Tensor:
        """``sum_k value_k (vector_k . v) vector_k``, ``[n,d]``."""
        along = torch.bmm(self.vectors, v[:, :, None])[:, :, 0] * self.values.to(v.dtype)  # [n,k]
        return torch.bmm(along[:, None, :], self.vectors)[:, 0]


def _loss(target: Target, logits: Tensor, head: str) -> Tensor:
    """``-log p_y [N]`` in float64, with a gradient that keeps its digits where ``1 - p_y`` has none left.

    ``-log p_y = -log sigmoid(z_y - log sum_{j != y} exp z_j)``, whose derivatives are small numbers and not differences
    of large ones. The gradient of a sure prediction is the smallest, and where it points is all that counts here.
    """
    if _rank_one(target, head):
        return -target.log_probability(logits, head)  # type: ignore[arg-type]
    if target.name not in SCORES:
        target.log_probability(logits.detach(), head)  # type: ignore[arg-type]  # says that it has no probability
    others = logits.scatter(1, target.y[:, None], float("-inf")).logsumexp(1)
    return -F.logsigmoid(logits.gather(1, target.y[:, None])[:, 0] - others)


class _Root:
    """``R`` with ``R R^T`` the Hessian of the loss by the logits, ``C x C`` for each image, a column at a time.

    Attributes:
        width: how many columns are kept, of the image with the most.
        complete: whether none is left out.
    """

    def __init__(self, target: Target, logits: Tensor, head: str, share: float) -> None:
        z = logits.detach().double()
        self.one: Tensor | None = None
        if _rank_one(target, head):
            # -log sigmoid of something linear in the logits: one direction, that of the gradient.
            with torch.enable_grad():
                z.requires_grad_(True)
                log_p = target.log_probability(z, head)  # type: ignore[arg-type]
                (gradient,) = torch.autograd.grad(log_p.sum(), z)
            log_p = log_p.detach()
            rest = -torch.expm1(log_p)  # 1 - p, which the gradient has as a factor
            self.one = gradient * (log_p.exp() / rest.clamp(min=1e-300)).sqrt()[:, None]  # [N,C]
            self.width, self.complete = 1, True
            return
        self.p = z.softmax(1)  # [N,C]
        self.order = self.p.argsort(1, descending=True)
        likeliest = self.p.gather(1, self.order)
        kept = _kept(likeliest, share)
        self.root = likeliest.sqrt()
        self.kept = kept
        self.width, self.complete = int(kept.sum(1).max()), bool(kept.all())

    def column(self, j: int) -> Tensor:
        """Column ``sqrt(p_j) (e_j - p)`` of the j-th likeliest class of each image, ``[N,C]``; 0 where it is left out."""
        if self.one is not None:
            return self.one
        weight = (self.root * self.kept)[:, j : j + 1]
        return -weight * self.p.scatter_add(1, self.order[:, j : j + 1], -torch.ones_like(weight))

    def rest(self, signs: Tensor) -> Tensor:
        """The sum of the columns that are left out, each times its sign ``[C]``; ``[N,C]``."""
        weight = self.root * ~self.kept * signs
        return torch.zeros_like(self.p).scatter(1, self.order, weight) - self.p * weight.sum(1, keepdim=True)


def _rank_one(target: Target, head: str) -> bool:
    return head != "softmax" or target.name == "contrast"


def classes_for(target: Target, logits: Tensor, head: str, share: float) -> Tensor:
    """How many classes leave at most ``share`` of ``1 - p_1`` to the others, ``[B]``; 1 where the loss has one direction."""
    if _rank_one(target, head):
        return torch.ones(len(logits), dtype=torch.long, device=logits.device)
    if share == 0:
        return torch.full((len(logits),), logits.shape[1], device=logits.device)
    return _kept(logits.detach().double().softmax(1).sort(1, descending=True).values, share).sum(1)


def _kept(likeliest: Tensor, share: float) -> Tensor:
    """Which of the probabilities ``[N,C]``, largest first, leave at most ``share`` of ``1 - p_1`` to those after them."""
    after = likeliest.flip(1).cumsum(1).flip(1)  # summed from the smallest on: 1 - p has no digits where p is near 1
    rest = after[:, 1:2] if likeliest.shape[1] > 1 else torch.zeros_like(after)
    return (after > share * rest) | (torch.arange(likeliest.shape[1], device=likeliest.device) == 0)


def lanczos(
    multiply: Multiply, start: Tensor, steps: int = LANCZOS_STEPS, tolerance: float = LANCZOS_TOLERANCE, second: bool = False
) -> Spectrum:
    """The outer eigenvalues of a symmetric operator, by Lanczos' iteration with full reorthogonalisation.

    Power iteration needs many more products, and finds the eigenvalue that is largest in magnitude, which may be
    negative. Each image stops for itself when the residual of its largest eigenvalue is below ``tolerance`` of it. That there
    is one within the residual is certain, that it is the largest is as good as certain, by the noise in the start.

    Args:
        multiply: ``[n,d] -> [n,d]``, each row its own operator.
        start: ``[n,d]``; seeded noise is added, so that no eigenvector is missed because the start is orthogonal to it.
        steps: at most.
        second: go on until the second eigenvalue is known to 5 % of itself, too.

    Source: Parlett, The symmetric eigenvalue problem, 1998, chapter 13.
    """
    n, d = start.shape
    noise = gaussian(0, [0], torch.Size([d]), start)[0]
    q = start / start.norm(dim=1, keepdim=True).clamp(min=1e-30) + noise / noise.norm()
    q = q / q.norm(dim=1, keepdim=True)
    steps = min(steps, d)
    basis = start.new_zeros(n, steps, d)
    T = torch.zeros(n, steps, steps, dtype=torch.float64, device=start.device)
    going = torch.ones(n, dtype=torch.bool, device=start.device)
    taken = torch.zeros(n, dtype=torch.long, device=start.device)
    last = torch.zeros(n, dtype=torch.float64, device=start.device)
    small = torch.finfo(start.dtype).eps * d**0.5
    for k in range(steps):
        basis[:, k] = torch.where(going[:, None], q, 0)
        taken = taken + going
        w = multiply(q)
        T[:, k, k] = torch.where(going, (w.double() * q.double()).sum(1), T[:, k, k])
        for _ in range(2):  # twice is enough
            w = w - torch.bmm(torch.bmm(basis[:, : k + 1], w[:, :, None])[:, :, 0][:, None, :], basis[:, : k + 1])[:, 0]
        beta = w.double().norm(dim=1)
        last = torch.where(going, beta, last)
        values, vectors = torch.linalg.eigh(T[:, : k + 1, : k + 1])
        scale = values.abs().amax(1)
        exhausted = beta <= small * scale
        residual = beta[:, None] * vectors[:, -1].abs()  # of eigenvalues in ascending order
        settled = residual[:, -1] <= tolerance * values[:, -1].clamp(min=0)
        if second and k:
            settled = settled & (residual[:, -2] <= SECOND * values[:, -2].abs())
        going = going & ~exhausted & ~(settled & (k + 1 >= LEAST_STEPS))
        if not going.any() or k + 1 == steps:
            break
        T[:, k, k + 1] = T[:, k + 1, k] = torch.where(going, beta, 0.0)
        q = torch.where(going[:, None], w / beta.clamp(min=1e-300)[:, None].to(w.dtype), torch.zeros_like(w))
    return _ritz(T, basis, taken, last)


def _ritz(T: Tensor, basis: Tensor, taken: Tensor, last: Tensor) -> Spectrum:
    """Eigenvalues and vectors of each image's own part of T, largest first."""
    n, steps = basis.shape[:2]
    inside = torch.arange(steps, device=T.device) < taken[:, None]  # [n,k]
    pair = inside[:, :, None] & inside[:, None, :]
    low = T.abs().amax((1, 2)) * 4 + 1  # outside of an image's own part: below all others, and told by that
    own = torch.where(pair, T, torch.zeros_like(T)) - torch.diag_embed(torch.where(inside, 0.0, 1.0) * low[:, None])
    values, vectors = torch.linalg.eigh(own)
    values, vectors = values.flip(1), vectors.flip(2)
    kept = torch.arange(steps, device=T.device) < taken[:, None]
    bottom = vectors.gather(1, (taken - 1)[:, None, None].expand(-1, 1, steps))[:, 0]  # last component of each vector
    residual = last[:, None] * bottom.abs()
    values = torch.where(kept, values, torch.zeros_like(values))
    found = torch.bmm(vectors.transpose(1, 2).to(basis.dtype), basis) * kept[:, :, None]
    second = residual[:, 1] if steps > 1 else torch.zeros_like(last)
    return Spectrum(values, found, residual[:, 0], second.masked_fill(taken < 2, float("inf")), taken)


class _Recorder(TorchFunctionMode):
    """Which functions that are not piecewise linear a model calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SMOOTH and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self.found.add(name.rstrip("_"))
        if name in ("mul", "matmul", "__mul__", "bmm") and sum(isinstance(a, Tensor) and a.requires_grad for a in args) == 2:
            self.found.add("products of features")
        return func(*args, **(kwargs or {}))


def smooth_parts(capture: Capture) -> tuple[str, ...]:
    """What keeps the logits from being piecewise linear in the image; empty where they are.

    Smooth functions on the way from the image to the logits are seen as they run. Where none is known by name, what the
    model computes decides: the second derivative of a random combination of the logits along a random direction, at the
    first image of the batch, is exactly 0 for a piecewise-linear network, and hardly ever for another. Kept with the model.
    """
    known = _networks.of(capture.model)
    if "smooth" not in known:
        known["smooth"] = _smooth_parts(capture)
    return known["smooth"]  # type: ignore[no-any-return]


def _smooth_parts(capture: Capture) -> tuple[str, ...]:
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _Recorder() as recorder:
        x = capture.images[:1].clone().requires_grad_(True)
        logits = capture.differentiable(x)
    with torch.inference_mode(False), torch.enable_grad():
        # It has a gradient itself: a function that can be differentiated once only says so then.
        by = gaussian(0, [1], logits.shape[1:], logits).requires_grad_(True)
        direction = gaussian(0, [2], x.shape[1:], x)
        (first,) = torch.autograd.grad(logits, x, by, create_graph=True)
        _check_twice(first)
        second = None
        if first.requires_grad:
            try:
                (second,) = torch.autograd.grad(first, x, direction, allow_unused=True)
            except RuntimeError as error:
                raise FoveateError(f"the model cannot be differentiated twice: {str(error).splitlines()[0]}") from error
    capture.passes.backward += 3
    if recorder.found:
        return tuple(sorted(recorder.found))
    if second is None or float(second.norm()) <= 1e-6 * float(first.detach().norm()):
        return ()
    return ("an operation with a curvature of its own",)
