from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from featherweight.replay import record, replaying


class Layers(nn.Module):
    """One layer behind the other, one of them twice, one beside them, and an operator that writes to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.beside, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu_()
        return self.last(self.twice(self.twice(h)) + self.beside(x))


NAMES = ("first", "twice", "beside", "last")


@pytest.fixture
def net() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def recorded(net, x, folder):
    return record(net, NAMES, lambda: net(x), folder)


def ruined(net, *names):
    """A copy in which some layers return what is no number, wherever they are computed."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name in names:
            other.get_submodule(name).weight.fill_(float("nan"))
    return other


def test_what_comes_before_returns_what_it_returned_and_what_comes_behind_is_computed(net, tmp_path):
    x = torch.randn(4, 8)
    kept = recorded(net, x, tmp_path)
    other = ruined(net, "first", "beside")
    with replaying(other, kept, ["last"]), torch.no_grad():
        other.last.bias.add_(1.0)
        for _ in range(2):  # what the operator behind wrote to is not what the next run begins with
            torch.testing.assert_close(other(x), net(x) + 1.0)
    behind = ruined(net, "last")
    with replaying(behind, kept, ["first"]):
        assert behind(x).isnan().all()
    assert other(x).isnan().all()  # afterwards all is computed


def test_a_layer_that_is_called_again_after_the_one_that_changes_is_computed(net, tmp_path):
    x = torch.randn(4, 8)
    other = ruined(net, "twice")
    with replaying(other, recorded(net, x, tmp_path), ["last"]):
        assert other(x).isnan().all()


def test_inputs_of_another_shape_are_computed(net, tmp_path):
    other = copy.deepcopy(net)
    x = torch.randn(2, 8)
    with replaying(other, recorded(net, torch.randn(4, 8), tmp_path), ["last"]):
        torch.testing.assert_close(other(x), net(x))


def test_nothing_is_replayed_for_a_layer_that_was_never_called(net, tmp_path):
    net.idle = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    other = ruined(net, "first")
    kept = record(net, (*NAMES, "idle"), lambda: net(x), tmp_path)
    for throughout in (False, True):
        with replaying(other, kept, ["idle", "last"], throughout=throughout):
            assert other(x).isnan().all()


def test_throughout_all_others_return_what_they_returned_and_the_layer_reads_what_it_read(net, tmp_path):
    x = torch.randn(4, 8)
    kept = recorded(net, x, tmp_path)
    read = []
    for name in ("beside", "twice"):
        other = ruined(net, "first", "last")
        module = other.get_submodule(name)
        module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        with replaying(other, kept, [name], throughout=True):
            assert not other(x).isnan().any()
    h = net.first(x).relu()
    for found, wanted in zip(read, (x, h, net.twice(h)), strict=True):
        torch.testing.assert_close(found, wanted)
