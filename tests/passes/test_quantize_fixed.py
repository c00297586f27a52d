"""Fixed point: powers of two, saturation, how the point is chosen, and what one format for all rows costs."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight import targets
from featherweight.encodings import grid
from featherweight.errors import RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_fixed import (
    QuantizeFixed,
    clipped,
    closest_fraction,
    fixed_point,
    largest_fraction,
)
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording
from featherweight.testing import check_export, networks
from featherweight.workload import Workload


def stored(step: QuantizeFixed | QuantizeWeights, weight: torch.Tensor) -> torch.Tensor:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight.clone()
    example = torch.randn(2, weight.shape[1])
    workload = Workload(copy.deepcopy(model).eval(), (example,), [(example,)], lambda predict: 0.0)
    return step.apply(model, workload)[0].weight.detach()


def error(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float(((found - weight).square().sum(1) / weight.square().sum(1)).mean())


def test_it_loses_to_scales_per_channel_where_rows_differ():
    weight = torch.randn(16, 64) * torch.logspace(-2, 0, 16).unsqueeze(1)
    assert error(stored(QuantizeFixed(), weight), weight) > 50 * error(stored(QuantizeWeights(), weight), weight)


def test_it_is_about_as_good_where_rows_are_alike():
    weight = torch.randn(16, 64)
    assert error(stored(QuantizeFixed(), weight), weight) < 8 * error(stored(QuantizeWeights(), weight), weight)


@pytest.mark.parametrize("factor", [256, 16])
def test_the_classical_factors(factor):
    weight = torch.randn(8, 32) * 0.1
    fraction = {256: 8, 16: 4}[factor]
    found = stored(QuantizeFixed(fraction=fraction), weight)
    assert torch.equal(found, (weight * factor).round().clamp(-127, 127) / factor)


def test_what_does_not_fit_is_set_to_the_end_and_keeps_its_sign():
    found = stored(QuantizeFixed(fraction=8), torch.tensor([[1.0, -1.0, 0.25, 400.0]]))
    assert found.tolist() == [[127 / 256, -127 / 256, 0.25, 127 / 256]]


@given(
    st.lists(st.floats(-1e4, 1e4, allow_subnormal=False, width=32), min_size=1, max_size=20),
    st.integers(2, 8),
)
def test_the_largest_fraction_clips_nothing_and_one_more_would(values, bits):
    weight = torch.tensor(values)
    fraction = largest_fraction(weight, bits)
    if bool((weight == 0).all()):
        assert fraction == 0
        return
    assert not clipped(weight, fraction, bits)
    assert fraction == 60 or clipped(weight, fraction + 1, bits)


def test_the_least_error_clips_a_few_for_the_sake_of_the_many():
    weight = torch.randn(16, 256) * 0.05
    weight[3, 7] = 1.0
    covering, closest = largest_fraction(weight, 4), closest_fraction(weight, 4)
    assert closest > covering
    errors = [float((fixed_point(weight, f, 4) - weight).square().mean()) for f in (covering, closest)]
    assert errors[1] < errors[0] / 2
    for choose, fraction in (("range", covering), ("error", closest)):
        found = stored(QuantizeFixed(bits=4, choose=choose), weight)
        assert torch.equal(found, fixed_point(weight, fraction, 4))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_weights_are_multiples_of_a_power_of_two_in_one_format(bits):
    workload = networks()["depthwise"]
    with recording() as coverage:
        rounded = QuantizeFixed(bits=bits).apply(copy.deepcopy(workload.model), workload)
    said = dict(coverage.done)
    for name, layer in rounded.named_modules():
        if (encoding := encoding_of(layer)) is not None:
            fraction = -int(encoding.scale.log2())
            codes = layer.weight * 2.0**fraction
            assert encoding.scale == 2.0**-fraction
            assert torch.equal(codes, codes.round())
            assert grid(bits)[0] <= codes.min() and codes.max() <= grid(bits)[1]
            assert said[name] == f"int{bits} per tensor, {fraction} bits after the point"
    assert len(said) == 5


def test_a_tensor_of_zeros():
    assert torch.equal(stored(QuantizeFixed(), torch.zeros(3, 4)), torch.zeros(3, 4))


def test_zeros_survive_and_distillation_keeps_weights_on_the_grid():
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    rounded = QuantizeFixed(bits=5).apply(pruned, workload)
    before = rounded[0].weight.clone()
    trained = DistillSoft(epochs=3, lr=0.05).apply(rounded, workload)
    codes = trained[0].weight / encoding_of(trained[0]).scale
    assert torch.equal(codes, codes.round())
    assert bool((trained[0].weight[zero] == 0).all())
    assert not torch.equal(trained[0].weight, before)


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("network", ["depthwise", "transformer"])
def test_every_target_runs_it(target, bits, network, tmp_path):
    workload = networks()[network]
    rounded = QuantizeFixed(bits=bits).apply(copy.deepcopy(workload.model), workload)
    check_export(targets.find(target), rounded, workload, tmp_path)


def test_what_is_rounded_already_is_refused():
    workload = networks()["mlp"]
    once = QuantizeFixed().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"quantize_fixed would quantize '0', which an earlier step .* where: '!0'"):
        QuantizeFixed().apply(once, workload)
