"""Int8 files run int8 kernels, by the runtimes' own profiles, and compute what the torch module computes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.workload import Workload

HEAVY = {"Conv", "Convolution", "FusedConv", "Gemm", "MatMul", "FullyConnected", "aten::conv2d", "aten::linear"}


class Residual(nn.Module):
    """Two convolutions round a shortcut, pooling, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def workload() -> Workload:
    torch.manual_seed(0)
    model = Residual().eval()
    batches = [(torch.randn(16, 3, 16, 16),) for _ in range(4)]
    return Workload(model, (batches[0][0][:1],), batches, lambda predict: 0.0)


@pytest.mark.parametrize("target", targets.installed())
def test_int8_runs_on_int8_kernels(target, workload, tmp_path):
    quantized = QuantizeStatic().apply(copy.deepcopy(workload.model), workload)
    runtime = targets.find(target)
    runtime.export(quantized, workload, tmp_path)
    inputs = [workload.example[0].numpy()]
    kernels = runtime.profile(tmp_path, inputs, threads=1)
    int8 = [kernel for kernel in kernels if kernel.precision == "int8"]
    assert len(int8) >= (2 if target == "torch" else 4)  # torch's profiler merges kernels of one kind
    in_floats = [k for k in kernels if k.precision == "fp32" and k.kind.removeprefix("Nhwc") in HEAVY - {"Gemm"}]
    assert in_floats == []


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("target", targets.installed())
def test_agrees_with_the_compressed_module(target, batch, workload, tmp_path):
    quantized = QuantizeStatic().apply(copy.deepcopy(workload.model), workload)
    runtime = targets.find(target)
    runtime.export(quantized, workload, tmp_path)
    x = torch.cat([b[0] for b in workload.calibration])[:batch]
    (found,) = runtime.load(tmp_path, threads=1)([x.numpy()])
    with torch.no_grad():
        wanted = quantized(x).numpy()
    assert np.linalg.norm(found - wanted) <= runtime.tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize(("bits", "block", "share"), [(8, 0, 0.27), (4, 32, 0.18)])
@pytest.mark.parametrize("target", targets.installed())
def test_weights_are_stored_in_few_bits(target, bits, block, share, tmp_path):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    example = (torch.randn(1, 512),)
    workload = Workload(model, example, [example], lambda predict: 0.0)
    compressed = QuantizeWeights(bits=bits, block=block).apply(copy.deepcopy(model), workload)
    sizes = []
    for network in (model, compressed):
        folder = tmp_path / str(len(sizes))
        folder.mkdir()
        targets.find(target).export(network, workload, folder)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes[1] <= share * sizes[0]


@pytest.mark.parametrize("target", targets.installed())
def test_files_do_not_tell_where_they_were_made(target, workload, tmp_path):
    targets.find(target).export(workload.model, workload, tmp_path)
    here = str(Path(__file__).parent).encode()
    assert not any(here in path.read_bytes() or b"stack_trace" in path.read_bytes() for path in tmp_path.iterdir())
