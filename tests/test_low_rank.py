"""Ranks by energy, and layers that are made from tensors and the likeness of others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featherweight.low_rank import convolution, embedding, in_a_row, linear, pointwise, rank_for_energy, rounded_up


def test_a_larger_share_never_takes_a_smaller_rank() -> None:
    values = torch.linalg.svdvals(torch.randn(30, 40))
    ranks = [rank_for_energy(values, share / 50) for share in range(1, 51)]
    assert ranks == sorted(ranks) and ranks[0] < ranks[25] < ranks[-1] == 30


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_the_rank_is_the_smallest_that_keeps_the_share(share: float) -> None:
    values = torch.linalg.svdvals(torch.randn(20, 25, dtype=torch.float64))
    rank, energy = rank_for_energy(values, share), values.square()
    assert energy[:rank].sum() >= share * energy.sum() > energy[: rank - 1].sum()


def test_groups_have_one_rank_by_their_energy_together() -> None:
    values = torch.tensor([[10.0, 0.0, 0.0], [1.0, 1.0, 1.0]])  # 103 in all, 101 in the first place
    assert [rank_for_energy(values, share) for share in (101 / 103, 102 / 103, 1.0)] == [1, 2, 3]


def test_a_share_of_one_is_blind_to_rounding_errors() -> None:
    exact = torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 30, dtype=torch.float64)
    assert rank_for_energy(torch.linalg.svdvals(exact.float().double()), 1.0) == 5


def test_nothing_at_all_has_rank_one() -> None:
    assert rank_for_energy(torch.zeros(4), 0.5) == 1


def test_ranks_are_rounded_up_only_where_there_is_room() -> None:
    assert [rounded_up(rank, 8, most=16) for rank in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 17]


@pytest.mark.parametrize("trained", [True, False])
def test_layers_take_after_the_one_they_stand_for(trained: bool) -> None:
    like = nn.Conv2d(8, 6, (3, 5), stride=2, padding=(1, 4), dilation=(1, 2), groups=2, padding_mode="circular")
    like.double().eval().requires_grad_(trained)
    row = in_a_row(like, convolution(like, torch.randn(4, 4, 3, 5)), pointwise(like, torch.randn(6, 2), like.bias))
    x = torch.randn(3, 8, 9, 11, dtype=torch.float64)
    assert row(x).shape == like(x).shape
    assert row[1].bias is like.bias
    assert all(p.dtype == torch.float64 and p.requires_grad == trained for p in row.parameters())
    assert not any(module.training for module in row.modules())


def test_layers_hold_the_tensors_that_they_are_given() -> None:
    like, weight, bias = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4)
    x = torch.randn(5, 3)
    torch.testing.assert_close(linear(like, weight, bias)(x), x @ weight.T + bias)
    table = torch.randn(6, 2)
    found = embedding(nn.Embedding(6, 3, padding_idx=1), table)
    assert found.padding_idx == 1 and torch.equal(found(torch.arange(6)), table)
