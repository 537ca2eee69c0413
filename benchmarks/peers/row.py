"""A row: one job, its contestants in turns, passes, memory and agreement, and the limit beside it."""

from __future__ import annotations

import contextlib
import gc
import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.runtime.memory import peak
from foveate.runtime.model import read_logits

Job = Callable[[], Any]
SECONDS = 10.0  # that the timed rounds of one contestant may take; at least one, at most ROUNDS
ROUNDS = 15
LONG = 60.0  # seconds after which the run that is counted is a round as well: that it starts without kept memory is nothing


@dataclass
class Row:
    """One job.

    Args:
        part: its group.
        title: the job in words, network and batch included.
        ours: foveate's run.
        peers: the others' runs by name.
        model: whose passes are counted; None where there is none.
        limit: seconds of the fewest passes, measured when it is asked, given what foveate's run counted; None where a row
            has no limit.
        fewest: those passes in words.
        agree: two results to a sentence on how far they agree.
        remark: what a reader should know of this row.
        trains: it is a training step, which changes the model.
        rounds: how often, where the time of the first run shall not decide.
    """

    part: str
    title: str
    ours: Job
    peers: dict[str, Job] = field(default_factory=dict)
    model: nn.Module | None = None
    limit: Callable[[Contestant], float] | None = None
    fewest: str = ""
    agree: Callable[[Any, Any], str] | None = None
    remark: str = ""
    rounds: int | None = None
    trains: bool = False


@dataclass
class Contestant:
    """What a run took: medians over rounds of seconds and ratios, passes in images, memory in MB."""

    name: str
    seconds: float
    ratio: float = float("nan")  # its seconds by foveate's
    low: float = float("nan")
    high: float = float("nan")
    forward: int = 0
    backward: int = 0
    memory: float = float("nan")
    agreement: str = ""
    error: str = ""
    rounds: int = 0


@dataclass
class Outcome:
    part: str
    title: str
    contestants: list[Contestant]
    limit: float
    over_limit: float
    over_low: float
    over_high: float
    fewest: str
    remark: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Counted:
    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def counted(model: nn.Module | None) -> Iterator[Counted]:
    """Images that go forward through the whole model, and backward from its logits, counted from outside for everybody."""
    found = Counted()
    if model is None:
        yield found
        return

    def forward(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = read_logits(output)
        found.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        found.backward += len(gradient)

    handle = model.register_forward_hook(forward)
    try:
        yield found
    finally:
        handle.remove()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Job) -> tuple[float, Any]:
    """Seconds and result of a run; what it prints is swallowed."""
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        synchronise()
        start = time.perf_counter()
        result = run()
        synchronise()
        return time.perf_counter() - start, result


def run(row: Row, device: torch.device) -> Outcome:
    """All contestants of a row: once with passes and memory counted, then in turns for time, each as often as it can.

    The counted run of a long job is its first round as well.
    """
    jobs = {"foveate": row.ours, **row.peers}
    found: dict[str, Contestant] = {}
    results: dict[str, Any] = {}
    for name, job in jobs.items():
        before = [] if row.trains else state(row.model)
        with counted(row.model) as passes, peak(device) as memory:
            try:
                seconds, results[name] = timed(job)
                megabytes = memory() if row.model is not None else float("nan")  # not of other processes
                found[name] = Contestant(name, seconds, forward=passes.forward, backward=passes.backward, memory=megabytes)
            except Exception as error:  # a peer that cannot do it is a result
                if name == "foveate":
                    raise
                found[name] = Contestant(name, float("nan"), error=f"{type(error).__name__}: {str(error)[:120]}")
        _without_gradients(row.model)
        if not row.trains and state(row.model) != before:
            raise RuntimeError(f"{row.title}: {name} leaves the model changed, and the others would be measured on that")
    for name in results:
        if name != "foveate" and row.agree is not None:
            found[name].agreement = row.agree(results["foveate"], results[name])
    results = dict.fromkeys(results)
    times = {name: [found[name].seconds] if found[name].seconds > LONG else [] for name in results}
    wanted = dict.fromkeys(results, row.rounds or 1)
    limits: list[float] = []
    for number in range(row.rounds or ROUNDS):
        if number == 1 and row.rounds is None:  # the first timed run says how often: the counted one was slower
            wanted = {name: min(ROUNDS, int(SECONDS / max(times[name][0], 1e-6))) for name in results}
        turn = number % len(results)
        for name in [*results][turn:] + [*results][:turn]:  # nobody is always first
            if len(times[name]) < wanted[name]:
                times[name].append(timed(jobs[name])[0])
                _without_gradients(row.model)
        if row.limit and number < wanted["foveate"]:
            limits.append(row.limit(found["foveate"]))
    ours = times["foveate"]
    for name, values in times.items():
        one = found[name]
        one.seconds, one.rounds = statistics.median(values), len(values)
        # A single round is held against what foveate takes as a rule, not against the one run beside it.
        one.ratio, one.low, one.high = ratio(values, ours if len(values) > 1 else [statistics.median(ours)])
    over = ratio(ours, limits) if limits else (float("nan"),) * 3
    limit = statistics.median(limits) if limits else float("nan")
    return Outcome(row.part, row.title, list(found.values()), limit, *over, row.fewest, row.remark)


def ratio(a: list[float], b: list[float], samples: int = 2000) -> tuple[float, float, float]:
    """The median of the common rounds' own ratios a / b with a 95 % bootstrap interval.

    Of two to four rounds the interval is their range; a single round has none (not a number).
    """
    ratios = np.array([x / y for x, y in zip(a, b, strict=False)])
    middle = float(np.median(ratios))
    if len(ratios) < 5:
        return (middle, float(ratios.min()), float(ratios.max())) if len(ratios) > 1 else (middle, float("nan"), float("nan"))
    draws = np.median(ratios[np.random.default_rng(0).integers(len(ratios), size=(samples, len(ratios)))], axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return middle, float(low), float(high)


def state(model: nn.Module | None) -> list[Any]:
    """What a job must leave as it was: modules, modes, numbers of hooks, gradient flags, versions of parameters."""
    if model is None:
        return []
    modules = [(id(m), m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    return [*modules, *((id(p), p.requires_grad, p._version) for p in model.parameters())]


def _without_gradients(model: nn.Module | None) -> None:
    """Some leave .grad on the parameters, which the next one's memory must not pay for."""
    if model is not None:
        model.zero_grad(set_to_none=True)
