"""Precision: what a device has instructions for, and one note where it has none."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from foveate import Capture, FoveateError, precision
from foveate.cli import app
from foveate.precision import has_bf16, warn_if_slow
from foveate.runtime import runner
from foveate.runtime.feature import Passes
from foveate.testing import example, networks


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    warn_if_slow.cache_clear()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
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
        ({"avx_ne_convert": True}, True),
        ({"avx10_2": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "arm64", "bf16": True}, True),
        ({"architecture": "riscv64"}, None),
    ],
)
def test_what_a_processor_has(monkeypatch: pytest.MonkeyPatch, able: dict[str, Any], expected: bool | None) -> None:
    processor(monkeypatch, **able)
    assert has_bf16() is expected
    assert has_bf16(torch.device("mps")) is None


def test_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_bf16() is None


@pytest.mark.parametrize(("major", "hip", "expected"), [(7, None, False), (8, None, True), (9, None, True), (7, "6.0", True)])
def test_a_gpu_is_asked_itself(monkeypatch: pytest.MonkeyPatch, major: int, hip: str | None, expected: bool) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(major=major)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert has_bf16(torch.device("cuda:1")) is expected
    assert asked == ([] if hip else [torch.device("cuda:1")])


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="no flags to read")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell")
def test_as_the_system_says() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_bf16() == any(name in flags for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))


def test_a_slow_processor_is_told_once_and_computes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, avx2=True)
    network, x = networks()["gap"].float(), example().x.float()
    with pytest.warns(UserWarning, match="this processor has no bf16 instructions") as said:
        scores = [Capture(network, x, "features", precision="bf16").score(x) for _ in range(3)]
    assert len(said) == 1 and said[0].filename == runner.__file__  # of foveate, whose notes the command line shows
    torch.testing.assert_close(scores[2], network(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("able", "kind"), [({"avx2": True}, "fp32"), ({"avx512_bf16": True}, "bf16")])
def test_nobody_is_told_without_need(monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], kind: precision.Precision) -> None:
    processor(monkeypatch, **able)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Capture(networks()["gap"].float(), example().x.float(), "features", precision=kind)


def test_the_model_s_own_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(runner, "warn_if_slow", asked.append)
    model = networks()["gap"].float()
    for first in (model.to("meta"), nn.ReLU()):
        runner.Runner(first, first, True, "bf16", None, Passes())
    assert asked == [torch.device("meta"), torch.device("cpu")]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_of_several_processes_one_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    processor(monkeypatch, avx2=True)
    monkeypatch.setenv(name, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_slow(torch.device("cpu"))


def test_the_command_line_shows_it_once_and_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor(monkeypatch, avx2=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / name)
    images = [str(tmp_path / name) for name in ("a.png", "b.png")]
    options = ["--model", "foveate:small_cnn", "--method", "grad_cam,score_cam", "--precision", "bf16", "--json"]
    result = CliRunner().invoke(app, ["explain", *images, *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("note: this processor has no bf16 instructions") == 1
    assert len(json.loads(result.stdout)["images"]) == 2


def test_training_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.training.recipe import read_recipe
    from foveate.training.train import _trainer

    processor(monkeypatch, avx2=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="this processor has no bf16 instructions"):
        _trainer(read_recipe("scenes_plain", {"precision": "bf16"}), 1, [], [])


def test_an_unknown_precision_is_quoted() -> None:
    with pytest.raises(FoveateError, match=r"precision 'int8' is unknown: use fp32 or bf16"):
        Capture(networks()["gap"], example().x, "features", precision="int8")  # type: ignore[arg-type]
