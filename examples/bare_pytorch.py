"""A loss on maps in a loop of your own, and the film strip of where the model looks: plain PyTorch.

python examples/bare_pytorch.py [--epochs 3] [--out film.html]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import foveate
from foveate.data import scenes
from foveate.losses.contrastive import ablated_cross_entropy_of
from foveate.report import film as page
from foveate.training.film import Film


def main(epochs: int, out: str) -> None:
    data, held = scenes.make("train").batch(), scenes.make("val").batch()
    model = foveate.load("foveate:small_cnn")
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    film = Film(foveate.Batch(held.x[::30], held.y[::30], held.mask[::30], id=held.id[::30]), class_names=scenes.CLASSES)
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).split(32):
            batch = foveate.Batch(data.x[rows], data.y[rows], data.mask[rows])
            capture = foveate.Capture(model, batch.x, frozen=False)  # one forward pass, with a graph to the parameters
            loss = ablated_cross_entropy_of(capture, batch).mean()  # or foveate.cam_loss(a map of yours) + cross-entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        frame = film.shoot(model, epoch)
        accuracy = (foveate.Capture(model.eval(), held.x).pred == held.y).float().mean()
        plain = F.cross_entropy(model(held.x).detach(), held.y)
        print(f"epoch {epoch}: accuracy {accuracy:.3f}, cross-entropy {plain:.3f}, on the animal {frame.inside.mean():.3f}")
    print(page.write(film, out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="film.html")
    call = parser.parse_args()
    main(call.epochs, call.out)
