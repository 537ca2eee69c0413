"""The harness of benchmarks/peers: what it counts, compares and writes; the rows themselves need the peers."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.peers.row")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.peers.page")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def test_images_are_counted_forward_and_backward(row: ModuleType) -> None:
    model, x = network(), torch.rand(3, 3, 8, 8, requires_grad=True)
    with row.counted(model) as passes:
        model(x)[:, 0].sum().backward()
        with torch.no_grad():
            model(x[:2])
    model(x)
    assert (passes.forward, passes.backward) == (5, 3)
    assert not model._forward_hooks


def test_a_ratio_is_the_median_of_the_rounds_own(row: ModuleType) -> None:
    middle, low, high = row.ratio([2.0, 4, 6, 8, 10, 30], [1.0, 2, 3, 4, 5, 10])
    assert (middle, low) == (2, 2) and 2 <= high <= 3
    assert row.ratio([6.0, 4], [2.0, 2, 4]) == (2.5, 2, 3)
    assert row.ratio([6.0], [2.0])[0] == 3 and row.ratio([6.0], [2.0])[1] != row.ratio([6.0], [2.0])[1]


def test_a_row_has_everybody_and_the_limit(row: ModuleType, page: ModuleType, tmp_path: Path) -> None:
    model, x = network(), torch.rand(2, 3, 8, 8)

    def slow() -> Tensor:
        time.sleep(0.02)
        return model(torch.cat([x, x]))[:2]

    def broken() -> Tensor:
        raise AttributeError("module 'numpy' has no attribute 'trapz'")

    job = row.Row(
        "part",
        "two images",
        lambda: model(x),
        {"twice": slow, "broken": broken},
        model,
        lambda ours: 1e-9 * ours.forward,
        "nothing",
        lambda a, b: f"differ by {float((a - b).abs().max()):.0g}",
        rounds=5,
    )
    found = row.run(job, torch.device("cpu"))
    ours, twice, failed = found.contestants
    assert (ours.name, ours.forward, ours.rounds, twice.forward) == ("foveate", 2, 5, 4)
    assert twice.ratio > 1.5 and twice.agreement == "differ by 0"
    assert "trapz" in failed.error and failed.rounds == 0
    assert found.limit == 2e-9 and found.over_limit > 1
    page.write([found.record()], "a machine", tmp_path, "cpu")
    text = (tmp_path / "performance.md").read_text()
    assert "| two images | **foveate** |" in text and "AttributeError" in text and "a machine" in text
    assert (tmp_path / "performance.png").stat().st_size > 5000


def test_a_failure_of_our_own_is_not_hidden(row: ModuleType) -> None:
    def broken() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        row.run(row.Row("part", "broken", broken), torch.device("cpu"))


def test_the_plain_methods_agree_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for a peer in the rows without one: the same maps, slowly."""
    monkeypatch.syspath_prepend(str(ROOT))
    plain = importlib.import_module("benchmarks.peers.plain")
    from foveate import explain

    model, x = network(), torch.rand(1, 3, 224, 224)
    settings = {"extremal_perturbation": {"steps": 4, "lr": 1.0}}
    ours = explain(model, x, "extremal_perturbation", target=1, settings=settings).raw["extremal_perturbation"]
    assert "benchmarks.peers.plain" in sys.modules and ours.std() > 0
    theirs = plain.extremal(model, x, 1, 0.1, 4, lr=1.0)[None]
    # All values start equal: which of them count as the largest is up to the sort, and the masks part a little there.
    assert (theirs - ours).abs().max() < 0.05
    assert torch.corrcoef(torch.stack([theirs.flatten(), ours.flatten()]))[0, 1] > 0.99


def test_a_peer_that_changes_the_model_ends_the_run(row: ModuleType) -> None:
    model = network()
    job = row.Row("part", "two images", lambda: None, {"peer": lambda: model[1].train()}, model)
    with pytest.raises(RuntimeError, match="peer leaves the model changed"):
        row.run(job, torch.device("cpu"))


def test_rows_of_another_machine_are_set_aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("quantus")
    monkeypatch.syspath_prepend(str(ROOT))
    main = importlib.import_module("benchmarks.peers.__main__")
    place = tmp_path / "rows_cpu.json"
    place.write_text('{"machine": "a", "rows": [{"title": "t"}]}')
    assert main.known(place, "a") == {"t": {"title": "t"}}
    assert main.known(place, "b") == {} and not place.exists() and (tmp_path / "rows_cpu.old.json").exists()
