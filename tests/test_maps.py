"""Maps: properties of the algebra, and what happens to maps that say nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import composite

from foveate import FoveateError, maps


@composite
def saliency(draw: st.DrawFn) -> torch.Tensor:
    h, w = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(draw(st.integers(1, 3)), h, w, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(saliency(), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_range_is_idempotent_and_blind_to_affine_maps(S: torch.Tensor, factor: float, shift: float) -> None:
    scaled = maps.scale(S)
    assert scaled.amin((1, 2)).eq(0).all()
    assert scaled.amax((1, 2)).eq(1).all()
    torch.testing.assert_close(maps.scale(scaled), scaled)
    torch.testing.assert_close(maps.scale(factor * S + shift), scaled, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(saliency())
def test_max_keeps_the_sign(S: torch.Tensor) -> None:
    scaled = maps.scale(S, "max")
    assert torch.equal(scaled.sign(), S.sign())
    torch.testing.assert_close(scaled.abs().amax((1, 2)), torch.ones(len(S), dtype=S.dtype))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e8])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_constant_map_has_no_nan_in_value_or_gradient(value: float, constant: float) -> None:
    S = torch.full((2, 3, 4), value)
    S[1] = torch.rand(3, 4)
    S.requires_grad_(True)
    scaled = maps.scale(S, "range", constant)
    assert (scaled[0] == constant).all()
    scaled.sum().backward()
    assert (S.grad[0] == 0).all()
    assert torch.isfinite(S.grad).all()
    assert maps.is_constant(S).tolist() == [True, False]


def test_float_noise_is_constant() -> None:
    S = torch.full((1, 4, 4), 1.0)
    S[0, 0, 0] += 2e-7
    assert maps.is_constant(S).all()
    assert (maps.scale(S) == 0).all()


def test_prepare_is_relu_upsample_range_in_this_order() -> None:
    S = torch.tensor([[[-1.0, 0.0], [1.0, 2.0]]])
    by_hand = torch.nn.functional.interpolate(S.clamp(min=0)[:, None], (5, 7), mode="bilinear", align_corners=False)[:, 0]
    by_hand = (by_hand - by_hand.min()) / (by_hand.max() - by_hand.min())
    torch.testing.assert_close(maps.prepare(S, (5, 7)), by_hand)
    assert not torch.equal(maps.prepare(S, (5, 7), positive=False), by_hand)


@pytest.mark.parametrize(
    ("S", "match"), [(torch.rand(2, 1, 3, 3), r"\[2, 1, 3, 3\]"), (torch.tensor([[[float("nan"), 1.0]]]), "NaN")]
)
def test_prepare_refuses(S: torch.Tensor, match: str) -> None:
    with pytest.raises(FoveateError, match=match):
        maps.prepare(S, (4, 4))


def test_all_at_once_is_each_alone() -> None:
    raw = {f"m{i}": torch.randn(3, *((4, 4) if i % 3 else (5, 7)), dtype=torch.float64 if i == 4 else None) for i in range(70)}
    raw["flat"], raw["whole"] = torch.ones(3, 4, 4), torch.randn(3, 8, 8)
    together = maps.prepare_all(raw, (8, 8))
    assert list(together) == list(raw)
    for name, saliency in raw.items():
        torch.testing.assert_close(together[name], maps.prepare(saliency, (8, 8)), rtol=0, atol=1e-6)
        assert together[name].untyped_storage().nbytes() == together[name].numel() * together[name].element_size()
    assert maps.prepare_all({}, (8, 8)) == {}


def test_large_maps_are_grown_a_method_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "AT_ONCE", 1)
    counts = []
    monkeypatch.setattr(maps, "upsample", lambda S, size: counts.append(len(S)) or S)
    maps.prepare_all({name: torch.rand(2, 7, 7) for name in "abcd"}, (112, 112))
    maps.prepare_all({name: torch.rand(2, 7, 7) for name in "abcd"}, (448, 448))
    assert counts == [4, 4, 2, 2, 2, 2]


@pytest.mark.parametrize("kind", ["range", "max"])
def test_scaling_leaves_what_it_is_given(kind: maps.Scaling) -> None:
    for S in (torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[1, 5]]])):
        before = S.clone()
        assert maps.scale(S, kind)[0, 0, 1] == 1
        assert torch.equal(S, before)


def test_unknown_scaling() -> None:
    with pytest.raises(FoveateError, match="scaling 'minmax' is unknown"):
        maps.scale(torch.rand(1, 2, 2), "minmax")


def test_apply_mask() -> None:
    x, M = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5)
    torch.testing.assert_close(maps.apply_mask(x, M), x * M[:, None])
    assert torch.equal(maps.apply_mask(x, torch.ones(2, 4, 5)), x)
    torch.testing.assert_close(maps.apply_mask(x, torch.zeros(2, 4, 5), 0.5), torch.full_like(x, 0.5))
    other = torch.rand_like(x)
    torch.testing.assert_close(maps.apply_mask(x, M, other), x * M[:, None] + other * (1 - M[:, None]))


def test_blur_keeps_constants_and_mass_and_spreads_a_point() -> None:
    torch.testing.assert_close(maps.blur(torch.full((1, 3, 9, 11), 0.7), 1.5), torch.full((1, 3, 9, 11), 0.7))
    point = torch.zeros(1, 31, 31, dtype=torch.float64)
    point[0, 15, 15] = 1
    blurred = maps.blur(point, 2.0)
    assert abs(float(blurred.sum()) - 1) < 1e-9
    rows = torch.arange(31, dtype=torch.float64) - 15
    assert abs(float((blurred[0].sum(1) * rows**2).sum()) - 4) < 0.15  # the variance of the Gaussian, cut at 3 sigma
    assert torch.equal(maps.blur(point, 0), point)


def test_mass_inside() -> None:
    S = torch.tensor([[[1.0, 3.0], [-9.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    mask = torch.tensor([[[True, False], [True, False]]]).expand(3, -1, -1)
    assert maps.mass_inside(S, mask).tolist() == [0.25, 0.0, 0.0]
