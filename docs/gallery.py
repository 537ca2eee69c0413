"""Makes the pictures of the gallery, one per method, in docs/gallery/: python docs/gallery.py [METHOD ...].

Three small networks learn the scenes first, with cross-entropy and the CAM loss or with cross-entropy alone: a CNN, the
same CNN with a CA-Stream, and a vision transformer. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import foveate
from foveate._torchvision import torchvision
from foveate.data import scenes
from foveate.data.images import to_image
from foveate.overlay import overlay
from foveate.registry import METHODS

OUT = Path(__file__).parent / "gallery"
SIDE = 192  # of one of the two tiles of a picture, in pixels
SETTINGS = {"rise": {"masks": 1000}}
OWN = {"attention_rollout": "vit", "ca_stream": "stream"}  # which need a network of their own


def learned(model: nn.Module, parameters: Iterable[nn.Parameter], epochs: int, lr: float, cam: bool = False) -> nn.Module:
    """The model after some epochs of AdamW on the scenes, images and their mirror images."""
    data = scenes.make("train").batch()
    steps = epochs * -(-len(data) // 32)
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).split(32):
            x, y = data.x[rows], data.y[rows]
            x = x.flip(3) if epoch % 2 else x
            if cam:
                capture = foveate.Capture(model, x, frozen=False)
                shown = foveate.methods.cam.contrastive_cam(capture, None, capture.target(y))
                loss = F.cross_entropy(capture.logits, y) + foveate.cam_loss(shown).mean()
            else:
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    held = scenes.make("val").batch()
    right = (foveate.Capture(model, held.x).pred == held.y).float().mean()
    print(f"{type(model).__name__}: {right:.3f} of the validation images are right")
    return model


def network(kind: str) -> nn.Module:
    """A trained one: ``cnn``, ``stream`` or ``vit``."""
    torch.manual_seed(0)
    if kind == "vit":
        torchvision()  # beside PyTorch's CPU build, before timm
        from timm.models import VisionTransformer

        vit = VisionTransformer(img_size=96, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=2)
        vit = foveate.normalized(vit, [0.5] * 3, [0.5] * 3)
        return learned(vit, vit.parameters(), 16, 2e-3)
    cnn = foveate.load("foveate:small_cnn")
    cnn = learned(cnn, cnn.parameters(), 8, 0.01, cam=True)
    if kind == "cnn":
        return cnn
    stream = foveate.ca_stream(cnn, ["stages.0", "stages.1", "features"])
    return learned(stream, [p for p in stream.parameters() if p.requires_grad], 4, 0.01)


def main(names: Iterable[str]) -> None:
    """Train, explain, draw."""
    test = scenes.make("test").batch()
    chosen = [int((test.y == label).nonzero()[0]) for label in (1, 0)]  # an orca on grass, a leopard on water
    x, y = test.x[chosen], test.y[chosen]
    draw("photograph", x, None)
    networks: dict[str, nn.Module] = {}
    for name in names:
        kind = OWN.get(name, "cnn")
        model = networks[kind] = networks[kind] if kind in networks else network(kind)
        settings = {key: value for key, value in SETTINGS.items() if key == name}
        draw(name, x, foveate.explain(model, x, name, target=y, settings=settings)[name])
    total = sum(path.stat().st_size for path in OUT.glob("*.jpg"))
    print(f"{len(list(OUT.glob('*.jpg')))} pictures, {total / 1024:.0f} KB")


def draw(name: str, x: Tensor, maps: Tensor | None) -> None:
    """Both images, side by side, with their maps."""
    picture = Image.new("RGB", (2 * SIDE + 4, SIDE), "white")
    for k in range(2):
        tile = to_image(x[k] if maps is None else overlay(x[k], maps[k]))
        picture.paste(tile.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (k * (SIDE + 4), 0))
    OUT.mkdir(exist_ok=True)
    picture.save(OUT / f"{name}.jpg", quality=82, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:] or METHODS.all())
