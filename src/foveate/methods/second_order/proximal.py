"""Proximal: the sparse maximiser of a concave quadratic with an L1 penalty, whose Hessian is of low rank or nearly so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.methods.second_order.curvature import Spectrum

ROUNDS = 12  # of corrections by products with the whole Hessian
PRODUCTS = 300  # after them, at most
ETA = 1e-4  # how exactly a share of zeros is reached, where values are not fewer
SEARCH = 40  # values of lambda_1, at most
NEWTON = 30  # steps in the space of the low rank, at most
STEPS = 2000  # of proximal gradient, at most


@dataclass(frozen=True)
class Maximum:
    """What was found for one image.

    Attributes:
        delta: ``D [d]``.
        inside: ``theta V D [r]``.
        threshold: lambda_1.
        error: bound on the relative error of D.
        steps: passes over V.
        products: with the whole of H.
    """

    delta: Tensor
    inside: Tensor
    threshold: Tensor
    error: float
    steps: int
    products: int = 0


@dataclass(frozen=True)
class LowRank:
    """The problem of one image with ``H = V^T diag(theta) V`` of low rank, ``V [r,d]``, and ``shift = 2 lambda_2``.

    ``D = soft(g + V^T u, lambda_1) / shift`` with ``u = theta V D`` is an equation in r unknowns, piecewise linear, which
    Newton's iteration solves in a few passes over V; proximal steps of length ``1 / L'`` from there, accelerated, bring
    the bound on the error below the tolerance whatever Newton's iteration did.
    """

    values: Tensor
    vectors: Tensor
    largest: float
    shift: float
    tolerance: float

    @property
    def steep(self) -> float:
        """Largest curvature L' of the smooth part, ``shift - H``; a negative eigenvalue of H adds to it."""
        return self.shift - min(0.0, float(self.values.min()))

    @property
    def flat(self) -> float:
        """Smallest curvature of the smooth part."""
        return self.shift - self.largest

    @property
    def momentum(self) -> float:
        """Of accelerated steps on a problem of that curvature."""
        root = float((self.steep / self.flat) ** 0.5)
        return (root - 1) / (root + 1)

    def multiply(self, v: Tensor) -> Tensor:
        """``H v``, ``[d]``."""
        return (self.values.to(v) * (self.vectors @ v)) @ self.vectors

    def solve(self, g: Tensor, threshold: Tensor, start: Maximum | None) -> Maximum:
        """D for a given lambda_1."""
        if float(threshold) == 0:
            along = (self.vectors @ g).double() * (self.values / (self.shift - self.values))  # Woodbury's identity
            delta = (g + along.to(g) @ self.vectors) / self.shift
            inside = self.values * (self.vectors @ delta).double()
            return Maximum(delta, inside, threshold, self.error(delta, g + inside.to(g) @ self.vectors, threshold), 1)
        inside, steps = self._newton(g, threshold, torch.zeros_like(self.values) if start is None else start.inside)
        return self._proximal(g, threshold, soft(g + inside.to(g) @ self.vectors, threshold) / self.shift, steps)

    def _newton(self, g: Tensor, threshold: Tensor, inside: Tensor) -> tuple[Tensor, int]:
        one = torch.eye(len(self.values), dtype=torch.float64, device=g.device)

        def miss(u: Tensor) -> tuple[Tensor, Tensor]:
            delta = soft(g + u.to(g) @ self.vectors, threshold) / self.shift
            return u - self.values * (self.vectors @ delta).double(), delta

        missed, delta = miss(inside)
        steps = 1
        for _ in range(NEWTON):
            if float(missed.norm()) <= 1e-7 * max(float(inside.norm()), 1e-30):
                break
            support = self.vectors[:, delta != 0]
            slope = one - self.values[:, None] * (support @ support.T).double() / self.shift
            move = torch.linalg.solve(slope, -missed)
            for length in (1.0, 0.5, 0.25, 0.125):
                trial, change = miss(inside + length * move)
                steps += 1
                if float(trial.norm()) < float(missed.norm()):
                    break
            else:
                break  # at the accuracy of the arithmetic, or in a corner that proximal steps leave
            inside, missed, delta = inside + length * move, trial, change
        return inside, steps

    def _proximal(self, g: Tensor, threshold: Tensor, start: Tensor, steps: int) -> Maximum:
        here = ahead = start
        error = float("inf")
        for _ in range(STEPS):
            new, error = self.step(ahead, g + self.multiply(ahead), threshold)
            ahead, here = new + self.momentum * (new - here), new
            steps += 1
            if not error > max(self.tolerance / 2, 8 * torch.finfo(g.dtype).eps * self.steep / self.flat):
                break
        return Maximum(here, self.values * (self.vectors @ here).double(), threshold, error, steps)

    def by_eta(self, g: Tensor, eta: float, start: Maximum | None) -> Maximum:
        """lambda_1 for a share ``eta`` of zeros, within .0001: a bracket that is halved, from a good guess, warm.

        At the solution ``D = soft(g + H D, lambda_1) / shift``, so that the quantile of ``|g + H D|`` is a guess.
        """
        low, high = 0.0, float("inf")
        found, steps = start, 0
        threshold = quantile((g if found is None else g + found.inside.to(g) @ self.vectors)[None], eta)[0]
        for number in range(SEARCH):
            found = self.solve(g, threshold, found)
            steps += found.steps
            zeros = float((found.delta == 0).double().mean())
            if abs(zeros - eta) <= max(ETA, 1 / len(g)):
                break
            low, high = (max(low, float(threshold)), high) if zeros < eta else (low, min(high, float(threshold)))
            guess = quantile((g + found.inside.to(g) @ self.vectors)[None], eta)[0]
            if number < 4 and low < float(guess) < high:
                threshold = guess
            else:
                threshold = torch.full_like(guess, 2 * low if high == float("inf") else (low + high) / 2)
            if high < float("inf") and high - low <= 4 * torch.finfo(g.dtype).eps * high:
                break  # the share jumps here: equal values
        assert found is not None
        return Maximum(found.delta, found.inside, found.threshold, found.error, steps)

    def step(self, delta: Tensor, pushed: Tensor, threshold: Tensor) -> tuple[Tensor, float]:
        """One proximal step of length ``1 / L'`` with ``pushed = g + H D``, and the bound on ``|D - best| / |D|``.

        The bound is ``2 L' |step| / (mu |D|)`` for a problem of curvature between mu and L', because the step of
        a strongly concave problem is at least mu / (2 L') of the way that is left.
        """
        new = soft(delta + (pushed - self.shift * delta) / self.steep, threshold / self.steep)
        return new, _relative(new - delta, new) * 2 * self.steep / self.flat

    def error(self, delta: Tensor, pushed: Tensor, threshold: Tensor) -> float:
        """The bound of :meth:`step`."""
        return self.step(delta, pushed, threshold)[1]


def maximise(
    spectrum: Spectrum,
    shift: Tensor,
    g: Tensor,
    *,
    lambda1: float | None,
    eta: float,
    tolerance: float,
    exact: Callable[[Tensor], Tensor] | None,
) -> list[Maximum]:
    """``argmax g^T D + D^T H D / 2 - lambda_1 |D|_1 - shift / 2 |D|_2^2`` of each image.

    Args:
        spectrum: eigenvectors of H: all of it, or what Lanczos' iteration found.
        shift: ``2 lambda_2 [n]``, above the largest eigenvalue.
        g: ``[n,d]``.
        lambda1: None to find it for the share ``eta`` of zeros.
        tolerance: bound on the relative error of D.
        exact: multiplies with the whole of H, ``[n,d] -> [n,d]``, where the spectrum is not all of it: the bound is then that
            of the whole problem, and D is corrected until it holds.
    """
    largest = spectrum.largest
    problems = [
        LowRank(values, vectors, float(largest[i]), float(shift[i]), tolerance)
        for i, (values, vectors) in enumerate(zip(spectrum.values, spectrum.vectors, strict=True))
    ]

    def inner(i: int, pushed: Tensor, start: Maximum | None) -> Maximum:
        if lambda1 is None:
            return problems[i].by_eta(pushed, eta, start)
        return problems[i].solve(pushed, pushed.new_tensor(lambda1), start)

    found = [inner(i, g[i], None) for i in range(len(problems))]
    return found if exact is None else _corrected(problems, g, found, inner, exact, tolerance)


def _corrected(
    problems: list[LowRank],
    g: Tensor,
    found: list[Maximum],
    inner: Callable[[int, Tensor, Maximum], Maximum],
    exact: Callable[[Tensor], Tensor],
    tolerance: float,
) -> list[Maximum]:
    """Solutions of the whole problem from those of the low rank: what that misses of H D acts like a part of the gradient."""
    found, open_ = list(found), set(range(len(found)))
    for _ in range(ROUNDS):
        products = exact(torch.stack([one.delta for one in found]))
        for i in sorted(open_):
            one, pushed = found[i], g[i] + products[i]
            error = problems[i].error(one.delta, pushed, one.threshold)
            one = replace(one, error=error, products=one.products + 1)
            if not error > tolerance:
                open_.remove(i)
                found[i] = one
                continue
            better = inner(i, pushed - problems[i].multiply(one.delta), one)
            found[i] = replace(
                one, delta=better.delta, inside=better.inside, threshold=better.threshold, steps=one.steps + better.steps
            )
        if not open_:
            return found
    # The low rank misses too much: accelerated proximal steps, with a product each, converge whatever it misses.
    ahead = [one.delta for one in found]
    for _ in range(PRODUCTS):
        products = exact(torch.stack(ahead))
        for i in sorted(open_):
            one, problem = found[i], problems[i]
            new, error = problem.step(ahead[i], g[i] + products[i], one.threshold)
            ahead[i] = new + problem.momentum * (new - one.delta)
            found[i] = replace(one, delta=new, error=error, steps=one.steps + 1, products=one.products + 1)
            if not error > tolerance:
                open_.remove(i)
        if not open_:
            break
    return found


def _relative(difference: Tensor, value: Tensor) -> float:
    top = float(difference.double().norm())
    return top / max(float(value.double().norm()), 1e-300) if top else 0.0


def soft(v: Tensor, threshold: Tensor) -> Tensor:
    """``sign(v) max(|v| - threshold, 0)``, with exact zeros."""
    return v.sign() * (v.abs() - threshold).clamp(min=0)


def quantile(v: Tensor, eta: float) -> Tensor:
    """The value that at most ``round(eta d)`` of ``|v|`` do not exceed, ``[n]``: soft-thresholded by it, so many are 0."""
    place = round(eta * v.shape[1])
    return v.abs().kthvalue(place, 1).values if place else torch.zeros(len(v), dtype=v.dtype, device=v.device)
