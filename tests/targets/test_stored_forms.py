"""Codebooks, companded weights and narrow formats in files: small where layers are small, decoded and stored once."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import surgery, targets
from featherweight.targets import Kernel
from featherweight.testing import FORMS, networks, relative_error, run
from featherweight.workload import Workload

ADDED = [name for name in FORMS if not name.startswith("int") or " on " in name]  # those that are not Affine
KINDS = (nn.Conv2d, nn.Linear, nn.Embedding)


def coded(model: nn.Module, form: str) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in surgery.select(model, "*", KINDS).values():
        surgery.encode(layer, FORMS[form][1](layer.weight.detach()))
    return model


@pytest.mark.parametrize("form", ADDED)
def test_small_layers_are_not_folded_either(form, tmp_path):
    """The optimizer folds what it takes for constants of fewer than 8192 values."""
    onnx = pytest.importorskip("onnx")
    workload = networks()["mlp"]
    model = coded(workload.model, form)
    targets.find("onnxruntime").export(model, workload, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = [[5, 32], [32, 64], [64, 16]]
    found = sorted(list(t.dims) for t in graph.initializer if len(t.dims) == 2 and 1 not in t.dims)
    assert found == shapes
    types = {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if list(t.dims) in shapes}
    stored = {
        "codebook of 16": "UINT4",
        "codebook per channel": "UINT4",
        "codebook of 16 per half": "UINT4",
        "int4 on mu": "INT4",
        "float16": "FLOAT16",
        "bfloat16": "BFLOAT16",
        "float8": "FLOAT8E4M3FN",
    }
    assert types == {stored.get(form, "UINT8" if form.startswith("codebook") else "INT8")}


ONCE = {
    "onnxruntime": list(FORMS),
    "openvino": [form for form in ADDED if form != "scaled int8"],  # it computes with integers that have a scale
}


@pytest.mark.parametrize(
    ("target", "form"), [(target, form) for target in ONCE if target in targets.installed() for form in ONCE[target]]
)
def test_weights_are_decoded_when_the_file_is_loaded_and_not_again(target, form, tmp_path):
    workload = networks()["residual"]
    kinds = []
    for name, model in (("dense", workload.model), (form, coded(workload.model, form))):
        (tmp_path / name).mkdir()
        targets.find(target).export(model, workload, tmp_path / name)
        inputs = [workload.example[0].numpy()]
        kinds.append(Counter(kernel.kind for kernel in targets.find(target).profile(tmp_path / name, inputs, 1)))
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("form", FORMS)
def test_torch_decodes_at_loading_all_that_is_stored(form, tmp_path):
    """A decoder, a reshaping or an addition that is left is run again for every input."""
    workload = networks()["residual"]
    left = []
    for name, model in (("dense", workload.model), (form, coded(workload.model, form))):
        (tmp_path / name).mkdir()
        targets.find("torch").export(model, workload, tmp_path / name)
        inputs = [workload.example[0].numpy()]
        left.append(Counter(kernel.kind for kernel in targets.find("torch").profile(tmp_path / name, inputs, 1)))
    assert left[0] == left[1]


def files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("form", ["codebook of 16", "int4 on mu", "float8"])
@pytest.mark.parametrize("target", targets.installed())
def test_a_weight_that_layers_share_is_stored_once(target, form, tmp_path):
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)).eval()
    model[1].weight = model[0].weight
    ids = torch.randint(0, 1000, (2, 5))
    workload = Workload(copy.deepcopy(model), (ids,), [(ids,)], lambda predict: 0.0)
    encoding = FORMS[form][1](model[0].weight.detach())
    for layer in model:
        surgery.encode(layer, encoding)
    targets.find(target).export(model, workload, tmp_path)
    assert files(tmp_path) < 1.2 * 64_000 * encoding.bits_per_weight / 8 + 12_000
    found = targets.find(target).load(tmp_path, 1)([ids.numpy()])
    assert relative_error(found, run(model, (ids,))) < 1e-4


def test_decoded_weights_are_no_rows_that_are_joined(tmp_path):
    """OpenVINO's fused kernels are off where matrices are added or multiplied: weights that are decoded are none."""
    openvino = pytest.importorskip("featherweight.targets.openvino")
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(2, 7, 16)
    workload = Workload(model, (x,), [(x,)], lambda predict: 0.0)
    targets.find("openvino").export(coded(model, "int8 on log"), workload, tmp_path)
    assert not openvino._joins_rows(openvino._core().read_model(tmp_path / "model.xml"))
    (tmp_path / "stacked").mkdir()
    targets.find("openvino").export(networks()["stacked"].model, networks()["stacked"], tmp_path / "stacked")
    assert openvino._joins_rows(openvino._core().read_model(tmp_path / "stacked" / "model.xml"))


@pytest.mark.parametrize(("told", "took"), [(30, 0.025), (3, 0.0)])
def test_what_a_profile_adds_to_an_operator_is_taken_off_again(told, took):
    onnxruntime = pytest.importorskip("featherweight.targets.onnxruntime")
    event = {"name": "layer/conv_kernel_time", "dur": told, "args": {"op_name": "QLinearConv"}}
    found = onnxruntime._kernel(event, added_ms=0.005)
    assert found == Kernel("layer/conv", "QLinearConv", "int8", pytest.approx(took))
    pytest.importorskip("onnxruntime")
    assert 0 <= onnxruntime._added_ms(1) < 1  # milliseconds
