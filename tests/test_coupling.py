"""What hangs together is found, whatever the architecture; cut networks compute what the silenced originals do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.coupling import Group, cut, groups, tensor_of, trial
from featherweight.encodings import Affine, affine_scale
from featherweight.errors import LayerError, RecipeError
from featherweight.surgery import encode, open_recurrent
from featherweight.workload import Batch, call, outputs

# ------------------------------------------------------------------------------------------------ networks


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, body: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv(inputs: int, out: int, kernel: int = 3, **more) -> nn.Conv2d:
    return nn.Conv2d(inputs, out, kernel, padding=kernel // 2, **more)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def residual() -> nn.Module:
    def body(net, x):
        x = net.stem(x)
        x = F.relu(net.bn2(net.conv2(F.relu(net.bn1(net.conv1(x))))) + net.shortcut(x))
        x = x + net.inner(x)
        return net.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Net(
        body,
        stem=nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(True), nn.MaxPool2d(2)),
        conv1=conv(16, 24, stride=2, bias=False),
        bn1=nn.BatchNorm2d(24),
        conv2=conv(24, 32, bias=False),
        bn2=nn.BatchNorm2d(32),
        shortcut=nn.Sequential(conv(16, 32, 1, stride=2), nn.BatchNorm2d(32)),
        inner=nn.Sequential(conv(32, 8), nn.PReLU(8), conv(8, 32)),
        head=nn.Linear(32, 5),
    )


def depthwise_with_gate() -> nn.Module:
    def body(net, x):
        x = net.stem(x)
        y = net.depthwise(net.expand(x))
        y = y * torch.sigmoid(net.open(F.relu(net.squeeze(y.mean((2, 3), keepdim=True)))))
        return net.head(pooled(net.twice(x + net.narrow(y))))

    return Net(
        body,
        stem=nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.Hardswish()),
        expand=nn.Sequential(conv(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU6(True)),
        depthwise=nn.Sequential(conv(32, 32, groups=32), nn.BatchNorm2d(32), nn.SiLU()),
        squeeze=conv(32, 8, 1),
        open=conv(8, 32, 1),
        narrow=conv(32, 16, 1),
        twice=conv(16, 32, groups=16),
        head=nn.Linear(32, 5),
    )


def dense() -> nn.Module:
    def body(net, x):
        x = net.stem(x)
        for layer in (net.one, net.two):
            x = torch.cat([x, layer(x)], 1)
        return net.head(pooled(net.norm(x)))

    return Net(
        body,
        stem=conv(3, 16),
        one=nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8)),
        two=nn.Sequential(nn.BatchNorm2d(24), nn.ReLU(), conv(24, 8)),
        norm=nn.BatchNorm2d(32),
        head=nn.Linear(32, 5),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        *(conv(3, 32), nn.ReLU(), conv(32, 64, groups=4), nn.BatchNorm2d(64), conv(64, 32, 1, groups=2), nn.ReLU()),
        *(conv(32, 8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5)),
    )


def shuffled(shuffle: Callable[[Tensor], Tensor]) -> nn.Module:
    def body(net, x):
        x = net.stem(x)
        return net.head(pooled(x + net.two(net.middle(shuffle(F.relu(net.norm(net.one(x))))))))

    return Net(
        body,
        stem=conv(3, 32),
        one=conv(32, 32, 1, groups=2, bias=False),
        norm=nn.BatchNorm2d(32),
        middle=conv(32, 32, groups=32),
        two=conv(32, 32, 1, groups=2),
        head=nn.Linear(32, 5),
    )


def by_views(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def halves() -> nn.Module:
    """ShuffleNet v2: one half passes, the other is worked on, and then they are mixed."""

    def body(net, x):
        x = net.stem(x)
        kept, worked = x.chunk(2, dim=1)
        x = F.channel_shuffle(torch.cat([kept, net.branch(worked)], 1), 2)
        return net.head(pooled(x))

    branch = nn.Sequential(conv(16, 16, 1), nn.ReLU(), conv(16, 16, groups=16), conv(16, 16, 1))
    return Net(body, stem=conv(3, 32), branch=branch, head=nn.Linear(32, 5))


def decoder_of_images() -> nn.Module:
    def body(net, x):
        x = F.pad(net.act(net.entry(F.pixel_shuffle(net.wide(x), 2))), (1, 1, 1, 1))
        x = F.instance_norm(net.up(F.glu(net.gate(x), 1)))
        return net.last(F.interpolate(x, scale_factor=2.0, mode="bilinear"))

    return Net(
        body,
        wide=conv(3, 32),
        entry=conv(8, 16, 1),
        act=nn.PReLU(16),
        gate=conv(16, 64, 1),
        up=nn.ConvTranspose2d(32, 24, 2, 2),
        last=conv(24, 3),
    )


def heads_of(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def language_model() -> nn.Module:
    """Tied embeddings, query, key and value in one matrix, and a gated feed-forward layer."""

    def body(net, ids):
        x = net.words(ids)
        q, k, v = (heads_of(part, 8) for part in net.qkv(net.norm(x)).chunk(3, dim=-1))
        x = x + net.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        up, gate = net.up(net.norm(x)).chunk(2, dim=-1)
        return net.last(x + net.down(up * F.silu(gate)))

    net = Net(
        body,
        words=nn.Embedding(40, 32),
        norm=nn.LayerNorm(32),
        qkv=nn.Linear(32, 96),
        out=nn.Linear(32, 32),
        up=nn.Linear(32, 128),
        down=nn.Linear(64, 32),
        last=nn.Linear(32, 40, bias=False),
    )
    net.last.weight = net.words.weight
    return net


def grouped_queries() -> nn.Module:
    """Two heads of keys and values serve four of queries, by repetition; products and softmax are written out."""

    def body(net, x):
        q, k, v = heads_of(net.q(x), 8), heads_of(net.k(x), 8), heads_of(net.v(x), 8)
        k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for y in (k, v))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v
        return net.out(mixed.transpose(1, 2).flatten(2))

    return Net(body, q=nn.Linear(16, 32), k=nn.Linear(16, 16), v=nn.Linear(16, 16), out=nn.Linear(32, 6))


def raw_parameters() -> nn.Module:
    net = Net(lambda net, x: torch.addmm(net.b, torch.relu(x @ net.w) * net.scale, net.u.t()) @ net.last.weight.T)
    for name, shape in {"w": (16, 24), "u": (32, 24), "b": (32,), "scale": (24,)}.items():
        net.register_parameter(name, nn.Parameter(torch.randn(shape)))
    net.last = nn.Linear(32, 5)
    return net


class OnlyLogits(nn.Module):
    """A network of transformers, called with tensors by name and without caches."""

    def __init__(self, net: nn.Module, **fixed) -> None:
        super().__init__()
        self.net, self.fixed = net, fixed


class BertLogits(OnlyLogits):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(input_ids=input_ids, attention_mask=attention_mask).logits


class WhisperLogits(OnlyLogits):
    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.net(input_features=input_features, decoder_input_ids=decoder_input_ids, use_cache=False).logits


def bert(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation=attention,
    )
    return BertLogits(transformers.BertForSequenceClassification(config))


def whisper() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIZES.items()}
    config = transformers.WhisperConfig(
        vocab_size=50,
        d_model=32,
        max_source_positions=10,
        max_target_positions=8,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sizes,
    )
    return WhisperLogits(transformers.WhisperForConditionalGeneration(config))


SIZES = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}

IMAGES = (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
IDS = torch.arange(18).view(3, 6)
TOKENS = (IDS,)
SENTENCES = {"input_ids": IDS, "attention_mask": (IDS % 6 < 4).long()}
SPEECH = {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": IDS}


def recurrent(layer: nn.RNNBase) -> nn.Module:
    def body(net, x):
        return net.last(net.rnn(torch.relu(net.first(x)))[0][:, -1])

    width = layer.hidden_size * (2 if layer.bidirectional else 1)
    return Net(body, first=nn.Linear(16, 8), rnn=layer, last=nn.Linear(width, 5))


def opened(net: nn.Module) -> nn.Module:
    open_recurrent(net)
    return net


ROWS, SEQUENCES = (torch.randn(3, 16),), (torch.randn(3, 5, 16),)

# name: (network, example, the groups that can be cut: layers, units, kind)
CASES: dict[str, tuple[Callable[[], nn.Module], Batch, set[tuple[str, int, str]]]] = {
    "residual": (
        residual,
        IMAGES,
        {
            ("stem.0", 16, "channels"),
            ("conv1", 24, "channels"),
            ("conv2 + shortcut.0 + inner.2", 32, "channels"),
            ("inner.0", 8, "channels"),
        },
    ),
    "depthwise and gate": (
        depthwise_with_gate,
        IMAGES,
        {
            ("stem.0 + narrow + twice", 16, "channels"),
            ("expand.0 + depthwise.0 + open", 32, "channels"),
            ("squeeze", 8, "channels"),
        },
    ),
    "dense": (dense, IMAGES, {("stem", 16, "channels"), ("one.2", 8, "channels"), ("two.2", 8, "channels")}),
    "grouped, flattened": (
        grouped,
        IMAGES,
        {("0", 8, "channels"), ("2", 16, "channels"), ("4", 16, "channels"), ("6", 8, "channels")},
    ),
    "shuffled": (
        lambda: shuffled(lambda x: F.channel_shuffle(x, 2)),
        IMAGES,
        {("stem + two", 16, "channels"), ("one + middle", 8, "channels")},
    ),
    "shuffled by views": (
        lambda: shuffled(by_views),
        IMAGES,
        {("stem + two", 16, "channels"), ("one + middle", 8, "channels")},
    ),
    "halves": (halves, IMAGES, {("stem + branch.3", 16, "channels"), ("branch.0 + 2", 16, "channels")}),
    "decoder of images": (
        decoder_of_images,
        IMAGES,
        {("wide", 8, "channels"), ("entry", 16, "channels"), ("gate", 32, "channels"), ("up", 24, "channels")},
    ),
    "language model": (language_model, TOKENS, {("qkv", 4, "heads"), ("up", 64, "features")}),
    "grouped queries": (grouped_queries, SEQUENCES, {("q + k + v", 2, "heads")}),
    "raw parameters": (raw_parameters, ROWS, {("w", 24, "features"), ("u", 32, "features")}),
    "LSTM": (
        lambda: recurrent(nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)),
        SEQUENCES,
        {("first", 8, "features"), ("rnn", 6, "features")},
    ),
    "GRU without biases": (
        lambda: recurrent(nn.GRU(8, 6, bias=False, batch_first=True)),
        SEQUENCES,
        {("first", 8, "features"), ("rnn", 6, "features")},
    ),
    "RNN whose weights are layers": (
        lambda: opened(recurrent(nn.RNN(8, 6, num_layers=2, batch_first=True))),
        SEQUENCES,
        {("first", 8, "features"), ("rnn.ih_l0 + hh_l0 + ih_l1 + 1 more", 6, "features")},
    ),
    **{
        f"BERT, {attention}": (
            lambda attention=attention: bert(attention),
            SENTENCES,
            {
                *((f"net.bert.encoder.layer.{i}.attention.self.query + key + value", 4, "heads") for i in range(2)),
                *((f"net.bert.encoder.layer.{i}.intermediate.dense", 64, "features") for i in range(2)),
                ("net.bert.pooler.dense", 32, "features"),
            },
        )
        for attention in ("sdpa", "eager")
    },
    "Whisper": (
        whisper,
        SPEECH,
        {
            ("net.model.encoder.conv1", 32, "channels"),
            ("net.model.encoder.layers.0.fc1", 64, "features"),
            ("net.model.decoder.layers.0.fc1", 64, "features"),
        },
    ),
    "nn.TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        SEQUENCES,
        {("linear1", 32, "features")},
    ),
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """The network in eval mode, with statistics in its batch norms that are worth keeping."""
    torch.manual_seed(0)
    net = build().eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.uniform_(layer.bias, -1.0, 1.0)
    return net


def free(found: list[Group]) -> list[Group]:
    return [group for group in found if group.frozen is None]


def reasons(net: nn.Module, example: Batch) -> dict[str, str | None]:
    return {group.name: group.frozen for group in groups(net.eval(), example)}


def run(net: nn.Module, example: Batch) -> Tensor:
    with torch.no_grad():
        return outputs(call(net, example))[0]


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# ------------------------------------------------------------------------------------------------ finding, cutting


@pytest.mark.parametrize("name", CASES)
def test_a_cut_network_computes_what_the_original_does_with_its_readers_zeroed(name: str):
    build, example, expected = CASES[name]
    net = made(build)
    found = groups(net, example)
    assert {(group.name, len(group), group.kind) for group in free(found)} == expected
    assert all(group.frozen for group in found if group not in free(found))

    cuts = [(group, range(0, len(group), 2)) for group in free(found)]
    original, zeroed = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        for group, units in cuts:
            readers = [s for s in group.slices if s.role == "reads"]
            assert readers
            for s in readers:
                tensor_of(zeroed, s.names[0]).transpose(0, s.dim)[s.index[units].ravel()] = 0.0
    cut(net, cuts)
    assert size(net) < size(original)
    torch.testing.assert_close(run(net, example), run(zeroed, example), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(net, example), run(original, example), rtol=1e-3)
    for layer in net.modules():
        check_sizes(layer)


def check_sizes(layer: nn.Module) -> None:
    """The attributes of a layer say what its tensors are."""
    if isinstance(layer, nn.ConvTranspose2d):
        assert layer.weight.shape[:2] == (layer.in_channels, layer.out_channels // layer.groups)
    elif isinstance(layer, nn.Conv2d):
        assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    elif isinstance(layer, nn.Linear):
        assert layer.weight.shape == (layer.out_features, layer.in_features)
    elif isinstance(layer, nn.BatchNorm2d):
        assert layer.weight.shape == layer.running_var.shape == (layer.num_features,)
    elif isinstance(layer, nn.PReLU):
        assert layer.weight.shape == (layer.num_parameters,)
    elif isinstance(layer, nn.RNNBase):
        assert layer.weight_ih_l0.shape[1] == layer.input_size and layer.weight_hh_l0.shape[1] == layer.hidden_size


def test_a_residual_cut_by_hand():
    net = made(residual)
    (group,) = (g for g in groups(net, IMAGES) if g.name.startswith("conv2"))
    small = trial(net, IMAGES, [(group, [0, 5])])
    keep = [i for i in range(32) if i not in (0, 5)]
    for name in ("conv2.weight", "bn2.running_var", "shortcut.0.bias", "shortcut.1.weight", "inner.2.weight"):
        assert torch.equal(tensor_of(small, name), tensor_of(net, name)[keep])
    for name in ("inner.0.weight", "head.weight"):
        assert torch.equal(tensor_of(small, name), tensor_of(net, name)[:, keep])
    assert torch.equal(small.conv1.weight, net.conv1.weight)
    assert small.conv2.out_channels == small.head.in_features == 30 and net.conv2.out_channels == 32


def test_flattened_pixels_go_with_their_channel():
    net = made(grouped)
    (group,) = (g for g in groups(net, IMAGES) if g.name == "6")
    cut(net, [(group, [1])])
    assert net[9].weight.shape == (5, 7 * 16)


def test_arithmetic_is_counted_where_a_unit_is_made_and_where_it_is_read():
    net = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 8, stride=2), nn.Flatten(), nn.Linear(128, 5)).eval()
    first, second = free(groups(net, IMAGES))
    assert first.macs == 3 * 9 * 64 + 8 * 9 * 16  # 64 pixels before the stride, 16 after
    assert second.macs == 16 * 9 * 16 + 16 * 5


def test_arithmetic_of_attention_counts_for_its_heads():
    net = made(grouped_queries)
    (group,) = free(groups(net, SEQUENCES))
    projections, out, products = 5 * 16 * (16 + 8 + 8), 5 * 16 * 6, 2 * (2 * 5 * 5 * 8)
    assert group.macs == projections + out + products


def test_what_was_trainable_stays_so_and_ties_hold():
    net = made(language_model)
    net.up.weight.requires_grad_(False)
    small = trial(net, TOKENS, [(group, [0]) for group in free(groups(net, TOKENS))])
    assert not small.up.weight.requires_grad and small.down.weight.requires_grad
    assert small.last.weight is small.words.weight
    assert isinstance(small.qkv.weight, nn.Parameter) and small.qkv.weight.is_leaf


def test_a_layer_used_twice_is_cut_once():
    twice = nn.Linear(32, 32)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), twice, nn.ReLU(), twice, nn.Linear(32, 4)).eval()
    (group,) = free(groups(net, ROWS))
    assert group.name == "0 + 2 + 4"
    trial(net, ROWS, [(group, [3, 4])])
    cut(net, [(group, [3, 4])])
    assert net[2].weight.shape == (30, 30) and net[4] is net[2]


def test_parts_that_compete_apart_are_cut_at_once():
    net = made(dense)
    found = {group.name: group for group in free(groups(net, IMAGES))}
    cut(net, [(found["two.2"], [7]), (found["stem"], [0, 1]), (found["one.2"], [0])])
    assert net.two[2].in_channels == 21 and net.head.in_features == 28


# ------------------------------------------------------------------------------------------------ refusing


@torch.library.custom_op("featherweight_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.sort(dim=1).values


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def between(body: Callable[[Tensor], Tensor], width: int = 16) -> nn.Module:
    return Net(lambda net, x: net.last(body(net.first(x))), first=nn.Linear(16, 16), last=nn.Linear(width, 4)).eval()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: F.layer_norm(x, (16,)), "feeds layer_norm, whose result depends on how many there are"),
        (lambda x: F.group_norm(x, 2), "feeds group_norm, whose result depends"),
        (lambda x: F.softmax(x, dim=-1), "feeds softmax, whose result depends"),
        (lambda x: x / x.norm(dim=1, keepdim=True), "feeds linalg_vector_norm, whose result depends"),
        (lambda x: x - x.mean(1, keepdim=True), "feeds mean, whose result depends"),
        (lambda x: torch.cat(x.split([6, 10], dim=1), 1), "is split at fixed places by split_with_sizes"),
        (lambda x: F.pad(x[:, 1:], (0, 1)), "is cut at fixed places by slice"),
        (lambda x: x + torch.arange(16.0), "meets a fixed width at add"),
        (lambda x: torch.ops.featherweight_tests.mystery(x), "goes through featherweight_tests.mystery"),
        (lambda x: torch.einsum("nc,nd->nc", x, x), "goes through einsum, an operator that is not known here"),
    ],
)
def test_what_depends_on_the_width_is_frozen_with_the_reason(body: Callable[[Tensor], Tensor], reason: str):
    found = reasons(between(body), ROWS)
    assert reason in (found["first"] or "")
    assert found["last"] == "is an output of the network"


def test_the_reason_names_the_layer_that_is_in_the_way():
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    assert reasons(net, ROWS)["0"] == "feeds layer_norm in '1', whose result depends on how many there are"


def test_recurrent_layers_with_projections_are_left():
    net = Net(lambda net, x: net.last(net.lstm(net.first(x))[0]), first=nn.Linear(16, 8), last=nn.Linear(3, 4))
    net.lstm = nn.LSTM(8, 6, proj_size=3, batch_first=True)
    found = reasons(net, SEQUENCES)
    assert found["first"] == found["lstm"] == "goes through lstm in 'lstm', an operator that is not known here"


def test_states_that_layers_make_go_with_the_units_they_start():
    def body(net, x):
        start = torch.tanh(net.start(x.mean(1)))
        return net.last(net.rnn(x, start[None])[0][:, -1])

    net = Net(body, start=nn.Linear(16, 6), rnn=nn.GRU(16, 6, batch_first=True), last=nn.Linear(6, 4)).eval()
    (group,) = free(groups(net, SEQUENCES))
    assert set(group.layers) == {"start", "rnn"}
    small = trial(net, SEQUENCES, [(group, [1, 4])])
    assert small.start.out_features == small.rnn.hidden_size == 4


def test_attention_that_fixes_its_heads_is_left():
    assert reasons(made(CASES["nn.TransformerEncoderLayer"][0]), SEQUENCES)["self_attn"] == (
        "sets the scale of scaled_dot_product_attention in 'self_attn'"
    )


def test_weights_that_are_computed_are_left():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 8), nn.Linear(8, 4))
    found = reasons(net, ROWS)
    assert "goes through _weight_norm" in (found["0.parametrizations.weight"] or "") and found["1"] is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: x.view(-1, 4, 4).flatten(1), "its forward fixes the width: RuntimeError: shape '[-1, 4, 4]'"),
        (lambda x: torch.cat(x.split(8, 1), 1) * (16 / x.shape[1]), "without some of it the other channels change"),
    ],
)
def test_what_only_shows_when_it_runs_is_found_by_trial(body: Callable[[Tensor], Tensor], reason: str):
    net = between(body)
    (group,) = free(groups(net, ROWS))
    before = run(net, ROWS)
    with pytest.raises(LayerError) as error:
        trial(net, ROWS, [(group, [0])])
    assert reason in str(error.value)
    assert torch.equal(run(net, ROWS), before) and net.first.out_features == 16


def test_encoded_weights_are_refused():
    net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    encode(net[0], Affine(net[0].weight, affine_scale(net[0].weight, bits=8, axis=0), bits=8))
    with pytest.raises(RecipeError) as error:
        groups(net, ROWS)
    for part in ("Sequential", "'0.weight'", "int8", "prune_channels", "quantize_static", "swap them"):
        assert part in str(error.value)
