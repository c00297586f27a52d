"""Dynamic quantization: ranges follow each input, where fixed ranges clip what calibration never saw."""

import copy

import torch
from torch import nn

from featherweight.passes.quantize_dynamic import QuantizeDynamic
from featherweight.passes.quantize_static import QuantizeStatic
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
