"""Narrow formats: small weights survive because they are scaled into the range, which a bare cast does not do."""

import copy

import pytest
import torch
from torch import nn

from featherweight.encodings import NARROW
from featherweight.errors import RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.fold_batchnorm import FoldBatchnorm
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.scale_weights import ScaleWeights, narrow_scale
from featherweight.surgery import encoding_of
from featherweight.testing import networks
from featherweight.workload import Workload


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(copy.deepcopy(model).eval(), (x,), [(x,)], lambda predict: 0.0)


def scaled(weight: torch.Tensor, **settings: object) -> nn.Linear:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    return ScaleWeights(**settings).apply(model, workload_of(model, torch.randn(2, weight.shape[1])))[0]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((found.double() - wanted).norm() / wanted.double().norm())


# The relative step of each format, halved, is what rounding costs at most where no weight is too small.
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "float8": 2**-4}


@pytest.mark.parametrize(("narrow", "size"), [("float16", 1e-8), ("float8", 1e-4), ("float8", 1e-6)])
def test_small_weights_survive_that_a_bare_cast_loses(narrow, size):
    weight = size * torch.randn(32, 64)
    assert error(weight.to(NARROW[narrow]).float(), weight) > 0.5
    for scope in ("tensor", "channel"):
        assert error(scaled(weight, narrow=narrow, scope=scope).weight, weight) < ROUNDING[narrow]


@pytest.mark.parametrize(("narrow", "size"), [("float16", 1e7), ("float8", 1e4)])
def test_large_weights_survive_that_a_bare_cast_clips_or_makes_infinite(narrow, size):
    weight = size * torch.randn(32, 64)
    assert error(weight.to(NARROW[narrow]).float(), weight) > 0.5
    assert error(scaled(weight, narrow=narrow).weight, weight) < ROUNDING[narrow]


def test_scaling_gains_nothing_where_the_format_holds_the_weights_as_they_are():
    weight = torch.randn(32, 64).clamp(-4, 4)
    weight = torch.where(weight.abs() < 0.1, 0.1, weight)
    assert torch.equal(scaled(weight, narrow="float16").weight, weight.half().float())
    assert torch.equal(scaled(weight, narrow="bfloat16").weight, weight.bfloat16().float())


def test_a_scale_for_each_channel_saves_the_small_ones():
    weight = torch.randn(8, 64) * torch.logspace(-6, 0, 8).unsqueeze(1)
    one, each = (scaled(weight, narrow="float8", scope=scope).weight for scope in ("tensor", "channel"))
    assert error(one[0], weight[0]) > 0.5
    assert error(each[0], weight[0]) < ROUNDING["float8"]


@pytest.mark.parametrize("largest", [1e-12, 0.001, 0.5, 1.0, 3.0, 448.0, 1e9])
@pytest.mark.parametrize("narrow", ["float16", "float8"])
def test_the_scale_is_a_power_of_two_and_uses_the_upper_half_of_the_range(largest, narrow):
    scale = narrow_scale(torch.tensor(largest), narrow)
    assert float(torch.frexp(scale).mantissa) == 0.5
    most = torch.finfo(NARROW[narrow]).max
    assert most / 2 <= largest / float(scale) <= most * (1 + 1e-6)


def test_whole_numbers_are_the_nearest():
    weight = torch.randn(8, 64)
    layer = scaled(weight, narrow="int8")
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((layer.weight - weight).abs() <= steps / 2 * 1.001).all())


@pytest.mark.parametrize(("narrow", "bits"), [("float16", 16), ("bfloat16", 16), ("float8", 8), ("int8", 8)])
def test_bits_that_are_stored(narrow, bits):
    weight = torch.randn(8, 64)
    found = {scope: encoding_of(scaled(weight, narrow=narrow, scope=scope)) for scope in ("tensor", "channel")}
    assert found["tensor"].bits_per_weight == bits + 32 / 512
    assert found["channel"].bits_per_weight == bits + 32 / 64
    assert found["channel"].describe() == f"{narrow} scaled per channel"


def test_weights_of_zero():
    for narrow in NARROW:
        assert torch.equal(scaled(torch.zeros(4, 16), narrow=narrow).weight, torch.zeros(4, 16))


@pytest.mark.parametrize("narrow", NARROW)
def test_training_stays_in_the_format_and_zeros_stay_zero(narrow):
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    after = ScaleWeights(narrow=narrow).apply(pruned, workload)
    before = after[0].weight.clone()
    trained = DistillSoft(epochs=10, lr=0.05).apply(after, workload)
    encoding = encoding_of(trained[0])
    assert encoding.values.dtype == NARROW[narrow]
    assert not torch.equal(trained[0].weight, before)
    assert bool((trained[0].weight[zero] == 0).all())
    assert torch.equal(encoding.project(trained[0].weight), trained[0].weight)


def test_what_was_stored_narrow_is_refused():
    workload = networks()["residual"]
    after = ScaleWeights().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"scale_weights would quantize 'stem.0'.* float16 scaled per channel"):
        ScaleWeights().apply(after, workload)
    with pytest.raises(RecipeError, match="Put fold_batchnorm before that step"):
        FoldBatchnorm().apply(after, workload)
