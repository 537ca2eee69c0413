"""Insertion and deletion, and sanity checks: identities, other people's code, and what must and must not collapse."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from foveate import Batch, Capture, FoveateError, measure, normalized
from foveate.metrics.causal import insertion_deletion, rise_kernel
from foveate.metrics.sanity import similarity, spearman
from foveate.models.randomize import randomized, stages_of
from foveate.registry import METRICS
from foveate.testing import SHAPE, assert_untouched, example, fingerprint, networks


def both(network: nn.Module, batch: Batch, M: torch.Tensor, **settings: object) -> dict[str, torch.Tensor]:
    return insertion_deletion(Capture(network, batch.x, "features"), M, batch, **settings)


class TestInsertionDeletion:
    M = torch.rand(2, *SHAPE[2:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def test_only_the_order_counts(self) -> None:
        network, batch = networks()["gap"], example()
        plain, bent = (both(network, batch, M) for M in (self.M, self.M**3))
        assert all(torch.equal(plain[name], bent[name]) for name in plain)

    def test_the_ends(self) -> None:
        """Both curves have the image at one end; the other ends do not depend on the map."""
        network, batch = networks()["gap"], example()
        found, other = both(network, batch, self.M), both(network, batch, 1 - self.M)
        p = network(batch.x).softmax(1).gather(1, batch.y[:, None])[:, 0]
        torch.testing.assert_close(found["I_curve"][:, -1], p)
        torch.testing.assert_close(found["D_curve"][:, 0], p)
        assert torch.equal(found["I_curve"][:, 0], other["I_curve"][:, 0])
        assert torch.equal(found["D_curve"][:, -1], other["D_curve"][:, -1])

    def test_from_the_same_ends_one_is_the_other_backwards(self) -> None:
        """Showing the most salient first from black is hiding the least salient first, read from its end."""
        network, batch = networks()["gap"], example()
        grid = torch.arange(16 * 16, dtype=torch.float64).view(1, 16, 16)  # 28 steps part 252 and 4 pixels: use 16
        small = Batch(batch.x[:1, :, :16, :16], batch.y[:1])
        down = both(network, small, grid, steps=16, start="black", end="black")
        up = both(network, small, -grid, steps=16, start="black", end="black")
        torch.testing.assert_close(down["I_curve"], up["D_curve"].flip(1))

    def test_the_kernel_is_nearly_a_box(self) -> None:
        kernel = rise_kernel(11)
        assert kernel.sum() == pytest.approx(1)
        assert 0.0077 < float(kernel.min()) < float(kernel.max()) < 0.00885
        assert torch.allclose(rise_kernel(5), torch.full((5, 5), 0.04, dtype=torch.float64), atol=1e-4)
        with pytest.raises(FoveateError, match="kernel 4 has no centre"):
            rise_kernel(4)

    def test_grey_is_the_mean_of_the_normalisation(self) -> None:
        """The zero of a normalised image: what RISE deletes to, and what its blur sees beyond the edges."""
        network, batch = networks()["gap"], example()
        mean, std = (0.3, 0.5, 0.6), (0.2, 0.3, 0.4)
        wrapped = normalized(network, mean, std).double()
        inner = (batch.x - torch.tensor(mean).double().view(1, 3, 1, 1)) / torch.tensor(std).double().view(1, 3, 1, 1)
        outside = insertion_deletion(Capture(wrapped, batch.x, "features"), self.M, batch)
        inside = insertion_deletion(Capture(network, inner, "features"), self.M, batch)
        for name in outside:
            torch.testing.assert_close(outside[name], inside[name], rtol=1e-5, atol=1e-5)

    def test_ties(self) -> None:
        network, batch = networks()["gap"], example()
        flat = torch.ones(2, *SHAPE[2:], dtype=torch.float64)
        raster = both(network, batch, flat)
        ramp = torch.arange(flat[0].numel(), 0, -1, dtype=torch.float64).view(flat[0].shape).expand_as(flat)
        assert torch.equal(raster["I"], both(network, batch, ramp)["I"])
        one, same, two = (both(network, batch, flat, ties="random", seed=seed)["I"] for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, two)
        untied = both(network, batch, self.M, ties="random")
        assert torch.equal(untied["I"], both(network, batch, self.M)["I"])

    def test_steps(self) -> None:
        network, batch = networks()["gap"], example()
        pixels = SHAPE[2] * SHAPE[3]
        for steps in (2, 7, 28, pixels):
            found = both(network, batch, self.M, steps=steps)
            assert found["I_curve"].shape == (2, -(-pixels // -(-pixels // steps)) + 1)
        for settings, match in (
            ({"steps": 1}, "too few"),
            ({"start": "noise"}, "'noise' is unknown"),
            ({"ties": "x"}, "ties 'x'"),
            ({"columns": ["I", "X"]}, "use 'I', 'D' or both"),
            ({"columns": []}, "use 'I', 'D' or both"),
        ):
            with pytest.raises(FoveateError, match=match):
                both(network, batch, self.M, **settings)

    def test_passes_are_counted_and_ends_shared(self) -> None:
        network, batch = networks()["gap"], example()
        capture = Capture(network, batch.x, "features")
        before = capture.passes.forward
        insertion_deletion(capture, self.M, batch, steps=10)
        first = capture.passes.forward - before
        insertion_deletion(capture, 1 - self.M, batch, steps=10)
        assert capture.passes.forward - before - first == 2 * 2 * 9
        assert first == 2 * 2 * 9 + 2 + 2 + 1  # the images, their blur, and one empty image for all

    @pytest.mark.parametrize(("column", "ends"), [("I", 2), ("D", 1)])  # the blur of each image, one empty image for all
    def test_one_of_the_two_is_the_same_in_half_of_the_passes(self, column: str, ends: int) -> None:
        network, batch = networks()["gap"], example()
        expected = both(network, batch, self.M, steps=10)
        capture = Capture(network, batch.x, "features")
        before = capture.passes.forward
        found = insertion_deletion(capture, self.M, batch, steps=10, columns=(column,))
        assert found.keys() == {column, f"{column}_curve"}
        torch.testing.assert_close(found[column], expected[column])
        torch.testing.assert_close(found[f"{column}_curve"], expected[f"{column}_curve"])
        assert capture.passes.forward - before == 2 * 9 + 2 + ends  # the images themselves, which are known afterwards

    def test_a_table_of_one_of_the_two_computes_that_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, batch = networks()["gap"], example()
        wanted = []
        record = METRICS.get("insertion_deletion")

        def spy(*args: Any, columns: list[str], **settings: Any) -> dict[str, torch.Tensor]:
            wanted.append(list(columns))
            return insertion_deletion(*args, columns=columns, **settings)

        monkeypatch.setitem(METRICS._records, record.name, dataclasses.replace(record, function=spy))
        found = measure(network, [batch], ["random"], ["D"], layer="features").frame()["column"]
        assert wanted == [["D"]]
        assert "D" in set(found)
        assert "I" not in set(found)


class TestRandomisation:
    def test_stages_go_from_the_head_to_the_input(self) -> None:
        network = networks()["inplace"]
        stages = stages_of(network, 3)
        names = [name for stage in stages for name in stage]
        order = [name for name, module in network.named_modules() if list(module.parameters(recurse=False))]
        assert names == order[::-1]
        assert len(stages) == min(3, len(order))
        assert stages[0] == [order[-1]]
        assert stages_of(network, 1) == [names]
        assert stages_of(network, 0) == [[name] for name in names]

    @pytest.mark.parametrize("init", ["reset", "normal", "permute"])
    @pytest.mark.parametrize("mode", ["cascade", "independent"])
    def test_what_changes_and_what_does_not(self, mode: str, init: str) -> None:
        network = networks()["inplace"]
        before, state = fingerprint(network), torch.get_rng_state()
        seen: list[set[str]] = []
        for _, changed in randomized(network, mode, 0, init):
            other = dict(changed.named_parameters())
            seen.append({name for name, p in network.named_parameters() if not torch.equal(p, other[name])})
            assert not any(p.requires_grad for p in changed.parameters())
        assert_untouched(before, network)
        assert torch.equal(torch.get_rng_state(), state)
        modules = [stage[0] for stage in stages_of(network, 0)]
        for number, changed_names in enumerate(seen):
            expected = modules[: number + 1] if mode == "cascade" else [modules[number]]
            assert {name.rpartition(".")[0] for name in changed_names} <= set(expected)
            fresh = isinstance(network.get_submodule(modules[number]), nn.BatchNorm2d)  # its first values are its reset ones
            assert changed_names or fresh or init == "permute"

    def test_running_statistics(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        network[1].running_mean.fill_(7)
        *_, (_, reset) = randomized(copy.deepcopy(network), stages=0)
        *_, (_, kept) = randomized(copy.deepcopy(network), stages=0, reset_buffers=False)
        *_, (_, shuffled) = randomized(copy.deepcopy(network), stages=0, init="permute")
        assert float(reset[1].running_mean.abs().max()) == float(shuffled[1].running_mean.abs().max()) == 0
        assert float(kept[1].running_mean.min()) == 7

    def test_seeds(self) -> None:
        def draw(seed: int) -> torch.Tensor:
            *_, (_, changed) = randomized(networks()["gap"], seed=seed)
            return torch.cat([p.flatten() for p in changed.parameters()])

        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))

    def test_controls_do_not_change_and_say_so(self) -> None:
        """A control ignores the parameters: its similarity is 1, and its sensitivity to the class 0."""
        names = ["grad_cam", "centre", "random"]
        results = measure(
            networks()["gap"], [example(count=4)], names, ["randomisation", "class_sensitivity"], layer="features"
        )
        for control in ("centre", "random"):
            assert results.values[control, "randomisation"] == pytest.approx(1)
            assert results.values[control, "randomisation_ssim"] == pytest.approx(1)
            assert results.values[control, "class_sensitivity"] == pytest.approx(0, abs=1e-12)
        assert np.nanmax(results.values["grad_cam", "randomisation"]) < 0.99
        assert np.nanmin(results.values["grad_cam", "class_sensitivity"]) > 0.01

    def test_wrong_options(self) -> None:
        for settings, match in (({"mode": "x"}, "mode 'x'"), ({"init": "x"}, "init 'x'"), ({"stages": -1}, "stages -1")):
            with pytest.raises(FoveateError, match=match):
                list(randomized(networks()["gap"], **settings))
        with pytest.raises(FoveateError, match="no parameters"):
            list(randomized(nn.ReLU()))


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 7, 9)), rng.integers(0, 4, (5, 7, 9)).astype(float)  # ties in one
    expected = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(spearman(torch.tensor(a), torch.tensor(b)), torch.tensor(expected))
    assert torch.isnan(spearman(torch.ones(1, 3, 3), torch.rand(1, 3, 3))).all()


def test_structural_similarity_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = torch.rand(2, 24, 31, dtype=torch.float64), torch.rand(2, 24, 31, dtype=torch.float64)
    for i in range(2):
        theirs, full = metrics.structural_similarity(
            a[i].numpy(), b[i].numpy(), data_range=1.0, full=True, use_sample_covariance=False
        )
        assert float(similarity(a, b)[i]) == pytest.approx(float(full[3:-3, 3:-3].mean()), rel=1e-6)
    assert torch.isnan(similarity(torch.ones(1, 9, 9), torch.rand(1, 9, 9))).all()
    assert similarity(a, a).tolist() == pytest.approx([1, 1])


def test_random_networks_run_once_for_all_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four methods or one: the networks are made once a batch, and each runs once; too large ones are not kept."""
    from foveate.metrics import sanity

    def forwards(methods: list[str]) -> int:
        network, calls = networks()["gap"], []
        network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
        found = measure(network, [example(count=2)], methods, ["randomisation"], layer="features")
        tables.append({key: values for key, values in found.values.items() if key[0] == "grad_cam"})
        return sum(calls)

    tables: list[dict[tuple[str, str], np.ndarray]] = []
    one, four = forwards(["grad_cam"]), forwards(["grad_cam", "hires_cam", "layer_cam", "xgrad_cam"])
    assert four == one
    monkeypatch.setattr(sanity, "KEPT_BYTES", 0)
    assert forwards(["grad_cam", "layer_cam"]) > one
    for key in tables[0]:
        np.testing.assert_array_equal(tables[0][key], tables[1][key])
        np.testing.assert_array_equal(tables[0][key], tables[2][key])
