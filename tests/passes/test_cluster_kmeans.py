"""Shared values: closer than a uniform grid, closer still where it matters when weighted, and kept in training."""

import copy

import pytest
import torch
from torch import nn

from featherweight.encodings import Affine, Codebook, affine_scale
from featherweight.errors import LayerError, RecipeError
from featherweight.passes.cluster_kmeans import ClusterKmeans, importance, kmeans
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.surgery import encode, encoding_of, recording
from featherweight.testing import networks
from featherweight.workload import Workload


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(copy.deepcopy(model).eval(), (x,), [(x,)], lambda predict: 0.0)


def clustered(weight: torch.Tensor, x: torch.Tensor | None = None, **settings: object) -> nn.Linear:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    x = torch.randn(64, weight.shape[1]) if x is None else x
    return ClusterKmeans(**settings).apply(model, workload_of(model, x))[0]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().sum())


def uniform_error(weight: torch.Tensor, bits: int) -> float:
    scale = affine_scale(weight, bits, -1, search=True)
    return error(Affine(weight, scale, bits=bits, axis=-1).decode(), weight)


LAPLACE = torch.distributions.Laplace(0.0, 1.0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("draw", [LAPLACE.sample, torch.randn])
def test_it_is_closer_than_a_uniform_grid_of_as_many_bits(bits, draw):
    weight = draw((64, 128))
    assert error(clustered(weight, bits=bits, weighted=False).weight, weight) < 0.9 * uniform_error(weight, bits)


def test_it_gains_nothing_where_weights_are_spread_evenly():
    weight = torch.rand(64, 128) * 2 - 1
    assert error(clustered(weight, bits=4, weighted=False).weight, weight) > 0.8 * uniform_error(weight, 4)


def test_weighted_by_what_inputs_say_it_is_better_on_outputs_and_worse_on_weights():
    weight, x = torch.randn(64, 128), torch.randn(256, 128)
    x[:, :16] *= 30.0
    weight[:, :16] *= 0.2  # small, so that values for the many others miss them
    plain, counted = (clustered(weight, x, weighted=w).weight for w in (False, True))
    assert error(x @ counted.T, x @ weight.T) < 0.5 * error(x @ plain.T, x @ weight.T)
    assert error(counted, weight) > 1.5 * error(plain, weight)


def test_weighted_is_plain_where_inputs_are_alike():
    weight = torch.randn(16, 32)
    x = torch.ones(8, 32)
    plain, counted = (clustered(weight, x, weighted=w).weight for w in (False, True))
    torch.testing.assert_close(counted, plain)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scope", ["tensor", "channel"])
def test_there_are_no_more_values_than_the_bits_can_name(bits, scope):
    weight = torch.randn(6, 600)
    layer = clustered(weight, bits=bits, scope=scope)
    counts = [len(row.unique()) for row in (layer.weight if scope == "channel" else layer.weight.view(1, -1))]
    assert max(counts) <= 2**bits
    assert min(counts) > 2 ** (bits - 1)  # none are wasted
    assert encoding_of(layer).bits == (4 if bits <= 4 else 8)


def test_more_bits_and_finer_scopes_are_closer_and_cost_more():
    weight = torch.randn(32, 256) * torch.logspace(-2, 0, 32).unsqueeze(1)
    layers = [clustered(weight, **s) for s in ({"bits": 4}, {"bits": 4, "scope": "channel"}, {"bits": 8})]
    small = [float(((layer.weight - weight) / weight.std(1, keepdim=True)).square().mean()) for layer in layers]
    assert small[0] > 10 * small[1]
    assert error(layers[2].weight, weight) < error(layers[0].weight, weight) / 50
    bits = [encoding_of(layer).bits_per_weight for layer in layers]
    assert bits == pytest.approx([4 + 16 * 32 / 8192, 4 + 16 * 32 / 256, 8 + 256 * 32 / 8192])
    assert encoding_of(clustered(weight, scope="channel", table="float16")).bits_per_weight == 4 + 16 * 16 / 256
    assert [encoding_of(layer).describe() for layer in layers[:2]] == [
        "codebook of 16 per tensor",
        "codebook of 16 per channel",
    ]


def test_tables_of_channels_and_blocks_are_shared_by_as_many_as_were_asked_for():
    weight = torch.randn(30, 96)
    asked = {
        "codebook of 16 per 10 channels": {"scope": "channel", "size": 12},
        "codebook of 16 per block of 48": {"scope": "block", "size": 50},
        "codebook of 16 per tensor": {"scope": "channel", "size": 64},
    }
    for told, settings in asked.items():
        layer = clustered(weight, bits=4, **settings)
        assert encoding_of(layer).describe() == told
        parts = layer.weight.view(len(encoding_of(layer).table) // 16, -1)
        assert all(len(part.unique()) == 16 for part in parts)


def test_values_in_int8_cost_a_quarter_and_little_error():
    weight = torch.randn(32, 256) * torch.logspace(-2, 0, 32).unsqueeze(1)
    wide, narrow = (clustered(weight, scope="channel", table=table) for table in ("float32", "int8"))
    assert encoding_of(narrow).bits_per_weight == 4 + (16 * 8 + 32) / 256
    assert encoding_of(narrow).table.dtype == torch.int8
    more = [error(a, w) / error(b, w) for a, b, w in zip(narrow.weight, wide.weight, weight, strict=True)]
    assert sum(more) / len(more) < 1.1


def test_values_that_half_precision_cannot_hold_stay_in_single():
    weight = torch.randn(16, 64)
    for size, dtype in ((1.0, torch.float16), (1e-7, torch.float32), (1e6, torch.float32)):
        assert encoding_of(clustered(size * weight, table="float16")).table.dtype == dtype
        assert error(clustered(size * weight, table="float16").weight / size, weight) < 0.02 * error(0 * weight, weight)


def test_three_clusters_are_found_exactly():
    centres = torch.tensor([-3.0, 0.5, 8.0])
    values = centres.repeat_interleave(50)[None] + 0.01 * torch.randn(1, 150)
    found = kmeans(values, torch.ones(1, 150), 3)
    torch.testing.assert_close(found, values.view(1, 3, 50).mean(2))


def test_few_weights_have_few_values():
    weight = torch.tensor([1.0, 2.0, 4.0]).repeat(32, 8)
    layer = clustered(weight, bits=4)
    torch.testing.assert_close(layer.weight.detach(), weight)
    assert encoding_of(layer).table.numel() == 3
    assert bool((clustered(torch.full((8, 8), 2.0)).weight == 2.0).all())


def test_weights_of_a_group_count_by_the_channels_that_the_group_reads():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    found = importance(torch.tensor([1.0, 2.0, 3.0, 4.0]), tuple(conv.weight.shape), 2)
    assert found.shape == conv.weight.shape
    assert found[:3].flatten(2).amax(2).tolist() == [[1.0, 2.0]] * 3
    assert found[3:].flatten(2).amin(2).tolist() == [[3.0, 4.0]] * 3


def test_embeddings_count_alike_and_a_weight_that_layers_share_is_clustered_once():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)).eval()
    model[2].weight = model[0].weight
    ids = torch.randint(0, 40, (4, 5))
    workload = workload_of(model, ids)
    after = ClusterKmeans().apply(copy.deepcopy(model), workload)
    assert encoding_of(after[0]) is encoding_of(after[2])
    alone = nn.Sequential(copy.deepcopy(model[0]))
    alike = [ClusterKmeans(weighted=w).apply(copy.deepcopy(alone), workload_of(alone, ids))[0] for w in (True, False)]
    assert torch.equal(alike[0].weight, alike[1].weight)
    trained = DistillSoft(steps=3).apply(after, workload)
    assert torch.equal(trained[0].weight, trained[2].weight)


def test_distillation_moves_weights_from_value_to_value():
    workload = networks()["mlp"]
    after = ClusterKmeans(bits=3).apply(copy.deepcopy(workload.model), workload)
    tables = [encoding_of(after[i]).table.clone() for i in (0, 2)]
    codes = [encoding_of(after[i]).codes.clone() for i in (0, 2)]
    trained = DistillSoft(epochs=10, lr=0.05).apply(after, workload)
    for i, table, before in zip((0, 2), tables, codes, strict=True):
        assert torch.equal(encoding_of(trained[i]).table, table)
        assert not torch.equal(encoding_of(trained[i]).codes, before)
        assert set(trained[i].weight.unique().tolist()) <= set(table.tolist())


@pytest.mark.parametrize(
    "settings",
    [{}, {"scope": "channel"}, {"scope": "channel", "size": 4, "table": "int8"}, {"scope": "block", "size": 64}],
)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_zeros_of_a_pruned_network_stay_zero(settings, bits):
    workload = networks()["mlp"]
    pruned = PruneMagnitude(share=0.6).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    after = ClusterKmeans(bits=bits, **settings).apply(pruned, workload)
    assert bool((after[0].weight[zero] == 0).all())
    trained = DistillSoft(epochs=5, lr=0.1).apply(after, workload)
    assert bool((trained[0].weight[zero] == 0).all())
    assert bool((trained[0].weight != 0).any())


def test_what_would_not_become_smaller_is_left_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))
    workload = workload_of(model, torch.randn(8, 4))
    with recording() as coverage:
        ClusterKmeans(scope="channel").apply(copy.deepcopy(model), workload)
    assert coverage.done == [("1", "codebook of 16 per channel")]
    assert coverage.left == [("0", "as codebook of 16 per channel it would take 132 bits a weight, where it takes 32")]
    with pytest.raises(LayerError, match=r"cluster_kmeans would make none .* 132 bits a weight.* Leave the step out"):
        ClusterKmeans(scope="channel", where="0").apply(model, workload)


def test_codes_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    encode(model[0], Affine(model[0].weight, affine_scale(model[0].weight, 8, 0), bits=8))
    with pytest.raises(RecipeError, match=r"cluster_kmeans would quantize '0'.* stored as int8 per channel"):
        ClusterKmeans().apply(model, workload_of(model, torch.randn(8, 8)))
    model = nn.Sequential(nn.Linear(8, 8))
    encode(model[0], Codebook(model[0].weight, torch.linspace(-1, 1, 16)))
    with pytest.raises(RecipeError, match=r"quantize_static would quantize '0'.* codebook of 16 per tensor"):
        QuantizeStatic().apply(model, workload_of(model, torch.randn(8, 8)))
    with pytest.raises(RecipeError, match=r"prune_magnitude would zero .* codebook of 16 per tensor"):
        PruneMagnitude().apply(model, workload_of(model, torch.randn(8, 8)))
