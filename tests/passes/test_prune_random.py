"""Random pruning: as much goes as anywhere else, chance alone says what, and everything that looks does better."""

import pytest
import torch
from torch import nn

from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.prune_random import PruneRandom
from featherweight.passes.prune_sparsegpt import PruneSparsegpt
from featherweight.passes.prune_wanda import PruneWanda
from featherweight.recipe import Recipe, compress_model
from featherweight.workload import Workload
from tests import loud

SEEDS = range(5)


def total_error(workload, step, seed=0) -> float:
    model, _ = compress_model(Recipe((step,), "torch"), workload, seed)
    return sum(loud.output_errors(workload.model, model, workload.calibration).values())


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_it_loses_to_all_that_look(pattern):
    for seed in SEEDS:
        workload = loud.workload(seed)
        chance = total_error(workload, PruneRandom(pattern=pattern))
        for kind in (PruneMagnitude, PruneWanda, PruneSparsegpt):
            assert total_error(workload, kind(pattern=pattern)) < chance


def square() -> Workload:
    x = torch.randn(4, 64)
    return Workload(nn.Sequential(nn.Linear(64, 64)).eval(), (x,), [(x,)], lambda predict: 0.0)


def test_the_seed_alone_says_what_goes():
    workload = square()
    kept = [compress_model(Recipe((PruneRandom(),), "torch"), workload, seed)[0][0].weight != 0 for seed in (3, 3, 4)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    workload.model[0].weight.data = workload.model[0].weight.flip(0, 1)
    again, _ = compress_model(Recipe((PruneRandom(),), "torch"), workload, 3)
    assert torch.equal(again[0].weight != 0, kept[0])


def test_large_weights_go_as_often_as_small_ones():
    workload = square()
    size = workload.model[0].weight.abs()
    gone = [compress_model(Recipe((PruneRandom(),), "torch"), workload, seed)[0][0].weight == 0 for seed in range(20)]
    large = size > size.median()
    assert abs(float(torch.stack(gone)[:, large].float().mean()) - 0.5) < 0.02
    assert all(int(zero.sum()) == 64 * 32 for zero in gone)
