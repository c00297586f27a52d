"""Static quantization: what each range and the bias correction are for."""

import copy

import pytest
import torch
from torch import nn

from featherweight.encodings import Affine, affine_scale
from featherweight.errors import RecipeError
from featherweight.passes.quantize_static import (
    InputStatistics,
    QuantizeStatic,
    bias_shift,
    least_error_range,
    squared_error,
)
from featherweight.surgery import encoding_of, input_quantizer, recording
from featherweight.workload import Workload


def workload_of(model: nn.Module, *batches: torch.Tensor) -> Workload:
    return Workload(model.eval(), (batches[0][:1],), [(batch,) for batch in batches], lambda predict: 0.0)


def outlying(n: int = 400_000) -> torch.Tensor:
    """Normal values and one far away: what breaks ranges that cover everything."""
    values = torch.randn(n)
    values[0] = 300.0
    return values


def test_least_error_clips_an_outlier_where_minmax_cannot():
    values = outlying()
    low, high = float(values.min()), float(values.max())
    clipped = least_error_range(values, low, high)
    assert clipped[1] < high * 0.8
    assert squared_error(values, *clipped) < squared_error(values, low, high) * 0.8


def test_ranges_agree_where_there_are_no_outliers():
    statistics = InputStatistics()
    statistics.add(torch.linspace(-1, 1, 4096).view(64, 64), -1, 4096)
    assert statistics.range("minmax") == (-1.0, 1.0)
    low, high = statistics.range("mse")
    assert low <= -0.95
    assert high >= 0.95
    low, high = statistics.range("percentile")
    assert -1.0 <= low <= -0.99
    assert 0.99 <= high <= 1.0


def test_a_range_always_holds_zero():
    statistics = InputStatistics()
    statistics.add(torch.full((4, 4), 3.0), -1, 16)
    assert statistics.range("minmax") == (0.0, 3.0)


@pytest.mark.parametrize("groups", [1, 4])
def test_bias_shift_is_the_change_of_the_mean_output(groups):
    layer = nn.Conv2d(8, 8, 3, groups=groups, bias=False).double()
    error = torch.randn_like(layer.weight)
    mean = torch.randn(8, dtype=torch.float64)
    layer.weight.data = error
    constant = mean.view(1, 8, 1, 1).expand(1, 8, 3, 3)
    assert torch.allclose(bias_shift(error, mean, groups), layer(constant).flatten())


def test_bias_correction_restores_the_mean_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32))
    batch = torch.rand(256, 16) + 1  # far from zero mean, so that rounding errors add up
    wanted = model(batch).mean(0)
    off = {}
    for correct in (False, True):
        workload = workload_of(copy.deepcopy(model), batch)
        quantized = QuantizeStatic(bias_correction=correct, range="minmax").apply(copy.deepcopy(model), workload)
        off[correct] = (quantized(batch).mean(0) - wanted).abs().mean().item()
    assert off[True] < off[False] / 3


def test_error_is_small_and_every_layer_is_covered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    batch = torch.randn(64, 3, 8, 8)
    workload = workload_of(copy.deepcopy(model), batch)
    with recording() as coverage:
        quantized = QuantizeStatic().apply(copy.deepcopy(model), workload)
    assert [layer for layer, _ in coverage.done] == ["0", "3"]
    assert ((quantized(batch) - model(batch)).norm() / model(batch).norm()).item() < 0.05
    for name in ("0", "3"):
        layer = quantized.get_submodule(name)
        encoding = encoding_of(layer)
        assert isinstance(encoding, Affine)
        assert encoding.codes.dtype is torch.int8
        assert input_quantizer(layer) is not None


def test_a_layer_without_bias_gets_one_from_the_correction():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    quantized = QuantizeStatic(bias_correction=True).apply(model, workload_of(copy.deepcopy(model), torch.rand(32, 8)))
    assert quantized[0].bias.shape == (4,)


def test_quantizing_twice_is_refused_and_says_what_to_do():
    model = nn.Sequential(nn.Linear(8, 4))
    workload = workload_of(copy.deepcopy(model), torch.rand(32, 8))
    once = QuantizeStatic().apply(model, workload)
    with pytest.raises(
        RecipeError, match=r"would quantize '0', which an earlier step .* int8 per channel.*where: '!0'"
    ):
        QuantizeStatic().apply(once, workload)


def test_per_channel_scales_beat_one_scale_on_channels_of_different_size():
    weight = torch.randn(16, 64) * torch.logspace(-2, 1, 16).unsqueeze(1)
    errors = []
    for axis in (-1, 0):
        encoding = Affine(weight, affine_scale(weight, 8, axis), bits=8, axis=axis)
        errors.append((((encoding.decode() - weight) ** 2).sum(1) / (weight**2).sum(1)).mean().item())
    assert errors[1] < errors[0] / 10


def test_the_sample_sees_every_channel_and_place():
    """Even steps through (n, channels, height, width) would only ever meet a corner of some channels."""
    x = torch.zeros(32, 64, 4, 4)
    x[:, 33, 2, 1] = 5.0
    statistics = InputStatistics()
    for _ in range(4):
        statistics.add(x, 1, 4096)
    share = (torch.cat(statistics.sample) > 0).float().mean().item()
    assert 0.3 / (64 * 16) < share < 3 / (64 * 16)
    assert len(torch.cat(statistics.sample)) == 4 * 4096
