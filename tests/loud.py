"""A network with inputs like real ones: they hang together, and some channels are far louder than others."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight import Workload
from featherweight.hooks import (
    watch_inputs,
)
from featherweight.surgery import (
    select,
)
from featherweight.workload import Batch

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Net(nn.Module):
    """(n, 8, 10, 10) to (n, 16): a grouped, a depthwise and a pointwise convolution, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 24, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.mixed = nn.Conv2d(24, 32, 1)
        self.up, self.head = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.grouped, self.depthwise, self.mixed):
            x = torch.relu(layer(x))
        return self.head(F.gelu(self.up(x.mean((2, 3)))))


def images(count: int, seed: int) -> Tensor:
    """Smooth in space, 8 channels made of 4, the loudest 100 times as loud as the quietest."""
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 4, generator=rng)
    loudness = torch.logspace(-1, 1, 8)[torch.randperm(8, generator=rng)]
    rng.manual_seed(seed)
    smooth = F.avg_pool2d(torch.randn(count, 4, 12, 12, generator=rng), 3, stride=1)
    mixed = torch.einsum("oi,nihw->nohw", mixing, smooth) + 0.1 * torch.randn(count, 8, 10, 10, generator=rng)
    return mixed * loudness.view(8, 1, 1)


def workload(seed: int, examples: int = 128) -> Workload:
    """Weights and data are drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net().eval()
    x = images(examples, seed + 1)
    return Workload(net, (x[:2],), [(part,) for part in x.split(16)], lambda predict: 0.0, train=[(x,)])


def output_errors(before: nn.Module, after: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """By layer: how far its output is off for the inputs that it has in `before`, relative to that output."""
    twin = copy.deepcopy(before)  # that nobody watches
    wrong: dict[str, float] = {}
    right: dict[str, float] = {}

    def observe(name: str, x: Tensor) -> None:
        y = twin.get_submodule(name)(x)
        wrong[name] = wrong.get(name, 0.0) + float((after.get_submodule(name)(x) - y).square().sum())
        right[name] = right.get(name, 0.0) + float(y.square().sum())

    watch_inputs(before, select(before, "*", KINDS), batches, observe)
    return {name: (wrong[name] / right[name]) ** 0.5 for name in wrong}


def weight_errors(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """By layer: the norm of what its weight lost, relative to the weight."""
    layers = select(before, "*", KINDS)
    return {
        name: float(((after.get_submodule(name).weight - layer.weight).norm() / layer.weight.norm()).detach())
        for name, layer in layers.items()
    }
