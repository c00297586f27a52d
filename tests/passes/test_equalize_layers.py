"""Equalisation: the same function, with weights that one scale for a whole tensor fits."""

import copy

import pytest
import torch
from torch import nn

from featherweight.errors import LayerError, RecipeError
from featherweight.passes.equalize_layers import EqualizeLayers
from featherweight.passes.fold_batchnorm import FoldBatchnorm
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_fixed import QuantizeFixed
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.recipe import Recipe, compress_model
from featherweight.rescaling import largest_of_columns, largest_of_rows
from featherweight.surgery import recording
from featherweight.testing import networks, run
from featherweight.workload import Workload

CHAIN = ((0, 2), (2, 4), (4, 8))  # which layer of `uneven` reads which


def uneven(seed: int) -> Workload:
    """A convolution, a depthwise and a pointwise one and a linear layer; channels differ by up to a thousand."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
    ).eval()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            sizes = torch.logspace(-1.5, 1.5, len(layer.bias))[torch.randperm(len(layer.bias))]
            layer.weight *= sizes.view(-1, 1, 1, 1)
            layer.bias *= sizes
    x = torch.randn(64, 3, 10, 10)
    return Workload(model, (x[:2],), [(x,)], lambda predict: 0.0)


def error(model: nn.Module, workload: Workload) -> float:
    (x,) = workload.calibration[0]
    with torch.no_grad():
        return float((model(x) - workload.model(x)).norm() / workload.model(x).norm())


@pytest.mark.parametrize("seed", range(3))
def test_the_function_stays_and_both_sides_of_every_channel_become_alike(seed):
    workload = uneven(seed)
    after = EqualizeLayers().apply(copy.deepcopy(workload.model), workload)
    assert error(after, workload) < 1e-5
    for maker, reader in CHAIN:
        made = largest_of_rows(after[maker].weight)
        read = largest_of_columns(after[reader].weight, getattr(after[reader], "groups", 1), 4 if reader == 8 else 1)
        torch.testing.assert_close(made, read, rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [8, 4])
def test_one_scale_for_a_whole_tensor_loses_less(bits, seed):
    workload = uneven(seed)
    off = []
    for steps in ((), (EqualizeLayers(),)):
        model, _ = compress_model(Recipe((*steps, QuantizeFixed(bits=bits)), "torch"), workload)
        off.append(error(model, workload))
    assert off[1] < 0.7 * off[0]


def test_real_networks_keep_their_function():
    for name in ("residual", "mlp"):
        workload = networks()[name]
        model = copy.deepcopy(workload.model)
        model = FoldBatchnorm().apply(model, workload) if name == "residual" else model
        model = EqualizeLayers().apply(model, workload)
        (before,), (after,) = run(workload.model, workload.calibration[0]), run(model, workload.calibration[0])
        assert abs(before - after).max() < 1e-4


def test_what_is_equal_already_stays():
    workload = uneven(0)
    once = EqualizeLayers().apply(copy.deepcopy(workload.model), workload)
    with recording() as coverage:
        twice = EqualizeLayers().apply(copy.deepcopy(once), workload)
    assert all(" over 0.99" in what or " over 1 to 1," in what for _, what in coverage.done)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-7)


def test_channels_that_nothing_computes_or_nothing_reads_are_left_alone():
    workload = uneven(0)
    with torch.no_grad():
        workload.model[0].weight[3] = 0
        workload.model[4].weight[:, 5] = 0
    after = EqualizeLayers().apply(copy.deepcopy(workload.model), workload)
    assert error(after, workload) < 1e-5
    assert all(bool(p.isfinite().all()) for p in after.parameters())


def test_what_was_done_and_what_was_left_is_said():
    workload = networks()["residual"]
    with recording() as coverage:
        EqualizeLayers().apply(FoldBatchnorm().apply(copy.deepcopy(workload.model), workload), workload)
    done = {layer: what for layer, what in coverage.done if layer in ("stem.0", "conv1")}
    assert done["stem.0"].endswith("for conv1, shortcut.0")
    assert done["conv1"].endswith("for conv2")
    assert dict(coverage.left)["conv2"] == "its output goes through add, which scales of channels do not pass"
    with recording() as coverage:
        EqualizeLayers(where="0").apply(copy.deepcopy(uneven(0).model), uneven(0))
    assert [layer for layer, _ in coverage.done] == ["0"]


def test_batch_norms_must_be_folded_first():
    with pytest.raises(LayerError, match="a batch norm follows it: put fold_batchnorm before this step"):
        compress_model(Recipe((EqualizeLayers(where="conv*"),), "torch"), networks()["residual"])


@pytest.mark.parametrize("rounding", [QuantizeStatic(), QuantizeFixed(bits=4)])
def test_after_rounding_it_is_refused(rounding):
    message = (
        r"Step 2 \(equalize_layers\): equalize_layers would rescale the weights of '0', which an earlier step stored "
        r"as int\d per \w+\. Steps that move scales, such as equalize_layers, come before those that round weights, "
        "such as quantize_static: swap them"
    )
    with pytest.raises(RecipeError, match=message):
        compress_model(Recipe((rounding, EqualizeLayers()), "torch"), uneven(0))


def test_zeros_survive():
    workload = uneven(0)
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[4].weight == 0
    after = EqualizeLayers().apply(copy.deepcopy(pruned), workload)
    assert bool((after[4].weight[zero] == 0).all())
    (x,) = workload.calibration[0]
    torch.testing.assert_close(after(x), pruned(x), rtol=1e-4, atol=1e-4)
