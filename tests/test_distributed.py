"""Several processes: a live capture trains the model that the wrapper trains."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from foveate import Capture
from foveate.losses.centre import cam_loss_of
from foveate.testing import example, networks


def worker(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch, a loss on maps, and the gradients that come of it."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    network, batch = networks()["inplace"], example(count=4)
    model = DistributedDataParallel(network)
    rows = slice(2 * rank, 2 * rank + 2)
    half = type(batch)(batch.x[rows], batch.y[rows])
    capture = Capture(model, half.x, "features", frozen=False)
    loss = torch.nn.functional.cross_entropy(capture.logits, half.y) + cam_loss_of(capture, half).mean()
    loss.backward()
    torch.save([p.grad for p in network.parameters()], f"{folder}/{rank}.pt")
    Path(folder, f"{rank}.done").touch()
    del model, capture, loss  # the wrapper's threads end before the group that they talk through
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    try:
        mp.spawn(worker, (str(tmp_path),), nprocs=2)
    except mp.ProcessExitedException:
        # Gloo now and then aborts a process on its way out, after its work is done; without that work the test fails.
        if not all((tmp_path / f"{rank}.done").exists() for rank in range(2)):
            raise
    network, batch = copy.deepcopy(networks()["inplace"]), example(count=4)
    capture = Capture(network, batch.x, "features", frozen=False)
    (torch.nn.functional.cross_entropy(capture.logits, batch.y) + cam_loss_of(capture, batch).mean()).backward()
    for rank in range(2):
        for theirs, parameter in zip(torch.load(tmp_path / f"{rank}.pt"), network.parameters(), strict=True):
            torch.testing.assert_close(theirs, parameter.grad, rtol=1e-8, atol=1e-12)
