"""Layers that int8 harms: known because one was made so."""

from __future__ import annotations

import torch
from torch import nn

from featherweight.fragile import worst_first
from featherweight.recipe import Recipe, compress_model
from featherweight.workload import Workload


class Loud(nn.Module):
    """Four layers, the third of which reads one value that is a thousand times as large as all others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.loud, self.last = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        loud = torch.cat([x[:, :-1], 1000 + 0 * x[:, -1:]], 1)
        return self.last(torch.tanh(self.loud(loud) - 1000 * self.loud.weight[:, -1]))


def test_the_layer_that_int8_harms_most_comes_first():
    torch.manual_seed(0)
    model, x = Loud().eval(), torch.randn(64, 16)
    workload = Workload(model, (x,), [(x,)], lambda predict: 0.0)
    rounded, _ = compress_model(
        Recipe.from_yaml("{steps: [quantize_static: {range: minmax}], target: torch}"), workload
    )
    before = rounded(x)
    found = worst_first(rounded, model, workload)
    assert found[0] == "loud" and set(found) <= {"first", "second", "loud", "last"}
    assert torch.equal(rounded(x), before)  # all is put back
    assert worst_first(model, model, workload) == []
