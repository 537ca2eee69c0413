"""Second derivatives written by hand: the same values, and gradients of gradients, as PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.runtime.second_derivatives import Phase, batch_norm, convolution


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_(True)


@pytest.mark.parametrize("affine", ["both", "none", "a weight of 0"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm(affine: str, layout: torch.memory_format) -> None:
    x = rand(3, 4, 5, 2).detach().contiguous(memory_format=layout).requires_grad_(True)
    weight, bias = (None, None) if affine == "none" else (rand(4, seed=1), rand(4, seed=2))
    if affine == "a weight of 0":
        weight = (weight.detach() * torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)).requires_grad_(True)
    statistics = [torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    theirs = [s.clone() for s in statistics]
    ours = batch_norm(x, *statistics, weight, bias, 0.1, 1e-5, Phase())
    torch.testing.assert_close(ours, F.batch_norm(x, *theirs, weight, bias, True, 0.1, 1e-5))
    torch.testing.assert_close(statistics, theirs)
    inputs = (x,) if weight is None else (x, weight, bias)

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return batch_norm(x, None, None, weight, bias, 0.1, 1e-5, Phase())

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation", "biased"),
    [(1, (1, 1), (1, 1), (1, 1), True), (1, (2, 1), (0, 2), (1, 2), False), (3, (2, 2), (1, 1), (1, 1), True)],
)
def test_convolution(groups: int, stride: tuple, padding: tuple, dilation: tuple, biased: bool) -> None:
    x, weight = rand(2, 3, 6, 7), rand(6, 3 // groups, 3, 2, seed=1)
    bias = rand(6, seed=2) if biased else None
    options = (stride, padding, dilation, groups)
    torch.testing.assert_close(convolution(x, weight, bias, *options, Phase()), F.conv2d(x, weight, bias, *options))

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolution(x, weight, bias, *options, Phase())

    inputs = (x, weight, bias) if biased else (x, weight)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_an_inner_pass_leaves_gradients_of_weights_to_the_outer_one() -> None:
    x, weight, scale, phase = rand(2, 3, 5, 5), rand(4, 3, 3, 3, seed=1), rand(4, seed=2), Phase()
    y = batch_norm(convolution(x, weight, None, (1, 1), (1, 1), (1, 1), 1, phase), None, None, scale, None, 0.1, 1e-5, phase)
    phase.inner = True
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    phase.inner = False
    ours = torch.autograd.grad(gradient.square().sum() + y.pow(3).sum(), (weight, scale))
    plain = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, scale, None, True, 0.1, 1e-5)
    (slope,) = torch.autograd.grad(plain.square().sum(), x, create_graph=True)
    theirs = torch.autograd.grad(slope.square().sum() + plain.pow(3).sum(), (weight, scale))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
