"""Schedules: how much cross-entropy and an added loss weigh as training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foveate.errors import FoveateError


@dataclass(frozen=True)
class Weights:
    """Factors at one moment of training: of cross-entropy, of the added loss, and of the learning rate."""

    cross_entropy: float = 1.0
    added: float = 1.0
    learning_rate: float = 1.0


Schedule = Callable[[float], Weights]


def constant(progress: float) -> Weights:
    """Both losses at their full weight all the time."""
    return Weights()


def three_phase(progress: float) -> Weights:
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


SCHEDULES: dict[str, Schedule] = {"constant": constant, "three_phase": three_phase}


def get(name: str) -> Schedule:
    """A schedule by name.

    Raises:
        FoveateError: no such schedule.
    """
    if name not in SCHEDULES:
        raise FoveateError(f"schedule {name!r} is unknown: use {', '.join(map(repr, SCHEDULES))}")
    return SCHEDULES[name]
