"""Interpretable gradients in a LightningModule of your own, with the film strip as a callback.

python examples/lightning_module.py [--epochs 3] [--out film.html]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import foveate
from foveate.data import scenes
from foveate.losses.gradients import interpretable_gradients_of
from foveate.report import film as page
from foveate.training.film import Film, lightning_callback
from foveate.training.lightning import ready

ready()  # beside PyTorch's CPU build, before lightning
import lightning as L  # noqa: E402


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = foveate.load("foveate:small_cnn").train()  # it comes in evaluation mode, and Lightning keeps the mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: foveate.Batch, index: int) -> torch.Tensor:
        # One forward pass for both gradients: the plain one, and the guided one that it is drawn to.
        capture = foveate.Capture(self.net, batch.x, ("auto", "input"), frozen=False, guided=True)
        term = interpretable_gradients_of(capture, batch).mean()
        return F.cross_entropy(capture.logits, batch.y) + 0.0075 * term

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def main(epochs: int, out: str) -> None:
    held = scenes.make("val").batch()
    film = Film(foveate.Batch(held.x[::30], held.y[::30], held.mask[::30], id=held.id[::30]), class_names=scenes.CLASSES)
    loader = torch.utils.data.DataLoader(scenes.make("train"), 32, shuffle=True, collate_fn=foveate.Batch.collate)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=epochs, callbacks=[lightning_callback(film)], **options).fit(Classifier(), loader)
    print(page.write(film, out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="film.html")
    call = parser.parse_args()
    main(call.epochs, call.out)
