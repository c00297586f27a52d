"""Networks that the exporter alone cannot translate."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
