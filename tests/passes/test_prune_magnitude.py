"""Magnitude pruning: what it keeps, what that is worth, and what it is not worth."""

import copy

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.encodings import Affine, Masked, affine_scale
from featherweight.errors import RecipeError
from featherweight.masks import largest, largest_of_all
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encode, encoding_of, recording
from featherweight.testing import networks
from featherweight.workload import Workload


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model.eval(), (x,), [(x,)], lambda predict: 0.0)


def zeros(layer: nn.Module) -> float:
    return float((layer.weight == 0).float().mean())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_exactly_the_share_goes_and_it_is_the_smallest(share):
    weight = torch.randn(7, 13)
    kept = largest(weight.abs(), share)
    assert int((~kept).sum()) == int(share * 91)
    assert kept.all() or weight[kept].abs().min() >= weight[~kept].abs().max()


def test_equal_weights_give_their_share_too():
    assert int((~largest(torch.ones(10), 0.5)).sum()) == 5


def test_it_hurts_less_than_chance():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64, bias=False), torch.randn(256, 64)
    wanted = layer(x)

    def error(mask):
        return float((x @ (layer.weight * mask).T - wanted).square().mean().detach())

    chance = torch.rand(64, 64).argsort(dim=1) >= 32
    assert error(largest(layer.weight.abs(), 0.5)) < 0.5 * error(chance)


def test_it_loses_where_small_weights_read_loud_inputs():
    """What the score does not see is the input: weights on a loud feature matter more than their size says."""
    torch.manual_seed(0)
    weight, loudness = torch.randn(64, 64), torch.logspace(-2, 2, 64)
    x = torch.randn(256, 64) * loudness
    wanted = x @ weight.T

    def error(mask):
        return float((x @ (weight * mask).T - wanted).square().mean())

    by_product = largest((weight * loudness).abs(), 0.5)
    assert error(largest(weight.abs(), 0.5)) > 10 * error(by_product)


def test_layers_give_equally_or_compete():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.normal_().pow_(5)  # a few say almost everything
        model[1].weight.uniform_(3, 4)
    workload = workload_of(model, torch.randn(2, 10))
    each = PruneMagnitude(share=0.5).apply(copy.deepcopy(model), workload)
    assert (zeros(each[0]), zeros(each[1])) == (0.5, 0.5)
    with recording() as coverage:
        all_ = PruneMagnitude(share=0.3, scope="global").apply(copy.deepcopy(model), workload)
    assert zeros(all_[0]) == pytest.approx(0.6)
    assert zeros(all_[1]) == 0.0
    assert coverage.done == [("0", "60% zeros")]
    assert coverage.left == [("1", "its weights are all larger than those that go")]


def test_no_layer_goes_whole_for_the_unit_that_its_weights_are_in():
    """By magnitude alone the second layer would be next to nothing but zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        model[1].weight *= 0.001
    workload = workload_of(model, torch.randn(64, 32))
    pruned = PruneMagnitude(share=0.5, scope="global").apply(copy.deepcopy(model), workload)
    assert zeros(pruned[0]) == pytest.approx(0.5, abs=0.1) and zeros(pruned[1]) == pytest.approx(0.5, abs=0.1)
    masked = largest_of_all([layer.weight.detach().abs() for layer in model], 0.5)
    assert masked[0].float().mean() > 0.99 and masked[1].float().mean() < 0.01


def test_pruning_again_counts_the_zeros_that_there_are():
    model = nn.Sequential(nn.Linear(10, 10))
    workload = workload_of(model, torch.randn(2, 10))
    pruned = PruneMagnitude(share=0.3).apply(copy.deepcopy(model), workload)
    again = PruneMagnitude(share=0.6).apply(pruned, workload)
    assert zeros(again[0]) == pytest.approx(0.6)


def test_zeros_survive_distillation_and_the_rest_learns():
    torch.manual_seed(0)
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.7).apply(copy.deepcopy(workload.model), workload)
    before = [layer.weight.clone() for layer in pruned if isinstance(layer, nn.Linear)]
    after = DistillSoft(epochs=3, lr=0.05).apply(pruned, workload)
    for layer, old in zip([m for m in after if isinstance(m, nn.Linear)], before, strict=True):
        assert isinstance(encoding_of(layer), Masked)
        assert bool((layer.weight[old == 0] == 0).all())
        assert not torch.equal(layer.weight, old)


def test_zeros_survive_quantization():
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.7).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    rounded = QuantizeWeights(bits=4).apply(pruned, workload)
    assert isinstance(encoding_of(rounded[0]), Affine)
    assert bool((rounded[0].weight[zero] == 0).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_survive_quantization_and_distillation(bits, tmp_path):
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.7).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    rounded = QuantizeWeights(bits=bits).apply(pruned, workload)
    trained = DistillSoft(epochs=5, lr=0.1).apply(rounded, workload)
    assert bool((trained[0].weight[zero] == 0).all())
    sizes = []
    for number, mask in enumerate((zero, None)):  # the mask is no part of what ships
        encoding_of(trained[0]).mask = mask
        (tmp_path / str(number)).mkdir()
        targets.find("torch").export(trained, workload, tmp_path / str(number))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / str(number)).iterdir()))
    assert sizes[0] < sizes[1] + zero.numel() / 2


def test_a_weight_that_an_embedding_uses_too_is_left():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)).eval()
    model[2].weight = model[0].weight
    ids = torch.randint(0, 20, (4, 5))
    with recording() as coverage:
        after = PruneMagnitude().apply(copy.deepcopy(model), workload_of(model, ids))
    assert coverage.done == [("1", "50% zeros")]
    assert coverage.left == [
        ("2", "shares its weight with '0', which is left out"),
        ("0", "is of kind Embedding, which prune_magnitude does not treat (weight)"),
    ]
    assert after[0].weight is after[2].weight


def test_zeros_make_no_dense_file_smaller(tmp_path):
    workload = networks()["residual"]
    pruned = PruneMagnitude(share=0.9).apply(copy.deepcopy(workload.model), workload)
    sizes = []
    for number, model in enumerate((workload.model, pruned)):
        folder = tmp_path / str(number)
        folder.mkdir()
        targets.find("torch").export(model, workload, folder)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_rounded_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    encode(model[0], Affine(model[0].weight, affine_scale(model[0].weight, 8, 0), bits=8))
    with pytest.raises(
        RecipeError, match=r"'0', which an earlier step stored as int8 per channel\. Put prune_magnitude before"
    ):
        PruneMagnitude().apply(model, workload_of(model, torch.randn(2, 4)))
