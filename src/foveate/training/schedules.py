"""Schedules: how much cross-entropy and an added loss weigh as training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.errors import FoveateError

WORST_FIT = 0.05  # below it a map's fit counts as this: a weight of at most 20


@dataclass(frozen=True)
class Weights:
    """Factors at one moment of training: of cross-entropy, of the added loss, and of the learning rate."""

    cross_entropy: float = 1.0
    added: float = 1.0
    learning_rate: float = 1.0


Schedule = Callable[[float, float], Weights]


def constant(progress: float, value: float = 0.0) -> Weights:
    """Both losses at their full weight all the time."""
    return Weights()


def linear(progress: float, value: float = 0.0) -> Weights:
    """The added loss grows from 0 to its full weight over the first half: maps of random weights mean nothing yet."""
    return Weights(added=min(1.0, 2 * progress))


def three_phase(progress: float, value: float = 0.0) -> Weights:
    """The talk's three phases: cross-entropy alone, the added loss alone, cross-entropy again at a tenth of the rate.

    Args:
        progress: share of the epochs that are done, in [0, 1). The phases end at 1/3 and 2/3: epochs 5 and 10 of the
            15 in the code of January 2023.

    Source: Setpal, "Interpretability tools as feedback loops", 2023.
    """
    if progress < 1 / 3:
        return Weights(1.0, 0.0)
    if progress < 2 / 3:
        return Weights(0.0, 1.0)
    return Weights(1.0, 0.0, 0.1)


def inverse_fit(progress: float, value: float = 0.0) -> Weights:
    """Weights proportional to 1 / fit quality: the heavier, the worse the map fits.

    Args:
        value: of the added loss on this batch, a share in [0, 1]: ``1 - value`` is the fit, and counts as .05 at least.

    Source: Setpal, "Interpretability tools as feedback loops", 2023.
    """
    return Weights(added=1 / max(WORST_FIT, 1 - value))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "three_phase": three_phase,
    "inverse_fit": inverse_fit,
}


def phases(parts: Sequence[tuple[float, Weights]]) -> Schedule:
    """Custom weights: ``(share of the epochs at which a part ends, its weights)``, the last at 1."""

    def schedule(progress: float, value: float = 0.0) -> Weights:
        return next((weights for end, weights in parts if progress < end), parts[-1][1])

    return schedule


def get(name: str) -> Schedule:
    """A schedule by name: ``(share of the epochs that are done, value of the loss on this batch) -> Weights``.

    Raises:
        FoveateError: no such schedule.
    """
    if name not in SCHEDULES:
        raise FoveateError(f"schedule {name!r} is unknown: use {', '.join(map(repr, SCHEDULES))}")
    return SCHEDULES[name]
