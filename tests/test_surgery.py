"""Surgery: finding layers, changing them, watching them, tracing them."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from featherweight import hooks, surgery
from featherweight.encodings import Affine, InputQuantizer, Masked, affine_scale
from featherweight.errors import ExportError, LayerError, RecipeError
from featherweight.testing import networks


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


class Mixed(nn.Module):
    """Layers with weights of many kinds, some in a parametrization, and one tensor of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 4))
        self.linear, self.norm, self.rnn = nn.Linear(4, 4), nn.LayerNorm(4), nn.GRU(4, 4)
        self.conv = parametrizations.weight_norm(nn.Conv1d(4, 4, 1))
        self.pruned = nn.Conv1d(4, 4, 1)
        surgery.encode(self.pruned, Masked(self.pruned.weight, self.pruned.weight > 0))


def test_layers_with_weights_that_a_step_does_not_treat_are_named():
    with surgery.recording() as coverage:
        surgery.leave_others(Mixed(), "*", ["linear"], "quantize_x")
    assert coverage.left == [
        ("", "is of kind Mixed, which quantize_x does not treat (places)"),
        ("rnn", "is of kind GRU, which quantize_x does not treat (weight_ih_l0, weight_hh_l0)"),
        ("conv", "is of kind Conv1d, which quantize_x does not treat (weight)"),
        ("pruned", "is of kind Conv1d, which quantize_x does not treat (weight)"),
    ]
    with surgery.recording() as coverage:
        surgery.leave_others(Mixed(), "!conv, !pruned, !", ["linear", "rnn"], "quantize_x")
    assert not coverage.left


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)

    def forward(self, x):
        return self.a(input=x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids)))


def test_layers_that_share_a_weight_are_one_group():
    net = Tied()
    layers = surgery.select(net, "*", (nn.Linear, nn.Embedding))
    assert [list(group) for group in surgery.groups_by_weight(net, layers)] == [["embed", "head"], ["middle"]]
    encoding = Masked(net.embed.weight, net.embed.weight > 0)
    for layer in (net.embed, net.head):
        surgery.encode(layer, encoding)
    assert [list(group) for group in surgery.groups_by_weight(net, layers)] == [["embed", "head"], ["middle"]]


def test_layers_that_share_a_weight_with_one_that_is_left_out_are_left():
    net = Tied()
    with surgery.recording() as coverage:
        groups = surgery.groups_by_weight(net, surgery.select(net, "*", (nn.Linear,)))
    assert [list(group) for group in groups] == [["middle"]]
    assert coverage.left == [("head", "shares its weight with 'embed', which is left out")]


# ------------------------------------------------------------------------------------------------ changing


def test_replace_reaches_nested_layers():
    net = model()
    surgery.replace(net, "2.0", nn.Identity())
    assert isinstance(net[2][0], nn.Identity)


def test_replace_reaches_every_name_of_a_layer():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.append(net[0])
    surgery.replace(net, "0", nn.Identity())
    assert isinstance(net[0], nn.Identity) and net[2] is net[0] and isinstance(net[1], nn.ReLU)


@pytest.mark.parametrize("stored", ["int8 per channel", "50% zeros"])
def test_encoded_layers_cannot_change_their_shape(stored):
    layer = nn.Linear(2, 4)
    if stored.startswith("int8"):
        encode8(layer)
    else:
        surgery.encode(layer, Masked(layer.weight, torch.tensor([True, False]).expand(4, 2)))
    with pytest.raises(
        RecipeError, match=rf"thin_out would cut 'fc', which an earlier step stored as {stored}\. .*swap"
    ):
        surgery.refuse_encoded({"ok": nn.Linear(2, 2), "fc": layer}, "thin_out", "cut")


class Reads(nn.Module):
    """Calls `a` and `b`; does something else with `b`, which `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if how == "by another way":
            self.hidden = [self.b]

    def forward(self, x):
        y = self.a(x)
        if self.how == "its weight":
            return self.b(y) @ self.b.weight
        if self.how == "its width":
            return self.b(y) / self.b.in_features
        if self.how == "its kind":
            return self.b(y) if isinstance(self.b, nn.Linear) else y
        if self.how == "by another way":
            return self.hidden[0](y)
        if self.how == "not at all":
            return y
        return self.b(self.b(y)) + torch.rand(4)


def replaceable(net, example=None):
    example = (torch.randn(3, 4),) if example is None else example
    before = [(name, module) for name, module in net.named_modules()]
    with surgery.recording() as coverage:
        found = surgery.replaceable(net, surgery.select(net, "*", (nn.Linear,)), (nn.Linear,), example)
    assert before == [(name, module) for name, module in net.named_modules()]
    assert not any(module._forward_pre_hooks for name, module in net.named_modules() if name in found)
    return list(found), dict(coverage.left)


def test_layers_that_are_only_called_can_be_replaced():
    assert replaceable(Reads("only called").eval()) == (["a", "b"], {})


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("its weight", "the network does more than call it: without it, it raises AttributeError: .*'weight'"),
        ("its width", "the network does more than call it: without it, it raises AttributeError: .*'in_features'"),
        ("its kind", "the network does more than call it: without it, its outputs are others"),
        ("by another way", "the network does not call it on the example"),
        ("not at all", "the network does not call it on the example"),
    ],
)
def test_layers_with_which_more_or_less_is_done_are_left(how, why):
    found, left = replaceable(Reads(how).eval())
    assert found == ["a"] and list(left) == ["b"]
    assert re.fullmatch(why, left["b"])


def test_torchs_own_transformer_reads_some_of_its_layers():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval()
    found, left = replaceable(nn.Sequential(nn.Linear(4, 4), net).eval(), (torch.randn(3, 5, 4),))
    assert found == ["0"]
    assert set(left) == {f"1.layers.0.{name}" for name in ("self_attn.out_proj", "linear1", "linear2")}


def test_layers_of_other_kinds_tied_hooked_or_alone_are_left():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), Doubled(4, 4)).eval()
    net[1].weight = net[0].weight
    net[2].register_forward_hook(lambda module, args, output: output + 1)
    assert replaceable(net) == (
        ["3"],
        {
            "0": "shares its weight with '1', which could not use it any more",
            "1": "shares its weight with '0', which could not use it any more",
            "2": "has hooks, which would be lost with it",
            "4": "is of kind Doubled, which may do more than its weight says",
        },
    )
    assert replaceable(nn.Linear(4, 4).eval())[1] == {
        "": "is the whole network: wrap it in a module whose forward calls it"
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_weight_norms_stand_in_nobodys_way(norm):
    net = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 4)).eval()
    assert surgery.replaceable(
        net, surgery.select(net, "*", (nn.Linear,)), (nn.Linear,), (torch.randn(3, 4),)
    ).keys() == {"0", "1"}


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


@pytest.mark.parametrize("norm", ["masked", "spectral norm"])
def test_encoding_a_copy_leaves_the_original_whole(norm):
    """torch derives a class for a parametrized layer, which copies share, and takes properties off it again."""
    layer, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    if norm == "masked":
        surgery.encode(layer, Masked(layer.weight, layer.weight > 0))
    else:
        parametrizations.spectral_norm(layer)
    wanted = layer(x)
    encode8(copy.deepcopy(layer))
    assert torch.equal(layer(x), wanted)


NORMED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": weight_norm,
    "old spectral norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMED)
def test_a_weight_that_is_computed_is_encoded_as_a_plain_one(norm):
    layer, x = NORMED[norm](nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    wanted = layer(x).detach()
    assert surgery.is_computed(layer)
    encode8(layer)
    assert not surgery.is_computed(layer)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert surgery.kind_of(layer) is nn.Linear and not layer._forward_pre_hooks
    torch.testing.assert_close(layer(x), wanted, rtol=0.05, atol=0.05)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_dense_weight_is_what_the_next_run_would_use():
    layer, x = weight_norm(nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    with torch.no_grad():
        layer.weight_g.mul_(2.0)  # the hook has not run since
    weight = surgery.dense_of(layer)
    assert torch.equal(nn.functional.linear(x, weight, layer.bias), layer(x))


def test_encoding_a_layer_does_not_touch_one_that_uses_its_weight_too():
    net = Tied()
    before = net.embed.weight.detach().clone()
    encode8(net.head)
    assert net.embed.weight.requires_grad
    other = parametrizations.spectral_norm(nn.Linear(4, 9))
    other.parametrizations.weight.original = net.embed.weight
    encode8(other)
    assert torch.equal(net.embed.weight, before)


def test_a_shared_encoding_is_thawed_once():
    net, ids = Tied(), torch.tensor([[1, 2]])
    encoding = Affine(net.embed.weight, affine_scale(net.embed.weight, 8, 0), bits=8)
    for layer in (net.embed, net.head):
        surgery.encode(layer, encoding)
    with surgery.thawed(net):
        assert [name for name, _ in net.named_parameters() if "latent" in name] == [
            "embed.parametrizations.weight.0.latent"
        ]
        net(ids).sum().backward()
        both = encoding.latent.grad.clone()
        with torch.no_grad():
            encoding.latent.neg_()
    assert int((both != 0).any(1).sum()) == 9  # the head's gradient reaches the rows that were not looked up
    assert torch.equal(net.embed.weight, net.head.weight)
    assert surgery.encoding_of(copy.deepcopy(net).head) is not encoding


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


# ------------------------------------------------------------------------------------------------ blocks


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


def test_blocks_of_nested_containers_have_their_whole_names():
    net = nn.Module()
    net.stage = nn.ModuleList([nn.Sequential(Wrapped(), Wrapped()), nn.Sequential(Wrapped(), Wrapped())])
    assert [block.name for block in surgery.blocks(net)] == ["stage.0.0", "stage.0.1", "stage.1.0", "stage.1.1"]


def test_alone_of_its_kind_or_a_single_layer_is_no_block():
    assert not list(surgery.blocks(nn.Sequential(Wrapped(), nn.Linear(4, 4), nn.Linear(4, 4))))


def test_blocks_within_blocks_are_told_apart_while_others_go():
    net = nn.Sequential(*(nn.ModuleDict({"inner": nn.Sequential(Wrapped(), Wrapped())}) for _ in range(3)))
    fewer = surgery.without(net, [surgery.Block("", "0"), surgery.Block("1.inner", "0")])
    assert [len(child["inner"]) for child in fewer] == [1, 2]


def test_without_blocks_the_others_move_up_in_a_copy():
    net = nn.Sequential(Wrapped(), Wrapped(), Wrapped())
    fewer = surgery.without(net, [surgery.Block("", "1")])
    assert len(net) == 3 and list(dict(fewer.named_children())) == ["0", "1"]
    assert torch.equal(fewer[1].inner.weight, net[2].inner.weight)


# ------------------------------------------------------------------------------------------------ names and parts


def test_layers_that_are_called_by_keyword_are_watched_and_quantized():
    net, seen, x = ByKeyword(), [], torch.rand(3, 4)
    hooks.watch_inputs(net, {"a": net.a}, [(x,)], lambda name, value: seen.append((name, value)))
    assert seen[0][0] == "a" and torch.equal(seen[0][1], x)
    surgery.quantize_input(net.a, InputQuantizer(0.0, 0.5))
    wanted = net.a.weight @ surgery.input_quantizer(net.a)(x).T
    torch.testing.assert_close(net(x), wanted.T + net.a.bias)
    torch.testing.assert_close(surgery.trace(net, (x,)).module()(x), net(x))


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("residual", ["stem", "shortcut"]),
        ("depthwise", ["stem", "expand", "middle", "narrow"]),
        ("mlp", ["0", "2", "4"]),
        ("stacked", ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_landmarks_are_blocks_parts_or_layers(network, names):
    assert surgery.landmarks(networks()[network].model) == names


def test_blocks_that_are_left_end_where_the_last_before_the_next_ended():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(6)))
    fewer = surgery.without(net, [surgery.Block("", name) for name in ("0", "3")])
    assert surgery.counterparts(fewer, net) == {"0": "1", "1": "3", "2": "4", "3": "5"}
    fewest = surgery.without(copy.deepcopy(fewer), [surgery.Block("", name) for name in ("1", "3")])
    assert surgery.counterparts(fewest, net) == {"0": "3", "1": "5"}
    assert torch.equal(fewest[1][0].weight, net[4][0].weight)
    assert surgery.counterparts(net, net) == surgery.counterparts(net[:2], net) == {}


def test_names_that_stand_for_something_else_are_told():
    workload = networks()["stacked"]
    fewer = surgery.without(workload.model, [surgery.Block("blocks", "1")])
    reasons = surgery.unlike(fewer, workload.model, workload.example)
    inside = {name for name, _ in workload.model.blocks.named_modules(prefix="blocks")} - {"blocks"}
    assert set(reasons) == inside - {"blocks.1", "blocks.2"}  # of which it is known where they went
    assert surgery.unlike(copy.deepcopy(workload.model), workload.model, workload.example) == {}
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    folded = copy.deepcopy(net)
    folded[4] = nn.Identity()
    assert surgery.unlike(folded, net, (torch.randn(2, 1, 3, 3),)) == {"3": "the batch norm '4' was folded into it"}


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


class Recurrent(nn.Module):
    """Also keeps the batch as an attribute, if it is told to."""

    def __init__(self, kept: bool = False) -> None:
        super().__init__()
        self.kept, self.last = kept, None
        self.layers = nn.ModuleList([kind(4, 4, batch_first=True) for kind in (nn.LSTM, nn.GRU)])

    def forward(self, x):
        if self.kept:
            self.last = x + 1
        for layer in self.layers:
            x = layer(x)[0]
        return x


def test_recurrent_layers_are_traced_without_a_warning_and_other_warnings_come_through():
    x = (torch.randn(3, 2, 4),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.trace(Recurrent().eval(), x)
        surgery.trace(nn.LSTM(4, 4, batch_first=True).eval(), x)
    with pytest.warns(UserWarning, match=r"self\.last.* assigned during export"):
        surgery.trace(Recurrent(kept=True).eval(), x)


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


# ------------------------------------------------------------------------------------------------ other layers


class Voice(nn.Module):
    """(n, 5, 8) to (n, 3): an LSTM and a GRU in both directions, then cells, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True)
        self.gru = nn.GRU(6, 4, bidirectional=True, batch_first=True)
        self.cell, self.last = nn.LSTMCell(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.gru(self.lstm(x)[0])[0]
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.last(state[0])


def test_weights_of_recurrent_layers_become_layers_and_nothing_else_changes():
    model, x = Voice().eval(), torch.randn(3, 5, 8)
    opened = copy.deepcopy(model)
    surgery.open_recurrent(opened)
    torch.testing.assert_close(opened(x), model(x), rtol=0, atol=0)
    assert list(surgery.select(opened, "lstm.*, cell.*", (surgery.RecurrentWeight,))) == [
        *("lstm.ih_l0", "lstm.hh_l0", "lstm.ih_l1", "lstm.hh_l1", "cell.ih", "cell.hh")
    ]
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in model.parameters())
    assert isinstance(opened.lstm, nn.LSTM) and surgery.kind_of(opened.lstm).__name__ == "LSTM"
    for layer in surgery.select(opened, "*", (surgery.RecurrentWeight,)).values():
        weight = layer.weight.detach()
        surgery.encode(layer, Affine(weight, affine_scale(weight, 8, 0), bits=8, axis=0))
    copied = copy.deepcopy(opened)
    torch.testing.assert_close(copied(x), model(x), rtol=0.05, atol=0.05)
    assert not torch.equal(copied(x), model(x))
    with surgery.thawed(copied):
        copied(x).sum().backward()
        assert all(p.grad is not None for p in copied.parameters() if p.requires_grad)


def test_linear_layers_that_lie_the_other_way_round_become_linear_layers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(6, 8), nn.GELU(), conv1d(3, 6)).eval()
    x = torch.randn(2, 5, 8)
    wanted = model(x)
    surgery.use_linear(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert model[0].weight.shape == (6, 8) and not model[0].training
    torch.testing.assert_close(model(x), wanted)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(8, 8), []

    def forward(self, x):
        q = self.linear(x)
        y = nn.functional.scaled_dot_product_attention(q, q, value=q)
        self.seen = [q.dtype, y.dtype]
        return y


def test_in_bfloat16_attention_stays_in_floats_whose_gradients_are_faster_on_a_processor():
    model = Attention()
    with surgery.computing_in("bfloat16", model, torch.device("cpu")):
        assert model(torch.randn(2, 4, 8)).dtype == torch.float32
    assert model.seen == [torch.bfloat16, torch.float32]
    model(torch.randn(2, 4, 8))
    assert model.seen == [torch.float32, torch.float32]
