"""Importance turned into masks: how much goes, from where, and what does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.errors import SettingError
from featherweight.masks import (
    BLOCK,
    check_share,
    choose,
    largest,
    largest_blocks,
    largest_of_all,
    largest_of_each,
    largest_of_rows,
    misfit,
)

SHARES = st.floats(0.0, 0.99)


def importances(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 9), st.integers(1, 9), SHARES)
def test_a_tensor_or_each_row_gives_exactly_its_share(rows, columns, share):
    importance = importances(rows, columns)
    assert int((~largest(importance, share)).sum()) == int(share * rows * columns)
    by_row = largest_of_rows(importance, share)
    assert ((~by_row).sum(1) == int(share * columns)).all()
    for values, kept in zip(importance, by_row, strict=True):
        assert kept.all() or values[kept].min() >= values[~kept].max()


def test_equal_importance_gives_its_share_too():
    assert int((~largest(torch.ones(10), 0.5)).sum()) == 5


def test_one_competition_for_all_is_that_of_one_tensor():
    whole = importances(30)
    parts = largest_of_all([whole[:12].view(3, 4), whole[12:]], 0.4)
    assert torch.equal(torch.cat([part.flatten() for part in parts]), largest(whole, 0.4))
    assert [part.shape for part in parts] == [(3, 4), (18,)]
    assert largest_of_all([], 0.4) == []


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8)])
def test_n_of_every_m_are_kept_and_are_the_largest(kept, of):
    importance = importances(5, 24)
    mask = largest_of_each(importance, kept, of)
    for values, chosen in zip(importance.view(-1, of), mask.view(-1, of), strict=True):
        assert int(chosen.sum()) == kept
        assert values[chosen].min() >= values[~chosen].max()


def test_eight_weights_leave_more_choice_than_four():
    importance = importances(64, 64)
    four, eight = (importance[largest_of_each(importance, n // 2, n)].sum() for n in (4, 8))
    assert four < eight < importance[largest_of_rows(importance, 0.5)].sum()


def test_a_row_is_as_long_as_its_kernels_say():
    importance = importances(4, 2, 2, 2)
    assert torch.equal(choose(importance, "2:4", 0.5).flatten(1), largest_of_each(importance.flatten(1), 2, 4))
    assert choose(importance, "free", 0.5, by_row=True).flatten(1).sum(1).tolist() == [4] * 4
    assert int(choose(importance, "free", 0.5).sum()) == 16


@given(st.integers(2, 5), st.integers(2, 5), SHARES)
def test_blocks_go_whole_and_what_is_left_over_stays(down, across, share):
    importance = importances(2 * down + 1, 2 * across + 1)
    kept = largest_blocks(importance, share, size=2)
    assert kept[-1].all() and kept[:, -1].all()
    blocks = kept[:-1, :-1].reshape(down, 2, across, 2).sum((1, 3))
    assert set(blocks.flatten().tolist()) <= {0, 4}
    assert int((blocks == 0).sum()) == int(share * down * across)


def test_the_block_of_the_smallest_norm_goes_not_that_of_the_smallest_weight():
    importance = torch.ones(BLOCK, 2 * BLOCK)
    importance[:, BLOCK:] = 0.5
    importance[0, 0] = 0.0
    kept = choose(importance, "blocks", 0.5)
    assert kept[:, :BLOCK].all() and not kept[:, BLOCK:].any()


@pytest.mark.parametrize(
    ("shape", "pattern", "why"),
    [
        ((8, 3), "2:4", "its rows hold 3 weights, which is no multiple of 4"),
        ((8, 1, 3, 3), "4:8", "its rows hold 9 weights, which is no multiple of 8"),
        ((16, 8, 3, 3), "blocks", "it is a matrix of 16 by 72, smaller than a block of 32 by 32"),
        ((32, 32), "blocks", ""),
        ((8, 4, 3, 3), "2:4", ""),
        ((1, 1), "free", ""),
    ],
)
def test_what_does_not_fit_is_said(shape, pattern, why):
    assert misfit(shape, pattern) == why


def test_a_share_beside_a_pattern_that_gives_it_is_refused():
    check_share("prune_it", "2:4", 0.5)
    check_share("prune_it", "free", 0.7)
    check_share("prune_it", "blocks", 0.7)
    with pytest.raises(SettingError, match=r"prune_it: share=0\.7 does not go with pattern='4:8', .* Leave share out"):
        check_share("prune_it", "4:8", 0.7)
