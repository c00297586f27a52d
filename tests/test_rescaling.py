"""Scales of channels: where they can move without a change of the function, where not, and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.encodings import Masked
from featherweight.rescaling import move, read_with, seams
from featherweight.surgery import encode, encoding_of


class Net(nn.Module):
    """Layers `a` and `b`, more by name, and what is done with them."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class RootMeanSquare(nn.Module):
    """As transformers write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def conv(*sizes: int, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(*sizes, 3, padding=1, **settings)


def in_a_row(*between: nn.Module):
    return lambda m, x: m.b(nn.Sequential(*between)(m.a(x)))


IMAGE, ROWS, WORDS = (2, 4, 8, 8), (3, 4), (2, 5, 4)
# name: network, shape of its input, maker -> readers with their inputs a channel
MOVABLE = {
    "ReLU": (Net(in_a_row(nn.ReLU()), a=conv(4, 6), b=conv(6, 3)), IMAGE, {"a": {"b": 1}}),
    "nothing": (Net(in_a_row(), a=nn.Linear(4, 6), b=nn.Linear(6, 3)), ROWS, {"a": {"b": 1}}),
    "in place": (Net(in_a_row(nn.LeakyReLU(inplace=True)), a=conv(4, 6), b=conv(6, 3)), IMAGE, {"a": {"b": 1}}),
    "pooling": (Net(in_a_row(nn.MaxPool2d(2), nn.AvgPool2d(2)), a=conv(4, 6), b=conv(6, 3)), IMAGE, {"a": {"b": 1}}),
    "groups": (Net(in_a_row(nn.ReLU()), a=conv(4, 6, groups=2), b=conv(6, 9, groups=3)), IMAGE, {"a": {"b": 1}}),
    "depthwise": (Net(in_a_row(nn.ReLU()), a=conv(4, 6), b=conv(6, 12, groups=6)), IMAGE, {"a": {"b": 1}}),
    "flattened": (Net(in_a_row(nn.ReLU(), nn.Flatten()), a=conv(4, 6), b=nn.Linear(384, 3)), IMAGE, {"a": {"b": 64}}),
    "mean": (Net(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv(4, 6), b=nn.Linear(6, 3)), IMAGE, {"a": {"b": 1}}),
    "turned": (
        Net(lambda m, x: m.b(m.a(x).transpose(1, 2)), a=nn.Linear(4, 6), b=nn.Conv1d(6, 3, 3)), WORDS, {"a": {"b": 1}}),
    "rows of words": (
        Net(lambda m, x: m.b(m.a(x).reshape(-1, 6)), a=nn.Linear(4, 6), b=nn.Linear(6, 3)), WORDS, {"a": {"b": 1}}),
    "LayerNorm": (
        Net(lambda m, x: m.b(y := m.a(x)) * m.c(y), a=nn.LayerNorm(4), b=nn.Linear(4, 3), c=nn.Linear(4, 3)),
        WORDS, {"a": {"b": 1, "c": 1}}),
    "RMSNorm": (Net(in_a_row(), a=nn.RMSNorm(4), b=nn.Linear(4, 3)), WORDS, {"a": {"b": 1}}),
    "written out": (Net(in_a_row(), a=RootMeanSquare(4), b=nn.Linear(4, 3)), WORDS, {"a": {"b": 1}}),
    "BatchNorm": (Net(in_a_row(nn.ReLU()), a=nn.BatchNorm2d(4), b=conv(4, 3)), IMAGE, {"a": {"b": 1}}),
    "gated": (
        Net(lambda m, x: m.b(F.silu(m.gate(x)) * m.a(x)), gate=nn.Linear(4, 6), a=nn.Linear(4, 6), b=nn.Linear(6, 3)),
        ROWS, {"a": {"b": 1}}),
    "squeezed": (
        Net(lambda m, x: m.b((y := m.a(x)) * m.c(y.mean((2, 3), keepdim=True)).sigmoid()),
            a=conv(4, 6), b=conv(6, 3), c=nn.Conv2d(6, 6, 1)),
        IMAGE, {"a": {"b": 1, "c": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVABLE)
def test_scales_move_and_the_function_stays(name: str) -> None:
    net, shape, expected = MOVABLE[name]
    model = copy.deepcopy(net).double().eval()
    x = torch.randn(shape).double()
    wanted = model(x).detach()
    found = {seam.maker: seam for seam in seams(model, (x,)) if not seam.why_not}
    assert {maker: seam.readers for maker, seam in found.items()} == expected
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for seam in found.values():
        factors = 0.1 + 10 * torch.rand(len(read_with(model, seam))).double()
        ranges = read_with(model, seam)
        move(model, seam, factors)
        torch.testing.assert_close(read_with(model, seam), ranges * factors)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {*expected, *(reader for readers in expected.values() for reader in readers)}
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def tied() -> Net:
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    net.c.weight = net.b.weight
    return net


def ab(forward) -> Net:
    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))


FIXED = {
    "GELU": (ab(lambda m, x: m.b(F.gelu(m.a(x)))), "goes through gelu, which scales of channels do not pass"),
    "ReLU6": (ab(lambda m, x: m.b(F.relu6(m.a(x)))), "goes through relu6"),
    "addition": (ab(lambda m, x: m.b(m.a(x) + x)), "goes through add"),
    "read beside": (ab(lambda m, x: m.b(y := m.a(x)) + y), "goes through add"),
    "an output": (ab(lambda m, x: (m.b(y := m.a(x)), y)), "its output is an output of the network"),
    "square": (ab(lambda m, x: m.b((y := m.a(x)) * y)), "goes through mul"),
    "below a fraction": (ab(lambda m, x: m.b(x / m.a(x).clone())), "goes through div"),
    "expanded": (ab(lambda m, x: m.b(m.a(x[:, None]).expand(-1, 4, -1).transpose(1, 2))), "goes through expand"),
    "over channels": (ab(lambda m, x: m.b(m.a(x).mean(1, keepdim=True) * x)), "goes through mean"),
    "attention": (
        ab(lambda m, x: m.b(F.scaled_dot_product_attention(x[:, None], x[:, None], m.a(x)[:, None])[:, 0])),
        "goes through scaled_dot_product_attention"),
    "read twice": (ab(lambda m, x: m.b(m.a(x)) + m.b(x)), "whose weight is shared, computed or called twice"),
    "tied": (tied(), "whose weight is shared"),
    "nobody": (ab(lambda m, x: m.b(x + 0 * m.a(x).shape[0])), "nothing reads its channels"),
    "a batch norm": (
        Net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), n=nn.BatchNorm1d(4)),
        "a batch norm follows it: put fold_batchnorm before this step"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_where_the_function_would_change_the_reason_is_said(name: str) -> None:
    net, why = FIXED[name]
    found = {seam.maker: seam.why_not for seam in seams(net.eval(), (torch.randn(3, 4),))}
    assert why in found["a"]


def test_weights_that_are_computed_are_not_touched() -> None:
    net = ab(lambda m, x: m.b(m.a(x)))
    nn.utils.parametrizations.weight_norm(net.b)
    found = {seam.maker: seam.why_not for seam in seams(net.eval(), (torch.randn(3, 4),))}
    assert "b" not in found
    assert "whose weight is shared, computed" in found["a"]


def test_zeros_stay_zeros() -> None:
    net = ab(lambda m, x: m.b(m.a(x).relu())).eval()
    x = torch.randn(3, 4)
    for layer in (net.a, net.b):
        encode(layer, Masked(layer.weight, torch.rand(4, 4) > 0.5))
    wanted, masks = net(x), [encoding_of(layer).mask for layer in (net.a, net.b)]
    seam = next(seam for seam in seams(net, (x,)) if seam.maker == "a")
    move(net, seam, torch.tensor([0.1, 1.0, 5.0, 30.0]))
    for layer, mask in zip((net.a, net.b), masks, strict=True):
        assert isinstance(encoding_of(layer), Masked)
        assert torch.equal(encoding_of(layer).mask, mask)
    torch.testing.assert_close(net(x), wanted)
