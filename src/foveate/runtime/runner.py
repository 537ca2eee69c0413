"""Runner: how the classifier is called; parameters that no gradient reaches, changed images in chunks, errors as sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from foveate.errors import FoveateError
from foveate.precision import CPU, Precision, autocast_dtype, casting, check_precision, warn_if_slow
from foveate.runtime import memory
from foveate.runtime.attention import WrittenAttention
from foveate.runtime.chunks import in_chunks
from foveate.runtime.feature import Passes
from foveate.runtime.folding import folded
from foveate.runtime.layers import WITHOUT_GRADIENTS, reaches
from foveate.runtime.linear_head import at_least_float32
from foveate.runtime.memo import Memo
from foveate.runtime.model import Place, check_eval, detached, eager, lock_of, modules_of, read_logits, swapped
from foveate.targets import Target

Pass = Literal["forward", "backward", "tail"]
# Images of 224 x 224 that run at once. On a CPU the system clears the memory of every layer anew where a process gives it
# back, the more often the larger the blocks are: then 4 forward and 8 backward are best, and more where it is kept. Measured
# on ResNet-50, MobileNet-V2 and SqueezeNet with 1 to 32 images: where it is kept within a tenth of the best of each.
AT_ONCE: dict[str, dict[Pass, int]] = {
    "cpu": {"forward": 4, "backward": 8, "tail": 64},
    "kept": {"forward": 8, "backward": 8, "tail": 64},
    "other": {"forward": 64, "backward": 32, "tail": 512},
}
FIXED = (fx.GraphModule, torch.jit.ScriptModule)  # programs, which may have the size of a batch in them
TAIL_BYTES = 64 * 2**20  # of features that run through a tail at once, on a CPU
# So many images, or so many pixels, are faster channels-last. On a CPU fewer are too in bf16, and with depthwise convolutions.
CHANNELS_LAST_FROM, CHANNELS_LAST_PIXELS = 4, 2 * 224 * 224
_formats = Memo()


class Runner:
    """Calls a classifier for a capture, and counts.

    Args:
        model: the classifier, without wrappers.
        live: what is called where parameters get gradients: the model, or its DistributedDataParallel wrapper.
        frozen: parameters get no gradient.
        precision: of changed images: ``fp32``, or ``bf16`` through autocast.
        chunk: how many changed images run at once; by memory where it is None.
        passes: where images are counted.
    """

    def __init__(
        self, model: nn.Module, live: nn.Module, frozen: bool, precision: Precision, chunk: int | None, passes: Passes
    ) -> None:
        if chunk is not None and chunk < 1:
            raise FoveateError(f"chunk {chunk} is not a number of images: use 1 or more")
        self.model = model
        self.live = live
        self.frozen = frozen
        self.precision: Precision = check_precision(precision)
        self.chunk = chunk
        self.passes = passes
        self.lock = lock_of(model)
        self._folded: list[Place] | None = None
        self._frozen: list[Place] | None = None
        self._took = 0  # images in the first batch that the model has run
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.device: torch.device | None = None if first is None else first.device
        self.dtype: torch.dtype | None = None if first is None else first.dtype
        # Methods compute in full precision; the model runs as it did for the caller.
        self.autocast = autocast_dtype((self.device or CPU).type)
        if precision == "bf16":
            warn_if_slow(self.device or CPU)

    @property
    def _on_cpu(self) -> bool:
        return self.device is None or self.device.type == "cpu"

    def exact(self, features: Iterable[Tensor]) -> bool:
        """Whether images run in float32 proper, by the model's parameters and some of its features.

        Not in 16 bits, also not where the model itself casts, nor in the shortened float32 of other devices.
        """
        floats = [tensor for tensor in (*self.model.parameters(), *features) if tensor.is_floating_point()]
        whole = all(tensor.dtype in (torch.float32, torch.float64) for tensor in floats)
        cast = self.autocast is not None or torch.is_autocast_enabled("cpu")
        return whole and self._on_cpu and self.precision == "fp32" and not cast

    def chunk_size(self, size: tuple[int, int], kind: Pass = "forward") -> int:
        """How many images of a size run at once: memory depends on this, and results no more than by rounding."""
        if self.chunk is not None:
            return self.chunk
        at_once = AT_ONCE[("kept" if memory.kept() else "cpu") if self._on_cpu else "other"][kind]
        if self.precision == "bf16" and kind == "forward":
            at_once *= 2
        return max(1, at_once * 224 * 224 // (size[0] * size[1]))

    def tail_size(self, activations: Tensor, size: tuple[int, int]) -> int:
        """How many changed features run at once: as many as the ``tail`` rule says, and no more than fit its bytes."""
        fitting = (TAIL_BYTES if self._on_cpu else 16 * TAIL_BYTES) // max(
            1, activations[0].numel() * activations.element_size()
        )
        return max(1, min(self.chunk_size(size, "tail"), fitting)) if self.chunk is None else self.chunk

    def placed(self, images: Tensor) -> Tensor:
        """Images on the model's device and in its precision."""
        return images if self.device is None else images.to(self.device, self.dtype)

    def __call__(self, x: Tensor) -> Any:
        """The model on ``x``, with parameters that no gradient reaches where the capture is frozen."""
        with self.lock:
            return self.detached(x) if self.frozen else self._guarded(self.live, x)

    def detached(self, x: Tensor) -> Any:
        """The model on ``x`` with parameters that no gradient reaches."""
        if self._frozen is None:  # once: an optimisation calls the model a hundred times
            self._frozen = list(detached(modules_of(self.model)))
        with self.lock, swapped(self._frozen):
            return self._guarded(self.model, x)

    def differentiable(self, images: Tensor, cast: bool = False) -> Tensor:
        """Logits ``[N,C]`` of changed images, with a graph to the images, and to the parameters where live.

        Args:
            cast: in bf16 where the capture asks for it.
        """
        check_eval(modules_of(self.model))
        images = self.placed(images)
        with torch.inference_mode(False), torch.enable_grad(), eager(modules_of(self.model)), self._cast(images, cast):
            logits = at_least_float32(read_logits(self.laid_out(self, images)))
        self.passes.forward += len(images)
        if images.requires_grad:
            self.check_graph(logits, images)
        return logits

    def gradient(self, images: Tensor, target: Target) -> Tensor:
        """Gradient of the score by changed images, ``[N,C,H,W]``; a function of the parameters where live."""
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone().requires_grad_(True)
            score = target(self.differentiable(images))
            if not score.requires_grad:
                raise FoveateError(f"the score {target.name!r} is not a differentiable function of the logits")
            (gradient,) = torch.autograd.grad(score.sum(), images, create_graph=not self.frozen)
        self.passes.backward += len(images)
        return at_least_float32(gradient)

    def check_graph(self, logits: Tensor, images: Tensor) -> None:
        """Raise a FoveateError where no gradient of the logits can reach the image; looked at once for a model."""
        known = _formats.of(self.model)
        if not known.get("differentiable"):
            if not reaches(logits, images):
                raise FoveateError(
                    "the logits have no gradient to the image: the model runs under torch.no_grad, is quantised, or detaches "
                    f"what it computes: {WITHOUT_GRADIENTS}"
                )
            known["differentiable"] = True

    def logits(self, images: Tensor | Iterable[Tensor], many: bool = False) -> Iterable[Tensor]:
        """Logits of changed images without a graph, a chunk at a time, in the faster layout, in bf16 where asked for.

        Args:
            many: there are hundreds of them, worth folding batch norms into convolutions first.
        """
        check_eval(modules_of(self.model))
        for part in [images] if isinstance(images, Tensor) else images:
            with self.lock:
                if many and self._folded is None and len(part):
                    with eager(modules_of(self.model)), self.as_caller():
                        self._folded, passes = folded(self.model, self.placed(part[:1].detach()))
                    self.passes.forward += passes
                # Swapped for the time of a part alone: between two of them the model is the caller's.
                with swapped(self._folded or [] if many else []):
                    pieces = list(in_chunks(self._plain, self.chunk_size((part.shape[-2], part.shape[-1])), part))
            yield from pieces

    def _plain(self, images: Tensor) -> Tensor:
        images = self.placed(images.detach())
        with torch.inference_mode(), eager(modules_of(self.model)), self._cast(images):
            logits = at_least_float32(read_logits(self.laid_out(partial(self._guarded, self.model), images)))
        self.passes.forward += len(images)
        if not torch.isfinite(logits.sum()):
            self.passes.spoilt += int((~torch.isfinite(logits).all(1)).sum())
        return logits.clone()  # a clone made outside of inference mode can take part in a graph

    def as_caller(self) -> AbstractContextManager[Any]:
        """The autocast in which the capture was made."""
        return casting((self.device or CPU).type, self.autocast)

    @contextmanager
    def _cast(self, images: Tensor, wanted: bool = True) -> Iterator[None]:
        if not (wanted and self.precision == "bf16"):
            with self.as_caller():
                yield
            return
        known, attention = _formats.of(self.model), WrittenAttention()
        # The mode sees every call of the model, so that it stays away from one that attends to nothing.
        written = known.get("attends", True) and images.device.type == "cpu"
        with torch.autocast(images.device.type, torch.bfloat16), attention if written else nullcontext():
            yield
        if written:
            known["attends"] = attention.seen

    def laid_out(self, run: Callable[[Tensor], Any], images: Tensor) -> Any:
        """The model on images in the layout that is faster; channels-first where its own reshaping needs that."""
        known = _formats.of(self.model)
        if known.get("channels_first") or self._faster_first(images, known):
            return run(images.contiguous())
        try:
            return run(images.contiguous(memory_format=torch.channels_last))
        except (FoveateError, RuntimeError) as error:
            if "view" not in str(error):
                raise
        known["channels_first"] = True  # x.view(len(x), -1) cannot flatten channels that lie last
        return run(images.contiguous())

    def _faster_first(self, images: Tensor, known: dict[str, bool]) -> bool:
        if len(images) >= CHANNELS_LAST_FROM or images[:, 0].numel() >= CHANNELS_LAST_PIXELS:
            return False
        if images.device.type != "cpu":
            return True
        if images.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return False
        if "depthwise" not in known:
            convolutions = (m for m in modules_of(self.model) if isinstance(m, nn.Conv2d))
            known["depthwise"] = any(m.groups == m.in_channels > 1 for m in convolutions)
        return not known["depthwise"]

    def _guarded(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """The model's own errors as a sentence with the shape that it was given.

        A model that was exported for batches of one size is given batches of that size.
        """
        known: dict[str, Any] = _formats.of(self.model)
        if known.get("batch", len(x)) != len(x):
            return _in_batches(function, x, known["batch"])
        try:
            output = function(x)
            self._took = self._took or len(x)
            return output
        except (FoveateError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
            if self._took not in (0, len(x)) and any(isinstance(m, FIXED) for m in modules_of(self.model)):
                with suppress(RuntimeError, AssertionError, ValueError, TypeError, IndexError):
                    logits = _in_batches(function, x, self._took)
                    known["batch"] = self._took
                    return logits
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if x.requires_grad and "numpy()" in reason:
                raise FoveateError(f"the model leaves PyTorch, so that no gradient comes back: {WITHOUT_GRADIENTS}") from error
            raise FoveateError(f"the model cannot take images of shape {list(x.shape)}: {reason}") from error


def _in_batches(function: Callable[[Tensor], Any], x: Tensor, size: int) -> Tensor:
    """Logits of images that run ``size`` at a time, the last of them again and again where one is short."""
    logits = []
    for part in x.split(size):
        full = torch.cat([part, part[-1:].expand(size - len(part), -1, -1, -1)])
        logits.append(read_logits(function(full))[: len(part)])
    return torch.cat(logits)
