"""Any classifier as one that takes images in [0, 1] and returns logits: normalisation inside, wrappers off, outputs read."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, fx, nn

from foveate.errors import FoveateError, NotFiniteError
from foveate.runtime import outputs

Place = tuple[dict[str, Any], str, Any]  # a dictionary of a module (its parameters, say), a name in it, and what to put there
_ABSENT = object()
_LOCK = threading.Lock()
_looked: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_noted: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # models whose outputs were listed
LOOK_AT = 8  # batches of a model that are looked at for their range
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalized(nn.Module):
    """A model with its normalisation inside: ``model((x - mean) / std)`` for ``x`` in [0, 1].

    Black is then 0 for every model, so that a masked image means the same thing everywhere. The wrapped model keeps
    its layer names: ``features.12`` is found with or without the wrapper.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise FoveateError(f"mean {tuple(mean)} and std {tuple(std)} must be equally long, and every std above 0")
        self.model = unwrap(model)
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1), persistent=False)
        self.training = self.model.training

    def normalise(self, x: Tensor) -> Tensor:
        """``(x - mean) / std``: what the wrapped model is given.

        Raises:
            FoveateError: another number of channels; one would be spread over three in silence.
        """
        wanted, given = self.mean.shape[1], x.shape[-3]
        if wanted not in (1, given):
            grey = ": x.expand(-1, 3, -1, -1) makes three of one" if given == 1 else ""
            raise FoveateError(f"this model takes images of {wanted} channels, and these have {given}{grey}")
        return (x - self.mean.to(x)) / self.std.to(x)

    def forward(self, x: Tensor) -> Any:
        return self.model(self.normalise(x))


def normalized(
    model: nn.Module | Callable[[Tensor], Any], mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Normalized:
    """``model`` with ``(x - mean) / std`` in front, so that it takes images in [0, 1]; ImageNet's values by default.

    The wrapper is put on the device of the model; the model itself is not changed.

    Raises:
        FoveateError: ``mean`` and ``std`` differ in length, or a std is not above 0.
    """
    wrapped = Normalized(model, mean, std)
    first = next(wrapped.model.parameters(), None)
    if first is not None:
        wrapped.mean, wrapped.std = wrapped.mean.to(first.device), wrapped.std.to(first.device)
    return wrapped


class OneOutput(nn.Module):
    """A model with several outputs as a classifier by one of them; see :func:`one_output`."""

    def __init__(self, model: nn.Module, output: str | int) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        return outputs.select(self.model(x), self.output)

    def extra_repr(self) -> str:
        return f"output={self.output!r}"


class Function(nn.Module):
    """Any function of images as a module; the modules that it calls are parts of it, as far as they can be seen.

    Those are what a method is bound to, what a ``functools.partial`` holds, and what a function reads from where it was
    written: so a network in it is known to be on a GPU, or in training mode. An array that it returns becomes a tensor.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.training = False
        for name, module in _held(function).items():
            self.add_module(name if not hasattr(self, name) else f"{name}_", module)

    def forward(self, x: Tensor) -> Any:
        output = self.function(x)
        return torch.as_tensor(output) if isinstance(output, np.ndarray) else output

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def _held(function: Any, looked: tuple[Any, ...] = ()) -> dict[str, nn.Module]:
    """The modules that a function calls, by the names that it has for them."""
    if isinstance(function, functools.partial):
        given = enumerate((function.func, *function.args, *function.keywords.values()))
        values = {f"argument_{i}": value for i, value in given}
    elif inspect.ismethod(function):
        owner = function.__self__
        values = {"model": owner} if isinstance(owner, nn.Module) else dict(getattr(owner, "__dict__", {}))
    elif inspect.isfunction(function):
        seen = inspect.getclosurevars(function)
        values = {**{k: v for k, v in seen.globals.items() if isinstance(v, nn.Module)}, **seen.nonlocals}
    else:
        values = dict(getattr(function, "__dict__", {}))
    found: dict[str, nn.Module] = {}
    for name, value in values.items():
        if isinstance(value, nn.Module):
            found[name] = value
        elif (isinstance(value, functools.partial) or inspect.isroutine(value)) and not any(value is f for f in looked):
            found |= _held(value, (*looked, function))
    return found


def one_output(model: Any, output: str | int | None) -> Any:
    """A model that returns several things (heads, features) as a classifier by one of them: by name, index or dotted path.

    What takes images in [0, 1] still does, and keeps its layers' names. None: the model as it is.

    >>> heads = nn.ModuleDict({"breed": nn.Linear(3, 37), "species": nn.Linear(3, 2)})
    >>> both = Function(lambda x: {name: head(x.mean((2, 3))) for name, head in heads.items()})
    >>> one_output(both, "species")(torch.rand(4, 3, 8, 8)).shape
    torch.Size([4, 2])
    """
    if output is None:
        return model
    model = unwrap(model)
    if not isinstance(model, Normalized):
        return OneOutput(model, output)
    made = copy.copy(model)  # with its normalisation, which metrics read, and its class names
    made._modules = dict(model._modules)
    made.model = OneOutput(model.model, output)
    return made


def unwrap(model: Any) -> nn.Module:
    """The module that does the work: without DataParallel, DistributedDataParallel and ``torch.compile`` around it.

    A function of images becomes a :class:`Function`.

    Raises:
        FoveateError: neither a module nor a function.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            break
    if isinstance(model, nn.Module):
        return model
    if callable(model) and not isinstance(model, type):
        return Function(model)
    raise FoveateError(
        f"the model is the class {model.__name__}, and not a model: make one, as in {model.__name__}()"
        if isinstance(model, type)
        else f"a model is a torch.nn.Module or a function of images, and this is a {type(model).__name__}"
    )


def core(model: nn.Module) -> tuple[nn.Module, str]:
    """The user's own model inside :class:`Normalized` and :class:`OneOutput`, and the prefix of its layers' names."""
    prefix = ""
    while isinstance(model, (Normalized, OneOutput)):
        model, prefix = model.model, prefix + "model."
    return model, prefix


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once, in the order of ``model.modules()``, whose nested generators are ten times slower."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting.extend(reversed(module._modules.values()))
    return list(found)


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock of a model: hooks and swapped tensors of one thread are no other thread's business, so runs take turns."""
    with _LOCK:
        return _locks.setdefault(core(model)[0], threading.RLock())


@contextmanager
def swapped(places: Sequence[Place]) -> Iterator[None]:
    """Other tensors in the parameters and buffers of modules, or other things in their attributes; inside only."""
    before = [(own, name, own.get(name, _ABSENT)) for own, name, _ in places]
    try:
        for own, name, value in places:
            own[name] = value
        yield
    finally:
        for own, name, value in before:
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value


def detached(modules: Sequence[nn.Module]) -> Iterator[Place]:
    """Where a model keeps its parameters, and what stands there for those that no gradient may reach.

    A model made in inference mode has parameters and buffers that no graph may hold: copies of them.
    """
    made: dict[int, Tensor] = {}  # a parameter in two places stays one tensor
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue  # compiled code does not read them here
        for own, always in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in own.items():
                if tensor is not None and (always or tensor.is_inference()):
                    copy = made.setdefault(id(tensor), tensor.detach().clone() if tensor.is_inference() else tensor.detach())
                    yield own, name, copy


@contextmanager
def eager(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run a model, given as :func:`modules_of` it, so that hooks on its layers are seen, and seen once.

    Compiled parts run eagerly, and checkpointed ones keep their activations: what runs again on the way back would do so
    without the hooks, and with other parameters where they were swapped.
    """
    # Looked up where they are stored: a module's own __getattr__ is slow to say that there is none.
    compiled = any(m.__dict__.get("_compiled_call_impl") or "_orig_mod" in m._modules for m in modules)
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), _once:
        yield


class _Once:
    """Inside, ``torch.utils.checkpoint`` calls its function and does no more, in this thread alone.

    Both kinds of checkpoints are looked up in that module by name at each call, also where ``checkpoint`` was imported from
    it; a PyTorch that has other names keeps its own behaviour.
    """

    NAMES = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")

    def __init__(self) -> None:
        self.inside = threading.local()
        self.threads = 0
        self.before: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self.inside.depth = getattr(self.inside, "depth", 0) + 1
        with _LOCK:
            self.threads += 1
            if self.threads == 1 and all(hasattr(checkpointing, name) for name in self.NAMES):
                self.before = tuple(getattr(checkpointing, name) for name in self.NAMES)
                for name, way in zip(self.NAMES, self._ways(*self.before), strict=True):
                    setattr(checkpointing, name, way)

    def __exit__(self, *error: object) -> None:
        self.inside.depth -= 1
        with _LOCK:
            self.threads -= 1
            if not self.threads:
                for name, way in zip(self.NAMES, self.before, strict=False):
                    setattr(checkpointing, name, way)

    def _ways(self, function: Any, generator: Any) -> tuple[Any, Any]:
        def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return run(*args) if getattr(self.inside, "depth", 0) else function.apply(run, preserve, *args)

        def around(*args: Any, **options: Any) -> Iterator[None]:
            return _nothing() if getattr(self.inside, "depth", 0) else generator(*args, **options)

        return SimpleNamespace(apply=apply), around


def _nothing() -> Iterator[None]:
    """What stands around a checkpoint, before and after its function."""
    yield


_once = _Once()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode inside; afterwards every module is in the mode that it was in."""
    training = [module for module in modules_of(model) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def read_logits(output: Any) -> Tensor:
    """The logits ``[B,C]`` in what a classifier returns: a tensor, ``.logits``, or the first of a tuple, dict or dataclass.

    Raises:
        FoveateError: there is nothing of that shape in it; the message lists what there is.
    """
    there = outputs.listed(output)
    advice = (
        f": its outputs are {there}; name one, as output={next(iter(outputs.tensors(output)))!r} (--output)" if there else ""
    )
    if isinstance(output, Tensor):
        logits = output
    elif isinstance(getattr(output, "logits", None), Tensor):
        logits = output.logits
    elif isinstance(output, (Mapping, Sequence)) or outputs.parts(output):
        own = {name: value for name, value in outputs.parts(output) if isinstance(value, Tensor)}
        if not own:
            kind = "dict" if isinstance(output, Mapping) else type(output).__name__
            keys = f": its keys are {list(output)}" if isinstance(output, Mapping) else ""
            raise FoveateError(f"the model returned a {kind} without a tensor{advice or keys}")
        logits = next((own[name] for name in outputs.NAMES if name in own), next(iter(own.values())))
    else:
        raise FoveateError(f"the model returned a {type(output).__name__}: foveate needs a tensor, tuple, dict or .logits")
    if logits.ndim == 1:
        logits = logits[:, None]
    while logits.ndim > 2 and logits.shape[-1] == 1:
        logits = logits[..., 0]
    if logits.ndim != 2:
        raise FoveateError(f"the model returned shape {list(logits.shape)}, but a classifier returns logits [B,C]{advice}")
    return logits


@contextmanager
def hooked(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks on modules of a model; gone afterwards, whatever happens.

    The one place where hooks are put on a model: runs in other threads wait until they are gone, see :func:`lock_of`.
    """
    with lock_of(model), ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def check_logits(logits: Tensor, count: int, output: Any = None, model: nn.Module | None = None) -> None:
    """One row of finite numbers per image; a warning where they look like probabilities.

    Another one, once for a model, where the ``output`` that they are from has several that may be logits.

    Raises:
        FoveateError: another number of rows, or NaN or infinity.
    """
    if len(logits) != count:
        raise FoveateError(f"the model returned {len(logits)} rows for {count} image(s)")
    if model is not None and not _noted.setdefault(core(model)[0], False) and not isinstance(output, Tensor):
        _noted[core(model)[0]] = True
        if len(names := outputs.of_logits(output, count)) > 1:
            warnings.warn(
                f"the model has several outputs, {outputs.listed(output)}, and the first, {names[0]!r}, is explained: "
                f"output={names[1]!r} (--output {names[1]}) takes another",
                stacklevel=5,
            )
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and bool((logits.sum(1) - 1).abs().max() < 1e-4):
        warnings.warn(
            "the model's outputs add up to 1, as probabilities do: give the logits, without the softmax at the end",
            stacklevel=5,
        )
    bad = ~torch.isfinite(logits).all(1)
    if bad.any():
        raise NotFiniteError(
            f"the model returns NaN or infinity for image {int(bad.nonzero()[0])} of the batch: "
            "check its weights and its input range",
            bad.nonzero()[:, 0].tolist(),
        )


def check_images(x: Tensor, model: nn.Module | None = None) -> None:
    """Raise a FoveateError unless ``x`` is ``[B,K,H,W]``, floating point, with at least one image.

    Where a model is given, a warning, once for it and in its first batches, of images that are not in [0, 1].
    """
    if not isinstance(x, Tensor) or x.ndim != 4:
        given = f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise FoveateError(f"images are a tensor of shape [B,C,H,W] with values in [0, 1], and this is {given}")
    if not x.is_floating_point():
        raise FoveateError(f"images are floating point in [0, 1], and these are {x.dtype}: divide by 255 first")
    if x.numel() == 0:
        raise FoveateError("the batch holds no image" if len(x) == 0 else f"images of shape {list(x.shape[1:])} have no pixels")
    if model is not None:
        _warn_of_range(x, model)


def _warn_of_range(x: Tensor, model: nn.Module) -> None:
    looked = _looked.get(model, 0)
    if looked == LOOK_AT:
        return
    low, high = torch.stack(x.detach().aminmax()).tolist()
    _looked[model] = looked + 1
    if low < -0.01 or high > 1.01:
        _looked[model] = LOOK_AT
        warnings.warn(
            f"images are in [0, 1], and these are in [{low:.2f}, {high:.2f}]: black is 0 wherever something is masked. Give "
            "them before normalisation, which belongs into the model (foveate.normalized, or mean and std in foveate.load)",
            stacklevel=4,
        )


def check_eval(modules: Sequence[nn.Module]) -> None:
    """Raise a FoveateError where any module is in training mode, which would change what is explained, and itself."""
    if not any(module.training for module in modules):
        return
    model = modules[0]
    fixed: set[nn.Module] = set()  # of exported programs, whose eval() raises: how they run is written into their graph
    for module in modules:
        if isinstance(module, fx.GraphModule) and "eval" in module.__dict__:
            fixed.update(module.modules())
            if any(_in_training(node) for node in module.graph.nodes):
                raise FoveateError("the model was exported in training mode: call eval() on it before torch.export.export")
    first = next((name or type(model).__name__ for name, m in model.named_modules() if m.training and m not in fixed), None)
    if first is not None and not (model.training and set(model.children()) <= fixed):  # a wrapper has the mode of its model
        raise FoveateError(f"the model is in training mode ({first!r} is): call model.eval() before it is explained")


def _in_training(node: fx.Node) -> bool:
    """Whether a node of an exported graph drops out at random, or normalises by the batch."""
    name, flag = str(node.target), {"aten.dropout": 2, "aten.batch_norm": 5}
    return any(name.startswith(kind) and len(node.args) > i and node.args[i] is True for kind, i in flag.items())
