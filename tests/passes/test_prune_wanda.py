"""Wanda: worse on weights, better on outputs than magnitude, wherever inputs differ in loudness."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.prune_random import PruneRandom
from featherweight.passes.prune_wanda import PruneWanda, importance, squares
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import encoding_of
from featherweight.workload import Workload
from tests import loud


def compressed(workload, step):
    return compress_model(Recipe((step,), "torch"), workload)[0]


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model.eval(), (x[:2],), [(x,)], lambda predict: 0.0)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_nearer_outputs_and_worse_weights_than_by_magnitude(share):
    for seed in range(5):
        workload = loud.workload(seed)
        ours, simple = (compressed(workload, kind(share=share)) for kind in (PruneWanda, PruneMagnitude))
        outputs = [loud.output_errors(workload.model, model, workload.calibration) for model in (ours, simple)]
        weights = [loud.weight_errors(workload.model, model) for model in (ours, simple)]
        assert outputs[0]["grouped"] < 0.7 * outputs[1]["grouped"]
        assert sum(outputs[0].values()) < sum(outputs[1].values())
        # The weights of a depthwise filter all read the same channel: there the norms tell nothing apart.
        assert all(weights[0][name] > weights[1][name] for name in weights[0] if name != "depthwise")


def test_nothing_is_gained_where_all_inputs_are_as_loud():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(256, 64), dim=0)
    workload = workload_of(nn.Sequential(nn.Linear(64, 64)), x)
    found = {kind: compressed(workload, kind()) for kind in (PruneWanda, PruneMagnitude, PruneRandom)}
    errors = {kind: loud.output_errors(workload.model, model, [(x,)])["0"] for kind, model in found.items()}
    assert errors[PruneWanda] == pytest.approx(errors[PruneMagnitude], rel=0.05)
    assert errors[PruneWanda] < 0.7 * errors[PruneRandom]


def test_each_row_gives_its_share():
    model = compressed(loud.workload(0), PruneWanda(share=0.4))
    for name, row in (("grouped", 36), ("depthwise", 9), ("mixed", 24), ("up", 32), ("head", 64)):
        zeros = (model.get_submodule(name).weight.flatten(1) == 0).sum(1)
        assert zeros.tolist() == [int(0.4 * row)] * len(zeros)


def test_a_quiet_row_keeps_as_much_as_a_loud_one_and_magnitude_takes_all_of_it():
    model = nn.Sequential(nn.Linear(32, 2))
    model[0].weight.data[0] *= 100
    workload = workload_of(model, torch.randn(64, 32))
    assert (compressed(workload, PruneWanda())[0].weight == 0).sum(1).tolist() == [16, 16]
    assert (compressed(workload, PruneMagnitude())[0].weight == 0).sum(1).tolist()[1] > 24


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(8, 16, 3, groups=2), (9,)),
        (nn.Conv2d(8, 16, 3), (6, 6)),
        (nn.Conv2d(8, 16, 3, groups=2), (6, 6)),
        (nn.Conv3d(8, 16, 2, groups=4), (4, 4, 4)),
    ],
    ids=str,
)
def test_what_reads_the_loud_channel_of_its_group_stays(layer, size):
    layer.reset_parameters()  # from the seed of every test
    x = torch.randn(16, 8, *size)
    groups = torch.arange(layer.groups)
    loud_ones = groups % (8 // layer.groups)  # another one in each group
    x.unflatten(1, (layer.groups, -1))[:, groups, loud_ones] *= 1e5
    weight = compressed(workload_of(nn.Sequential(layer), x), PruneWanda(share=0.5))[0].weight
    kept = (weight != 0).unflatten(0, (layer.groups, -1)).flatten(3).float().mean((1, 3))
    assert (kept[groups, loud_ones] == 1.0).all()
    kept[groups, loud_ones] = 0.0
    assert (kept < 0.6).all()


def test_the_filters_of_a_depthwise_convolution_keep_their_largest_weights():
    layer = nn.Conv2d(6, 12, 3, groups=6)
    x = torch.randn(8, 6, 5, 5) * torch.logspace(-2, 2, 6).view(6, 1, 1)
    before = layer.weight.detach().flatten(1).abs()
    kept = compressed(workload_of(nn.Sequential(layer), x), PruneWanda(share=0.5))[0].weight.flatten(1) != 0
    smallest = before.topk(4, dim=1, largest=False).indices
    assert torch.equal(kept, torch.ones_like(kept).scatter(1, smallest, False))


def test_an_input_without_a_batch_is_measured_as_one_with_it():
    x = torch.randn(4, 9) * torch.logspace(-1, 1, 4).view(4, 1)
    with_batch = workload_of(nn.Sequential(nn.Conv1d(4, 8, 3)), x.unsqueeze(0))
    without = Workload(with_batch.model, (x,), [(x,)], lambda predict: 0.0)
    weights = [compressed(workload, PruneWanda())[0].weight for workload in (with_batch, without)]
    assert torch.equal(*weights)


def test_layers_that_share_a_weight_are_measured_together():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    first = torch.randn(64, 16) * torch.logspace(1, -1, 16)
    second = model[1](model[0](first)).detach()
    weight = model[0].weight.detach()
    together = importance(weight, (squares(first, -1) + squares(second, -1)).sqrt())
    alone = importance(weight, squares(first, -1).sqrt())
    after = compressed(workload_of(model, first), PruneWanda())

    def kept(scores):
        return torch.ones_like(scores, dtype=torch.bool).scatter(1, scores.argsort(1)[:, :8], False)

    assert encoding_of(after[0]) is encoding_of(after[2])
    assert torch.equal(after[0].weight != 0, kept(together))
    assert not torch.equal(kept(alone), kept(together))
