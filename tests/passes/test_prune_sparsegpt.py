"""SparseGPT: the nearest outputs of all, bought with worse weights; its update is the least-squares one."""

import copy

import pytest
import torch
from torch import nn

from featherweight.masks import largest
from featherweight.passes import prune_sparsegpt
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.prune_sparsegpt import PruneSparsegpt, inverse_factor, sparsegpt
from featherweight.passes.prune_wanda import PruneWanda
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import recording
from featherweight.workload import Workload
from tests import loud


def compressed(workload, step):
    return compress_model(Recipe((step,), "torch"), workload)[0]


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model.eval(), (x[:2],), [(x,)], lambda predict: 0.0)


# ------------------------------------------------------------------------------------------------ why it exists


@pytest.mark.parametrize("settings", [{}, {"share": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}], ids=str)
def test_nearer_outputs_and_worse_weights_than_without_correction(settings):
    for seed in range(5):
        workload = loud.workload(seed)
        models = [compressed(workload, kind(**settings)) for kind in (PruneSparsegpt, PruneWanda, PruneMagnitude)]
        seen = [loud.output_errors(workload.model, model, workload.calibration) for model in models]
        fresh = [(loud.images(128, seed=100 + seed),)]
        unseen = [loud.output_errors(workload.model, model, fresh) for model in models]
        weights = [loud.weight_errors(workload.model, model) for model in models]
        for name in seen[0]:
            if seen[0][name] == 0.0:  # a row that no pattern fits
                continue
            assert seen[0][name] < min(seen[1][name], seen[2][name])
            assert unseen[0][name] < min(unseen[1][name], unseen[2][name])
            assert weights[0][name] > weights[2][name]


def test_blocks_are_made_up_for_too():
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(512, 24) @ torch.randn(24, 96) + 0.3 * torch.randn(512, 96)
        workload = workload_of(nn.Sequential(nn.Linear(96, 128)), x)
        errors = [
            loud.output_errors(workload.model, compressed(workload, kind(pattern="blocks")), [(x,)])["0"]
            for kind in (PruneSparsegpt, PruneWanda, PruneMagnitude)
        ]
        assert errors[0] < 0.8 * min(errors[1:])


def test_it_learns_little_data_by_heart():
    """With fewer examples than inputs the correction is as good as perfect on them, and not on others."""
    torch.manual_seed(0)
    x = torch.randn(512, 128)
    workload = workload_of(nn.Sequential(nn.Linear(128, 64)), x[:32])
    model = compressed(workload, PruneSparsegpt(damping=1e-4))
    simple = compressed(workload, PruneWanda())
    seen, unseen = (loud.output_errors(workload.model, model, [(part,)])["0"] for part in (x[:32], x[32:]))
    assert seen < 0.3 * unseen
    assert unseen > loud.output_errors(workload.model, simple, [(x[32:],)])["0"]


# ------------------------------------------------------------------------------------------------ mathematics


def correlated(groups: int, width: int) -> torch.Tensor:
    """XᵀX of inputs that hang together, (groups, width, width)."""
    x = torch.randn(groups, 256, width).double() @ torch.randn(groups, width, width).double()
    return x.mT @ x


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = correlated(3, 20)
    factor = inverse_factor(hessian, damping=0.1)
    damped = hessian + 0.1 * hessian.diagonal(dim1=1, dim2=2).mean(1).view(3, 1, 1) * torch.eye(20)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.mT @ factor @ damped, torch.eye(20).double().expand(3, 20, 20))


@pytest.mark.parametrize("width", [40, 300])
def test_what_stays_is_the_least_squares_fit_where_all_that_goes_comes_first(width):
    """Then nothing that stays is fixed too early, and the corrections one by one add up to the best there is."""
    hessian, weight = correlated(2, width), torch.randn(2, 5, width).double()
    gone, stays = slice(0, width // 2), slice(width // 2, width)
    mask = torch.arange(width).expand(10, width) >= width // 2
    found, kept = sparsegpt(weight, inverse_factor(hessian, 0.01), lambda _: mask, span=width)
    damped = hessian + 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1).view(2, 1, 1) * torch.eye(width)
    best = weight[:, :, stays] + weight[:, :, gone] @ damped[:, gone, stays] @ damped[:, stays, stays].inverse()
    assert torch.equal(kept.flatten(0, 1), mask)
    torch.testing.assert_close(found[:, :, stays], best)


def test_it_is_magnitude_where_inputs_are_alike_and_unrelated():
    weight = torch.randn(1, 8, 40).double()
    factor = inverse_factor(7 * torch.eye(40).double().unsqueeze(0), 0.01)
    found, kept = sparsegpt(weight, factor, lambda importance: largest(importance, 0.5), span=128)
    assert torch.equal(kept[0], largest(weight[0].abs(), 0.5))
    torch.testing.assert_close(found * kept, weight * kept)


@pytest.mark.parametrize("span", [4, 128])
def test_zeros_stay_zero_though_corrections_reach_them(span):
    weight = torch.randn(1, 8, 256).double()
    zero = torch.rand(weight.shape) < 0.3
    weight[zero] = 0.0
    factor = inverse_factor(correlated(1, 256), 0.01)
    _, kept = sparsegpt(weight, factor, lambda importance: largest(importance, 0.25), span)
    assert not kept[zero].any()
    assert int((~kept).sum()) <= int(zero.sum()) + 0.1 * zero.numel()


def test_choosing_again_every_few_columns_sees_what_was_corrected():
    """In one go the second of two equal features looks as dispensable as the first, though it then bears both."""
    hessian = torch.ones(1, 4, 4).double() + 0.01 * torch.eye(4)
    weight = torch.tensor([[[1.0, 1.1, 1.0, 1.1]]]).double()
    shown = []

    def keep(importance):
        shown.append(importance)
        return largest(importance, 0.5)

    sparsegpt(weight, inverse_factor(hessian, 0.01), keep, span=2)
    late = shown[1]
    shown.clear()
    sparsegpt(weight, inverse_factor(hessian, 0.01), keep, span=4)
    assert (late > shown[0][:, 2:]).all()


def test_inputs_that_are_always_zero_break_nothing():
    workload = loud.workload(0)
    with torch.no_grad():
        workload.model.grouped.weight[:5] = 0.0
        workload.model.grouped.bias[:5] = -1.0  # five depthwise filters and five columns read nothing but zeros
    model = compressed(workload, PruneSparsegpt())
    assert all(torch.isfinite(layer.weight).all() for layer in model.modules() if isinstance(layer, loud.KINDS))
    errors = loud.output_errors(workload.model, model, workload.calibration)
    assert max(errors.values()) < 0.5
    silent = nn.Sequential(nn.Linear(8, 8))
    assert compressed(workload_of(silent, torch.zeros(4, 8)), PruneSparsegpt())[0].weight.isfinite().all()


# ------------------------------------------------------------------------------------------------ layers


def test_too_wide_layers_are_left(monkeypatch):
    monkeypatch.setattr(prune_sparsegpt, "WIDEST", 40)
    workload = loud.workload(0)
    with recording() as coverage:
        PruneSparsegpt().apply(copy.deepcopy(workload.model), workload)
    assert [name for name, _ in coverage.done] == ["grouped", "depthwise", "mixed", "up"]
    assert coverage.left == [("head", "its rows hold 64 weights, whose Hessian would take 0.0 GB")]


def test_more_damping_moves_less():
    workload = loud.workload(0)
    gentle, bold = (compressed(workload, PruneSparsegpt(damping=damping)) for damping in (1.0, 0.001))
    stayed = [model.up.weight.detach() for model in (gentle, bold)]
    moved = [float((weight - workload.model.up.weight.detach())[weight != 0].norm()) for weight in stayed]
    assert moved[0] < 0.7 * moved[1]
