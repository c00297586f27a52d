from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from featherweight.replay import record, replay


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
    replay(other, kept, ["last"])
    with torch.no_grad():
        other.last.bias.add_(1.0)
        for _ in range(2):  # what the operator behind wrote to is not what the next run begins with
            torch.testing.assert_close(other(x), net(x) + 1.0)
    behind = ruined(net, "last")
    replay(behind, kept, ["first"])
    assert behind(x).isnan().all()


def test_a_layer_that_is_called_again_after_the_one_that_changes_is_computed(net, tmp_path):
    x = torch.randn(4, 8)
    other = ruined(net, "twice")
    replay(other, recorded(net, x, tmp_path), ["last"])
    assert other(x).isnan().all()


def test_inputs_of_another_shape_are_computed(net, tmp_path):
    other = copy.deepcopy(net)
    replay(other, recorded(net, torch.randn(4, 8), tmp_path), ["last"])
    x = torch.randn(2, 8)
    torch.testing.assert_close(other(x), net(x))


def test_nothing_is_replayed_for_a_layer_that_was_never_called(net, tmp_path):
    net.idle = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    other = ruined(net, "first")
    replay(other, record(net, (*NAMES, "idle"), lambda: net(x), tmp_path), ["idle", "last"])
    assert other(x).isnan().all()


def test_copies_of_a_network_that_replays_replay_too(net, tmp_path):
    x = torch.randn(4, 8)
    other = ruined(net, "first")
    replay(other, recorded(net, x, tmp_path), ["last"])
    torch.testing.assert_close(copy.deepcopy(other)(x), net(x))
