"""Networks that the exporter alone cannot translate."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight import targets
from featherweight.passes.factorize_svd import FactorizeSvd
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.testing import check_export
from featherweight.workload import Workload, input_names


class Biased(nn.Module):
    """Attention with a learnt bias that is laid out for the whole batch, as Swin and BEiT have it."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(1, 2, 8, 8))

    def forward(self, x):
        q, k, v = (layer(x).view(-1, 8, 2, 8).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(x.shape[0], 2, 8, 8))
        return self.out(y.transpose(1, 2).contiguous().reshape(-1, 8, 16))


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_views_of_turned_tensors_are_exported():
    pytest.importorskip("onnxscript")
    from featherweight.onnx_graph import to_onnx

    model, x = Biased().eval(), torch.randn(2, 8, 16)
    network = to_onnx(model, Workload(model, (x,), [(x,)], lambda predict: 0.0))
    assert [value.name for value in network.graph.inputs] == list(input_names(model, (x,)))


class Masked(nn.Module):
    """Attention that leaves out what a mask of yes and no says."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, x, mask):
        q = x.view(-1, 8, 2, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=(mask > 0)[:, None, None].expand(x.shape[0], 2, 8, 8))
        return self.out(y.transpose(1, 2).contiguous().reshape(-1, 8, 16))


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_masked_attention_is_exported_without_a_guard_that_keeps_runtimes_from_fusing_it():
    ort = pytest.importorskip("onnxruntime")
    import onnx_ir

    from featherweight.onnx_graph import to_onnx

    x, mask = torch.randn(2, 8, 16), torch.tensor([[1.0] * 8, [1.0] * 3 + [0.0] * 5])
    model = Masked().eval()
    network = to_onnx(model, Workload(model, (x, mask), [(x, mask)], lambda predict: 0.0))
    assert not [node for node in network.graph if node.op_type == "IsNaN"]
    session = ort.InferenceSession(onnx_ir.to_proto(network).SerializeToString())
    run = lambda mask: torch.from_numpy(session.run(None, {"x": x.numpy(), "mask": mask.numpy()})[0])  # noqa: E731
    torch.testing.assert_close(run(mask), model(x, mask).detach(), rtol=1e-4, atol=1e-5)
    assert run(torch.zeros_like(mask)).isfinite().all()


class Guarded(nn.Module):
    """Weights of attention by hand, masked with −∞, where a row that is masked whole becomes zeros."""

    def forward(self, x, mask):
        weights = torch.softmax(x + torch.where(mask > 0, 0.0, float("-inf")), -1)
        return torch.where(weights.isnan(), 0.0, weights)


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_a_guard_that_is_needed_stays():
    ort = pytest.importorskip("onnxruntime")
    import onnx_ir

    from featherweight.onnx_graph import to_onnx

    x, mask = torch.randn(2, 8), torch.tensor([[1.0] * 3 + [0.0] * 5, [0.0] * 8])
    network = to_onnx(Guarded(), Workload(Guarded(), (x, mask), [(x, mask)], lambda predict: 0.0))
    session = ort.InferenceSession(onnx_ir.to_proto(network).SerializeToString())
    found = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), Guarded()(x, mask))
    assert not found[1].any()


class Placed(nn.Module):
    """Tokens and their places, which are always the same."""

    def __init__(self):
        super().__init__()
        self.token, self.place, self.out = nn.Embedding(300, 384), nn.Embedding(512, 384), nn.Linear(384, 8)
        self.register_buffer("places", torch.arange(512)[None])

    def forward(self, ids):
        return self.out(self.token(ids) + self.place(self.places[:, : ids.shape[1]]))


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("target", targets.installed())
def test_factors_of_what_is_always_the_same_are_computed_beforehand(target, tmp_path):
    """OpenVINO refuses a product of constants of 4 bits."""
    ids = torch.randint(0, 300, (4, 32))
    workload = Workload(Placed().eval(), (ids[:2],), [(ids,)], lambda predict: 0.0)
    steps = (FactorizeSvd(share=0.25, where="place"), QuantizeWeights(bits=4, block=32))
    model, _ = compress_model(Recipe(steps, target), workload)
    check_export(targets.find(target), model, workload, tmp_path)


def test_decoded_weights_are_no_product():
    pytest.importorskip("onnxscript")
    from featherweight.onnx_graph import to_onnx

    ids = torch.randint(0, 300, (4, 32))
    workload = Workload(Placed().eval(), (ids[:2],), [(ids,)], lambda predict: 0.0)
    steps = (FactorizeSvd(share=0.25, where="place"), QuantizeWeights(bits=4, block=32))
    model, _ = compress_model(Recipe(steps, "onnxruntime"), workload)
    graph = to_onnx(model, workload).graph
    assert [node.op_type for node in graph].count("MatMul") == 1
    assert [value.name for value in graph.initializers.values() if value.name.endswith("/computed")] == [
        "linear/computed"
    ]
    assert sum(value.dtype.name == "INT4" for value in graph.initializers.values()) == 2  # of tokens and the last
