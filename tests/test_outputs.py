"""Models with several outputs, of which one is asked for by name; and functions of images that are no module."""

from __future__ import annotations

import functools
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveate import Batch, Capture, FoveateError, LayerError, explain, measure, normalized, saliency
from foveate.runtime.model import Function, one_output

SETTINGS = {"rise": {"masks": 16}, "occlusion": {"window": 8, "stride": 8}}
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclass
class Heads:
    species: Tensor
    breed: Tensor


Named = namedtuple("Named", ["species", "breed"])
WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"species": a, "breed": b},
    "dataclass": Heads,
    "namedtuple": Named,
    "nested": lambda a, b: {"heads": {"species": a, "breed": b}},
}


class TwoHeads(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = WAYS[way]
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.species, self.breed = nn.Linear(8, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).mean((2, 3))
        return self.way(self.species(features), self.breed(features))


def alone(head: str) -> nn.Module:
    model = TwoHeads("tuple")
    return nn.Sequential(model.body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), getattr(model, head)).eval()


@pytest.mark.parametrize("method", ["hires_cam", "ablation_cam", "gradient", "grad_cam"])
@pytest.mark.parametrize(
    ("way", "output"),
    [
        *(("tuple", 1), ("tuple", -1), ("tuple", "1"), ("list", 1), ("dict", "breed"), ("dict", 1), ("dataclass", "breed")),
        *(("namedtuple", "breed"), ("namedtuple", 1), ("nested", "heads.breed"), ("nested", "heads.1")),
    ],
)
def test_an_output_is_explained_as_a_model_with_that_head_alone(way: str, output: str | int, method: str) -> None:
    model = normalized(TwoHeads(way).eval())
    found = explain(model, X, method, output=output, layer="body", target=[1, 4])
    expected = explain(normalized(alone("breed")), X, method, layer="0", target=[1, 4])
    torch.testing.assert_close(found.capture.logits, expected.capture.logits)
    torch.testing.assert_close(found.raw[method], expected.raw[method], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_output_lists_those_that_there_are(way: str) -> None:
    with pytest.raises(FoveateError, match=r"there is no output 'bred'.*\[1, 2\].*\[1, 5\]"):
        explain(TwoHeads(way).eval(), X, output="bred")


def test_what_was_taken_of_several_is_said_once() -> None:
    model = TwoHeads("dict").eval()
    with pytest.warns(UserWarning, match=r"species \[2, 2\], breed \[2, 5\], and the first, 'species'.*output='breed'"):
        explain(model, X, "gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(model, X, "gradient")
        explain(TwoHeads("dict").eval(), X, "gradient", output="breed")


def test_outputs_that_are_no_logits_are_no_reason_for_a_note() -> None:
    model = TwoHeads("tuple").eval()
    model.way = lambda a, b: {"logits": a, "features": b}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(model, X, "gradient").capture.logits.shape == (2, 2)
        model.way = lambda a, b: (a, b[:, :, None, None])
        explain(TwoHeads("tuple").eval(), X, "gradient", output=0)


def test_a_map_in_front_of_the_logits_is_an_error_that_lists_both() -> None:
    class Both(TwoHeads):
        def forward(self, x: Tensor) -> Any:
            features = self.body(x)
            return features, self.breed(features.mean((2, 3)))

    model = Both("tuple").eval()
    with pytest.raises(FoveateError, match=r"returned shape \[2, 8, 7, 7\].*0 \[2, 8, 7, 7\], 1 \[2, 5\]; name one"):
        Capture(model, X, "body")
    assert Capture(one_output(model, 1), X, "body").logits.shape == (2, 5)


def test_an_output_is_measured() -> None:
    model, data = normalized(TwoHeads("dict").eval()), Batch(X, torch.tensor([4, 3]))
    found = measure(model, data, "hires_cam", ["AD", "I"], output="breed", layer="body").frame()
    expected = measure(normalized(alone("breed")), data, "hires_cam", ["AD", "I"], layer="0").frame()
    np.testing.assert_allclose(found["value"].astype(float), expected["value"].astype(float), rtol=1e-4, atol=1e-4)
    assert model.training is False and set(model._modules) == {"model"} and isinstance(model.model, TwoHeads)


# -- functions -----------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


class Service:
    def __init__(self) -> None:
        self.net = network()

    def answer(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def functions() -> dict[str, Callable[[Tensor], Any]]:
    model = network()
    return {
        "lambda": lambda x: model(x),
        "bound": model.forward,
        "of an object": Service().answer,
        "partial": functools.partial(lambda net, x: net(x), model),
        "hidden": (lambda holder: lambda x: holder[0](x))([model]),
    }


@pytest.mark.parametrize("kind", functions())
@pytest.mark.parametrize("method", ["rise", "occlusion", "gradient", "integrated_gradients", "smooth_grad"])
def test_methods_without_layers_take_any_function(kind: str, method: str) -> None:
    own = {method: SETTINGS[method]} if method in SETTINGS else None
    found, expected = (saliency(m, X, method, settings=own) for m in (functions()[kind], network()))
    torch.testing.assert_close(found, expected)


def test_a_function_of_arrays_is_explained_without_gradients() -> None:
    weight = np.random.default_rng(0).normal(size=(3, 4))
    model = lambda x: x.mean((2, 3)).numpy() @ weight  # noqa: E731
    assert saliency(model, X, "occlusion", settings={"occlusion": SETTINGS["occlusion"]}).shape == (2, 32, 32)
    with pytest.raises(FoveateError, match="leaves PyTorch, so that no gradient comes back: 'rise' and 'occlusion'"):
        saliency(model, X, "gradient")


def test_a_function_without_modules_has_no_layers_and_is_measured() -> None:
    model = lambda x: x.mean((2, 3))  # noqa: E731
    with pytest.raises(LayerError, match=r"a function of images has no layers.*'rise' and 'occlusion'"):
        explain(model, X, "grad_cam")
    found = measure(model, Batch(X, torch.tensor([0, 1])), ["gradient", "random"], ["AD", "AG"]).frame()
    assert set(found["method"]) == {"gradient", "random"} and found["value"].notna().all()


def test_the_modules_of_a_function_are_looked_at() -> None:
    model = network()
    assert explain(lambda x: model(x), X, "hires_cam").layer == "model." + explain(model, X, "hires_cam").layer
    with pytest.raises(FoveateError, match="a function of images cannot be randomised"):
        measure(lambda x: model(x), Batch(X, torch.tensor([0, 1])), "gradient", "randomisation")
    model.train()
    with pytest.raises(FoveateError, match=r"in training mode \('model' is\)"):
        explain(lambda x: model(x), X, "gradient")


def test_a_normalisation_goes_around_a_function() -> None:
    model = network()
    found = saliency(normalized(lambda x: model(x)), X, "gradient")
    torch.testing.assert_close(found, saliency(normalized(model), X, "gradient"))
    assert "lambda" in repr(Function(lambda x: x))


@pytest.mark.parametrize(("model", "said"), [(nn.Linear, "the class Linear"), ("resnet", "is none yet: model = foveate.load")])
def test_what_is_no_model_is_said(model: Any, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        explain(model, X, "rise")
