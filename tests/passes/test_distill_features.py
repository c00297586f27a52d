"""Distillation of inner layers: it reaches the middle of deep networks, at other widths too."""

import copy

import pytest
import torch
from torch import Tensor, nn

from featherweight.encodings import Affine, Masked
from featherweight.errors import LayerError
from featherweight.hooks import watch_outputs
from featherweight.losses import relative_error
from featherweight.passes import Pass
from featherweight.passes.distill_features import DistillFeatures, attention, least_squares, projected, relations
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.drop_layers import DropLayers
from featherweight.passes.fold_batchnorm import FoldBatchnorm
from featherweight.passes.prune_channels import PruneChannels
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import Block, Coverage, encoding_of, recording, without
from featherweight.testing import networks, state
from featherweight.workload import Workload, call

KINDS = ("values", "attention", "relations")


class Layer(nn.Module):
    """(n, 4, c) to the same: two linear layers, with nothing passing by them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.narrow(torch.tanh(self.wide(x))))


class Deep(nn.Module):
    """(n, 4, 8) to (n, 4, 5): six layers one after the other, at each of four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 24), nn.Linear(24, 5)
        self.layers = nn.Sequential(*(Layer(24) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)))


def deep(seed: int) -> Workload:
    """With weights that keep the size of what passes through."""
    rng = torch.Generator().manual_seed(seed)
    net = Deep().eval()
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = 1.3 * torch.randn(layer.weight.shape, generator=rng) / layer.in_features**0.5
            layer.bias.data.zero_()
    net.head.weight.data.mul_(3)
    x = torch.randn(16, 16, 4, 8, generator=rng)
    return Workload(net, (x[0],), [(part,) for part in x[:4]], lambda predict: 0.0, train=[(part,) for part in x])


def error(student: nn.Module, data: Workload) -> float:
    """Of the outputs on inputs that nobody has seen, over that of guessing their mean."""
    x = torch.randn(250, 4, 8, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float(relative_error(student(x), data.model(x)))


def taught(data: Workload, *steps: Pass, seed: int = 0) -> tuple[nn.Module, Coverage]:
    return compress_model(Recipe(steps, "torch"), data, seed)


# ------------------------------------------------------------------------------------------------ mathematics


def test_a_projection_works_at_each_position_alike():
    values, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 3)
    assert torch.allclose(
        projected(values, weight, 1), nn.functional.conv2d(values, weight[:, :, None, None]), atol=1e-5
    )
    last = torch.randn(2, 4, 3)
    assert torch.allclose(projected(last, weight, 2), nn.functional.linear(last, weight), atol=1e-5)


def test_least_squares_find_what_was_projected_and_channels_that_are_always_zero_do_no_harm():
    student, weight = torch.randn(20, 3, 4), torch.randn(5, 3)
    found = least_squares(student, projected(student, weight, 1), 1)
    assert torch.allclose(found, weight, atol=1e-2)
    student[:, 1] = 0
    found = least_squares(student, projected(student, weight, 1), 1)
    assert found.isfinite().all() and torch.allclose(found[:, ::2], weight[:, ::2], atol=1e-2)


def test_attention_and_relations_do_not_see_width_or_size():
    """Channels that are turned among one another, doubled or all made larger say the same."""
    x, turned = torch.randn(4, 6, 5), torch.linalg.qr(torch.randn(6, 6)).Q
    for other in (projected(x, turned, 1), torch.cat([x, x], 1), 3 * x):
        assert torch.allclose(attention(x, 1), attention(other, 1), atol=1e-5)
        assert torch.allclose(relations(x), relations(other), atol=1e-5)


def test_the_mathematics_of_the_papers():
    x = torch.randn(3, 2, 4)
    q = x.square().sum(1)
    assert torch.allclose(attention(x, 1), q / q.norm(dim=1, keepdim=True))
    g = x.flatten(1) @ x.flatten(1).T
    assert torch.allclose(relations(x), g / g.norm(dim=1, keepdim=True))


# ------------------------------------------------------------------------------------------------ what it is for

MIDDLE = "layers.1.*, layers.2.*, layers.3.*, layers.4.*"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_mends_the_middle_of_a_deep_network_in_fewer_steps_than_outputs_alone(seed):
    data = deep(seed)
    broken = PruneMagnitude(share=0.8, where=MIDDLE)
    soft, _ = taught(data, broken, DistillSoft(epochs=4), seed=seed)
    inner, _ = taught(data, broken, DistillFeatures(epochs=4), seed=seed)
    assert error(inner, data) < 0.9 * error(soft, data)


def test_what_is_too_broken_to_become_the_same_inside_is_better_left_to_its_outputs():
    data, broken = deep(3), PruneMagnitude(share=0.9, where=MIDDLE)
    soft, inner = (taught(data, broken, step)[0] for step in (DistillSoft(epochs=2), DistillFeatures(epochs=2)))
    assert error(inner, data) > 1.1 * error(soft, data)


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "float32") for kind in KINDS), ("values", "bfloat16")])
def test_a_narrower_network_learns_from_a_wider_one(kind, precision):
    """Widths differ inside and at the places that are compared."""
    data = networks()["residual"]
    distillation = DistillFeatures(epochs=10, kind=kind, precision=precision)
    model, coverage = taught(data, PruneChannels(share=0.5, allocation="uniform"), distillation)
    assert model.stem[0].out_channels < 16 and model.shortcut[0].out_channels < 32
    assert coverage.done[-1][1].startswith(f"distilled 40 steps (kl, {kind} of stem, shortcut), loss ")
    first, last = (float(value) for value in coverage.done[-1][1].rpartition("loss ")[2].split(" → "))
    assert last < 0.95 * first
    assert {name for name, _ in model.named_modules()} <= {name for name, _ in data.model.named_modules()}


def test_a_projection_begins_as_a_fit_even_where_batch_norms_are_out_of_tune():
    """As they are once channels are gone: by their statistics nothing reaches the layers that are compared."""
    data = networks()["residual"]
    student, _ = taught(data, PruneChannels(share=0.5))
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(1e6)
    with recording() as coverage:
        DistillFeatures(steps=1, weight=1000.0).apply(student, data)
    assert float(coverage.done[0][1].split()[-1]) < 1.1 * 1000


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compared_becomes_alike(kind):
    """With no weight on inner layers, they differ more."""
    data = deep(0)
    compare = {
        "values": relative_error,
        "attention": lambda a, b: relative_error(attention(a, 2), attention(b, 2)),
        "relations": lambda a, b: relative_error(relations(a), relations(b)),
    }[kind]

    def inner_error(weight: float) -> float:
        step = DistillFeatures(epochs=6, kind=kind, weight=weight, layers="layers.3")
        student, _ = taught(data, PruneMagnitude(share=0.8, where=MIDDLE), step)
        x = data.calibration[0][0]
        with torch.no_grad():
            return float(compare(*(net.layers[:4](net.stem(x)) for net in (student, data.model))))

    assert inner_error(10.0) < 0.8 * inner_error(0.0)


# ------------------------------------------------------------------------------------------------ what it keeps


@pytest.mark.parametrize("kind", ["values", "relations"])
def test_masks_and_grids_stay_and_nothing_is_left_behind(kind):
    data = networks()["stacked"]
    before = state(data.model)
    steps = (
        PruneMagnitude(share=0.7, where="blocks.0.*"),
        QuantizeWeights(bits=4, where="blocks.1.*"),
        QuantizeStatic(where="blocks.2.*"),
    )
    untaught, _ = taught(data, *steps)
    model, _ = taught(data, *steps, DistillFeatures(epochs=10, lr=0.03, kind=kind))
    assert state(data.model) == before
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in untaught.named_parameters()]
    assert not any(module._forward_hooks for module in model.modules())
    pruned, rounded = (net.blocks[0].up for net in (model, untaught))
    assert isinstance(encoding_of(pruned), Masked) and torch.equal(pruned.weight == 0, rounded.weight == 0)
    for index in (1, 2):
        ours, theirs = (encoding_of(net.blocks[index].up) for net in (model, untaught))
        assert isinstance(ours, Affine) and torch.equal(ours.scale, theirs.scale)
        assert not torch.equal(ours.decode(), theirs.decode())


# ------------------------------------------------------------------------------------------------ which layers


def compared(data: Workload, *steps: Pass, **settings) -> tuple[str, dict[str, str]]:
    """The layers that are said to be compared, and those that are not with the reason."""
    model, _ = taught(data, *steps)
    with recording() as coverage:
        DistillFeatures(steps=1, **settings).apply(model, data)
    return coverage.done[0][1].partition(" of ")[2].partition(")")[0], dict(coverage.left)


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("residual", "stem, shortcut"),
        ("depthwise", "stem, expand, middle and 1 more"),
        ("mlp", "0, 2"),
        ("transformer", "blocks.0, blocks.1"),
        ("stacked", "blocks.0, blocks.1, blocks.2"),
    ],
)
def test_it_chooses_layers_by_itself(network, layers):
    assert compared(networks()[network]) == (layers, {})


def test_layers_are_chosen_by_name():
    assert compared(networks()["mlp"], layers="0, 1") == ("0, 1", {})


def test_a_layer_that_took_in_a_batch_norm_is_not_compared():
    data = networks()["residual"]
    chosen, reasons = compared(data, FoldBatchnorm(), layers="conv1, bn1, stem.0")
    assert chosen == "bn1"
    assert reasons == {
        "stem.0": "not compared: the batch norm 'stem.1' was folded into it",
        "conv1": "not compared: the batch norm 'bn1' was folded into it",
    }
    assert compared(data, layers="conv1, bn1, stem.0") == ("stem.0, conv1, bn1", {})


def test_blocks_that_took_the_names_of_others_are_not_compared():
    data = networks()["stacked"]
    fewer = copy.deepcopy(data.model)
    fewer.blocks = nn.ModuleList([fewer.blocks[0], fewer.blocks[2]])
    with pytest.raises(LayerError, match=r"finds no layer that it can compare. blocks.0: 'blocks' has other members"):
        DistillFeatures(steps=1).apply(fewer, data)
    DistillFeatures(steps=1, layers="head").apply(fewer, data)


def test_blocks_that_are_left_learn_what_was_returned_before_the_next_that_is_left():
    data = networks()["stacked"]
    assert compared(data, DropLayers(share=0.3))[0] == "blocks.0, blocks.1"
    fewer = without(data.model, [Block("blocks", "1")])
    batch = data.calibration[0]

    def error() -> float:
        with (
            torch.no_grad(),
            watch_outputs(data.model, ["blocks.1"]) as theirs,
            watch_outputs(fewer, ["blocks.0"]) as own,
        ):
            call(data.model, batch), call(fewer, batch)
        return float(relative_error(own["blocks.0"], theirs["blocks.1"]))

    before = error()
    fewer = DistillFeatures(epochs=5, lr=0.01, layers="blocks.0").apply(fewer, data)
    assert error() < 0.75 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layers": "no.such"},
            r"layers='no.such' matches none of the 5 inner layers of Sequential.*They are: 0, 1, 2,",
        ),
        ({"kind": "attention"}, r"finds no layer.*0: it returns \(2, 64\), which has no positions to attend to"),
        ({"where": "9"}, "where='9' matches none"),
    ],
)
def test_patterns_and_kinds_that_do_not_fit(settings, message):
    data = networks()["mlp"]
    with pytest.raises(LayerError, match=message):
        DistillFeatures(**settings).apply(copy.deepcopy(data.model), data)


def test_a_network_without_inner_layers():
    x = torch.randn(4, 3)
    data = Workload(nn.Linear(3, 2).eval(), (x,), [(x,)], lambda predict: 0.0)
    with pytest.raises(LayerError, match="There are none: take distill_soft instead"):
        DistillFeatures().apply(copy.deepcopy(data.model), data)


def test_layers_that_return_another_number_of_positions():
    x = torch.randn(4, 3, 8, 8)
    data = Workload(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3)).eval(), (x,), [], lambda p: 0.0)
    data.model(x)
    data = Workload(data.model, (x,), [(x,)], lambda predict: 0.0)
    student = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 3))
    with pytest.raises(
        LayerError, match=r"0: it returns \(4, 2, 8, 8\), in the original \(4, 4, 6, 6\): more than widths"
    ):
        DistillFeatures(layers="0").apply(student, data)
