"""Precision: what a device has instructions for, and one note where it has none."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate import Capture, FoveateError, precision
from foveate.precision import has_bf16, warn_if_slow
from foveate.testing import example, networks


@pytest.fixture(autouse=True)
def unsaid() -> Iterator[None]:
    warn_if_slow.cache_clear()
    yield
    warn_if_slow.cache_clear()


def processor(monkeypatch: pytest.MonkeyPatch, **able: Any) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **able}, raising=False)


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, None),
    ],
)
def test_what_a_processor_has(monkeypatch: pytest.MonkeyPatch, able: dict[str, Any], expected: bool | None) -> None:
    processor(monkeypatch, **able)
    assert has_bf16() is expected
    assert has_bf16("mps") is None


def test_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_bf16() is None


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="no flags to read")
def test_as_the_system_says() -> None:
    if hasattr(torch.cpu, "get_capabilities"):
        flags = Path("/proc/cpuinfo").read_text().split()
        assert has_bf16() == ("avx512_bf16" in flags or "amx_bf16" in flags or "avx_ne_convert" in flags)


def test_a_slow_processor_is_told_once_and_computes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, avx2=True)
    network, x = networks()["gap"].float(), example().x.float()
    with pytest.warns(UserWarning, match="this processor has no bf16 instructions, so that precision bf16 is slower") as said:
        scores = [Capture(network, x, "features", precision="bf16").score(x) for _ in range(3)]
    assert len(said) == 1
    torch.testing.assert_close(scores[2], network(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("able", "kind"), [({"avx2": True}, "fp32"), ({"avx512_bf16": True}, "bf16")])
def test_nobody_is_told_without_need(monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], kind: precision.Precision) -> None:
    processor(monkeypatch, **able)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Capture(networks()["gap"].float(), example().x.float(), "features", precision=kind)


def test_training_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.recipe import read_recipe
    from foveate.train import _trainer

    processor(monkeypatch, avx2=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="this processor has no bf16 instructions"):
        _trainer(read_recipe("scenes_plain", {"precision": "bf16"}), 1, [], [])


def test_an_unknown_precision_is_quoted() -> None:
    with pytest.raises(FoveateError, match=r"precision 'int8' is unknown: use fp32 or bf16"):
        Capture(networks()["gap"], example().x, "features", precision="int8")  # type: ignore[arg-type]
