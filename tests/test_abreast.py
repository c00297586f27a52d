"""Runs side by side: every layer is met once, with what all batches bring to it."""

import gc

import pytest
import torch
from torch import nn

from featherweight.abreast import _Run, abreast


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def watched(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


BATCHES = [(torch.full((size, 4), float(size)),) for size in (1, 3, 2)]


def test_each_layer_comes_once_with_what_it_reads_in_each_batch():
    model = network()
    found = [(name, inputs) for name, inputs in abreast(model, watched(model), BATCHES)]
    assert [name for name, _ in found] == ["0", "2", "4"]
    for stage, (_, inputs) in enumerate(found):
        for (batch,), x in zip(BATCHES, inputs, strict=True):
            assert torch.equal(x, model[: 2 * stage](batch))
            assert not x.requires_grad


def test_what_is_done_to_a_layer_in_its_turn_is_what_runs():
    model, read = network(), {}
    for name, inputs in abreast(model, watched(model), BATCHES):
        read[name] = inputs
        model.get_submodule(name).weight.data.zero_()
    assert torch.equal(read["2"][1], torch.tanh(model[0].bias).expand(3, 4))


class Longer(nn.Module):
    """Calls its second layer for batches of several rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.c(self.b(x) if len(x) > 1 else x)


def test_batches_that_take_different_ways_all_arrive():
    model = Longer()
    found = [(name, [len(x) for x in inputs]) for name, inputs in abreast(model, watched(model), BATCHES)]
    assert found == [("a", [1, 3, 2]), ("c", [1]), ("b", [3, 2]), ("c", [3, 2])]


class Moody(nn.Module):
    """Calls its second layer with gradients recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        with torch.enable_grad():
            self.recorded = self.b(x).requires_grad
        return self.b(x)


def test_runs_do_not_meddle_with_what_others_record():
    model, modes = Moody(), []
    for _ in abreast(model, watched(model), BATCHES):
        modes.append((torch.is_grad_enabled(), getattr(model, "recorded", None)))
    assert modes == [(True, None), (True, None), (True, True)]
    assert torch.is_grad_enabled()


def left_behind() -> list[_Run]:
    """Runs that have begun and not ended."""
    gc.collect()
    return [run for run in gc.get_objects() if type(run) is _Run and run]


def test_who_stops_asking_ends_all_runs():
    model = network()
    runs = abreast(model, watched(model), BATCHES)
    next(runs)
    assert len(left_behind()) == 3
    runs.close()
    assert not left_behind()
    assert not model[0]._forward_pre_hooks


def test_what_the_network_raises_is_raised_and_no_run_is_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        list(abreast(model, watched(model), BATCHES))
    assert not left_behind()
