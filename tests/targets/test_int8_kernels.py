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
from featherweight.testing import check_export
from featherweight.workload import Workload

HEAVY = {"Conv", "Convolution", "FusedConv", "Gemm", "MatMul", "FullyConnected", "aten::conv2d", "aten::linear"}
HEAVY |= {"aten::conv1d", "aten::convolution", "aten::mkldnn_convolution", "aten::addmm", "aten::mm", "aten::matmul"}


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


def in_floats(kernels: list[targets.Kernel]) -> list[targets.Kernel]:
    return [k for k in kernels if k.precision == "fp32" and k.kind.removeprefix("Nhwc") in HEAVY]


def off(runtime: targets.Target, folder: Path, model: nn.Module, x: torch.Tensor) -> float:
    """How far what was exported is from the torch module, as a share of its output."""
    (found,) = runtime.load(folder, threads=1)([x.numpy()])
    with torch.no_grad():
        wanted = model(x).numpy()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def in_8_bits(model: nn.Module, batches: list, **settings: str) -> tuple[nn.Module, Workload]:
    workload = Workload(model, (batches[0][0][:2],), batches, lambda predict: 0.0)
    return QuantizeStatic(**settings).apply(copy.deepcopy(model), workload), workload


def changed_by_optimizing(folder: Path, x: torch.Tensor) -> float:
    """How far ONNX Runtime's kernels are from the graph as written, computed in floats, as a share of its output."""
    import onnxruntime

    written = onnxruntime.SessionOptions()
    written.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "model.onnx", written, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    (found,) = targets.find("onnxruntime").load(folder, threads=1)([x.numpy()])
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def with_uneven_channels(model: nn.Module) -> nn.Module:
    """Weights fifty times larger for some outputs than for others: one scale for all would ruin the others."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.normal_(layer.bias, std=0.1)
                layer.weight.mul_(torch.logspace(-1, 0.7, len(layer.weight)).view(-1, *[1] * (layer.weight.dim() - 1)))
    return model.eval()


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
    assert len(int8) >= 4
    for layer in ("stem", "a", "b", "head"):  # each is named after its layer
        assert any(kernel.name.startswith((f"{layer}/", f"{layer}_")) for kernel in int8)
    assert in_floats(kernels) == []


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


@pytest.mark.parametrize("width", [184, 92, 46, 69])
@pytest.mark.parametrize("target", targets.installed())
def test_rows_that_hold_no_whole_number_of_blocks_are_computed_right(target, width, tmp_path):
    """Blocks of 23 weights, which OpenVINO takes and computes something else with, are never made."""
    model = nn.Sequential(nn.Embedding(300, width), nn.Linear(width, 64)).eval()
    batch = (torch.randint(0, 300, (8, 5)),)
    workload = Workload(model, batch, [batch], lambda predict: 0.0)
    compressed = QuantizeWeights(bits=4, block=32).apply(copy.deepcopy(model), workload)
    targets.find(target).export(compressed, workload, tmp_path)
    (found,) = targets.find(target).load(tmp_path, threads=1)([batch[0].numpy()])
    with torch.no_grad():
        wanted = compressed(*batch).numpy()
    assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("target", targets.installed())
def test_files_do_not_tell_where_they_were_made(target, workload, tmp_path):
    targets.find(target).export(workload.model, workload, tmp_path)
    here = str(Path(__file__).parent).encode()
    assert not any(here in path.read_bytes() or b"stack_trace" in path.read_bytes() for path in tmp_path.iterdir())


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight as well, or is not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(500, 64), nn.Linear(64, 64), nn.Linear(64, 500, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(self.table(ids))))


@pytest.mark.parametrize("tied", [False, True])
def test_onnxruntime_decodes_only_the_rows_that_are_read(tied, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (2, 8))
    model, workload = in_8_bits(Tied(tied).eval(), [(ids,)])
    runtime = targets.find("onnxruntime")
    runtime.export(model, workload, tmp_path)
    kinds = {kernel.kind for kernel in runtime.profile(tmp_path, [ids.numpy()], threads=1)}
    assert "DequantizeLinear" not in kinds and "MatMul" not in kinds
    assert off(runtime, tmp_path, model, ids) < 1e-5
    tables = 1 if tied else 2
    assert (tmp_path / "model.onnx").stat().st_size < (tables + 0.5) * 500 * 64  # one copy of each


@pytest.mark.parametrize("tied", [False, True])
def test_onnxruntime_decodes_a_table_that_is_multiplied_too_when_it_loads_the_file(tied, tmp_path):
    pytest.importorskip("onnxruntime")
    ids = torch.randint(0, 500, (2, 8))
    model = Tied(tied).eval()
    workload = Workload(model, (ids,), [(ids,)], lambda predict: 0.0)
    stored = QuantizeWeights().apply(copy.deepcopy(model), workload)
    runtime = targets.find("onnxruntime")
    runtime.export(stored, workload, tmp_path)
    kinds = {kernel.kind for kernel in runtime.profile(tmp_path, [ids.numpy()], threads=1)}
    assert "DequantizeLinear" not in kinds and off(runtime, tmp_path, stored, ids) < 1e-5
    tables = 1 if tied else 2
    assert (tmp_path / "model.onnx").stat().st_size < (tables + 0.5) * 500 * 64  # one copy of each


class PostNorm(nn.Module):
    """A block of a post-norm transformer with a norm of large gain, whose sum reads what a quantized layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        nn.init.constant_(self.norm.weight, 20.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return h + self.down(nn.functional.gelu(self.up(h)))


class Reshaped(nn.Module):
    """A transposed tensor that a quantized layer reads, and a float sum too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sin(x).transpose(1, 2)
        return 0.01 * self.layer(h) + h


@pytest.mark.parametrize(("network", "shape"), [(PostNorm, (4, 6, 32)), (Reshaped, (4, 32, 6))])
def test_onnxruntime_leaves_float_readers_of_quantized_inputs_exact(network, shape, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    batches = [(torch.randn(shape),) for _ in range(4)]
    model, workload = in_8_bits(network().eval(), batches)
    runtime = targets.find("onnxruntime")
    runtime.export(model, workload, tmp_path)
    assert off(runtime, tmp_path, model, batches[0][0]) < 1e-5


def test_onnxruntime_adds_residuals_in_int8(workload, tmp_path):
    pytest.importorskip("onnxruntime")
    model, _ = in_8_bits(workload.model, workload.calibration)
    runtime = targets.find("onnxruntime")
    runtime.export(model, workload, tmp_path)
    kinds = [kernel.kind for kernel in runtime.profile(tmp_path, [workload.example[0].numpy()], threads=1)]
    assert "QLinearAdd" in kinds and "Add" not in kinds


def test_openvino_rounds_nothing_by_itself_but_the_input(workload, tmp_path):
    pytest.importorskip("openvino")
    model, _ = in_8_bits(workload.model, workload.calibration)
    runtime = targets.find("openvino")
    runtime.export(model, workload, tmp_path)
    kinds = [kernel.kind for kernel in runtime.profile(tmp_path, [workload.example[0].numpy()], threads=1)]
    assert kinds.count("FakeQuantize") == 1 and "Add" not in kinds


@pytest.mark.parametrize("edges", [(0, 1, 0, 1), (2, 0, 1, 3), (-1, 1, 0, 1)])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_zeros_round_a_picture_are_added_by_the_convolution(target, edges, tmp_path):
    pytest.importorskip(target)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ZeroPad2d(edges), nn.Conv2d(8, 8, 3, stride=2)]
    layers += [nn.ReLU(), nn.Conv2d(8, 8, 1)]
    x = torch.randn(2, 3, 40, 40)  # large enough for all operators to take time
    model, workload = in_8_bits(with_uneven_channels(nn.Sequential(*layers)), [(x,)])
    runtime = targets.find(target)
    runtime.export(model, workload, tmp_path)
    kinds = {kernel.kind for kernel in runtime.profile(tmp_path, [x.numpy()], threads=1)}
    assert ("Pad" in kinds) == (min(edges) < 0)
    assert off(runtime, tmp_path, model, x) < 0.01


CONVOLVED = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
LAYERS = (*CONVOLVED, nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 5))


@pytest.mark.parametrize("left", ["0", "2", "5", "8", "10"])
def test_onnxruntime_rounds_no_weights_by_itself(left, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    model, workload = in_8_bits(with_uneven_channels(nn.Sequential(*copy.deepcopy(LAYERS))), [(x,)], where=f"!{left}")
    targets.find("onnxruntime").export(model, workload, tmp_path)
    assert changed_by_optimizing(tmp_path, x) < 0.008  # int8 kernels differ by last bits


@pytest.mark.parametrize("signs", [(1.0, 2.0), (-2.0, 2.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_onnxruntime_rounds_nothing_before_a_batch_norm(bias, signs, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(width, 16, 3, bias=bias), nn.BatchNorm2d(16), nn.ReLU()) for width in (3, 16, 16)]
    model = with_uneven_channels(nn.Sequential(*(layer for block in blocks for layer in block)))
    model.append(nn.Flatten()).append(nn.Linear(16 * 36, 5))
    x = torch.randn(4, 3, 12, 12)
    for norm in model[1:-2:3]:
        nn.init.uniform_(norm.weight, *signs)
        nn.init.normal_(norm.bias)
        norm.weight.data[3], norm.momentum = 0.0, None
    model.train()(x)  # so that norms know what they see
    model, workload = in_8_bits(model.eval(), [(x,)])
    runtime = targets.find("onnxruntime")
    runtime.export(model, workload, tmp_path)
    kernels = runtime.profile(tmp_path, [x.numpy()], threads=1)
    assert in_floats(kernels) == [] and "BatchNormalization" not in {kernel.kind for kernel in kernels}
    assert off(runtime, tmp_path, model, x) < 0.01 and changed_by_optimizing(tmp_path, x) < 0.01


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", targets.installed())
def test_linear_layers_on_rows_run_in_int8(target, bias, tmp_path):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128, bias=bias), nn.GELU(), nn.Linear(128, 32, bias=bias))
    x = torch.randn(16, 64)
    model, workload = in_8_bits(layers.eval(), [(x,)])
    runtime = targets.find(target)
    runtime.export(model, workload, tmp_path)
    assert in_floats(runtime.profile(tmp_path, [x.numpy()], threads=1)) == []
    assert off(runtime, tmp_path, model, x) <= runtime.tolerance


CONVOLUTIONS = {
    "same": (nn.Conv2d(8, 8, 3, padding="same"), (2, 8, 9, 9)),
    "same, dilated": (nn.Conv2d(8, 8, 5, padding="same", dilation=2), (2, 8, 9, 9)),
    "valid": (nn.Conv2d(8, 8, 3, padding="valid", stride=2), (2, 8, 9, 9)),
    "same, even": (nn.Conv2d(8, 8, (4, 3), padding="same"), (2, 8, 9, 9)),
    "in a row": (nn.Conv1d(8, 16, 3, stride=2, padding=1, groups=2), (2, 8, 21)),
    "in a row, same": (nn.Conv1d(8, 16, 5, padding="same", dilation=2), (2, 8, 21)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_torch_runs_every_convolution_in_int8(name, tmp_path):
    torch.manual_seed(0)
    layer, shape = CONVOLUTIONS[name]
    x = torch.randn(shape)
    model, workload = in_8_bits(nn.Sequential(layer, nn.ReLU()).eval(), [(x,)])
    runtime = targets.find("torch")
    runtime.export(model, workload, tmp_path)
    kernels = runtime.profile(tmp_path, [x.numpy()], threads=1)
    assert in_floats(kernels) == [] and any(kernel.precision == "int8" for kernel in kernels)
    assert off(runtime, tmp_path, model, x) < 1e-5


class Waves(nn.Module):
    """Narrow convolutions with wide kernels, in one and two dimensions, in groups and without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 16, 8, padding=4), nn.Conv1d(16, 32, 16, padding=8)
        self.places = nn.Conv1d(32, 32, 8, padding=4, groups=2)
        self.pictures, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 8, 8, padding=4)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.first(x)).transpose(1, 2)).transpose(1, 2)
        x = self.places(x).unsqueeze(1)
        return self.head(self.last(self.pictures(x)).mean((2, 3)))


class Unbiased(nn.Module):
    """A convolution without a bias, whose output is rounded for the next one and read as it is by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.again = nn.Conv2d(3, 16, 2, stride=2, bias=False), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        y = self.norm(self.again(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head((x + y).mean((2, 3)))


class Averaged(nn.Module):
    """Linear layers without a bias and with zeros, each followed by one that reads the mean of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.zeros = nn.Linear(32, 16, bias=False), nn.Linear(32, 16)
        nn.init.zeros_(self.zeros.bias)
        self.last, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.bare(x).mean(1)) + self.last(self.zeros(x).mean(1)))


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.parametrize(("kind", "shape"), [(Waves, (3, 40)), (Unbiased, (3, 12, 12)), (Averaged, (7, 32))])
@pytest.mark.filterwarnings("ignore")  # of exporters; their own tests name them
def test_what_int8_kernels_get_wrong_is_kept_from_them(target, kind, shape, tmp_path):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, *shape)
    workload = Workload(model, (x,), [(torch.randn(16, *shape),)], lambda predict: 0.0)
    model = QuantizeStatic(where="!head").apply(copy.deepcopy(model), workload)
    check_export(targets.find(target), model, workload, tmp_path)
