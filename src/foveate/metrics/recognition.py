"""Recognition under the mask: Average Drop, Average Gain and Average Increase share one masked forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.batch import Batch
from foveate.errors import FoveateError
from foveate.maps import apply_mask
from foveate.registry import Column, metric
from foveate.runtime.capture import Capture
from foveate.targets import classes, log_probability

SURE = 1e-12  # a missing probability below this has no digits left to be gained


def average_drop(log_p: Tensor, log_o: Tensor) -> Tensor:
    """``AD = 100 max(0, p - o) / p = 100 max(0, 1 - exp(log o - log p))``, percent, lower is better.

    Args:
        log_p: log-probability of the class on the image, ``[B]``, float64.
        log_o: the same on the image seen through the map.
    """
    return 100 * (-torch.expm1(log_o - log_p)).clamp(min=0)


def average_gain(log_p: Tensor, log_o: Tensor) -> Tensor:
    """``AG = 100 max(0, o - p) / (1 - p)``, percent, higher is better: the share of missing confidence recovered.

    ``1 - p = -expm1(log p)``; where that is below 1e-12 the gain is 0.
    """
    missing = -torch.expm1(log_p)
    sure = (missing < SURE) & ~torch.isnan(log_o)
    gain = (log_o.exp() - log_p.exp()).clamp(min=0) / torch.where(sure, torch.ones_like(missing), missing)
    return 100 * torch.where(sure, torch.zeros_like(gain), gain)


def average_increase(log_p: Tensor, log_o: Tensor) -> Tensor:
    """``AI = 100 [o > p]``, percent, higher is better.

    Strict: where both are near, they must come from the same way of running the model, as :func:`recognition` takes care
    of; two ways differ by rounding, and a map of ones would score 50 and not 0. Not a number where one of them is none.
    """
    return torch.where(torch.isnan(log_o) | torch.isnan(log_p), torch.nan, 100.0 * (log_o > log_p).double())


@metric(
    "recognition",
    title="Average Drop, Gain, Increase",
    paper="Chattopadhay et al., WACV 2018 (AD, AI); Zhang et al., CVIU 2024 (AG)",
    columns={
        "AD": Column(
            "down",
            "average_drop",
            "Average Drop",
            "%",
            (0, 100),
            "100 max(0, p - o) / p, with p the probability on the image and o on the image seen through its map",
            "How much of the probability is lost when only what the map shows is left?",
            "p = .90 and, behind the map, o = .81: AD 10. The map keeps what the model needs.",
            "p = .90 and o = .09: AD 90. What the model needs lies outside of the map.",
        ),
        "AG": Column(
            "up",
            "average_gain",
            "Average Gain",
            "%",
            (0, 100),
            "100 max(0, o - p) / (1 - p)",
            "How much of the missing probability is gained when only what the map shows is left?",
            "p = .60 and, behind the map, o = .80: AG 50. The map hides what confuses the model.",
            "o below p: AG 0. Behind the map the model is less sure than before.",
        ),
        "AI": Column(
            "up",
            "average_increase",
            "Average Increase",
            "%",
            (0, 100),
            "100 where o > p, 0 elsewhere",
            "On how many images is the model surer behind the map than on the image?",
            "Behind 60 of 100 maps the probability rises: AI 60.",
            "Behind 5 of 100: AI 5.",
        ),
    },
    group="faithfulness",
)
def recognition(
    capture: Capture, M: Tensor, batch: Batch, *, target: str = "label", baseline: float = 0.0
) -> dict[str, Tensor]:
    """AD, AG and AI of maps ``M [B,H,W]`` in [0, 1], percent, one value per image; one forward pass for all three.

    ``p`` and ``o`` are probabilities of the class on ``x`` and on ``x * M``: masked in pixel space, black outside,
    computed in float64 from log-probabilities. The images run again, in the way of the masked ones, only where some ``o``
    is as near to ``p`` as rounding: the last digits of a value may depend on its batch and on what was measured before.

    Args:
        target: whose probability: ``label`` (the papers' choice), ``pred``, or ``second``.
        baseline: grey value in [0, 1] of what the map hides.

    Raises:
        FoveateError: images or maps outside of [0, 1], labels missing.
    """
    if not (_within_unit(capture.x) and _within_unit(M)):
        raise FoveateError(
            "AD, AG and AI mask images and need x and maps in [0, 1]: put the normalisation into the model "
            "(foveate.normalized) and scale the map (foveate.maps.prepare)"
        )
    y = classes(target, capture.logits, batch.y, capture.head)
    log_o = masked_log_probability(capture, M, y, baseline)
    log_p = capture.log_probability(y, beside=log_o)
    return {
        "AD": average_drop(log_p, log_o),
        "AG": average_gain(log_p, log_o),
        "AI": average_increase(log_p, log_o),
    }


def masked_log_probability(capture: Capture, M: Tensor, y: Tensor, baseline: float = 0.0) -> Tensor:
    """Log-probability of class ``y`` on ``x * M``, ``[B]``, float64."""
    return log_probability(capture.score(apply_mask(capture.x.detach(), M, baseline)), y, capture.head)


def _within_unit(values: Tensor) -> bool:
    return bool(values.min() >= -1e-4) and bool(values.max() <= 1 + 1e-4)
