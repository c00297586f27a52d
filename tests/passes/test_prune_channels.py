"""Channel pruning: what goes is what the outputs miss least, and what is left is an ordinary, narrower network."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.coupling import groups
from featherweight.errors import LayerError, RecipeError, WorkloadError
from featherweight.passes.prune_channels import (
    EXAMPLES,
    TOGETHER,
    PruneChannels,
    Ranking,
    alone,
    apart,
    batch_norm_scale,
    edges,
    global_removals,
    magnitude,
    noisy_loss,
    per_index,
    taylor,
    uniform_removals,
)
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import Coverage, recording
from featherweight.testing import networks
from featherweight.workload import Batch, Workload, call, outputs
from tests import gratings

DRAWS = EXAMPLES / TOGETHER


def workload_of(model: nn.Module, batches: list[Batch]) -> Workload:
    return Workload(model.eval(), batches[0], batches, lambda predict: 0.0)


def pruned(workload: Workload, **settings) -> tuple[nn.Module, Coverage]:
    with recording() as coverage:
        model = PruneChannels(**settings).apply(copy.deepcopy(workload.model), workload)
    return model, coverage


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def result(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return outputs(call(model, batch))[0]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rows(width: int = 16, count: int = 128) -> list[Batch]:
    return [(part,) for part in torch.randn(count, width).split(32)]


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6)).eval()


def free(model: nn.Module, example: Batch) -> list:
    return [group for group in groups(model, example) if group.frozen is None]


# ------------------------------------------------------------------------------------------------ mathematics


def test_sums_per_index():
    x = torch.randn(3, 4, 5)
    assert np.allclose(per_index(x, 1), x.sum((0, 2)).numpy(), atol=1e-5)


def test_noise_weighs_all_outputs_alike():
    small, large = torch.randn(2000), 1e3 * torch.randn(2000)
    rng = torch.Generator().manual_seed(1)
    draws = [[noisy_loss([x], rng).item() for _ in range(200)] for x in (small, large)]
    assert 0.8 < np.std(draws[0]) / np.std(draws[1]) < 1.25


def test_widths_stay_multiples():
    for units in (5, 16, 20, 64):
        for step in (1, 8, 16):
            left = [units - gone for gone in edges(units, step)]
            assert left[0] == units and min(left) > 0
            assert all(kept % step == 0 for kept in left[1:])


def test_uniform_takes_the_share_of_each_group_or_less():
    assert uniform_removals([64, 48, 4], [8, 8, 8], 0.3) == [16, 8, 0]
    assert uniform_removals([64, 48, 4], [1, 1, 1], 0.25) == [16, 12, 1]


def test_global_takes_what_matters_least_for_its_cost():
    scores = np.array([4.0, 1.0, 3.0, 2.0]), np.array([2.0, 2.0, 2.0, 2.0])
    harms = [apart(values).harm for values in scores]
    assert global_removals(harms, [1.0, 1.0], [1, 1], 0.25) == [2, 0]
    assert global_removals(harms, [1.0, 8.0], [1, 1], 8 / 36) == [0, 1]
    assert global_removals(harms, [1.0, 1.0], [1, 1], 0.9) == [3, 3]  # one of each stays
    assert global_removals(harms, [1.0, 1.0], [1, 1], 0.0) == [0, 0]


def test_global_goes_over_a_hump_where_what_lies_behind_pays():
    hump, plain = np.array([0.0, 3.0, 3.0, 3.0, 9.0]), np.array([0.0, 2.0, 4.0, 6.0, 8.0])
    assert global_removals([hump, plain], [1.0, 1.0], [1, 1], 3 / 8) == [3, 0]


def test_taylor_is_the_squared_change_of_the_outputs():
    """Outputs are linear in what reads the units, so the estimate must agree with the removal of each."""
    model, batches = two_layers(), rows()
    (group,) = free(model, batches[0])
    hidden = torch.relu(model[0](torch.cat([x for (x,) in batches])))
    change = (hidden.square().sum(0) * model[2].weight.square().sum(0)).detach().numpy()
    (effects,) = taylor(model, [group], batches, 1)
    ratio = np.square(effects).sum(0) / change
    assert ratio.std() / ratio.mean() < 3 * (2 / DRAWS) ** 0.5  # squared normal draws, of sizes that differ


def test_effects_that_are_summed_before_the_square_are_the_change_without_all_of_them():
    model, batches = two_layers(), rows()
    (group,) = free(model, batches[0])
    (effects,) = taylor(model, [group], batches, 1)
    with torch.no_grad():
        hidden = torch.relu(model[0](torch.cat([x for (x,) in batches]))).split(TOGETHER)
        moved = [(h[:, :16] @ model[2].weight[:, :16].T).square().sum() / model[2](h).square().mean() for h in hidden]
    change = sum(moved).item()  # noise comes in units of each draw's outputs
    assert np.square(effects[:, :16].sum(1)).sum() == pytest.approx(change, rel=3 * (2 / DRAWS) ** 0.5)


def test_magnitude_is_the_norm_of_what_makes_a_unit_times_that_of_what_reads_it():
    model = two_layers()
    (group,) = free(model, rows()[0])
    (found,) = magnitude(model, [group])
    wanted = model[0].weight.norm(dim=1) * model[2].weight.norm(dim=0)
    assert np.allclose(found / group.macs, wanted.detach().numpy(), rtol=1e-5)


def test_a_batch_norm_says_how_strongly_a_unit_is_made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 6)).eval()
    nn.init.uniform_(model[1].weight, -2.0, 2.0)
    (group,) = free(model, rows()[0])
    (found,) = magnitude(model, [group])
    wanted = model[1].weight.abs() * model[3].weight.norm(dim=0)
    assert np.allclose(found / group.macs, wanted.detach().numpy(), rtol=1e-5)


def test_batch_norm_scale_is_the_mean_over_the_norms_on_a_unit():
    model, example = networks()["residual"].model, networks()["residual"].example
    (stem, both) = (group for group in free(model, example) if group.name in ("stem.0", "conv2 + shortcut.0"))
    found = batch_norm_scale(model, [stem, both])
    scales = model.bn2.weight.abs() + model.shortcut[1].weight.abs()
    assert np.allclose(found[0] / stem.macs, model.stem[1].weight.detach().abs().numpy())
    assert np.allclose(found[1] / both.macs, (scales / 2).detach().numpy())


def test_random_draws_anew_under_another_seed_and_the_same_under_the_same():
    workload = workload_of(two_layers(), rows())

    def kept(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return pruned(workload, share=0.5, importance="random")[0][0].weight

    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))


# ------------------------------------------------------------------------------------------------ what it is for


def trained() -> tuple[nn.Module, list[Batch]]:
    """A network that has learnt to tell which of four directions a row points in."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    directions = torch.randn(16, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        x = torch.randn(128, 16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x @ directions).argmax(1)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), rows(count=256)


def disguised(model: nn.Module) -> nn.Module:
    """The same function, but half the units are made ten times as strong and read as much more weakly."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for made, read in ((model[0], model[2]), (model[2], model[4])):
            strength = torch.where(torch.arange(64) % 2 == 0, 10.0, 1.0)
            made.weight *= strength[:, None]
            made.bias *= strength
            read.weight /= strength
    return model


def harm(workload: Workload, model: nn.Module) -> float:
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(9))
    before, after = result(workload.model, (x,)), result(model, (x,))
    return float((before - after).square().sum() / before.square().sum())


@pytest.mark.parametrize(("importance", "off"), [("taylor", 1e-3), ("magnitude", 0.3)])
def test_what_is_made_strongly_and_read_weakly_counts_as_before(importance: str, off: float):
    """By norms nearly so: those of one layer's rows change with what was done to its columns."""
    model, batches = trained()
    plain, hidden = workload_of(model, batches), workload_of(disguised(model), batches)
    settings = {"share": 0.2, "allocation": "uniform", "importance": importance}
    one, other = (harm(w, pruned(w, **settings)[0]) for w in (plain, hidden))
    assert other == pytest.approx(one, rel=off)  # it is the same function, and the same units go


def silenced(model: nn.Module) -> nn.Module:
    """The same function, beside units that are made and read strongly and never pass their ReLU."""
    wide = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        for layer, old in zip((wide[0], wide[2], wide[4]), (model[0], model[2], model[4]), strict=True):
            rows, columns = old.weight.shape
            layer.weight[:rows, :columns], layer.bias[:rows] = old.weight, old.bias
        wide[0].weight[64:], wide[0].bias[64:] = 1.0, -1e3
        wide[2].weight[:, 64:] = 1.0
    return wide


def test_taylor_sees_that_strong_weights_pass_nothing_on_and_magnitude_does_not():
    model, batches = trained()
    plain, idle = workload_of(model, batches), workload_of(silenced(model), batches)
    settings = {"share": 1 / 3, "allocation": "uniform", "where": "0"}
    by_taylor, by_norm = (harm(idle, pruned(idle, importance=i, **settings)[0]) for i in ("taylor", "magnitude"))
    assert by_taylor < 1e-6 < 0.01 < by_norm
    settings = {"share": 0.2, "allocation": "uniform"}
    by_taylor, by_norm = (harm(plain, pruned(plain, importance=i, **settings)[0]) for i in ("taylor", "magnitude"))
    assert by_taylor < 1.5 * by_norm  # where all pass something on, norms do about as well: they cost no gradient


def test_what_goes_matters_less_than_what_stays(monkeypatch: pytest.MonkeyPatch):
    workload = workload_of(*trained())
    least = harm(workload, pruned(workload, share=0.2)[0])
    turned = "featherweight.passes.prune_channels.alone"
    monkeypatch.setattr(turned, lambda effects: Ranking(alone(effects).order[::-1], alone(effects).harm))
    assert least < 0.3 * harm(workload, pruned(workload, share=0.2)[0])


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_units_chosen_together_harm_less_than_units_chosen_one_by_one(allocation: str):
    """Channels after a ReLU all push the same way, so that those which hardly matter alone can matter together."""
    workload, (x, _) = gratings.workload(), gratings.gratings(400, seed=9)
    before = result(workload.model, (x,))

    def change(importance: str) -> float:
        after = result(pruned(workload, share=0.3, multiple=1, allocation=allocation, importance=importance)[0], (x,))
        return float((after - before).square().mean() / before.var())

    assert change("joint") < 0.7 * change("taylor")


def test_one_competition_harms_less_than_a_quota_for_each_layer():
    """The second layer is far wider than its rank: it can spare much more than the first."""
    model, batches = trained()
    with torch.no_grad():
        model[2].weight[8:], model[2].bias[8:] = 1e-3 * model[2].weight[8:], 0.0
    workload = workload_of(model, batches)
    one, quota = (pruned(workload, share=0.4, allocation=a)[0] for a in ("global", "uniform"))
    assert harm(workload, one) < 0.5 * harm(workload, quota)
    assert one[2].out_features < one[0].out_features


@cache
def slimmed() -> tuple[nn.Module, list[Batch]]:
    """The same task learnt with batch norms and a penalty on their scales, as network slimming trains."""
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(64), nn.BatchNorm1d(64)
    layers = nn.Linear(16, 64), norms[0], nn.ReLU(), nn.Linear(64, 64), norms[1], nn.ReLU(), nn.Linear(64, 4)
    model, directions = nn.Sequential(*layers), torch.randn(16, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        x = torch.randn(128, 16)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), (x @ directions).argmax(1))
        (loss + 3e-3 * sum(norm.weight.abs().sum() for norm in norms)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), rows(count=256)


def harm_by(workload: Workload, importance: str, **settings) -> float:
    return harm(workload, pruned(workload, importance=importance, **settings)[0])


@pytest.mark.parametrize(
    ("learnt", "allocation", "informed"),
    [
        (trained, "global", ["taylor", "joint"]),  # by magnitude layers of other widths do not compete on equal terms
        (trained, "uniform", ["taylor", "joint", "magnitude"]),
        (slimmed, "global", ["joint", "batchnorm", "magnitude"]),
        (slimmed, "uniform", ["joint", "batchnorm", "magnitude"]),
    ],
)
def test_informed_importance_beats_random(learnt, allocation: str, informed: list[str]):
    workload = workload_of(*learnt())
    settings = {"share": 0.3, "allocation": allocation}
    control = [harm_by(workload, "random", **settings) for _ in range(3)]
    for importance in informed:
        assert harm_by(workload, importance, **settings) < 0.8 * min(control)


def test_norms_of_layers_of_other_widths_do_not_compete_on_equal_terms():
    workload = workload_of(*trained())
    one, quota = (harm_by(workload, "magnitude", share=0.3, allocation=a) for a in ("global", "uniform"))
    assert one > 2 * quota


@pytest.mark.parametrize("importance", ["joint", "batchnorm"])
def test_one_competition_harms_less_in_a_network_as_it_was_trained(importance: str):
    workload = workload_of(*slimmed())
    one, quota = (harm_by(workload, importance, share=0.4, allocation=a) for a in ("global", "uniform"))
    assert one < 0.75 * quota


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
@pytest.mark.parametrize("name", list(networks()))
def test_networks_get_smaller_by_about_what_was_asked(name: str, importance: str):
    workload = networks()[name]
    small, coverage = pruned(workload, share=0.5, importance=importance, multiple=1)
    assert result(small, workload.example).shape == result(workload.model, workload.example).shape
    arithmetic = [sum(g.macs * len(g) for g in free(m, workload.example)) for m in (workload.model, small)]
    assert 0.1 < arithmetic[1] / arithmetic[0] < 0.7
    assert coverage.done and all(" -> " in what for _, what in coverage.done)
    assert ("head" if name != "mlp" else "4", "is an output of the network") in coverage.left


# ------------------------------------------------------------------------------------------------ widths, layers


def test_widths_are_multiples_and_heads_stay_whole():
    model, coverage = pruned(networks()["transformer"], share=0.5, allocation="uniform", multiple=16)
    assert all(block.up.out_features == 32 and block.query.out_features == 16 for block in model.blocks)
    assert {("blocks.0.query", "2 -> 1 heads"), ("blocks.1.query", "2 -> 1 heads")} <= set(coverage.done)


def test_a_multiple_that_is_too_wide_for_a_layer_is_halved():
    model, coverage = pruned(networks()["residual"], share=0.3, multiple=32, where="stem.0")
    assert ("stem.0", "16 -> 8 channels") in coverage.done
    assert size(model) < size(networks()["residual"].model)


def test_what_is_not_cut_because_it_matters_is_said():
    model = two_layers()
    with torch.no_grad():
        model[2].weight *= 100
    both = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), *model).eval()
    with torch.no_grad():
        both[2].weight[:8] = 0.0
    _, coverage = pruned(workload_of(both, rows()), share=0.05)
    assert {what for _, what in coverage.left} >= {"matters too much for the share that was asked for"}


def test_where_chooses_groups_and_what_hangs_outside_stays():
    workload = networks()["residual"]
    model, coverage = pruned(workload, where="conv*", share=0.5)
    assert model.stem[0].out_channels == 16 and model.conv1.out_channels < 32 and model.conv2.out_channels == 32
    assert (
        "conv2",
        "hangs together with 'shortcut.0', which where='conv*' leaves out",
    ) in coverage.left


@pytest.mark.parametrize("where", ["nothing", "head"])
def test_nothing_to_cut_is_an_error_that_lists_what_can_be(where: str):
    with pytest.raises(LayerError) as error:
        pruned(networks()["residual"], where=where)
    for part in (f"where='{where}'", "prune_channels", "Channels can go from: stem.0, conv1, conv2 + shortcut.0"):
        assert part in str(error.value)
    assert ("head is an output of the network" in str(error.value)) == (where == "head")


def test_what_has_no_batch_norm_is_left_by_its_importance():
    layers = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), *two_layers()
    model, coverage = pruned(workload_of(nn.Sequential(*layers), rows()), share=0.5, importance="batchnorm")
    assert (model[0].out_features, model[3].out_features) == (8, 32)
    assert ("3", "has no batch norm, which importance batchnorm reads: taylor and magnitude need none") in coverage.left
    with pytest.raises(
        LayerError, match=r"0 has no batch norm, .*: taylor and magnitude need none; 2 is .*\. Leave this"
    ):
        pruned(workload_of(two_layers(), rows()), importance="batchnorm")


class Products(nn.Module):
    """Attention written out: no layer reads queries and keys, they meet each other."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(16, width) for width in (16, 16, 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).transpose(1, 2) / 4).softmax(-1)
        return self.head((weights @ self.value(x)).mean(1))


@pytest.mark.parametrize("importance", ["taylor", "magnitude", "random"])
def test_features_that_no_layer_reads_can_go(importance: str):
    batches = [(x,) for x in torch.randn(4, 8, 5, 16)]
    model, _ = pruned(workload_of(Products(), batches), share=0.5, importance=importance, allocation="uniform")
    assert (model.query.out_features, model.key.out_features, model.value.out_features) == (8, 8, 8)


class Fixed(nn.Module):
    """One width is written into the code, the others are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.d(torch.relu(self.c(x.reshape(x.shape[0], 2, 8).flatten(1))))


def test_a_group_that_cannot_be_cut_after_all_is_left_and_the_others_give_more():
    workload = workload_of(Fixed(), rows())
    model, coverage = pruned(workload, share=0.5, allocation="uniform")
    assert (model.a.out_features, model.b.out_features, model.c.out_features) == (8, 16, 8)
    (why,) = [why for layer, why in coverage.left if layer == "b"]
    assert why.startswith("its forward fixes the width: RuntimeError: shape '[32, 2, 8]' is invalid")
    assert result(model, workload.example).shape == (32, 16)


# ------------------------------------------------------------------------------------------------ manners


def test_it_leaves_no_traces():
    workload = networks()["depthwise"]
    model = copy.deepcopy(workload.model)
    model.head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    small = PruneChannels(share=0.5).apply(model, workload)
    assert torch.equal(torch.get_rng_state(), state)
    for net in (small, workload.model):
        assert all(p.grad is None for p in net.parameters())
    assert not small.head.weight.requires_grad and small.narrow[0].weight.requires_grad
    assert not any(module.training for module in small.modules())


def test_it_works_where_gradients_are_off_and_repeats_itself():
    workload = networks()["residual"]
    with torch.no_grad():
        a, b = (pruned(workload, share=0.4)[0].state_dict() for _ in range(2))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_importance_is_measured_on_a_bounded_number_of_examples():
    seen = []
    model = two_layers()
    (group,) = free(model, rows()[0])
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    taylor(model, [group], rows(count=1000), 1)
    assert sum(seen) == EXAMPLES


def test_after_quantization_it_is_refused():
    workload = networks()["mlp"]
    model = QuantizeWeights().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"int.*prune_channels, come before .* such as quantize_static"):
        PruneChannels().apply(model, workload)


class Says(nn.Module):
    """Two layers whose logits are put through `last`."""

    def __init__(self, last):
        super().__init__()
        self.net, self.last = two_layers(), last

    def forward(self, x):
        return self.last(self.net(x))


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (lambda y: y.argmax(-1), "the model's 1 outputs are whole numbers"),
        (lambda y: y.detach(), "the model's forward cuts its outputs off from its weights"),
    ],
)
def test_outputs_without_a_gradient_say_what_to_do(last, why):
    workload = workload_of(Says(last), rows())
    with pytest.raises(WorkloadError, match=f"{why}.*Return logits .*, or set importance: magnitude"):
        PruneChannels().apply(copy.deepcopy(workload.model), workload)
    assert size(pruned(workload, importance="magnitude")[0]) < size(workload.model)


def test_weights_that_nothing_reads_say_what_to_do():
    model, batches = two_layers(), rows()
    with pytest.raises(WorkloadError, match=r"no layer's weights read the channels.*set importance: magnitude"):
        taylor(model, [], batches, 1)


def test_features_that_no_weight_reads_are_judged_by_those_that_make_them():
    batches: list[Batch] = [(torch.randn(32, 6, 16),) for _ in range(4)]
    model, coverage = pruned(workload_of(Products(), batches), share=0.5, allocation="uniform")
    assert ("query", "16 -> 8 features") in coverage.done
    assert model.query.weight.shape == model.key.weight.shape == (8, 16)
