"""Weight-only quantization: blocks beat rows at 4 bits, the searched scale beats the covering one, files shrink."""

import copy

import pytest
import torch
from torch import nn

from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording
from featherweight.workload import Workload


def error_of(weight: torch.Tensor, **settings: object) -> float:
    layer = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    layer[0].weight.data = weight.clone()
    example = torch.randn(2, weight.shape[1])
    workload = Workload(copy.deepcopy(layer).eval(), (example,), [(example,)], lambda predict: 0.0)
    changed = QuantizeWeights(**settings).apply(layer, workload)
    return ((changed[0].weight - weight) ** 2).mean().item()


@pytest.fixture
def weight() -> torch.Tensor:
    """Heavy-tailed, as trained weights are."""
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((32, 256))


def test_blocks_beat_rows_at_four_bits(weight):
    assert error_of(weight, bits=4, block=32) < error_of(weight, bits=4, block=0) / 1.5


def test_the_searched_scale_beats_the_covering_one_at_four_bits(weight):
    assert error_of(weight, bits=4, search=True) < error_of(weight, bits=4, search=False) / 1.2


def test_eight_bits_beat_four(weight):
    assert error_of(weight, bits=8) < error_of(weight, bits=4) / 50


@pytest.mark.parametrize(("bits", "block", "stored"), [(8, 0, 8.2), (4, 0, 4.2), (4, 32, 5.0), (4, 128, 4.3)])
def test_bits_that_are_stored(weight, bits, block, stored):
    layer = nn.Sequential(nn.Linear(256, 32))
    example = torch.randn(2, 256)
    workload = Workload(copy.deepcopy(layer).eval(), (example,), [(example,)], lambda predict: 0.0)
    changed = QuantizeWeights(bits=bits, block=block).apply(layer, workload)
    assert encoding_of(changed[0]).bits_per_weight <= stored


def test_rows_of_one_weight_are_left_with_the_reason():
    model = nn.Sequential(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 3)).eval()
    example = torch.randn(2, 1, 8)
    with recording() as coverage:
        QuantizeWeights().apply(model, Workload(copy.deepcopy(model), (example,), [(example,)], lambda predict: 0.0))
    assert [layer for layer, _ in coverage.done] == ["1"]
    assert coverage.left == [("0", "its rows hold one weight each: a scale would weigh more than it saves")]
