"""AWQ: closer outputs than plain rounding where few inputs are loud, no worse elsewhere, and what it costs."""

import copy

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.errors import RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_awq import QuantizeAwq
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.rescaling import stretches
from featherweight.surgery import encoding_of, recording
from featherweight.testing import check_export, networks
from featherweight.workload import Workload


def loudness(width: int) -> torch.Tensor:
    """Every sixteenth channel is thirty times as loud as the others, as in transformers."""
    return torch.where(torch.arange(width) % 16 == 0, 30.0, 1.0)


def with_tails(layer: nn.Module) -> nn.Module:
    """The layer with weights as training leaves them: few are large, so that a column can be stretched for nothing."""
    layer.weight.data = 0.05 * torch.distributions.StudentT(4.0).sample(layer.weight.shape)
    return layer


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model.eval(), (x[:2],), [(part,) for part in x.chunk(4)], lambda predict: 0.0)


def output_error(step: QuantizeAwq | QuantizeWeights, layer: nn.Module, seen: torch.Tensor, x: torch.Tensor) -> float:
    model = nn.Sequential(copy.deepcopy(layer))
    rounded = step.apply(model, workload_of(nn.Sequential(layer), seen))
    with torch.no_grad():
        return float((rounded(x) - layer(x)).square().mean() / layer(x).var())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("bits", [4, 3])
def test_closer_outputs_than_plain_rounding_where_few_inputs_are_loud(bits, block, seed):
    torch.manual_seed(seed)
    layer, x = with_tails(nn.Linear(128, 64)), torch.randn(768, 128) * loudness(128)
    plain, aware = (
        output_error(step, layer, x[:512], x[512:])
        for step in (QuantizeWeights(bits=bits, block=block), QuantizeAwq(bits=bits, block=block))
    )
    assert aware < (0.4 if block else 0.75) * plain


def test_it_gains_nothing_where_weights_have_no_tails():
    """All weights of a row are as large as the largest, so a column that is stretched stretches the grid with it."""
    layer, x = nn.Linear(128, 64), torch.randn(512, 128) * loudness(128)
    plain, aware = (output_error(step, layer, x, x) for step in (QuantizeWeights(bits=4), QuantizeAwq(bits=4, block=0)))
    assert aware == plain


@pytest.mark.parametrize("seed", range(3))
def test_closer_outputs_in_convolutions(seed):
    torch.manual_seed(seed)
    layer = with_tails(nn.Conv2d(32, 32, 3, padding=1))
    x = torch.randn(48, 32, 8, 8) * loudness(32).view(1, -1, 1, 1)
    plain, aware = (
        output_error(step, layer, x[:32], x[32:]) for step in (QuantizeWeights(bits=4, block=64), QuantizeAwq(bits=4))
    )
    assert aware < 0.8 * plain


def test_weights_that_are_read_loudly_are_closer_and_the_others_further():
    layer, x = with_tails(nn.Linear(128, 64)), torch.randn(512, 128) * loudness(128)
    off = []
    for step in (QuantizeWeights(bits=4, block=64), QuantizeAwq(bits=4)):
        rounded = step.apply(nn.Sequential(copy.deepcopy(layer)), workload_of(nn.Sequential(layer), x))
        off.append((rounded[0].weight - layer.weight).square().mean(0).detach())
    loud = loudness(128) > 1
    assert off[1][loud].mean() < off[0][loud].mean() / 3
    assert off[1][~loud].mean() > off[0][~loud].mean()


def test_where_no_input_is_louder_it_is_plain_rounding_or_hardly_other():
    torch.manual_seed(0)
    layer, x = with_tails(nn.Linear(128, 64)), torch.randn(4096, 128)
    plain, aware = (output_error(step(bits=4, block=64), layer, x, x) for step in (QuantizeWeights, QuantizeAwq))
    assert 0.9 * plain < aware <= plain


def test_an_input_that_is_always_zero_breaks_nothing():
    factors = stretches(torch.tensor([0.0, 1.0, 9.0]), power=1.0)
    assert bool((factors > 0).all() and factors.isfinite().all())
    assert factors.max() * factors.min() == pytest.approx(1.0)
    silent = stretches(torch.zeros(3), power=0.5)
    assert silent.tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_what_was_done_to_each_layer_is_said():
    workload = networks()["depthwise"]
    with recording() as coverage:
        QuantizeAwq(bits=3).apply(copy.deepcopy(workload.model), workload)
    said = dict(coverage.done)
    assert said["middle.0"].endswith("rounded as it is: its groups read different channels by the same columns")
    assert all("inputs to the power" in said[name] for name in ("stem.0", "expand.0", "narrow.0", "head"))
    with recording() as coverage:
        QuantizeAwq().apply(copy.deepcopy(networks()["transformer"].model), networks()["transformer"])
    assert dict(coverage.done)["words"] == "int4 blocks of 32, rounded as it is: its rows are looked up"


def test_it_costs_a_float_for_each_input_channel():
    layer, x = with_tails(nn.Linear(128, 64)), torch.randn(512, 128) * loudness(128)
    stored = []
    for step in (QuantizeWeights(bits=4, block=64), QuantizeAwq(bits=4)):
        rounded = step.apply(nn.Sequential(copy.deepcopy(layer)), workload_of(nn.Sequential(layer), x))
        stored.append(encoding_of(rounded[0]).bits_per_weight * layer.weight.numel() / 8)
    assert stored[1] == stored[0] + 4 * 128


def loud(network: str) -> Workload:
    """A network of ours whose first layer reads few loud channels."""
    workload = networks()[network]
    model = copy.deepcopy(workload.model)
    calibration = [(x * loudness(x.shape[1]).view(1, -1, *[1] * (x.dim() - 2)),) for (x,) in workload.calibration]
    return Workload(model, calibration[0], calibration, workload.score, train=calibration)


def test_zeros_survive_and_distillation_keeps_weights_on_the_grid():
    workload = loud("mlp")
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    rounded = QuantizeAwq(bits=3).apply(pruned, workload)
    before, encoding = rounded[0].weight.clone(), encoding_of(rounded[0])
    assert encoding.columns is not None
    scale, columns = encoding.scale.clone(), encoding.columns.clone()
    trained = DistillSoft(epochs=3, lr=0.05).apply(rounded, workload)
    assert torch.equal(encoding.scale, scale)
    assert torch.equal(encoding.columns, columns)
    assert torch.equal(encoding.project(trained[0].weight), trained[0].weight)
    assert bool((trained[0].weight[zero] == 0).all())
    assert not torch.equal(trained[0].weight, before)


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.parametrize(("network", "bits"), [("mlp", 3), ("residual", 4), ("depthwise", 6)])
def test_every_target_runs_it(target, network, bits, tmp_path):
    workload = loud(network)
    rounded = QuantizeAwq(bits=bits).apply(copy.deepcopy(workload.model), workload)
    assert any(e is not None and e.columns is not None for e in map(encoding_of, rounded.modules()))
    check_export(targets.find(target), rounded, workload, tmp_path)


@pytest.mark.parametrize("target", targets.installed())
def test_files_hold_codes_and_no_second_table(target, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 512) * loudness(512)
    workload = workload_of(nn.Sequential(with_tails(nn.Linear(512, 512))), x)
    sizes = []
    for number, step in enumerate((QuantizeWeights(bits=4, block=64), QuantizeAwq(bits=4))):
        folder = tmp_path / str(number)
        folder.mkdir()
        targets.find(target).export(step.apply(copy.deepcopy(workload.model), workload), workload, folder)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes[0] < sizes[1] < sizes[0] + 4 * 512 + 8192  # the factors, and a node or two


def test_what_is_rounded_already_is_refused():
    workload = networks()["mlp"]
    once = QuantizeAwq().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"quantize_awq would quantize '0', which an earlier step .* where: '!0'"):
        QuantizeAwq().apply(once, workload)
