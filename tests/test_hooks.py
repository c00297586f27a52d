"""Hooks: what layers read and return is seen as it was, and no hook is left behind."""

import pytest
import torch
from torch import nn

from featherweight import hooks


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))).eval()


def test_watching_sees_every_first_input_and_leaves_no_hook():
    net, seen = model(), []
    batches = [(torch.randn(2, 4),), (torch.randn(3, 4),)]
    layers = {name: net.get_submodule(name) for name in ("0", "2.1")}
    hooks.watch_inputs(net, layers, batches, lambda name, x: seen.append((name, tuple(x.shape), x.requires_grad)))
    assert seen == [("0", (2, 4), False), ("2.1", (2, 8), False), ("0", (3, 4), False), ("2.1", (3, 8), False)]
    with pytest.raises(ZeroDivisionError):
        hooks.watch_inputs(net, layers, batches, lambda name, x: 1 / 0)
    assert not any(module._forward_pre_hooks for module in net.modules())


class InPlace(nn.Module):
    """A layer whose output is changed in place afterwards, and one that returns a tuple and one that returns whole
    numbers."""

    class Pair(nn.Linear):
        def forward(self, x):
            return None, (super().forward(x), 7)

    class Whole(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.pair, self.whole = (
            nn.Linear(4, 4),
            nn.ReLU(inplace=True),
            self.Pair(4, 4),
            self.Whole(),
        )

    def forward(self, x):
        _, (y, _) = self.pair(self.relu(self.first(x)))
        return y + self.whole(y)[:, None]


@pytest.mark.parametrize("gradients", [True, False])
def test_watched_outputs_are_those_that_were_returned(gradients):
    net, x = InPlace().eval(), torch.randn(5, 4)
    with torch.set_grad_enabled(gradients), hooks.watch_outputs(net, ["first", "pair", "whole"]) as seen:
        net(x)
        assert list(seen) == ["first", "pair"]
        assert torch.equal(seen["first"], net.first(x)) and (seen["first"] < 0).any()
        assert torch.equal(seen["pair"], net.pair(seen["first"].relu())[1][0])
        assert all(value.requires_grad is gradients for value in seen.values())
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError, match="shapes"), hooks.watch_outputs(net, ["first"]):
        net(x[:, 1:])
    assert not net.first._forward_hooks


def test_watched_outputs_carry_gradients_even_behind_frozen_layers():
    net, x = InPlace().eval().requires_grad_(False), torch.randn(5, 4)
    with hooks.watch_outputs(net, ["first"]) as seen:
        y = net(x)
    (gradient,) = torch.autograd.grad(y.sum(), seen["first"])
    assert torch.equal(gradient, net.pair.weight.sum(0) * (seen["first"] > 0))


def test_outputs_and_inner_values_know_who_returned_them():
    net, x = model(), torch.randn(3, 4)
    (y, source), *rest = hooks.returned_by(net, (x,))
    assert torch.equal(y, net(x)) and source is net[2][1] and not rest
    assert hooks.returning_outputs(net, (x,)) == {"2", "2.1"}
    assert {name: value.shape[1] for name, value in hooks.returned_inside(net, (x,)).items()} == {
        "0": 8, "1": 8, "2.0": 8, "2.1": 2, "2": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.Conv1d(2, 3, 1), (4, 3, 5), 1),
        (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), (4, 3, 5, 5), 1),
        (nn.ReLU(), (4, 3, 5, 5), 1),
        (nn.Linear(2, 3), (4, 5, 5, 3), 3),
        (nn.Embedding(2, 3), (4, 5, 3), 2),
        (nn.Linear(2, 3), (4, 3), 1),
    ],
)
def test_channels_are_where_the_layer_puts_them(layer, shape, dim):
    assert hooks.channel_dim(layer, torch.zeros(shape)) == dim
