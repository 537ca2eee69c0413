"""Folding batch norms into convolutions: the same logits, only where that is right, and nothing left on the model."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from foveate import Capture, explain
from foveate.runtime.folding import folded
from foveate.runtime.model import swapped


def settled(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights of their own, so that leaving one out would be seen."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return model.double().eval()


class Net(nn.Module):
    def __init__(self, between: nn.Module | None = None, twice: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, affine=affine)
        self.second, self.last = nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.between = between or nn.Identity()
        self.twice = twice
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        x = torch.relu(self.norm(self.between(a)))
        x = torch.relu(self.last(self.second(x)))
        if self.twice:
            x = x + a[:, :, 2:, 2:]  # the convolution is read beside its norm
        return self.head(x.mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("affine", [True, False])
def test_the_same_logits(x: Tensor, affine: bool) -> None:
    model = settled(Net(affine=affine))
    places, runs = folded(model, x[:1])
    assert len(places) == 6 and runs == 2
    with swapped(places), torch.no_grad():
        assert model.norm(x.new_full((1, 6, 2, 2), 3)).eq(3).all()  # it hands on what it gets
        logits = model(x)
    torch.testing.assert_close(logits, model(x))


@pytest.mark.parametrize("model", [Net(between=nn.ReLU(inplace=True)), Net(between=nn.Hardtanh(-0.1, 0.1))])
def test_what_stands_between_a_convolution_and_its_norm_stays(model: nn.Module, x: Tensor) -> None:
    plain = settled(model)(x)
    places, _ = folded(model, x[:1])
    assert len(places) == 3
    with swapped(places):
        torch.testing.assert_close(model(x), plain)
    assert not any(own is model.first._parameters for own, _, _ in places)


def test_a_convolution_that_others_read_is_left_alone(x: Tensor) -> None:
    model = settled(Net(twice=True))
    assert folded(model, x[:1]) == ([], 2)
    torch.testing.assert_close(Capture(model, x, "second").score(x, many=True), model(x))


def test_weights_are_read_anew(x: Tensor) -> None:
    model = settled(Net())
    Capture(model, x, "second").score(x, many=True)
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.norm.running_mean.add_(1)
    torch.testing.assert_close(Capture(model, x, "second").score(x, many=True), model(x))


def test_a_network_in_training_mode_or_without_norms_is_not_run(x: Tensor) -> None:
    assert folded(settled(Net()).train(), x[:1]) == ([], 0)
    assert folded(nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double(), x[:1]) == ([], 0)


def test_nothing_stays_on_the_model_when_it_raises(x: Tensor) -> None:
    model = settled(Net())
    capture = Capture(model, x, "second")
    capture.score(x, many=True)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}

    def stop(module: nn.Module, inputs: object) -> None:
        raise KeyboardInterrupt

    handle = model.last.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        capture.score(x, many=True)
    handle.remove()
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == was and torch.equal(after[name], value) for name, (was, value) in before.items())
    assert "forward" not in model.norm.__dict__ and model.first.bias is None


def test_passes_say_what_ran(x: Tensor) -> None:
    capture = explain(settled(Net()), x[:1], "rise", layer="second", settings={"rise": {"masks": 10}}).capture
    assert capture.passes.forward == 1 + 2 + 10


def test_half_precision_is_near(x: Tensor) -> None:
    model = settled(Net()).float()
    exact, rough = (Capture(model, x.float(), "second", precision=p).score(x.float(), many=True) for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.03 * exact.abs().max()


class Keywords(nn.Module):
    """A norm called by keyword, and a head that works in float32 whatever autocast says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(input=self.conv(x))).mean((2, 3))
        with torch.autocast("cpu", enabled=False):
            return self.head(x.to(self.head.weight.dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_cannot_be_seen_is_left_alone(x: Tensor, precision: str) -> None:
    model = settled(Keywords()).float()
    logits = Capture(model, x.float(), "conv", precision=precision).score(x.float(), many=True)
    torch.testing.assert_close(logits, model(x.float()), rtol=0.05, atol=0.05)


def test_a_reader_that_was_silent_when_it_was_tried(x: Tensor) -> None:
    model = settled(Net(twice=True))
    torch.nn.init.zeros_(model.head.weight)
    Capture(model, x, "second").score(x, many=True)
    torch.nn.init.normal_(model.head.weight)
    torch.testing.assert_close(Capture(model, x, "second").score(x, many=True), model(x))


def test_threads_take_turns_on_a_model(x: Tensor) -> None:
    model = settled(Net())
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    alone = explain(model, x, ["grad_cam", "rise"], layer="second", settings={"rise": {"masks": 20}})

    def run(_: int) -> list[Tensor]:
        found = explain(model, x, ["grad_cam", "rise"], layer="second", settings={"rise": {"masks": 20}})
        return [found["grad_cam"], found["rise"]]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(16)))
    for grad_cam, rise in results:
        torch.testing.assert_close(grad_cam, alone["grad_cam"])
        torch.testing.assert_close(rise, alone["rise"])
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == was and torch.equal(after[name], value) for name, (was, value) in before.items())
    assert "forward" not in model.norm.__dict__ and all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_hooks_of_a_thread_wait_for_the_others(x: Tensor) -> None:
    """Every method that looks into a model, and the search for a layer: in turns, whoever asks."""
    names = ["full_grad", "grad_cam", "gradient", "hires_cam"]
    model = settled(Net())
    alone = {name: explain(model, x, name, layer="auto").raw[name] for name in names}
    before, models = sys.getswitchinterval(), [model, *(copy.deepcopy(model) for _ in range(7))]  # not known to any cache
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            calls = [(name, one) for _ in range(8) for one in models for name in names]
            found = list(pool.map(lambda call: explain(call[1], x, call[0], layer="auto").raw[call[0]], calls))
    finally:
        sys.setswitchinterval(before)
    for (name, _), raw in zip(calls, found, strict=True):
        torch.testing.assert_close(raw, alone[name])
