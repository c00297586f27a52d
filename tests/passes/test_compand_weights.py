"""Companding: closer than a uniform grid where weights crowd round zero, farther where they are spread evenly."""

import copy

import pytest
import torch
from torch import nn

from featherweight.encodings import Affine, affine_scale
from featherweight.errors import RecipeError
from featherweight.passes.compand_weights import STRENGTHS, CompandWeights
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording
from featherweight.testing import networks
from featherweight.workload import Workload


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(copy.deepcopy(model).eval(), (x,), [(x,)], lambda predict: 0.0)


def companded(weight: torch.Tensor, **settings: object) -> nn.Linear:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    return CompandWeights(**settings).apply(model, workload_of(model, torch.randn(2, weight.shape[1])))[0]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().sum())


def uniform_error(weight: torch.Tensor, bits: int) -> float:
    return error(Affine(weight, affine_scale(weight, bits, 0, search=True), bits=bits).decode(), weight)


@pytest.fixture
def laplacian() -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 0.1).sample((32, 512))


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_closer_than_a_uniform_grid_on_laplacian_weights(laplacian, bits):
    assert error(companded(laplacian, bits=bits).weight, laplacian) < 0.8 * uniform_error(laplacian, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_farther_on_weights_that_are_spread_evenly(bits):
    weight = torch.rand(32, 512) * 2 - 1
    assert error(companded(weight, bits=bits).weight, weight) > 1.1 * uniform_error(weight, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("draw", [torch.distributions.Laplace(0.0, 1.0).sample, torch.rand, torch.randn])
def test_the_curve_that_is_chosen_is_the_best(draw, bits):
    weight = draw((16, 128))
    found = {curve: error(companded(weight, bits=bits, curve=curve).weight, weight) for curve in STRENGTHS}
    chosen = companded(weight, bits=bits)
    assert error(chosen.weight, weight) == min(found.values())
    assert found[encoding_of(chosen).curve] == min(found.values())


def test_different_weights_want_different_curves():
    even = torch.rand(16, 512) * 2 - 1
    heavy = torch.randn(16, 512) ** 5
    chosen = [encoding_of(companded(weight, bits=4)) for weight in (even, heavy)]
    assert (chosen[0].curve, chosen[0].strength) != (chosen[1].curve, chosen[1].strength)


def test_bits_that_are_stored(laplacian):
    layers = [companded(laplacian, bits=bits, curve="power") for bits in (8, 4)]
    assert [encoding_of(layer).bits_per_weight for layer in layers] == [8 + 32 / 512, 4 + 32 / 512]
    assert error(layers[0].weight, laplacian) < error(layers[1].weight, laplacian) / 50
    assert encoding_of(layers[1]).describe().startswith("int4 companded by power ")


@pytest.mark.parametrize("curve", STRENGTHS)
def test_codes_stay_codes_and_zeros_stay_zero_through_distillation(curve):
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    after = CompandWeights(bits=4, curve=curve).apply(pruned, workload)
    assert bool((after[0].weight[zero] == 0).all())
    before = encoding_of(after[0]).codes.clone()
    trained = DistillSoft(epochs=10, lr=0.05).apply(after, workload)
    encoding = encoding_of(trained[0])
    assert not torch.equal(encoding.codes, before)
    assert bool((trained[0].weight[zero] == 0).all())
    assert torch.equal(encoding.project(trained[0].weight), trained[0].weight)


def test_convolutions_embeddings_and_what_is_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(20, 8)
            self.conv = nn.Conv1d(8, 8, 3, groups=8)
            self.point = nn.Conv1d(8, 8, 1, groups=8)

        def forward(self, ids):
            return self.point(self.conv(self.words(ids).transpose(1, 2)))

    net, ids = Net().eval(), torch.randint(0, 20, (2, 6))
    with recording() as coverage:
        after = CompandWeights().apply(copy.deepcopy(net), workload_of(net, ids))
    assert [layer for layer, _ in coverage.done] == ["words", "conv"]
    assert [layer for layer, _ in coverage.left] == ["point"]
    assert "40 bits a weight, where it takes 32" in coverage.left[0][1]
    torch.testing.assert_close(after(ids), net(ids), rtol=0.1, atol=0.1)


def test_codes_are_refused():
    workload = networks()["mlp"]
    after = CompandWeights().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"quantize_weights would quantize '0'.* stored as int8 companded by"):
        QuantizeWeights().apply(after, workload)
