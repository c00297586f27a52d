"""Dynamic quantization: ranges follow each input, where fixed ranges clip what calibration never saw."""

import copy

import pytest
import torch
from torch import nn

from featherweight.passes.quantize_dynamic import QuantizeDynamic
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.surgery import encoding_of, input_quantizer, recording
from featherweight.workload import Workload


def test_inputs_larger_than_calibration_survive():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    seen, later = torch.randn(64, 32), 20 * torch.randn(64, 32)
    workload = Workload(model, (seen[:1],), [(seen,)], lambda predict: 0.0)
    errors = {
        step.name(): (
            (step.apply(copy.deepcopy(model), workload)(later) - model(later)).norm() / model(later).norm()
        ).item()
        for step in (QuantizeDynamic(), QuantizeStatic())
    }
    assert errors["quantize_dynamic"] < 0.02 < errors["quantize_static"]


def test_within_calibration_fixed_ranges_are_as_good():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    seen = torch.randn(256, 32)
    workload = Workload(model, (seen[:1],), [(seen,)], lambda predict: 0.0)
    static = QuantizeStatic(range="mse").apply(copy.deepcopy(model), workload)
    assert ((static(seen) - model(seen)).norm() / model(seen).norm()).item() < 0.02


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("step", [QuantizeDynamic(), QuantizeStatic()])
def test_a_layer_that_is_never_called_has_no_input_to_round(step):
    model, x = Attends().eval(), torch.randn(4, 5, 8)
    with recording() as coverage:
        after = step.apply(copy.deepcopy(model), Workload(model, (x,), [(x,)], lambda predict: 0.0))
    said = dict(coverage.done)
    assert said["attention.out_proj"] == "int8 per channel"
    assert "inputs uint8" in said["head"]
    assert input_quantizer(after.attention.out_proj) is None and input_quantizer(after.head) is not None
    assert coverage.left == [
        ("attention", f"is of kind MultiheadAttention, which {step.name()} does not treat (in_proj_weight)")
    ]
    torch.testing.assert_close(after(x), model(x), rtol=0.1, atol=0.1)


def test_layers_that_share_a_weight_share_its_codes():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)).eval()
    model[2].weight = model[0].weight
    ids = torch.randint(0, 20, (4, 5))
    for step in (QuantizeDynamic(), QuantizeStatic()):
        after = step.apply(copy.deepcopy(model), Workload(model, (ids,), [(ids,)], lambda predict: 0.0))
        assert encoding_of(after[0]) is encoding_of(after[2]) is not encoding_of(after[1])
        assert input_quantizer(after[0]) is None and input_quantizer(after[2]) is not None
