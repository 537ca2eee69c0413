"""foveate beside pytorch-grad-cam, Captum, torch-cam and Quantus: the same work in one process, in turns.

    python -m benchmarks.peers [DATA] [--rows cams,score] [--device cuda] [--out bench]

Each row is one job that foveate and one or more others do on the same weights and images. A row's limit is the fewest passes
that the definition allows, times the best time of such a pass here. ``make bench`` makes an environment of its own for it.
"""

from foveate._torchvision import torchvision

torchvision()  # before any of them imports it: see there
