"""Surgery: finding layers, changing them, watching them, tracing them."""

import copy

import pytest
import torch
from torch import nn

from featherweight import surgery
from featherweight.encodings import Affine, InputQuantizer, Masked, affine_scale
from featherweight.errors import ExportError, LayerError, RecipeError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))).eval()


def encode8(layer: nn.Module) -> None:
    surgery.encode(layer, Affine(layer.weight, affine_scale(layer.weight, 8, 0), bits=8))


# ------------------------------------------------------------------------------------------------ coverage


def test_coverage_collects_inside_the_block_only():
    surgery.done("a", "lost")
    with surgery.recording() as coverage:
        surgery.done("a", "folded")
        with surgery.recording() as inner:
            surgery.left("b", "too small")
        surgery.left("c", "shared")
    surgery.done("a", "lost")
    assert coverage.as_rows() == [{"layer": "a", "done": "folded"}, {"layer": "c", "skipped": "shared"}]
    assert inner.left == [("b", "too small")]


# ------------------------------------------------------------------------------------------------ selecting


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("*", ["0", "2.0", "2.1"]),
        ("2.*", ["2.0", "2.1"]),
        ("!2.1", ["0", "2.0"]),
        ("0, 2.1", ["0", "2.1"]),
        ("2.*,!*.0", ["2.1"]),
    ],
)
def test_select_takes_patterns(where, chosen):
    assert list(surgery.select(model(), where, (nn.Linear,))) == chosen


@pytest.mark.parametrize(
    ("where", "kinds", "message"),
    [
        (
            "blocks.*",
            (nn.Linear,),
            "where='blocks.*' matches none of the 3 Linear layers of Sequential. They are: 0, 2.0, 2.1.",
        ),
        ("*", (nn.Conv2d,), "matches none of the 0 Conv2d layers of Sequential. There are none: leave this step out."),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_there_is(where, kinds, message):
    with pytest.raises(LayerError) as error:
        surgery.select(model(), where, kinds)
    assert message in str(error.value)


def test_long_lists_are_cut():
    with pytest.raises(LayerError, match=r"18, 19 and 5 more\."):
        surgery.select(nn.Sequential(*[nn.Linear(1, 1) for _ in range(25)]), "x", (nn.Linear,))


# ------------------------------------------------------------------------------------------------ changing


def test_replace_reaches_nested_layers():
    net = model()
    surgery.replace(net, "2.0", nn.Identity())
    assert isinstance(net[2][0], nn.Identity)


def test_encodings_are_found_by_the_name_of_their_tensor():
    net = model()
    encode8(net[0])
    encode8(net[2][1])
    assert list(surgery.encodings(net)) == ["0.weight", "2.1.weight"]
    assert list(surgery.encodings(net[0])) == ["weight"]
    assert surgery.encoding_of(net[2][0]) is None
    assert isinstance(net[0], nn.Linear)


def test_encoding_again_replaces_what_was_stored():
    net = model()
    surgery.encode(net[0], Masked(net[0].weight, net[0].weight > 0))
    zeros = net[0].weight == 0
    encode8(net[0])
    assert list(surgery.encodings(net)) == ["0.weight"]
    assert isinstance(surgery.encoding_of(net[0]), Affine)
    assert bool((net[0].weight[zeros] == 0).all())
    assert not any("values" in name for name in net.state_dict())


def test_rounding_twice_is_refused():
    net = model()
    encode8(net[0])
    with pytest.raises(RecipeError, match=r"quantize_x would quantize '0'.*int8 per channel.*where: '!0'"):
        surgery.refuse_quantized(surgery.select(net, "*", (nn.Linear,)), "quantize_x")
    surgery.refuse_quantized(surgery.select(net, "!0", (nn.Linear,)), "quantize_x")


def test_input_quantizers_are_applied_once_and_copied_with_the_layer():
    net, x = model(), torch.rand(3, 4)
    surgery.quantize_input(net[0], InputQuantizer(0.0, 0.1))
    surgery.quantize_input(net[0], InputQuantizer(0.0, 0.5))  # takes the first one's place
    wanted = nn.functional.linear(surgery.input_quantizer(net[0])(x), net[0].weight, net[0].bias)
    assert torch.equal(net[0](x), wanted)
    assert torch.equal(copy.deepcopy(net)[0](x), wanted)
    assert len(net[0]._forward_pre_hooks) == 1
    assert surgery.input_quantizer(net[2][0]) is None


def test_thawed_freezes_again_whatever_happens():
    net = model()
    encode8(net[0])
    before = net[0].weight.clone()
    with pytest.raises(ZeroDivisionError), surgery.thawed(net):  # noqa: PT012
        assert surgery.encoding_of(net[0]).latent.requires_grad
        raise ZeroDivisionError
    assert surgery.encoding_of(net[0]).latent is None
    assert torch.equal(net[0].weight, before)


# ------------------------------------------------------------------------------------------------ watching


def test_watching_sees_every_first_input_and_leaves_no_hook():
    net, seen = model(), []
    batches = [(torch.randn(2, 4),), (torch.randn(3, 4),)]
    layers = surgery.select(net, "0, 2.1", (nn.Linear,))
    surgery.watch_inputs(net, layers, batches, lambda name, x: seen.append((name, tuple(x.shape), x.requires_grad)))
    assert seen == [("0", (2, 4), False), ("2.1", (2, 8), False), ("0", (3, 4), False), ("2.1", (3, 8), False)]
    with pytest.raises(ZeroDivisionError):
        surgery.watch_inputs(net, layers, batches, lambda name, x: 1 / 0)
    assert not any(module._forward_pre_hooks for module in net.modules())


# ------------------------------------------------------------------------------------------------ tracing


@pytest.mark.parametrize("batch", [(torch.randn(1, 4),), (torch.randn(2, 4),)])
def test_a_trace_takes_any_batch(batch):
    net = model()
    program = surgery.trace(net, batch)
    for size in (1, 2, 7):
        x = torch.randn(size, 4)
        torch.testing.assert_close(program.module()(x), net(x))


def test_keyword_batches_are_traced_by_keyword():
    class Named(nn.Module):
        def forward(self, a, b):
            return a - b

    program = surgery.trace(Named(), {"a": torch.ones(1, 3), "b": torch.zeros(1, 3)})
    assert torch.equal(program.module()(a=torch.zeros(5, 3), b=torch.ones(5, 3)), -torch.ones(5, 3))


def test_what_cannot_be_traced_says_why():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, 4) + torch.zeros(2, 4)

    for net in (Branches(), Fixed()):
        with pytest.raises(
            ExportError, match=f"{type(net).__name__} cannot be traced with a free batch size.*torch.where"
        ):
            surgery.trace(net, (torch.randn(2, 4),))
