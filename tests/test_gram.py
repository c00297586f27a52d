"""What layers read: rows that times the weight are the outputs, sums over them, and the order of layers."""

import pytest
import torch
from torch import nn

from featherweight.errors import WorkloadError
from featherweight.gram import Gram, grams, grams_in_turn, rows_read, sampled
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


def test_one_run_for_each_batch_does_for_all_layers_and_ends_with_the_last_of_them():
    model = nn.Sequential(Counted(), nn.Linear(4, 4), nn.Linear(4, 4), Counted())
    workload = workload_of(model, torch.randn(8, 4), torch.randn(8, 4))
    found = list(grams_in_turn(model, [{"2": model[2]}, {"1": model[1]}], workload))
    assert [list(group) for group, _ in found] == [["1"], ["2"]]
    assert (model[0].calls, model[3].calls) == (3, 1)  # the example counts uses
    together = grams(model, {"1": model[1], "2": model[2]}, workload)
    for group, gram in found:
        torch.testing.assert_close(gram.mean(), together[next(iter(group))].mean())
    assert not model[1]._forward_pre_hooks


def test_later_layers_read_what_was_done_to_earlier_ones():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    workload = workload_of(model, torch.randn(8, 4), torch.randn(8, 4))
    seen = {}
    for group, gram in grams_in_turn(model, [{"0": model[0]}, {"1": model[1]}], workload):
        for name, layer in group.items():
            layer.weight.data.mul_(2)
            seen[name] = gram.mean()
    torch.testing.assert_close(seen["1"], grams(model, {"1": model[1]}, workload)["1"].mean())


class Attention(nn.Module):
    """Three layers that read one tensor, one that reads what they say, two that share a weight, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out, self.query, self.value, self.first, self.second, self.never = (
            nn.Linear(8, 8) for _ in range(7)
        )
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(self.query(x) @ self.key(x).transpose(0, 1), -1) @ self.value(x)
        return self.second(self.first(self.first(self.out(y))))


def test_a_weight_that_is_used_several_times_comes_with_the_last_use_and_all_that_it_read():
    model = Attention()
    workload = workload_of(model, torch.randn(3, 8), torch.randn(5, 8))
    layers = dict(model.named_children())
    shared = {name: layers.pop(name) for name in ("first", "second")}
    found = list(grams_in_turn(model, [*({name: layer} for name, layer in layers.items()), shared], workload))
    assert [list(group) for group, _ in found] == [["query"], ["key"], ["value"], ["out"], ["first", "second"]]
    together = grams(model, dict(model.named_children()), workload)
    counts = {name: gram.count for name, gram in together.items()}
    assert found[-1][1].count == counts["first"] + counts["second"] == 24
    both = sum(together[name].mean() * counts[name] for name in shared) / 24
    torch.testing.assert_close(found[-1][1].mean(), both)


def test_what_layers_read_alike_is_summed_once(monkeypatch):
    model, sums = Attention(), []
    add = Gram.add
    monkeypatch.setattr(Gram, "add", lambda gram, layer, x: (sums.append(layer), add(gram, layer, x)))
    workload = workload_of(model, torch.randn(3, 8))
    groups = [{name: model.get_submodule(name)} for name in ("query", "key", "value", "out")]
    found = {next(iter(group)): gram for group, gram in grams_in_turn(model, groups, workload)}
    assert sums == [model.query, model.out]
    assert found["query"] is found["value"]


def test_inputs_that_are_no_numbers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(WorkloadError, match=r"'0' read NaN or infinite .* where: '!0'"):
        grams(model, dict(model.named_children()), workload_of(model, torch.full((2, 4), torch.nan)))
