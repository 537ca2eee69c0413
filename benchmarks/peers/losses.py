"""A training step with each loss, beside the same step with cross-entropy alone."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.peers.row import Contestant, Row, timed
from benchmarks.training import load, step

from foveate.registry import LOSSES

NETWORKS = (("foveate:small_cnn", 96, 32), ("torchvision:resnet18", 112, 16))


def rows() -> Iterator[Row]:
    for name, size, count in NETWORKS:
        plain = step(*load(name, size, count, None))
        plain()

        def limit(_: Contestant, plain: object = plain) -> float:
            return timed(plain)[0]  # type: ignore[arg-type]

        for loss in LOSSES.all():
            module, batch = load(name, size, count, loss)
            run = step(module, batch)
            run()
            yield Row(
                "losses",
                f"Training step with {loss}, {name.partition(':')[2]}, {count} images of {size} pixels",
                run,
                model=module.classifier,
                trains=True,
                limit=limit,
                fewest="a step with cross-entropy alone",
                remark="a gradient of a gradient: two backward passes more, and slower ones" if "gradients" in loss else "",
            )
