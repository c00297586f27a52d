"""Trains the ResNet-18 of `image.py` on all 60,000 Fashion-MNIST images and writes its weights as fp16.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb FOLDER
    python examples/train_image.py FOLDER

About an hour on one core. The committed weights came from this script with its defaults; nothing at run time
needs it. It also writes `data/fashion_mnist.npz`, the subset that the examples use.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import SUBSET, brightness, full, moved, normalised
from resnet import WEIGHTS, ResNet18
from safetensors.torch import save_file
from torch import Tensor, nn

SUBSET_TRAIN = 20_000


def augmented(x: Tensor, rng: torch.Generator) -> Tensor:
    """(n, 1, 28, 28) normalised images moved, and a random patch of 7 pixels blanked in half of them."""
    x = moved(x, rng)
    top, left = torch.randint(0, 22, (2, len(x)), generator=rng)
    rows = torch.arange(28)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + 7)
    in_columns = (rows >= left[:, None]) & (rows < left[:, None] + 7)
    chosen = torch.rand(len(x), generator=rng) < 0.5
    blank = in_rows[:, None, :, None] & in_columns[:, None, None, :] & chosen[:, None, None, None]
    return x.masked_fill(blank, 0.0)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    hits = sum((net(x[i : i + 500]).argmax(1) == y[i : i + 500]).sum().item() for i in range(0, len(x), 500))
    return hits / len(x)


def train(folder: Path, epochs: int, batch: int, seed: int) -> None:
    data = full(folder)
    SUBSET.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        SUBSET,
        train_x=data["train_x"][:SUBSET_TRAIN],
        train_y=data["train_y"][:SUBSET_TRAIN],
        test_x=data["test_x"],
        test_y=data["test_y"],
    )
    x, y = normalised(brightness(data["train_x"])), torch.from_numpy(data["train_y"]).long()
    test_x, test_y = normalised(brightness(data["test_x"])), torch.from_numpy(data["test_y"]).long()
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    net = ResNet18().to(memory_format=torch.channels_last)
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, total_steps=steps, pct_start=0.25)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(epochs):
        net.train()
        start, total = time.time(), 0.0
        for chosen in torch.randperm(len(x), generator=rng)[: len(x) // batch * batch].split(batch):
            loss = loss_of(net(augmented(x[chosen], rng).to(memory_format=torch.channels_last)), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{epochs}: loss {total / (len(x) // batch):.4f}, "
            f"test accuracy {accuracy(net, test_x, test_y):.4f}, {time.time() - start:.0f} s",
            flush=True,
        )
        WEIGHTS.parent.mkdir(exist_ok=True)
        save_file(
            {
                name: (value.half() if value.is_floating_point() else value).contiguous()
                for name, value in net.state_dict().items()
            },
            WEIGHTS,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where dataset-fashion-mnist was unpacked")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.epochs, arguments.batch, arguments.seed)
