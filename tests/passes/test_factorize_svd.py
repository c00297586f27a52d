"""Two thin layers for one: best for the weights plain, for the outputs whitened; then layers as any others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featherweight import gram, targets
from featherweight.artifact import build
from featherweight.errors import LayerError, RecipeError, WorkloadError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.factorize_svd import (
    FactorizeSvd,
    Seen,
    energies,
    factors,
    matrices,
    rank_for_parameters,
    reduced,
)
from featherweight.passes.fold_batchnorm import FoldBatchnorm
from featherweight.passes.prune_channels import PruneChannels
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import Coverage
from featherweight.testing import check_export, networks, relative_error, run
from featherweight.workload import Workload

SEEDS = range(5)


def made(model: nn.Module, *batches: Tensor) -> Workload:
    return Workload(model.eval(), (batches[0][:2],), [(batch,) for batch in batches], score=lambda predict: 0.0)


def factorized(model: nn.Module, *batches: Tensor, **settings: object) -> tuple[nn.Module, Coverage]:
    return compress_model(Recipe((FactorizeSvd(**settings),), "torch"), made(model, *batches))


def product(pair: nn.Module) -> Tensor:
    return (pair[1].weight @ pair[0].weight).detach()


def correlated(rows: int, mixing: Tensor) -> Tensor:
    return torch.randn(rows, len(mixing)) @ mixing


def mixing(width: int) -> Tensor:
    """Makes features that hang together, a few directions far louder than the others."""
    loudness = torch.logspace(0.5, -1.5, width)
    return loudness[:, None] * torch.linalg.qr(torch.randn(width, width)).Q


# ------------------------------------------------------------------------------------------------ its reason


@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_has_less_error_in_outputs_and_more_in_weights(seed: int) -> None:
    torch.manual_seed(seed)
    mix = mixing(48)
    model, unseen = nn.Sequential(nn.Linear(48, 40)), correlated(500, mix)
    batches = correlated(2000, mix).split(500)
    plain, _ = factorized(model, *batches, whiten=False)
    whitened, _ = factorized(model, *batches, whiten=True)
    assert plain[0][0].weight.shape == whitened[0][0].weight.shape

    def in_outputs(found: nn.Module) -> float:
        return (found(unseen) - model(unseen)).square().sum().item()

    def in_weights(found: nn.Module) -> float:
        return (product(found[0]) - model[0].weight).square().sum().item()

    assert in_outputs(whitened) < in_outputs(plain) / 3
    assert in_weights(whitened) > 1.1 * in_weights(plain)


@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_helps_convolutions_of_smooth_pictures(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(6, 24, 3, padding=1))
    smooth = nn.AvgPool2d(5, stride=1)
    batches, unseen = [smooth(torch.randn(32, 6, 16, 16)) for _ in range(3)], smooth(torch.randn(32, 6, 16, 16))
    plain, _ = factorized(model, *batches, whiten=False)
    whitened, _ = factorized(model, *batches, whiten=True)
    wanted = model(unseen)
    errors = [(found(unseen) - wanted).square().sum().item() for found in (whitened, plain)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_gains_nothing_where_inputs_do_not_hang_together(seed: int) -> None:
    torch.manual_seed(seed)
    model, unseen = nn.Sequential(nn.Linear(32, 32)), torch.randn(500, 32)
    batches = torch.randn(4000, 32).split(1000)
    wanted = model(unseen)
    plain, whitened = (
        (factorized(model, *batches, whiten=whiten)[0](unseen) - wanted).square().sum() for whiten in (False, True)
    )
    assert 0.9 * plain < whitened < 1.1 * plain


@pytest.mark.parametrize("seed", SEEDS)
def test_no_factors_of_a_rank_are_nearer_to_the_weights_than_those_of_plain_svd(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(20, 30, dtype=torch.float64)
    b, a = factors(*reduced(weight), weight @ weight.T, 7)
    least = (b @ a - weight).square().sum()
    torch.testing.assert_close(least, torch.linalg.svdvals(weight)[7:].square().sum())  # Eckart and Young
    some = torch.randn(20, 7, dtype=torch.float64)
    others = [
        factors(*reduced(weight), weight @ torch.cov(torch.randn(30, 90, dtype=torch.float64)) @ weight.T, 7),
        (some, torch.linalg.lstsq(some, weight).solution),
        (b + 0.01 * torch.randn_like(b), a),
    ]
    assert all((b @ a - weight).square().sum() > least for b, a in others)


@pytest.mark.parametrize("out", [20, 50])
def test_no_factors_of_a_rank_are_nearer_to_the_outputs_than_the_whitened_ones(out: int) -> None:
    weight, x = torch.randn(out, 30, dtype=torch.float64), correlated(400, mixing(30)).double()
    seen = Seen(*reduced(weight[None]))
    for part in x.split(150):
        seen.add(part[None])
    b, a = factors(seen.basis, seen.rows, seen.spread(damping=0.0), 7)
    least = (x @ (b[0] @ a[0] - weight).T).square().sum()
    best_outputs = torch.linalg.svdvals(x @ weight.T)[7:].square().sum()  # nothing of this rank can be nearer
    torch.testing.assert_close(least, best_outputs)


@pytest.mark.parametrize("out", [20, 50])
def test_spread_and_energies_are_those_of_the_second_moment_damped_by_a_share_of_its_mean(out: int) -> None:
    weight, x = torch.randn(2, out, 30, dtype=torch.float64), torch.randn(2, 400, 30, dtype=torch.float64)
    moment = x.mT @ x / 400
    damped = moment / moment.diagonal(dim1=1, dim2=2).mean() + 0.1 * torch.eye(30)
    seen = Seen(*reduced(weight))
    seen.add(x)
    found, _ = energies(seen.spread(0.1))
    wanted = torch.linalg.svdvals(weight @ torch.linalg.cholesky(damped)).square()
    torch.testing.assert_close(found, wanted[:, : min(out, 30)])


def test_a_weight_that_read_nothing_is_taken_as_it_is() -> None:
    weight = torch.randn(1, 20, 30, dtype=torch.float64)
    seen = Seen(None, weight)
    seen.add(torch.zeros(1, 5, 30))
    torch.testing.assert_close(seen.spread(0.01), weight @ weight.mT)


def test_factors_that_need_less_rank_than_they_get_are_finite_and_exact() -> None:
    of_rank_two = torch.randn(20, 2, dtype=torch.float64) @ torch.randn(2, 30, dtype=torch.float64)
    for weight in (of_rank_two, torch.zeros(20, 30)):
        b, a = factors(*reduced(weight), weight @ weight.T, 7)
        assert b.isfinite().all() and a.isfinite().all() and b.abs().max() < 100
        torch.testing.assert_close(b @ a, weight)


def test_both_factors_are_alike_in_size() -> None:
    weight = 100 * torch.randn(3, 20, 30)
    b, a = factors(*reduced(weight), weight @ weight.mT, 7)
    torch.testing.assert_close(b.square().sum(-2), a.square().sum(-1), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------ layers

LAYERS = {
    "linear": (nn.Linear(24, 20), (3, 24)),
    "linear over positions, no bias": (nn.Linear(24, 20, bias=False), (3, 5, 24)),
    "conv1d": (nn.Conv1d(12, 16, 3, stride=2, padding="valid"), (3, 12, 9)),
    "conv2d": (nn.Conv2d(12, 16, 3, padding="same", dilation=2, padding_mode="reflect"), (3, 12, 9, 9)),
    "conv2d, groups": (nn.Conv2d(16, 48, (1, 3), stride=(1, 2), padding=(2, 1), groups=2, bias=False), (3, 16, 5, 9)),
    "conv3d": (nn.Conv3d(4, 12, 2, padding=1, padding_mode="circular"), (2, 4, 4, 4, 4)),
}


def of_low_rank(layer: nn.Module, rank: int) -> nn.Module:
    """A copy of `layer` whose weight is exactly of that rank, in each group."""
    layer = copy.deepcopy(layer)
    groups, out, inputs = matrices(layer).shape
    exact = torch.randn(groups, out, rank) @ torch.randn(groups, rank, inputs)
    layer.weight.data = exact.reshape(layer.weight.shape) / rank
    return layer


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_of_low_rank_is_found_out_and_kept_to_single_precision(kind: str, whiten: bool) -> None:
    layer, shape = LAYERS[kind]
    model, batch = nn.Sequential(of_low_rank(layer, 2)).eval(), torch.randn(shape)
    after, coverage = factorized(model, batch, torch.randn(shape), rank_by="energy", share=1.0, whiten=whiten)
    groups = getattr(layer, "groups", 1)
    rank = {1: 8, 2: 4}[groups]  # 2, rounded up so that all groups together have 8 channels
    assert after[0][0].weight.shape[0] == 8 and f"rank {rank} of" in coverage.done[0][1]
    assert [type(part) for part in after[0]] == [type(layer)] * 2
    torch.testing.assert_close(after(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_an_embedding_of_low_rank_becomes_a_narrower_one_and_a_linear_layer() -> None:
    table = nn.Embedding(50, 24, padding_idx=3)
    table.weight.data = torch.randn(50, 5) @ torch.randn(5, 24)
    table.weight.data[3] = 0.0
    ids = torch.randint(0, 50, (4, 6))
    after, coverage = factorized(nn.Sequential(table), ids, rank_by="energy", share=1.0)
    assert coverage.done == [("0", "rank 8 of 24, 1,200 -> 592 weights")]
    assert after[0][0].padding_idx == 3
    torch.testing.assert_close(after(ids), table(ids), rtol=1e-5, atol=1e-5)


def test_rows_of_an_embedding_that_are_read_often_are_met_more_closely() -> None:
    table = nn.Embedding(200, 32)
    ids = torch.randint(0, 20, (64, 8))
    model, errors = nn.Sequential(table), {}
    for whiten in (True, False):
        after, _ = factorized(model, ids, share=0.5, whiten=whiten)
        off = (after(torch.arange(200)) - table.weight).square().sum(1).detach()
        errors[whiten] = (float(off[:20].mean()), float(off[20:].mean()))
    assert errors[True][0] < 0.6 * errors[False][0]
    assert errors[False][1] <= errors[True][1] < 2 * errors[False][1]


def test_second_moments_that_do_not_fit_into_memory_together_are_taken_in_turn(monkeypatch) -> None:
    workload = networks()["residual"]
    together, coverage = compress_model(Recipe((FactorizeSvd(),), "torch"), workload)
    monkeypatch.setattr(gram, "HELD", 1)
    in_turn, same = compress_model(Recipe((FactorizeSvd(),), "torch"), workload)
    assert same == coverage
    for a, b in zip(together.parameters(), in_turn.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_sample_of_the_rows_does_nearly_as_well_as_all(monkeypatch) -> None:
    mix = mixing(32)
    model, batches, unseen = nn.Sequential(nn.Linear(32, 32)), correlated(4000, mix).split(500), correlated(500, mix)

    def error(rows: int) -> float:
        monkeypatch.setattr(gram, "SAMPLE", rows)
        return (factorized(model, *batches)[0](unseen) - model(unseen)).square().sum().item()

    assert error(4000) <= error(400) < 1.3 * error(4000)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_by_parameters_the_share_is_an_upper_bound(kind: str, share: float) -> None:
    layer, shape = LAYERS[kind]
    after, _ = factorized(nn.Sequential(layer), torch.randn(shape), rank_by="parameters", share=share)
    held = sum(part.weight.numel() for part in after[0])
    assert held <= share * layer.weight.numel() and held < layer.weight.numel()
    _, out, inputs = matrices(layer).shape
    assert held > share * layer.weight.numel() / 2 or rank_for_parameters(out, inputs, share) < 3


def test_by_energy_the_share_is_a_lower_bound_and_more_of_it_is_more_rank() -> None:
    model, batch = nn.Sequential(nn.Linear(96, 96)), torch.randn(50, 96)
    total, ranks = model[0].weight.square().sum(), []
    for share in (0.2, 0.4, 0.6):
        after, _ = factorized(model, batch, rank_by="energy", share=share, whiten=False)
        assert product(after[0]).square().sum() >= share * total
        ranks.append(after[0][0].out_features)
    assert ranks[0] < ranks[1] < ranks[2] and all(rank % 8 == 0 for rank in ranks)


def test_energy_is_that_of_the_outputs_where_weights_are_whitened() -> None:
    quiet = torch.cat([torch.ones(8), torch.full((56,), 1e-3)])
    model, batch = nn.Sequential(nn.Linear(64, 64)), torch.randn(900, 64) * quiet
    whitened, _ = factorized(model, batch, rank_by="energy", share=0.9, whiten=True)
    assert whitened[0][0].out_features == 8
    with pytest.raises(
        LayerError, match=r"0\.9 of its energy takes rank 3\d of 64, at which its factors hold no fewer"
    ):
        factorized(model, batch, rank_by="energy", share=0.9, whiten=False)


# ------------------------------------------------------------------------------------------------ what is left


def test_layers_that_no_rank_makes_smaller_are_left_and_others_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 32, 1), nn.ConvTranspose2d(32, 8, 2), nn.Flatten(), nn.Linear(800, 1)
    )
    _, coverage = factorized(model, torch.randn(4, 8, 11, 11))
    none = "at every rank its factors hold no fewer weights than it does"
    assert [layer for layer, _ in coverage.done] == ["1"]
    assert dict(coverage.left) == {
        "0": none,
        "2": "is of kind ConvTranspose2d, which factorize_svd does not treat (weight)",
        "4": none,
    }


def test_a_share_below_the_smallest_rank_is_said() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    _, coverage = factorized(model, torch.randn(9, 64), share=0.1)
    assert [layer for layer, _ in coverage.done] == ["0"]
    assert coverage.left == [("1", "at every rank its factors hold more than 0.1 of its weights")]


def test_an_embedding_that_rescales_its_rows_is_left() -> None:
    model = nn.Sequential(nn.Embedding(40, 24, max_norm=1.0), nn.Linear(24, 24))
    _, coverage = factorized(model, torch.randint(0, 40, (3, 4)))
    assert coverage.left == [("0", "it rescales its rows as they are read (max_norm)")]


class Attention(nn.Module):
    """torch's own, which reads the weight of its `out_proj` without calling it, and a layer asked for its width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.down(torch.relu(self.up(y)) / self.up.out_features)


def test_layers_that_are_read_and_not_only_called_are_left() -> None:
    model, batch = Attention(), torch.randn(4, 5, 32)
    after, coverage = factorized(model, batch)
    assert [layer for layer, _ in coverage.done] == ["down"]
    reasons = dict(coverage.left)
    assert reasons["attention.out_proj"].startswith("is of kind NonDynamicallyQuantizableLinear")
    assert reasons["up"].startswith("the network does more than call it: without it, it raises AttributeError")
    assert after(batch).shape == batch.shape


def test_one_layer_at_two_places_stays_one() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model.insert(2, model[0])
    after, _ = factorized(model, torch.randn(3, 32))
    assert after[0] is after[2] and isinstance(after[0], nn.Sequential)


def tied(rows: int = 400, width: int = 32, rank: int = 32) -> nn.Sequential:
    """An embedding and a last layer of one weight, as language models have them, of a rank."""
    model = nn.Sequential(nn.Embedding(rows, width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, rows))
    torch.manual_seed(0)
    model[0].weight.data = torch.randn(rows, rank) @ torch.randn(rank, width) / rank**0.5
    model[3].weight = model[0].weight
    return model


def test_tied_weights_share_their_factors() -> None:
    model, ids = tied(rank=8), torch.randint(0, 400, (64, 4))
    after, coverage = factorized(model, ids, share=0.4, where="!1")
    assert after[0][0].weight is after[3][1].weight and torch.equal(after[3][1].bias, model[3].bias)
    assert coverage.done[0] == ("0", "rank 8 of 32, 12,800 -> 3,456 shared weights")
    assert sum(p.numel() for p in after.parameters()) == 8 * (400 + 32 + 32) + 400 + 32 * 33
    assert relative_error(run(after, (ids,)), run(model, (ids,))) < 1e-4


@pytest.mark.parametrize("target", targets.installed())
def test_tied_factors_are_stored_once_and_run(target: str, tmp_path: Path) -> None:
    model, ids = tied().eval(), torch.randint(0, 400, (64, 4))
    workload = Workload(model, (ids[:2],), [(ids,)], lambda predict: 0.0)
    steps = (FactorizeSvd(share=0.5, where="!1"), QuantizeWeights(bits=4, block=32))
    artifact = build(Recipe(steps, target), workload, tmp_path / "a")
    expected, _ = compress_model(Recipe(steps, target), workload)
    assert (
        relative_error([artifact.predict()(ids).numpy()], run(expected, (ids,))) < 0.02
    )  # OpenVINO rounds what weights in 4 bits read
    dense = build(Recipe((), target), workload, tmp_path / "b")
    assert artifact.bytes < dense.bytes - 0.7 * 4 * 12_800


def test_weight_norm_is_resolved() -> None:
    plain, batch = nn.Conv1d(16, 24, 3), torch.randn(4, 16, 9)
    normed = nn.utils.parametrizations.weight_norm(copy.deepcopy(plain))
    (wanted, _), (found, _) = (factorized(nn.Sequential(layer), batch) for layer in (plain, normed))
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in wanted.named_parameters()]
    torch.testing.assert_close(found(batch), wanted(batch))


@pytest.mark.parametrize("step", [QuantizeWeights(), QuantizeStatic(), PruneMagnitude()])
def test_weights_that_are_encoded_already_are_refused(step: object) -> None:
    workload = networks()["mlp"]
    stored = {
        "quantize_weights": "int8 per channel",
        "quantize_static": "int8 per channel",
        "prune_magnitude": "50% zeros",
    }
    refusal = (
        rf"Step 2 \(factorize_svd\): factorize_svd would factorize '0', which an earlier step stored as "
        rf"{stored[step.name()]}\. .* such as prune_magnitude or quantize_static: swap them"
    )
    with pytest.raises(RecipeError, match=refusal):
        compress_model(Recipe((step, FactorizeSvd()), "torch"), workload)


def test_data_that_is_no_number_is_refused_by_the_layer_that_reads_it() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    bad = torch.randn(4, 16)
    bad[1, 3] = torch.nan
    with pytest.raises(WorkloadError, match=r"'0' read NaN or infinite.*where: '!0'"):
        factorized(model, torch.randn(4, 16), bad)


def test_inputs_that_are_always_zero_leave_plain_svd() -> None:
    model, batch = nn.Sequential(nn.Linear(16, 16)), torch.zeros(4, 16)
    whitened, plain = (factorized(model, batch, whiten=whiten)[0] for whiten in (True, False))
    torch.testing.assert_close(product(whitened[0]), product(plain[0]))


# ------------------------------------------------------------------------------------------------ what follows


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_factors_are_distilled_quantized_and_exported_as_any_layers(name: str, target: str, tmp_path: Path) -> None:
    workload = networks()[name]
    steps = (FactorizeSvd(), DistillSoft(steps=4), QuantizeStatic())
    model, coverage = compress_model(Recipe(steps, target), workload)
    factorized_layers = [layer for layer, what in coverage.done if what.startswith("rank")]
    assert len(factorized_layers) > 3
    for layer in factorized_layers:
        said = [what for done, what in coverage.done if done.startswith(f"{layer}.")]
        assert len([what for what in said if what.startswith("distilled")]) == 2
        assert len([what for what in said if what.startswith("int8")]) == 2
    check_export(targets.find(target), model, workload, tmp_path)


def test_distillation_takes_back_some_of_the_damage() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    workload = made(model, *torch.randn(2048, 32).split(64))
    unseen = torch.randn(500, 32)
    steps = (FactorizeSvd(share=0.4), DistillSoft(epochs=4, loss="mse"))
    before, after = (compress_model(Recipe(steps[:count], "torch"), workload)[0] for count in (1, 2))
    wanted = model(unseen)
    assert (after(unseen) - wanted).square().sum() < 0.8 * (before(unseen) - wanted).square().sum()


def test_channels_of_the_factors_can_be_removed() -> None:
    workload = networks()["residual"]
    steps = (FactorizeSvd(share=0.7), PruneChannels(share=0.3, multiple=1))
    model, coverage = compress_model(Recipe(steps, "torch"), workload)
    assert any(layer.endswith("conv2.0") and what.endswith("channels") for layer, what in coverage.done)
    assert run(model, workload.example)[0].shape == (2, 5)


def test_batch_norms_fold_into_the_second_factor() -> None:
    workload = networks()["residual"]
    plain, _ = compress_model(Recipe((FactorizeSvd(),), "torch"), workload)
    folded, coverage = compress_model(Recipe((FactorizeSvd(), FoldBatchnorm()), "torch"), workload)
    assert ("bn1", "folded into conv1.1") in coverage.done
    torch.testing.assert_close(run(folded, workload.example)[0], run(plain, workload.example)[0], rtol=1e-4, atol=1e-4)


def test_files_shrink_as_weights_do(tmp_path: Path) -> None:
    workload = made(nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400)), torch.randn(64, 400))
    after, _ = compress_model(Recipe((FactorizeSvd(share=0.3),), "torch"), workload)

    def sizes(model: nn.Module, folder: Path) -> tuple[int, int]:
        folder.mkdir()
        targets.find("torch").export(model, workload, folder)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return written, sum(p.numel() for p in model.parameters())

    (bytes_before, count_before), (bytes_after, count_after) = (
        sizes(model, tmp_path / name) for name, model in (("before", workload.model), ("after", after))
    )
    assert count_after < 0.31 * count_before
    saved = 4 * (count_before - count_after)
    assert abs((bytes_before - bytes_after) - saved) < 0.02 * saved
