"""Testing: the contracts that every method, metric and loss keeps, for foveate's own and for yours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import maps
from foveate.batch import Batch
from foveate.errors import FoveateError
from foveate.methods.cam import contrast_of
from foveate.models.castream import Stream
from foveate.registry import METHODS, METRICS, Explained, Method, Metric, Spent
from foveate.runtime.capture import Capture

SHAPE = (2, 3, 17, 23)  # odd on purpose: height and width are not to be mixed up
CLASSES = 4
ROUNDING = 1e-9  # by which a value may leave the range that its metric promises


class _GapNet(nn.Module):
    """Convolutions, average pooling, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.features(x))

    def tail(self, activations: Tensor) -> Tensor:
        result: Tensor = self.classifier(activations.mean((2, 3)))
        return result


class _FlatNet(_GapNet):
    """The same with flattening instead of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6 * 9 * 12, CLASSES)

    def tail(self, activations: Tensor) -> Tensor:
        result: Tensor = self.classifier(activations.flatten(1))
        return result


class _InplaceNet(nn.Module):
    """Signed features with batch norm in front and an in-place ReLU behind, strided, with a hidden layer in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)
        self.more = nn.Conv2d(6, 5, 3, padding=1)
        self.hidden, self.classifier = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.features(x))

    def tail(self, activations: Tensor) -> Tensor:
        pooled = F.relu(self.more(self.relu(activations))).mean((2, 3))
        result: Tensor = self.classifier(torch.tanh(self.hidden(pooled)))
        return result


class _TokenNet(nn.Module):
    """A block of attention whose class token is read: patches of 4 x 4 pixels, 4 x 5 of them at 17 x 23."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.features = nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)  # [B,20,8]
        return self.tail(self.features(torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1)))

    def tail(self, tokens: Tensor) -> Tensor:
        attention = (self.query(tokens) @ self.key(tokens).transpose(1, 2) / 8**0.5).softmax(-1)  # [B,21,21]
        result: Tensor = self.classifier((tokens + attention @ self.value(tokens))[:, 0])
        return result


class _StreamNet(_GapNet):
    """Cross-attention instead of average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream([6])

    def tail(self, activations: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.stream([activations]))
        return result


def networks() -> dict[str, nn.Module]:
    """Small networks in float64 and evaluation mode, each with its layer to look at called ``features``.

    Each has ``tail``, which takes that layer's output to the logits of :data:`CLASSES` classes, for replicas.
    """
    kinds: dict[str, Callable[[], nn.Module]] = {
        "gap": _GapNet,
        "flat": _FlatNet,
        "inplace": _InplaceNet,
        "tokens": _TokenNet,
        "stream": _StreamNet,
    }
    made = {}
    with torch.random.fork_rng(devices=[]):
        for number, (name, kind) in enumerate(kinds.items()):
            torch.manual_seed(number)
            network = kind().double()
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()  # type: ignore[union-attr]
                    module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            made[name] = network.eval()
    return made


def example(seed: int = 0, count: int = SHAPE[0]) -> Batch:
    """Random images in [0, 1], float64, with labels, masks and names."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *SHAPE[1:], generator=generator, dtype=torch.float64)
    mask = torch.rand(count, *SHAPE[2:], generator=generator) > 0.5
    y = torch.randint(CLASSES, (count,), generator=generator)
    return Batch(x, y, mask, id=tuple(map(str, range(count))))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a call must leave as it was: hooks, modules, modes, flags, gradients, values."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, Mapping)]
        state[f"module {name}"] = (id(module), module.training, hooks, sorted(vars(module)))
    for name, parameter in model.named_parameters():
        gradient = None if parameter.grad is None else parameter.grad.clone()
        state[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.detach().clone(), gradient)
    for name, buffer in model.named_buffers():
        state[f"buffer {name}"] = buffer.clone()
    return state


def assert_untouched(before: Mapping[str, Any], model: nn.Module) -> None:
    """Raise an AssertionError where a model differs from its :func:`fingerprint`, bit for bit."""
    after = fingerprint(model)
    assert before.keys() == after.keys(), f"modules or tensors came or went: {before.keys() ^ after.keys()}"
    for key, value in before.items():
        assert _same(value, after[key]), f"{key} has changed"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def check_method(method: str | Method, **settings: Any) -> None:
    """Hold a method against the contract; an AssertionError says what is broken.

    On networks of five kinds, at an odd image size: its map is ``[B,h,w]`` and finite; a batch gives what single
    images give, in any order; the model and the images are untouched, also when the target raises; where it says
    ``differentiable``, its gradient in the parameters agrees with finite differences; where it has ``complete``, it adds
    up to what that promises.

    Raises:
        AssertionError: as said.
        FoveateError: the method refuses all of them.
    """
    record = METHODS.get(method) if isinstance(method, str) else method
    refused: list[FoveateError] = []
    for name, network in networks().items():
        try:
            _check_method_on(record, name, network, settings)
        except FoveateError as error:
            refused.append(error)
    if len(refused) == len(networks()):
        raise refused[0]


def _map(record: Method, network: nn.Module, x: Tensor, y: Tensor, settings: Mapping[str, Any], frozen: bool = True) -> Tensor:
    capture = Capture(network, x, "features", frozen=frozen)
    result: Tensor = record(capture, "features", capture.target(y), **settings)
    return result


def _check_method_on(record: Method, name: str, network: nn.Module, settings: Mapping[str, Any]) -> None:
    batch, where = example(), f"{record.name} on the network {name!r}"
    assert batch.y is not None
    before, pixels = fingerprint(network), batch.x.clone()
    saliency = _map(record, network, batch.x, batch.y, settings)
    assert saliency.ndim == 3, f"{where}: a map is [B,h,w], and this one has shape {list(saliency.shape)}"
    assert len(saliency) == len(batch), f"{where}: {len(saliency)} maps for {len(batch)} images"
    assert torch.isfinite(saliency).all(), f"{where}: the map holds NaN or infinity"
    maps.prepare(saliency.detach(), SHAPE[2:])
    for index in range(len(batch)):
        alone = _map(record, network, batch.x[index : index + 1], batch.y[index : index + 1], settings)
        assert torch.allclose(alone[0], saliency[index], rtol=1e-8, atol=1e-10), f"{where}: a batch differs from single images"
    turned = _map(record, network, batch.x.flip(0), batch.y.flip(0), settings)
    assert torch.allclose(turned.flip(0), saliency, rtol=1e-8, atol=1e-10), f"{where}: the order of the batch matters"

    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    capture = Capture(network, batch.x, "features")
    with contextlib.suppress(RuntimeError, FoveateError):
        record(capture, "features", capture.target(broken), **settings)
    assert_untouched(before, network)
    assert torch.equal(pixels, batch.x), f"{where}: the images have changed"
    if record.differentiable:
        _check_gradient(record, where, network, batch, settings)
    if record.complete is not None:
        capture = Capture(network, batch.x, "features")
        target = contrast_of(capture, capture.target(batch.y)) if record.contrasts else capture.target(batch.y)
        error = record.complete(capture, "features", target, record(capture, "features", target, **settings), **settings)
        assert error is None or error.max() < record.complete_to, f"{where}: the map misses what it promises to add up to"


def _check_gradient(record: Method, where: str, network: nn.Module, batch: Batch, settings: Mapping[str, Any]) -> None:
    """Directional derivative of a random function of the map, by autograd and by central differences."""
    assert batch.y is not None
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in network.parameters() if p.requires_grad]
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    saliency = _map(record, network, batch.x, batch.y, settings, frozen=False)
    weight = torch.randn(saliency.shape, generator=generator, dtype=saliency.dtype)
    gradients = torch.autograd.grad((saliency * weight).sum(), parameters, allow_unused=True)
    exact = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    numeric = []
    for step in (1e-6, 1e-7, 1e-8):  # a smaller one where a ReLU has its kink within the larger
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(d, alpha=sign * step)
            values.append(float((_map(record, network, batch.x, batch.y, settings).detach() * weight).sum()))
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.sub_(d, alpha=sign * step)
        numeric.append((values[0] - values[1]) / (2 * step))
        if abs(numeric[-1] - exact) <= 1e-4 * max(1.0, abs(numeric[-1])):
            return
    raise AssertionError(f"{where}: gradient {exact}, finite differences {numeric}")


def measured(record: Metric, network: nn.Module, M: Tensor, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    """A metric on a network with the layer ``features``; one that asks where the map came from is told of HiResCAM."""
    return measured_on(Capture(network, batch.x, "features"), record, M, batch, **settings)


def measured_on(capture: Capture, record: Metric, M: Tensor, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    """The same on a capture that is there."""
    if "explained" in record.filled_in:
        method, target = METHODS.get("hires_cam"), capture.target("label", labels=batch.y)
        raw = method(capture, None, target).detach()
        settings["explained"] = Explained(method, raw, target, {}, Spent(0.5, 3.0, 1.0, 1.0, 2.0))
    result: dict[str, Tensor] = record(capture, None if record.of_model else M, batch, **settings)
    return result


def check_metric(metric: str | Metric, **settings: Any) -> None:
    """Hold a metric against the contract: its columns and ranges, one finite value per image, batches like singles, no traces.

    Raises:
        AssertionError: it says what is broken.
    """
    record = METRICS.get(metric) if isinstance(metric, str) else metric
    batch = example(count=3)
    assert batch.y is not None
    assert batch.mask is not None
    network = networks()["gap"]
    before = fingerprint(network)
    M = maps.scale(torch.rand(3, *SHAPE[2:], generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    together = measured(record, network, M, batch, **settings)
    assert set(record.columns) <= set(together), f"{record.name} promises {set(record.columns)} and gives {set(together)}"
    for column, values in together.items():
        curve = column not in record.columns or column in record.pooled
        assert values.ndim == 1 + curve, f"{record.name}: {column} has shape {list(values.shape)}, one value an image is due"
        assert len(values) == 3, f"{record.name}: {column} has shape {list(values.shape)}, and there are 3 images"
        assert curve or torch.isfinite(values).all(), f"{record.name}: {column} holds NaN or infinity"
        least, most = getattr(record.columns.get(column), "range", None) or (float("-inf"), float("inf"))
        outside = (values < least - ROUNDING) | (values > most + ROUNDING)
        assert not outside.any(), f"{record.name}: {column} promises [{least}, {most}] and gives {float(values[outside][0])}"
    for i in range(3):
        rows = slice(i, i + 1)
        one = Batch(batch.x[rows], batch.y[rows], batch.mask[rows], id=batch.id[rows])
        for column, values in measured(record, network, M[rows], one, **settings).items():
            near = torch.allclose(values, together[column][rows], atol=1e-8, equal_nan=True)
            assert near, f"{record.name}: {column} depends on the batch"
    assert_untouched(before, network)
