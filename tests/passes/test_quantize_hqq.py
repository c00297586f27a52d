"""HQQ: closer to most weights than covering or least-squares scales where tails are heavy, and without data."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.encodings import affine_scale
from featherweight.errors import RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_hqq import QuantizeHqq, half_quadratic, norm_error, rounded, shrink
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording
from featherweight.testing import check_export, networks
from featherweight.workload import Workload


def heavy_tailed(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return 0.02 * torch.distributions.StudentT(3.0).sample((64, 256))


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model.eval(), (x,), [(x,)], lambda predict: 0.0)


def off(step: QuantizeHqq | QuantizeWeights, weight: torch.Tensor, norm: float) -> float:
    """Mean of |ŵ − w|^norm."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight.clone()
    rounded = step.apply(model, workload_of(copy.deepcopy(model), torch.randn(2, weight.shape[1])))
    return float((rounded[0].weight - weight).abs().pow(norm).mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_closer_to_most_weights_than_covering_and_searched_scales(bits, block, seed):
    weight = heavy_tailed(seed)
    covering = off(QuantizeWeights(bits=bits, block=block, search=False), weight, 0.7)
    searched = off(QuantizeWeights(bits=bits, block=block), weight, 0.7)
    found = off(QuantizeHqq(bits=bits, block=block), weight, 0.7)
    assert found < 0.95 * covering
    assert found < searched


def test_it_loses_in_squared_error_which_it_does_not_seek():
    weight = heavy_tailed(0)
    for offset in (True, False):
        found = off(QuantizeHqq(block=0, offset=offset), weight, 2.0)
        assert found > 1.02 * off(QuantizeWeights(bits=4, offset=offset), weight, 2.0)


@pytest.mark.parametrize("bits", [4, 3])
def test_offsets_bring_more_of_the_weights_closer(bits):
    weight = heavy_tailed(0)
    found = [off(QuantizeHqq(bits=bits, block=64, offset=offset), weight, 0.7) for offset in (True, False)]
    assert found[0] < 0.95 * found[1]


def test_pruned_weights_stay_zero():
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    rounded = QuantizeHqq().apply(pruned, workload)
    assert bool((rounded[0].weight[zero] == 0).all()) and encoding_of(rounded[0]).offset is None


def test_it_needs_no_data():
    workload = networks()["mlp"]
    blind = dataclasses.replace(workload, calibration=[], train=None)
    with_data, without = (QuantizeHqq().apply(copy.deepcopy(w.model), w) for w in (workload, blind))
    assert torch.equal(with_data[0].weight, without[0].weight)


def test_shrinking_is_near_the_least_of_what_it_stands_for():
    """Half-quadratic splitting asks for the e with the least |e|^p + β/2 (e − x)²; large values are met closely."""
    beta, norm = 10.0, 0.7
    for x in (0.02, 0.9, 3.0):
        grid = torch.linspace(0, 4, 40_001)
        best = float(grid[((grid.pow(norm) / norm) + beta / 2 * (grid - x) ** 2).argmin()])
        assert float(shrink(torch.tensor([x]), beta, norm)) == pytest.approx(best, abs=0.03)


def test_no_scale_is_worse_than_where_it_started():
    rows = heavy_tailed(1)
    start = affine_scale(rows, 4, 0).unsqueeze(1)
    found = half_quadratic(rows, start, None, 4, 0.5)[:, :1]
    before, after = (norm_error(rows - scale * rounded(rows, scale, 4), 0.5) for scale in (start, found))
    assert bool((after <= before).all())
    assert bool((after < before).float().mean() > 0.9)


def test_the_size_of_weights_makes_no_difference():
    rows = heavy_tailed(2)
    start = affine_scale(rows, 4, 0).unsqueeze(1)
    for offset in (None, 0.1 * start):
        found = [
            half_quadratic(k * rows, k * start, offset if offset is None else k * offset, 4, 0.7) for k in (1.0, 1024.0)
        ]
        torch.testing.assert_close(1024 * found[0], found[1])


def test_rows_of_zeros_and_of_one_weight():
    model = nn.Sequential(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 4))
    nn.init.zeros_(model[1].weight)
    with recording() as coverage:
        rounded = QuantizeHqq().apply(model, workload_of(copy.deepcopy(model), torch.randn(2, 1, 8)))
    assert bool((rounded[1].weight == 0).all())
    assert coverage.done == [("1", "int4 blocks of 16 with offsets")]
    assert coverage.left == [("0", "its rows hold one weight each: a scale would weigh more than it saves")]


def test_distillation_keeps_weights_on_the_grid():
    workload = networks()["mlp"]
    rounded = QuantizeHqq(bits=3).apply(copy.deepcopy(workload.model), workload)
    before, scale = rounded[0].weight.clone(), encoding_of(rounded[0]).scale.clone()
    trained = DistillSoft(epochs=3, lr=0.05).apply(rounded, workload)
    encoding = encoding_of(trained[0])
    assert torch.equal(encoding.scale, scale)
    assert torch.equal(encoding.project(trained[0].weight), trained[0].weight)
    assert not torch.equal(trained[0].weight, before)


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.parametrize(("bits", "offset"), [(3, True), (2, True), (3, False)])
def test_every_target_runs_it(target, bits, offset, tmp_path):
    workload = networks()["transformer"]
    rounded = QuantizeHqq(bits=bits, offset=offset).apply(copy.deepcopy(workload.model), workload)
    check_export(targets.find(target), rounded, workload, tmp_path)


def test_what_is_rounded_already_is_refused():
    workload = networks()["mlp"]
    once = QuantizeHqq().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"quantize_hqq would quantize '0', which an earlier step .* where: '!0'"):
        QuantizeHqq().apply(once, workload)
