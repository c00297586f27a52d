"""Three thin convolutions for one: better than two where kernels are redundant on both sides, like two where on one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featherweight import targets
from featherweight.errors import RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.factorize_svd import FactorizeSvd
from featherweight.passes.factorize_tucker import (
    FactorizeTucker,
    factor_weights,
    kernels,
    ranks_for_parameters,
    sides,
    singular_values,
    tucker2,
)
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import Coverage
from featherweight.testing import check_export, networks
from featherweight.workload import Workload

SEEDS = range(5)


def made(model: nn.Module, *batches: Tensor) -> Workload:
    return Workload(model.eval(), (batches[0][:2],), [(batch,) for batch in batches], score=lambda predict: 0.0)


def applied(step: object, model: nn.Module, *batches: Tensor) -> tuple[nn.Module, Coverage]:
    return compress_model(Recipe((step,), "torch"), made(model, *batches))


def held(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


def composed(u: Tensor, core: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...op,...pqk,...iq->...oik", u, core, v)


def error(found: nn.Module, wanted: nn.Module, x: Tensor) -> float:
    """White inputs weigh all weights alike."""
    return ((found(x) - wanted(x)).square().sum() / wanted(x).square().sum()).item()


def redundant_on_both_sides(noise: float) -> nn.Conv2d:
    layer = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    kernel = composed(torch.randn(32, 8), torch.randn(8, 8, 9), torch.randn(32, 8))
    layer.weight.data = (kernel / kernel.std() + noise * torch.randn_like(kernel)).view(32, 32, 3, 3)
    return layer


def redundant_on_one_side(noise: float) -> nn.Conv2d:
    layer = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    kernel = (torch.randn(32, 8) @ torch.randn(8, 32 * 9)).view(32, 32, 9)
    layer.weight.data = (kernel / kernel.std() + noise * torch.randn_like(kernel)).view(32, 32, 3, 3)
    return layer


# ------------------------------------------------------------------------------------------------ its reason


@pytest.mark.parametrize("seed", SEEDS)
def test_beats_svd_at_equal_size_where_kernels_are_redundant_on_both_sides(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(redundant_on_both_sides(noise=0.05)), torch.randn(20, 32, 9, 9)
    tucker, _ = applied(FactorizeTucker(share=0.15), model, x)
    svd, _ = applied(FactorizeSvd(share=0.15, whiten=False), model, x)
    assert 0.5 * held(svd) < held(tucker) <= held(svd)
    assert error(tucker, model, x) < 0.05 * error(svd, model, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_is_two_factors_where_kernels_are_redundant_on_one_side_only(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(redundant_on_one_side(noise=0.05)), torch.randn(20, 32, 9, 9)
    tucker, _ = applied(FactorizeTucker(share=0.28), model, x)
    svd, _ = applied(FactorizeSvd(share=0.28, whiten=False), model, x)
    assert [part.weight.shape for part in tucker[0]] == [part.weight.shape for part in svd[0]]
    assert error(tucker, model, x) == pytest.approx(error(svd, model, x), rel=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_loses_to_whitened_svd_where_inputs_hang_together_and_kernels_do_not(seed: int) -> None:
    torch.manual_seed(seed)
    mixing = torch.logspace(0.5, -1.5, 32)[:, None] * torch.linalg.qr(torch.randn(32, 32)).Q
    x = torch.einsum("nchw,cd->ndhw", torch.randn(60, 32, 9, 9), mixing)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    tucker, _ = applied(FactorizeTucker(), model, x)
    svd, _ = applied(FactorizeSvd(), model, x)
    assert error(svd, model, x) < 0.9 * error(tucker, model, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_sweeps_lower_the_error_and_never_raise_it(seed: int) -> None:
    torch.manual_seed(seed)
    kernel = torch.randn(12, 10, 9, dtype=torch.float64)
    errors = [(composed(*tucker2(kernel, (4, 3), sweeps)) - kernel).square().sum().item() for sweeps in (0, 1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.99 * errors[0]


def test_the_error_is_no_more_than_what_both_sides_lose() -> None:
    kernel = torch.randn(12, 10, 9, dtype=torch.float64)
    lost = [singular_values(side)[rank:].square().sum() for side, rank in zip(sides(kernel), (5, 4), strict=True)]
    found = (composed(*tucker2(kernel, (5, 4), sweeps=0)) - kernel).square().sum()
    assert max(lost) <= found <= sum(lost)


# ------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("step", [1, 4, 8])
def test_more_weights_are_less_error_and_never_more_than_the_share(step: int) -> None:
    kernel = torch.randn(24, 20, 9, dtype=torch.float64)
    values, errors = [singular_values(side) for side in sides(kernel)], []
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0):
        ranks = ranks_for_parameters(values, 9, share, step)
        assert factor_weights(24, 20, 9, ranks) <= share * kernel.numel()
        errors.append((composed(*tucker2(kernel, ranks, sweeps=2)) - kernel).square().sum().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_weights_go_to_the_side_that_needs_them() -> None:
    flat, steep = torch.ones(32), torch.logspace(0, -6, 32)
    out, inputs = ranks_for_parameters([flat, steep], 9, 0.3, step=1)
    assert out >= 4 * inputs
    assert ranks_for_parameters([steep, flat], 9, 0.3, step=1) == (inputs, out)


def test_nothing_fits_a_share_that_is_too_small() -> None:
    assert ranks_for_parameters([torch.ones(4), torch.ones(4)], 9, 0.05, step=8) == (0, 0)


# ------------------------------------------------------------------------------------------------ layers

LAYERS = {
    "conv1d": (nn.Conv1d(20, 24, 5, stride=2, padding="valid"), (3, 20, 9), 3),
    "conv2d": (nn.Conv2d(20, 24, 3, padding="same", dilation=2, padding_mode="reflect"), (3, 20, 9, 9), 3),
    "conv2d, groups": (nn.Conv2d(24, 32, (1, 3), stride=(1, 2), padding=(2, 1), groups=2), (3, 24, 5, 9), 3),
    "conv3d": (nn.Conv3d(12, 16, 2, padding=1, bias=False, padding_mode="circular"), (2, 12, 4, 4, 4), 3),
    "few inputs": (nn.Conv2d(3, 32, 5, stride=2), (2, 3, 9, 9), 2),
    "few outputs": (nn.Conv2d(32, 2, 3), (2, 32, 9, 9), 2),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_of_low_rank_is_found_out_and_kept_to_single_precision(kind: str) -> None:
    layer, shape, parts = copy.deepcopy(LAYERS[kind][0]), *LAYERS[kind][1:]
    groups, out, inputs, taps = kernels(layer).shape
    ranks = (2, inputs if kind == "few inputs" else 2)
    exact = composed(
        torch.randn(groups, out, ranks[0]), torch.randn(groups, *ranks, taps), torch.randn(groups, inputs, ranks[1])
    )
    layer.weight.data = (exact / exact.std()).reshape(layer.weight.shape)
    model, batch = nn.Sequential(layer).eval(), torch.randn(shape)
    after, coverage = applied(FactorizeTucker(rank_by="energy", share=1.0), model, batch)
    assert [type(part) for part in after[0]] == [type(layer)] * parts
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(after(batch), model(batch), rtol=1e-4, atol=1e-4)
    assert coverage.done[0][1].endswith(
        f"{layer.weight.numel():,} -> {sum(p.weight.numel() for p in after[0]):,} weights"
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_by_parameters_the_share_is_an_upper_bound(kind: str, share: float) -> None:
    layer, shape, _ = LAYERS[kind]
    after, _ = applied(FactorizeTucker(share=share), nn.Sequential(layer), torch.randn(shape))
    count = sum(part.weight.numel() for part in after[0])
    assert count <= share * layer.weight.numel() and count < layer.weight.numel()


def test_ranks_are_multiples_of_eight_where_there_is_room() -> None:
    layer, step = nn.Conv2d(40, 48, 3), FactorizeTucker(rank_by="energy", share=0.999)
    layer.weight.data = composed(torch.randn(48, 11), torch.randn(11, 10, 9), torch.randn(40, 10)).view(48, 40, 3, 3)
    after, _ = applied(step, nn.Sequential(layer), torch.randn(2, 40, 5, 5))
    assert [part.weight.shape[:2] for part in after[0]] == [(16, 40), (16, 16), (48, 16)]


def test_what_gains_nothing_is_left_with_the_reason() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 16, 1), nn.Flatten(), nn.Linear(400, 4)
    )
    _, coverage = applied(FactorizeTucker(), model, torch.randn(2, 16, 9, 9))
    assert [layer for layer, _ in coverage.done] == ["0"]
    assert dict(coverage.left) == {
        "1": "at all ranks its factors hold more than 0.5 of its weights",
        "2": "its kernel has size 1, for which factorize_svd does the same with two layers",
        "4": "is of kind Linear, which factorize_tucker does not treat (weight)",
    }


def test_an_energy_that_takes_nearly_all_channels_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    model[1].weight.data = composed(torch.randn(16, 2), torch.randn(2, 2, 9), torch.randn(16, 2)).view(16, 16, 3, 3)
    _, coverage = applied(FactorizeTucker(rank_by="energy", share=0.99), model, torch.randn(2, 16, 9, 9))
    assert [layer for layer, _ in coverage.done] == ["1"]
    ((name, why),) = coverage.left
    assert name == "0" and "0.99 of its energy takes 16 of 16 output and 16 of 16 input channels" in why


@pytest.mark.parametrize("step", [QuantizeWeights(), PruneMagnitude()])
def test_weights_that_are_encoded_already_are_refused(step: object) -> None:
    refusal = r"factorize_tucker would factorize 'stem\.0', which an earlier step stored as .*swap them in the recipe"
    with pytest.raises(RecipeError, match=refusal):
        compress_model(Recipe((step, FactorizeTucker()), "torch"), networks()["residual"])


# ------------------------------------------------------------------------------------------------ what follows


@pytest.mark.parametrize("target", targets.installed())
def test_factors_are_distilled_quantized_and_exported_as_any_layers(target: str, tmp_path: Path) -> None:
    workload = networks()["residual"]
    steps = (FactorizeTucker(rank_by="energy"), DistillSoft(steps=4), QuantizeStatic())
    model, coverage = compress_model(Recipe(steps, target), workload)
    assert {"conv1.0", "conv1.1", "conv1.2"} <= {layer for layer, what in coverage.done if what.startswith("int8")}
    check_export(targets.find(target), model, workload, tmp_path)


def test_both_factorizations_share_the_work() -> None:
    steps = (FactorizeTucker(where="!shortcut*"), FactorizeSvd(where="head, shortcut*"))
    _, coverage = compress_model(Recipe(steps, "torch"), networks()["residual"])
    assert {layer for layer, _ in coverage.done} == {"stem.0", "conv1", "conv2", "shortcut.0", "head"}


def test_files_shrink_as_weights_do(tmp_path: Path) -> None:
    workload = made(nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3)), torch.randn(2, 128, 6, 6))
    after, _ = compress_model(Recipe((FactorizeTucker(share=0.2),), "torch"), workload)

    def sizes(model: nn.Module, folder: Path) -> tuple[int, int]:
        folder.mkdir()
        targets.find("torch").export(model, workload, folder)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return written, sum(p.numel() for p in model.parameters())

    (bytes_before, count_before), (bytes_after, count_after) = (
        sizes(model, tmp_path / name) for name, model in (("before", workload.model), ("after", after))
    )
    assert count_after < 0.21 * count_before
    saved = 4 * (count_before - count_after)
    assert abs((bytes_before - bytes_after) - saved) < 0.02 * saved
