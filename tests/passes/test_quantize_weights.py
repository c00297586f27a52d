"""Weight-only quantization: blocks beat rows at 4 bits, the searched scale beats the covering one, files shrink."""

import copy

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.artifact import count_parameters
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording, thawed
from featherweight.training import trainable
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


@pytest.mark.parametrize(
    ("bits", "block", "stored"),
    [(8, 0, 8.2), (6, 0, 8.2), (4, 0, 4.2), (4, 32, 5.0), (4, 128, 4.3), (3, 0, 4.2), (2, 128, 4.3)],
)
def test_bits_that_are_stored(weight, bits, block, stored):
    layer = nn.Sequential(nn.Linear(256, 32))
    example = torch.randn(2, 256)
    workload = Workload(copy.deepcopy(layer).eval(), (example,), [(example,)], lambda predict: 0.0)
    changed = QuantizeWeights(bits=bits, block=block).apply(layer, workload)
    assert encoding_of(changed[0]).bits_per_weight <= stored


@pytest.mark.parametrize("block", [0, 32])
def test_offsets_pay_where_weights_do_not_lie_alike_round_zero(weight, block):
    """They never lose, and gain most where all weights of a scale lie on one side."""
    for rows, gain in ((weight, 1.0), (weight.abs() + 5, 5.0)):
        plain, offset = (error_of(rows, bits=4, block=block, offset=asked) for asked in (False, True))
        assert offset <= plain / gain


def test_weights_that_were_pruned_have_no_offset():
    model = nn.Sequential(nn.Linear(64, 64))
    example = torch.randn(2, 64)
    workload = Workload(copy.deepcopy(model).eval(), (example,), [(example,)], lambda predict: 0.0)
    pruned = PruneMagnitude(share=0.5).apply(model, workload)
    zero = pruned[0].weight == 0
    rounded = QuantizeWeights(bits=4, block=32, offset=True).apply(pruned, workload)
    assert bool((rounded[0].weight[zero] == 0).all())


def test_searching_pays_most_where_bits_are_few(weight):
    gains = [error_of(weight, bits=bits, search=False) / error_of(weight, bits=bits) for bits in (8, 4, 3, 2)]
    assert gains == sorted(gains)
    assert gains[-1] > 2


@pytest.mark.parametrize("target", targets.installed())
def test_files_are_as_large_as_what_holds_their_codes(target, tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    workload = Workload(model, (torch.randn(2, 256),), [(torch.randn(2, 256),)], lambda predict: 0.0)
    sizes = {}
    for bits in range(2, 9):
        (tmp_path / str(bits)).mkdir()
        rounded = QuantizeWeights(bits=bits).apply(copy.deepcopy(model), workload)
        targets.find(target).export(rounded, workload, tmp_path / str(bits))
        sizes[bits] = sum(path.stat().st_size for path in (tmp_path / str(bits)).iterdir())
    few = 64  # bytes by which names and numbers in text differ
    assert all(sizes[bits] == pytest.approx(sizes[4], abs=few) for bits in (2, 3))
    assert all(sizes[bits] == pytest.approx(sizes[8], abs=few) for bits in (5, 6, 7))
    assert sizes[8] - sizes[4] == pytest.approx(256 * 256, rel=0.05)


def test_rows_of_one_weight_are_left_with_the_reason():
    model = nn.Sequential(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 3)).eval()
    example = torch.randn(2, 1, 8)
    with recording() as coverage:
        QuantizeWeights().apply(model, Workload(copy.deepcopy(model), (example,), [(example,)], lambda predict: 0.0))
    assert [layer for layer, _ in coverage.done] == ["1"]
    assert coverage.left == [("0", "its rows hold one weight each: a scale would weigh more than it saves")]


def tied() -> Workload:
    """The first and the last layer have one weight, as in Whisper."""
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)).eval()
    model[2].weight = model[0].weight
    ids = torch.randint(0, 20, (4, 5))
    return Workload(model, (ids,), [(ids,)], lambda predict: 0.0)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_weight_that_layers_share_is_stored_and_trained_once(bits):
    workload = tied()
    after = QuantizeWeights(bits=bits).apply(copy.deepcopy(workload.model), workload)
    assert encoding_of(after[0]) is encoding_of(after[2])
    assert count_parameters(after) == 20 * 8 + 8 * 8 + 8
    with thawed(after):
        assert len(trainable(after, "*")) == 3
    trained = DistillSoft(steps=3).apply(after, workload)
    assert torch.equal(trained[0].weight, trained[2].weight)


@pytest.mark.parametrize(("where", "left_out", "left"), [("!0", "0", "2"), ("!2", "2", "0")])
def test_a_weight_that_a_layer_outside_uses_too_is_left(where, left_out, left):
    workload = tied()
    with recording() as coverage:
        after = QuantizeWeights(where=where).apply(copy.deepcopy(workload.model), workload)
    assert coverage.left == [(left, f"shares its weight with {left_out!r}, which is left out")]
    assert [layer for layer, _ in coverage.done] == ["1"]
    assert after[0].weight is after[2].weight
    assert after[0].weight.requires_grad


def test_a_weight_normed_layer_and_one_of_another_kind():
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3), dim=2)
            self.rnn = nn.GRU(8, 8, batch_first=True)

        def forward(self, x):
            return self.rnn(self.conv(x).transpose(1, 2))[0]

    model, x = Speech().eval(), torch.randn(2, 4, 9)
    with recording() as coverage:
        after = QuantizeWeights().apply(copy.deepcopy(model), Workload(model, (x,), [(x,)], lambda predict: 0.0))
    assert coverage.done == [("conv", "int8 per channel")]
    assert coverage.left == [
        ("rnn", "is of kind GRU, which quantize_weights does not treat (weight_ih_l0, weight_hh_l0)")
    ]
    torch.testing.assert_close(after(x), model(x), rtol=0.05, atol=0.05)
