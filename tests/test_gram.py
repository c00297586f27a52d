"""What layers read: rows that times the weight are the outputs, sums over them, and the order of layers."""

import pytest
import torch
from torch import nn

from featherweight.errors import WorkloadError
from featherweight.gram import Gram, grams, reading_order, rows_read, sampled
from featherweight.workload import Workload

EVERYTHING = 1 << 30


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


LAYERS = [
    (nn.Linear(6, 8, bias=False), (5, 6)),
    (nn.Linear(6, 8, bias=False), (2, 3, 6)),
    (nn.Linear(6, 8, bias=False), (6,)),
    (nn.Conv1d(4, 8, 3, stride=2, padding=1, bias=False), (3, 4, 11)),
    (nn.Conv1d(4, 8, 3, groups=2, dilation=2, bias=False), (3, 4, 11)),
    (nn.Conv2d(4, 8, (3, 5), padding="same", dilation=(1, 2), bias=False), (2, 4, 6, 5)),
    (nn.Conv2d(4, 8, (3, 2), padding="same", padding_mode="circular", bias=False), (2, 4, 6, 5)),
    (nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode="reflect", bias=False), (2, 4, 6, 5)),
    (nn.Conv2d(4, 4, 3, stride=(2, 1), groups=4, bias=False), (2, 4, 6, 5)),
    (nn.Conv2d(4, 8, 3, padding="valid", bias=False), (4, 6, 5)),
    (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 2), dilation=(1, 2, 1), bias=False), (2, 2, 3, 5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_rows_times_the_weight_are_what_the_layer_says(layer, shape):
    x = torch.randn(shape)
    rows = rows_read(layer, x, EVERYTHING, rng())
    weight = layer.weight.flatten(1)
    said = rows @ weight.view(len(rows), -1, weight.shape[1]).transpose(1, 2)
    wanted = layer(x)
    if isinstance(layer, nn.Linear):
        wanted = wanted.reshape(1, -1, len(weight))
    else:
        whole = wanted if wanted.dim() == x.dim() == layer.weight.dim() else wanted.unsqueeze(0)
        wanted = whole.movedim(1, -1).reshape(-1, len(rows), len(weight) // len(rows)).transpose(0, 1)
    torch.testing.assert_close(said, wanted)


def test_samples_are_rows_that_there_are_without_repeats():
    x = torch.arange(60.0).view(4, 5, 3)
    found = sampled(x, 2, 12, rng())
    assert found.shape == (12, 3)
    assert len({tuple(row) for row in found.tolist()}) == 12
    assert {tuple(row) for row in found.tolist()} <= {tuple(row) for row in x.view(20, 3).tolist()}


def test_sums_over_several_calls_are_those_over_all_rows():
    layer, x = nn.Linear(6, 3), torch.randn(40, 6)
    gram = Gram(EVERYTHING)
    for part in x.split(16):
        gram.add(layer, part)
    torch.testing.assert_close(gram.mean(), (x.T @ x / 40).unsqueeze(0))
    torch.testing.assert_close(gram.magnitude(), x.abs().mean(0, keepdim=True))


def workload_of(model: nn.Module, *batches: torch.Tensor) -> Workload:
    return Workload(model.eval(), (batches[0][:1],), [(batch,) for batch in batches], lambda predict: 0.0)


class Counted(nn.Module):
    """Says how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


def test_a_run_ends_where_all_has_been_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Counted())
    workload = workload_of(model, torch.randn(8, 4), torch.randn(8, 4))
    short = grams(model, {"0": model[0]}, workload, {"0": 1})
    assert model[2].calls == 0
    whole = grams(model, {"0": model[0]}, workload)
    assert model[2].calls == 2
    assert torch.equal(short["0"].mean(), whole["0"].mean())
    assert not model[0]._forward_pre_hooks


class Attention(nn.Module):
    """Three layers that read one tensor, one that reads what they say, one that is called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out, self.query, self.value, self.twice, self.never = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(self.query(x) @ self.key(x).transpose(0, 1), -1) @ self.value(x)
        return self.twice(self.twice(self.out(y)))


def test_layers_that_read_the_same_tensor_stand_together_in_the_order_of_calls():
    model = Attention()
    order, calls = reading_order(model, dict(model.named_children()), (torch.randn(3, 8),))
    assert order == [["query", "key", "value"], ["out"], ["twice"]]
    assert calls == {"query": 1, "key": 1, "value": 1, "out": 1, "twice": 2}


def test_memory_that_is_used_again_is_another_tensor():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    order, _ = reading_order(model, dict(model.named_children()), (torch.randn(3, 8),))
    assert order == [[str(i)] for i in range(12)]


def test_inputs_that_are_no_numbers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(WorkloadError, match=r"'0' read NaN or infinite .* where: '!0'"):
        grams(model, dict(model.named_children()), workload_of(model, torch.full((2, 4), torch.nan)))
