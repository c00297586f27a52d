"""Blocks that matter least go first, together and not one by one; what cannot go is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from featherweight.damage import damage
from featherweight.errors import LayerError
from featherweight.passes.drop_layers import DropLayers, least_missed
from featherweight.passes.prune_channels import PruneChannels
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import Block, blocks, without
from featherweight.workload import Workload

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Add(nn.Module):
    """Adds `factor` times what a linear layer makes of its input."""

    def __init__(self, factor: float, seed: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)
        self.inner.weight.data = factor * torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)) / 8**0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def made(model: nn.Module) -> Workload:
    return Workload(model.eval(), (X[:2],), [(part,) for part in X.split(32)], score=lambda predict: 0.0)


def test_the_block_that_changes_least_goes_first() -> None:
    workload = made(nn.Sequential(Add(1.0, 1), Add(0.05, 2), Add(0.8, 3), nn.Linear(8, 3)))
    model, coverage = compress_model(Recipe((DropLayers(share=0.3),), "torch"), workload)
    assert coverage.done == [("1", "removed")]
    assert {layer for layer, _ in coverage.left} == {"0", "2"}
    assert [type(child) for child in model] == [Add, Add, nn.Linear]
    assert torch.equal(model[0].inner.weight, workload.model[0].inner.weight)
    assert torch.equal(model[1].inner.weight, workload.model[2].inner.weight)
    assert len(workload.model) == 4


class Chain(nn.Module):
    """Blocks 0 and 1 undo one another: each alone is missed badly, both together not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Add(0.0), Add(0.0), Add(0.3, 3)])
        self.blocks[0].inner.weight.data = 2.0 * torch.eye(8)
        self.blocks[1].inner.weight.data = -2.0 / 3.0 * torch.eye(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_damage_is_measured_anew_after_every_removal() -> None:
    net = Chain().eval()
    with torch.no_grad():
        alone = damage([without(net, [Block("blocks", "0")])(X)], [net(X)])
        both = damage([without(net, [Block("blocks", "0"), Block("blocks", "1")])(X)], [net(X)])
    assert both < 1e-10 < 0.1 < alone
    workload = made(net)
    # 2 alone is missed less than 0 or 1 alone; once 0 is gone, 1 is in the way
    assert [b.name for b in least_missed(net, list(blocks(net))[:2], 2, workload)] == ["blocks.0", "blocks.1"]


def test_idle_blocks_go_for_nothing_and_busy_ones_do_not() -> None:
    workload = made(nn.Sequential(Add(0.6, 1), Add(0.01, 2), Add(0.01, 3), Add(0.6, 4)))
    dropped, _ = compress_model(Recipe((DropLayers(share=0.5),), "torch"), workload)
    with torch.no_grad():
        assert damage([dropped(X)], [workload.model(X)]) < 0.01
    busy = made(nn.Sequential(*(Add(0.6, seed) for seed in range(4))))
    lost, _ = compress_model(Recipe((DropLayers(share=0.5),), "torch"), busy)
    with torch.no_grad():
        assert damage([lost(X)], [busy.model(X)]) > 0.1


class Needs(nn.Module):
    """Its second block makes four features of eight, so neither it nor what follows runs without it."""

    def __init__(self) -> None:
        super().__init__()
        wide, narrow = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 4))
        self.blocks = nn.ModuleList([Wrap(wide), Wrap(narrow)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Wrap(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_block_that_the_network_needs_is_left_and_named() -> None:
    _, coverage = compress_model(Recipe((DropLayers(share=0.9),), "torch"), made(Needs()))
    assert coverage.done == [("blocks.0", "removed")]
    ((name, why),) = coverage.left
    assert name == "blocks.1" and why.startswith("without it the network raises RuntimeError: mat1 and mat2 shapes")


class Picky(nn.Module):
    """Runs with so many blocks or more, and returns a column less with each one that is gone, if it is told to."""

    def __init__(self, fewest: int, narrower: bool = False) -> None:
        super().__init__()
        self.fewest, self.narrower = fewest, narrower
        self.blocks = nn.ModuleList(Add(0.1 * seed, seed) for seed in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.blocks) < self.fewest:
            raise ValueError(f"{len(self.blocks)} blocks are too few")
        for block in self.blocks:
            x = block(x)
        return x[:, : 5 + len(self.blocks)] if self.narrower else x


def test_why_no_block_can_go_is_said() -> None:
    refusal = r"'blocks\.0' the network raises ValueError: 2 blocks are too few; .*Leave this step out"
    with pytest.raises(LayerError, match=refusal):
        compress_model(Recipe((DropLayers(),), "torch"), made(Picky(3)))
    with pytest.raises(LayerError, match=r"returns shapes \[\(2, 7\)\] instead of \[\(2, 8\)\]"):
        compress_model(Recipe((DropLayers(),), "torch"), made(Picky(0, narrower=True)))


def test_blocks_that_cannot_go_together_are_named_with_the_reason() -> None:
    _, coverage = compress_model(Recipe((DropLayers(share=0.9),), "torch"), made(Picky(2)))
    assert coverage.done == [("blocks.0", "removed")]
    why = "without it and 'blocks.0' the network raises ValueError: 1 blocks are too few"
    assert coverage.left == [("blocks.1", why), ("blocks.2", why)]


def test_networks_without_alike_blocks_are_refused() -> None:
    with pytest.raises(LayerError, match="no block of Sequential that drop_layers can remove"):
        compress_model(Recipe((DropLayers(),), "torch"), made(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))))


def test_where_chooses_blocks() -> None:
    workload = made(nn.Sequential(Add(0.1, 1), Add(0.05, 2), Add(0.2, 3)))
    _, coverage = compress_model(Recipe((DropLayers(share=0.1, where="!1"),), "torch"), workload)
    assert coverage.done == [("0", "removed")] and [layer for layer, _ in coverage.left] == ["2"]


def test_channels_can_go_afterwards() -> None:
    workload = made(nn.Sequential(*(Pair(seed) for seed in range(3)), nn.Linear(8, 2)))
    before = copy.deepcopy(workload.model)
    model, _ = compress_model(Recipe((DropLayers(share=0.3), PruneChannels(share=0.3)), "torch"), workload)
    count = sum(p.numel() for p in model.parameters())
    assert len(model) == 3 and count < sum(p.numel() for p in before.parameters()) * 2 / 3


class Pair(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))
