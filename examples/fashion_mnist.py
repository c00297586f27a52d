"""Fashion-MNIST as the image examples read it.

The repository carries 20,000 training and all 10,000 test images (Xiao, Rasul, Vollgraf 2017, MIT licence) as
one `.npz` of unsigned bytes. `train_image.py` used the full 60,000 training images, which it takes from the
Debian package `dataset-fashion-mnist`; `full()` reads those. Nothing here knows of networks.

`Images` are what a workload is made of: pixels, labels and how the network at hand wants its pixels prepared.
`Accuracy` scores on them, `Shuffled` trains on them.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

SUBSET = Path(__file__).parent / "data" / "fashion_mnist.npz"
MEAN, STD = 0.2860, 0.3530  # of the training images' brightness
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

Prepare = Callable[[Tensor], Tensor]  # (n, 1, 28, 28) brightness to (n, ...) as a network reads it
Labelled = tuple[tuple[Tensor], Tensor]  # ((inputs,), labels), as a Workload wants its pairs


def brightness(pixels: np.ndarray) -> Tensor:
    """(n, 28, 28) bytes to (n, 1, 28, 28) floats, 0 black and 1 white."""
    return torch.tensor(pixels).unsqueeze(1).float() / 255


def normalised(x: Tensor) -> Tensor:
    """Brightness to mean 0 and deviation 1; any shape."""
    return (x - MEAN) / STD


def moved(x: Tensor, rng: torch.Generator) -> Tensor:
    """(n, c, 28, 28) shifted together by up to two pixels (edges repeated), half of them mirrored."""
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    dy, dx = torch.randint(0, 5, (2,), generator=rng).tolist()
    x = padded[:, :, dy : dy + 28, dx : dx + 28].clone()
    mirror = torch.rand(len(x), generator=rng) < 0.5
    x[mirror] = x[mirror].flip(-1)
    return x


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images; a slice of them is `Images` too."""

    x: Tensor  # (n, 1, 28, 28) brightness
    y: Tensor  # (n,) class numbers
    prepare: Prepare

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Images:
        return replace(self, x=self.x[part], y=self.y[part])

    def batches(self, size: int) -> Iterator[Labelled]:
        """In order, prepared a batch at a time so that they never lie in memory all at once; the last may be short."""
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            yield (self.prepare(x),), y

    def inputs(self, size: int) -> Iterator[tuple[Tensor]]:
        """The batches without their labels."""
        return (batch for batch, _ in self.batches(size))


def images(part: Literal["train", "test"], prepare: Prepare) -> Images:
    """The 20,000 committed training images, or the 10,000 test images."""
    arrays = subset()
    return Images(brightness(arrays[f"{part}_x"]), torch.from_numpy(arrays[f"{part}_y"]).long(), prepare)


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Scores a predicting function: for each image 1.0 if the highest logit is its class, else 0.0."""

    images: Images
    size: int = 200  # of a batch

    def __call__(self, predict: Callable[[Tensor], Tensor]) -> list[float]:
        hits: list[float] = []
        for (x,), y in self.images.batches(self.size):
            hits += (predict(x).argmax(1) == y).float().tolist()
        return hits


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Batches to train on, in a new order and newly moved at each iteration; a rest smaller than a batch is left out.

    Like a torch `DataLoader` it takes one number from torch's global generator per iteration and everything else
    from that number: `torch.manual_seed` makes a training repeatable, and the object itself never changes.
    """

    images: Images
    size: int = 128  # of a batch

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[Labelled]:
        rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        order = torch.randperm(len(self.images), generator=rng)
        for chosen in order[: len(self) * self.size].split(self.size):
            x = moved(self.images.x[chosen], rng)
            yield (self.images.prepare(x),), self.images.y[chosen]


def subset() -> dict[str, np.ndarray]:
    """The committed arrays: `train_x`, `train_y`, `test_x`, `test_y`, all bytes."""
    with np.load(SUBSET, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def full(folder: Path) -> dict[str, np.ndarray]:
    """The four idx files below `folder`, gzipped or not, under the names that `subset` uses."""
    stems = {
        "train_x": "train-images-idx3-ubyte",
        "train_y": "train-labels-idx1-ubyte",
        "test_x": "t10k-images-idx3-ubyte",
        "test_y": "t10k-labels-idx1-ubyte",
    }
    return {name: _read_idx(_find(folder, stem)) for name, stem in stems.items()}


def _find(folder: Path, stem: str) -> Path:
    found = sorted(folder.rglob(stem + "*"))
    if not found:
        raise FileNotFoundError(f"no {stem} below {folder}: unpack the Debian package dataset-fashion-mnist there")
    return found[0]


def _read_idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape.astype(int))
