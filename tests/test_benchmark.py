"""The harness of benchmarks/peers: what it counts, compares and writes; the rows themselves need the peers."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.peers.kept")


def test_rows_are_gone_on_with_and_those_of_another_machine_stay(kept: ModuleType, tmp_path: Path) -> None:
    first = kept.Kept(tmp_path / "bench", "cpu", "a machine", "1234567")
    first.add({"title": "one", "limit": float("nan")})
    first.add({"title": "two"})
    other = kept.Kept(tmp_path / "bench", "cpu", "another", "")
    assert not other.rows
    other.add({"title": "one"})
    again = kept.Kept(tmp_path / "bench", "cpu", "a machine", "89abcde")
    again.add({"title": "two", "limit": 1})
    rows = kept.Kept(tmp_path / "bench", "cpu", "a machine", "").rows
    assert [(one["title"], one["commit"]) for one in rows.values()] == [("one", "1234567"), ("two", "89abcde")]
    assert rows["two"]["limit"] == 1
    assert len(list((tmp_path / "bench").iterdir())) == 2


def test_a_damaged_file_is_named_and_left(kept: ModuleType, tmp_path: Path) -> None:
    place = kept.Kept(tmp_path, "cpu", "a machine", "").place
    place.write_text('{"machine": "a mach')
    with pytest.raises(SystemExit, match="is damaged: move it away"):
        kept.Kept(tmp_path, "cpu", "a machine", "")
    assert place.read_text() == '{"machine": "a mach'


def test_killed_while_a_row_is_written_the_others_stay(
    kept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = kept.Kept(tmp_path, "cpu", "a machine", "")
    rows.add({"title": "one"})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rows.add({"title": "two"})
    assert list(kept.Kept(tmp_path, "cpu", "a machine", "").rows) == ["one"]


def test_the_machine_line_tells_data_apart_and_whether_bf16_is_measured(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "weights").mkdir()
    for name in ("zoo.py", "imagenet/labels.csv", "weights/net.safetensors"):
        (tmp_path / name).write_text("a")
    lines = [page.machine(cpu, None), page.machine(cpu, tmp_path)]
    (tmp_path / "weights" / "net.safetensors").write_text("longer")
    lines.append(page.machine(cpu, tmp_path))
    assert len(set(lines)) == 3 and "both on noise" in lines[0] and "real ones on photographs (data " in lines[1]
    for has, words in ((True, "yes"), (False, "no, so that rows in bf16 are left out"), (None, "not known")):
        monkeypatch.setattr(page, "has_bf16", lambda device, has=has: has)
        assert f"bf16 instructions: {words}" in page.machine(cpu, None)


def test_rows_in_bf16_are_left_out_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("captum", "pytorch_grad_cam", "torchcam"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(ROOT))
    searches = importlib.import_module("benchmarks.peers.searches")
    passes = SimpleNamespace(limit=lambda *_, **__: None)
    one = SimpleNamespace(
        name="net", model=network(), layer="1", inner=None, x=torch.rand(1, 3, 8, 8), y=torch.zeros(1), passes=passes
    )
    for has, count in ((True, 2), (None, 2), (False, 1)):
        monkeypatch.setattr(searches, "has_bf16", lambda device, has=has: has)
        for part in (searches.rise, searches.score_cam):
            titles = [row.title for row in part({"net": one})]
            assert len(titles) == count and ("bf16" in titles[-1]) == (count == 2)


def test_rows_without_others_have_no_picture(page: ModuleType, tmp_path: Path) -> None:
    alone = {
        "contestants": [
            {"name": "foveate", "seconds": 1.0, "ratio": 1.0, "forward": 0, "backward": 0, "memory": 1.0, "agreement": ""}
        ]
    }
    one = {
        "title": "alone",
        "over_limit": 1.0,
        "over_low": 1.0,
        "over_high": 1.0,
        "fewest": "",
        "remark": "",
        "commit": "1234567",
    }
    page.write([{**one, **alone}], "a machine", tmp_path, "cpu")
    assert (tmp_path / "performance.md").read_text().startswith("a machine; commit 1234567")
    assert not (tmp_path / "performance.png").exists()
