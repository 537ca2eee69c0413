"""Whole processes: import, the first explanation from cold, growth with images and pixels, two processes against one,
memory kept or given back.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.peers import plain
from benchmarks.peers.agreement import ranks_agree
from benchmarks.peers.networks import Network, noise
from benchmarks.peers.passes import Passes
from benchmarks.peers.row import Row, timed

import foveate
from foveate import Batch, _torchvision
from foveate.data import images
from foveate.runtime import memory

LIBRARIES = {
    "pytorch-grad-cam": "pytorch_grad_cam",
    "Captum": "captum.attr",
    "torch-cam": "torchcam.methods",
    "Quantus": "quantus",
}
# Beside a PyTorch build that its operators were not made for, torchvision needs them declared; foveate sees to that itself.
PREAMBLE = (
    f"""
import torch
_library = torch.library.Library("torchvision", "DEF")
for _schema in {_torchvision._SCHEMAS!r}:
    _library.define(_schema)
"""
    if _torchvision._declared
    else ""
)
KEEP = f"""
import ctypes
mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
mallopt and (mallopt({memory._MMAP_MAX}, 0), mallopt({memory._TRIM_THRESHOLD}, -1))  # as foveate's command line does
"""
BY_HAND = """
import sys, torch, torchvision, PIL.Image as Image
from torchvision.transforms.functional import pil_to_tensor, resize
model = torchvision.models.mobilenet_v2().eval()
x = resize(pil_to_tensor(Image.open(sys.argv[1]).convert("RGB")) / 255, [224, 224])[None]
with torch.inference_mode():
    model(x)
"""
WITH_GRAD_CAM = """
import sys, numpy, torch, torchvision, PIL.Image as Image
from torchvision.transforms.functional import pil_to_tensor, resize
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
model = torchvision.models.mobilenet_v2().eval()
x = resize(pil_to_tensor(Image.open(sys.argv[1]).convert("RGB")) / 255, [224, 224])[None]
with GradCAM(model, [model.features]) as cam:
    found = cam(input_tensor=x, targets=None)[0]
Image.fromarray(show_cam_on_image(x[0].permute(1, 2, 0).numpy(), found, use_rgb=True)).save(sys.argv[2])
"""
KEPT = """
import sys, torch, foveate
if sys.argv[1] == "kept" and not foveate.keep_memory():
    sys.exit("freed memory cannot be kept here")
model = foveate.load("torchvision:mobilenet_v2")
batch = foveate.Batch(torch.rand(32, 3, 224, 224), torch.arange(32))
foveate.measure(model, [batch] * 12, "grad_cam", ["AD", "AG", "AI"])
"""


def process(*command: str) -> Callable[[], None]:
    return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True) and None


def rows() -> Iterator[Row]:
    torch_alone = process("-c", "import torch")
    yield Row(
        "import",
        "import foveate, a process of its own",
        process("-c", "import foveate"),
        {name: process("-c", f"{PREAMBLE}import {module}") for name, module in LIBRARIES.items()},
        limit=lambda _: timed(torch_alone)[0],
        fewest="import torch",
        rounds=5,
    )
    with tempfile.TemporaryDirectory() as place:
        yield from cold(Path(place))
        yield from two(Path(place))
    yield Row(
        "kept",
        "AD, AG, AI, MobileNet-V2, 12 batches of 32, own process: freed memory kept",
        process("-c", KEPT, "kept"),
        {"given back to the system": process("-c", KEPT, "back")},
        remark="start-up of the process included; where memory is kept, 8 masked images run at once and not 4",
        rounds=3,
    )


def cold(folder: Path) -> Iterator[Row]:
    photo = folder / "photo.png"
    images.to_image(noise(1)[0]).save(photo)
    explain = ["-m", "foveate", "explain", str(photo), "--model", "torchvision:mobilenet_v2", "--out", str(folder / "out")]
    by_hand = process("-c", KEEP + PREAMBLE + BY_HAND, str(photo))
    yield Row(
        "cold",
        "foveate explain of one file from cold, MobileNet-V2: map, picture, JSON",
        process(*explain),
        {"pytorch-grad-cam, a script": process("-c", KEEP + PREAMBLE + WITH_GRAD_CAM, str(photo), str(folder / "cam.png"))},
        limit=lambda _: timed(by_hand)[0],
        fewest="a script that imports torch and torchvision, reads the file, runs the network once",
        rounds=5,
    )


def growth(networks: dict[str, Network]) -> Iterator[Row]:
    network = networks["MobileNet-V2"]
    for count in (1, 10, 100, 1000):
        starts = range(0, count, 8)
        data = [Batch(network.x[: min(8, count - start)], network.y[: min(8, count - start)]) for start in starts]
        yield Row(
            "growth",
            f"AD, AG, AI of Grad-CAM, {network.name}, {count} images in batches of 8",
            lambda data=data: foveate.measure(network.model, data, "grad_cam", ["AD", "AG", "AI"], layer=network.layer),
            model=network.model,
            limit=network.passes.limit("forward", 2 * count, most=max(1, min(8, count))),
            fewest=f"{2 * count} forward",
        )
    for size, masks in ((224, 128), (448, 128), (896, 128)):
        x = torch.nn.functional.interpolate(network.x[:1], (size, size), mode="bilinear")
        y = int(network.y[0])
        yield Row(
            "size",
            f"RISE with {masks} masks, {network.name}, one image of {size} x {size}",
            lambda x=x, y=y, masks=masks: foveate.explain(
                network.model, x, "rise", layer=network.layer, target=y, settings={"rise": {"masks": masks}}
            )["rise"],
            {"after the paper": lambda x=x, y=y, masks=masks: plain.rise(network.model, x, y, masks)[None]},
            network.model,
            network.passes.limit("folded", masks, size=size, most=8),
            f"{masks} forward of that size, batch norms folded",
            ranks_agree,
        )


def two(folder: Path, count: int = 32) -> Iterator[Row]:
    source = folder / "photos"
    source.mkdir()
    lines = ["file,class_index"]
    for number, image in enumerate(noise(count)):
        images.to_image(image).save(source / f"{number:03d}.png")
        lines.append(f"{number:03d}.png,{number}")
    (source / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def evaluation(devices: int) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as out:
                what = ["--model", "torchvision:mobilenet_v2", "--methods", "grad_cam", "--metrics", "AD,I,D", "--devices"]
                process("-m", "foveate", "evaluate", str(source), *what, str(devices), "--out", out)()

        return run

    one = evaluation(1)
    passes = Passes(foveate.load("torchvision:mobilenet_v2"), torch.device("cpu"))
    yield Row(
        "two",
        f"foveate evaluate, {count} images, 4 methods, AD, I, D: two processes",
        evaluation(2),
        {"one process": one},
        limit=passes.limit("folded", 4 * (1 + 2 * 27) * count, most=16),
        fewest=f"4 x (1 + 2 x 27) x {count} forward, batch norms folded, without start-up and page",
        remark=f"on {torch.get_num_threads()} threads in all, which one process uses as well; start-up is paid twice",
        rounds=2,
    )
