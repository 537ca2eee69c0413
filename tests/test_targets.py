"""Targets: what people write, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate import FoveateError, targets
from foveate.targets import classes, head_of, log_probability, resolve

LOGITS = torch.tensor([[1.0, 3.0, -2.0], [0.5, 0.1, 0.2]], dtype=torch.float64)
Y = torch.tensor([2, 1])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, [1, 0]),
        ("pred", [1, 0]),
        ("second", [0, 2]),
        ("label", [2, 1]),
        (2, [2, 2]),
        ([0, 2], [0, 2]),
        (torch.tensor([1, 1]), [1, 1]),
        (torch.tensor(1, dtype=torch.uint8), [1, 1]),
    ],
)
def test_classes(target: object, expected: list[int]) -> None:
    assert classes(target, LOGITS, Y).tolist() == expected


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (3, "target 3 is out of range: the model has 3 classes, 0 to 2"),
        (-1, "target -1 is out of range"),
        ([0, 1, 2], r"shape \[3\], but there are 2 image"),
        ([[0], [1]], r"shape \[2, 1\]"),
        (1.5, "integers"),
        ("orca", "target 'orca' is unknown"),
        ([None, 1], "not a class index"),
        (torch.tensor([True, False]), "integers"),
    ],
)
def test_wrong_classes(target: object, match: str) -> None:
    with pytest.raises(FoveateError, match=match):
        classes(target, LOGITS, Y)


def test_label_needs_labels() -> None:
    with pytest.raises(FoveateError, match="have no labels"):
        classes("label", LOGITS)


def test_second_of_a_binary_head_is_the_other() -> None:
    assert classes("second", torch.tensor([[2.0], [-1.0]])).tolist() == [0, 1]


def test_heads() -> None:
    assert head_of(LOGITS) == "softmax"
    assert head_of(LOGITS[:, :1]) == "binary"
    assert head_of(LOGITS, "multilabel") == "multilabel"
    assert head_of(LOGITS[:, :1], "multilabel") == "multilabel"
    for logits, head in ((LOGITS, "binary"), (LOGITS[:, :1], "softmax"), (LOGITS, "tanh")):
        with pytest.raises(FoveateError, match=f"head '{head}'"):
            head_of(logits, head)


def test_log_probabilities() -> None:
    torch.testing.assert_close(log_probability(LOGITS, Y, "softmax"), LOGITS.softmax(1).log()[[0, 1], [2, 1]])
    torch.testing.assert_close(log_probability(LOGITS, Y, "multilabel"), LOGITS.sigmoid().log()[[0, 1], [2, 1]])
    z = LOGITS[:, :1]
    expected = torch.stack([1 - z[0, 0].sigmoid(), z[1, 0].sigmoid()]).log()
    torch.testing.assert_close(log_probability(z, torch.tensor([0, 1]), "binary"), expected)
    assert log_probability(LOGITS.float(), Y, "softmax").dtype == torch.float64


def test_scores() -> None:
    p = LOGITS.softmax(1)
    rows = torch.arange(2)
    torch.testing.assert_close(resolve(Y, LOGITS)(LOGITS), LOGITS[rows, Y])
    torch.testing.assert_close(resolve(Y, LOGITS, score="probability")(LOGITS), p[rows, Y])
    torch.testing.assert_close(resolve(Y, LOGITS, score="loss")(LOGITS), F.cross_entropy(LOGITS, Y, reduction="none"))
    torch.testing.assert_close(resolve(Y, LOGITS, against=0)(LOGITS), LOGITS[rows, Y] - LOGITS[:, 0])
    torch.testing.assert_close(resolve(Y, LOGITS, score="probability", head="multilabel")(LOGITS), LOGITS.sigmoid()[rows, Y])


def test_the_strongest_other_class() -> None:
    assert resolve(Y, LOGITS, against="strongest").other.tolist() == [1, 0]
    assert resolve("pred", LOGITS, against="strongest").other.tolist() == [0, 2]
    with pytest.raises(FoveateError, match="at least 2 classes"):
        resolve(0, torch.rand(2, 1), against="strongest", head="multilabel")


def test_the_gradient_of_a_contrast_is_the_difference_of_gradients() -> None:
    logits = LOGITS.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(resolve(1, logits, against=2)(logits).sum(), logits)
    assert gradient.tolist() == [[0, 1, -1], [0, 1, -1]]


def test_callables() -> None:
    one = resolve(lambda logits: logits[:, 0] * 2, LOGITS)
    torch.testing.assert_close(one(LOGITS), LOGITS[:, 0] * 2)
    assert one.y.tolist() == [1, 0]
    two = resolve(lambda logits, y: logits.gather(1, y[:, None])[:, 0], LOGITS)
    torch.testing.assert_close(two(LOGITS), LOGITS.max(1).values)
    several = resolve([lambda row: row[0], lambda row: row[2]], LOGITS)
    torch.testing.assert_close(several(LOGITS), torch.stack([LOGITS[0, 0], LOGITS[1, 2]]))
    torch.testing.assert_close(
        several.rows(torch.tensor([1, 0, 1]))(LOGITS[[1, 0, 1]]), torch.stack([LOGITS[1, 2], LOGITS[0, 0], LOGITS[1, 2]])
    )


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (lambda logits: logits, r"shape \[2\]; it returned \[2, 3\]"),
        (lambda logits: 1.0, "it returned float"),
        ([lambda row: row[0]], "1 target callables were given for 2"),
    ],
)
def test_wrong_callables(target: object, match: str) -> None:
    with pytest.raises(FoveateError, match=match):
        resolve(target, LOGITS)(LOGITS)


def test_wrong_combinations() -> None:
    with pytest.raises(FoveateError, match="cannot be joined with a callable"):
        resolve(lambda logits: logits[:, 0], LOGITS, against=1)
    with pytest.raises(FoveateError, match="score 'margin' is unknown"):
        resolve(1, LOGITS, score="margin")
    with pytest.raises(FoveateError, match="cannot be joined with 'against'"):
        resolve(1, LOGITS, score="probability", against=0)
    with pytest.raises(FoveateError, match="bound to 'logit' already"):
        resolve(targets.resolve(1, LOGITS), LOGITS, against=2)
    with pytest.raises(FoveateError, match=r"the target is for 2 image\(s\), but there are 1"):
        resolve(targets.resolve(1, LOGITS), LOGITS[:1])


def test_rows_of_a_target() -> None:
    target = resolve([2, 1], LOGITS, against=[0, 2])
    rows = torch.tensor([1, 1, 0])
    torch.testing.assert_close(target.rows(rows)(LOGITS[rows]), target(LOGITS)[rows])
