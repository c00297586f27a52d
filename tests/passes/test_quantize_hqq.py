"""HQQ: nearer than the grid it starts from, and without data; further than a grid of the least squared error."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.encodings import on_grid, spanning_grid
from featherweight.errors import RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_hqq import QuantizeHqq, half_quadratic, shrink
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording
from featherweight.testing import check_export, networks
from featherweight.workload import Workload


def heavy_tailed(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return 0.02 * torch.distributions.StudentT(3.0).sample((64, 256))


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model.eval(), (x,), [(x,)], lambda predict: 0.0)


def off(step: QuantizeHqq | QuantizeWeights, weight: torch.Tensor) -> float:
    """Mean of (ŵ − w)²."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight.clone()
    rounded = step.apply(model, workload_of(copy.deepcopy(model), torch.randn(2, weight.shape[1])))
    return float((rounded[0].weight - weight).square().mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_nearer_than_the_grid_that_spans_all_and_further_than_that_of_least_squares(bits, seed):
    weight = heavy_tailed(seed)
    spanning = off(QuantizeWeights(bits=bits, block=64, offset=True, search=False), weight)
    closest = off(QuantizeWeights(bits=bits, block=64, offset=True), weight)
    assert closest < off(QuantizeHqq(bits=bits, block=64), weight) < spanning


def test_weights_halfway_between_two_codes_pull_less():
    rows = torch.tensor([[0.0, 15.0, 3.0, 4.0, 7.0, 8.0, 10.49]])
    mean = spanning_grid(rows, 4)
    for _ in range(10):  # without splitting the offset is the mean of all that is missed
        mean[:, 1] += (rows - on_grid(rows, mean, 4)).mean(1)
    (found,) = half_quadratic(rows, 4, 0.7)
    assert 0 < float(found[1]) - 8 < 0.8 * (float(mean[0, 1]) - 8)


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


def test_scales_span_the_row_and_offsets_move_little():
    rows = heavy_tailed(1)
    start, found = spanning_grid(rows, 4), half_quadratic(rows, 4, 0.7)
    assert torch.equal(found[:, 0], start[:, 0])
    moved = (found[:, 1] - start[:, 1]).abs() / start[:, 0]
    assert float(moved.mean()) > 0 and float(moved.max()) < 0.5


def test_the_size_of_weights_makes_no_difference():
    rows = heavy_tailed(2)
    found = [half_quadratic(k * rows, 4, 0.7) for k in (1.0, 1024.0)]
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
@pytest.mark.parametrize("bits", [3, 2])
def test_every_target_runs_it(target, bits, tmp_path):
    workload = networks()["transformer"]
    rounded = QuantizeHqq(bits=bits).apply(copy.deepcopy(workload.model), workload)
    check_export(targets.find(target), rounded, workload, tmp_path)


def test_what_is_rounded_already_is_refused():
    workload = networks()["mlp"]
    once = QuantizeHqq().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"quantize_hqq would quantize '0', which an earlier step .* where: '!0'"):
        QuantizeHqq().apply(once, workload)
