"""GPTQ: further from the weights than nearest rounding, closer to the outputs; what its order and its sequence do."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from featherweight import passes, targets
from featherweight.encodings import Affine, Masked, affine_scale, grid
from featherweight.errors import RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_gptq import QuantizeGptq, falling, gptq
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording
from featherweight.testing import check_export, networks
from featherweight.workload import Workload

SEEDS = range(3)


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    """Correlated, as activations are: a quarter as many causes as features, of very different strength."""
    draw = torch.Generator().manual_seed(seed)
    causes = torch.randn(width // 4, width, generator=torch.Generator().manual_seed(1000 + seed))
    strength = torch.logspace(-1, 0.5, width // 4).unsqueeze(1)
    return torch.randn(n, width // 4, generator=draw) @ (strength * causes) + 0.05 * torch.randn(
        n, width, generator=draw
    )


def pictures(n: int, channels: int, seed: int) -> torch.Tensor:
    """Smooth, as photographs are."""
    draw = torch.Generator().manual_seed(seed)
    return nn.functional.interpolate(torch.randn(n, channels, 4, 4, generator=draw), size=12, mode="bilinear")


def layer_and_data(kind: str, seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A layer, what it is calibrated on and what it is judged on."""
    torch.manual_seed(seed)
    if kind == "linear":
        x = rows(768, 64, seed)
        return nn.Linear(64, 48), x[:512], x[512:]
    groups = {"convolution": 1, "grouped": 2, "depthwise": 8}[kind]
    x = pictures(96, 8, seed)
    return nn.Conv2d(8, 16, 3, padding=1, groups=groups), x[:64], x[64:]


def workload_of(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model.eval(), (x[:2],), [(part,) for part in x.chunk(4)], lambda predict: 0.0)


def errors(step: passes.Pass, layer: nn.Module, calibration: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    """Relative mean squared errors of the weights and of the outputs."""
    model = nn.Sequential(copy.deepcopy(layer))
    rounded = step.apply(model, workload_of(nn.Sequential(layer), calibration))
    with torch.no_grad():
        weight = (rounded[0].weight - layer.weight).square().mean() / layer.weight.square().mean()
        output = (rounded(x) - layer(x)).square().mean() / layer(x).var()
    return float(weight), float(output)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_worse_on_weights_and_better_on_outputs_than_the_nearest(bits, block, seed):
    layer, calibration, x = layer_and_data("linear", seed)
    nearest = errors(QuantizeWeights(bits=bits, block=block), layer, calibration, x)
    fed_on = errors(QuantizeGptq(bits=bits, block=block), layer, calibration, x)
    assert fed_on[0] > 1.05 * nearest[0]
    assert fed_on[1] < 0.6 * nearest[1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["convolution", "grouped", "depthwise"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_worse_on_weights_and_better_on_outputs_in_convolutions(bits, kind, seed):
    layer, calibration, x = layer_and_data(kind, seed)
    nearest = errors(QuantizeWeights(bits=bits), layer, calibration, x)
    fed_on = errors(QuantizeGptq(bits=bits), layer, calibration, x)
    assert fed_on[0] > 1.05 * nearest[0]
    assert fed_on[1] < 0.8 * nearest[1]


def test_it_gains_nothing_where_inputs_have_nothing_to_do_with_one_another():
    """Then no weight can make up for another's error, and nearest rounding is as good."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.linalg.qr(torch.randn(512, 32)).Q * 512**0.5
    nearest, fed_on = (errors(step, layer, x, x) for step in (QuantizeWeights(bits=4), QuantizeGptq(bits=4)))
    assert fed_on == pytest.approx(nearest, rel=1e-3)


def one_by_one(weight, step, hessian, bits, damping):
    """The same by its definition: the inverse is taken anew for what is left after every column."""
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    weight, rounded = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[i:, i:])
        rounded[:, i] = (weight[:, i] / step).round().clamp(*grid(bits)) * step
        error = (weight[:, i] - rounded[:, i]) / inverse[0, 0]
        weight[:, i:] -= error.unsqueeze(1) * inverse[0]
    return rounded.float()


def test_it_is_what_it_is_defined_to_be():
    torch.manual_seed(0)
    weight, x, step = torch.randn(6, 20), rows(100, 20, 0), 0.3
    hessian = x.T @ x / 100
    found = gptq(weight.unsqueeze(0), torch.full((1, 6, 20), step), hessian.unsqueeze(0), bits=4, damping=0.01)
    torch.testing.assert_close(found[0], one_by_one(weight, step, hessian, 4, 0.01))


def test_correcting_later_columns_in_one_go_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    weight, x = torch.randn(2, 4, 300), rows(600, 300, 0)
    hessian = (x.T @ x / 600).expand(2, -1, -1)
    steps = torch.full_like(weight, 0.4)
    found = []
    for lazy in (1, 128, 1000):
        monkeypatch.setattr("featherweight.passes.quantize_gptq.LAZY", lazy)
        found.append(gptq(weight, steps, hessian, bits=3, damping=0.01, order=falling(hessian)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_inputs_that_are_always_zero_round_to_the_nearest():
    torch.manual_seed(0)
    weight, x = torch.randn(1, 5, 12), rows(100, 12, 0)
    x[:, [3, 7]] = 0
    hessian = (x.T @ x).unsqueeze(0)
    found = gptq(weight, torch.ones_like(weight), hessian, bits=4, damping=0.01)
    assert torch.equal(found[..., [3, 7]], weight[..., [3, 7]].round())
    silent = gptq(weight, torch.ones_like(weight), torch.zeros_like(hessian), bits=4, damping=0.01)
    assert torch.equal(silent, weight.round())


def test_loud_inputs_first_is_better_where_some_are_louder():
    gains = []
    for seed in range(8):
        layer, calibration, x = layer_and_data("linear", seed)
        loud = torch.logspace(-1, 1, 64)  # the loudest last
        ordered, plain = (
            errors(QuantizeGptq(bits=3, order=order), layer, calibration * loud, x * loud)[1] for order in (True, False)
        )
        gains.append(ordered / plain)
    assert sorted(gains)[len(gains) // 2] < 0.1


class Attention(nn.Module):
    """Three layers that read one tensor and a fourth, with an embedding before and one layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.query, self.key, self.value, self.out, self.never = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        scores = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        return self.out(scores @ self.value(x))


def test_what_was_done_to_each_layer_is_said():
    model, ids = Attention(), torch.randint(0, 30, (8, 5))
    with recording() as coverage:
        QuantizeGptq(bits=3).apply(model, workload_of(copy.deepcopy(model), ids))
    assert coverage.done == [
        *((name, "int3 per channel, errors fed on") for name in ("query", "key", "value", "out")),
        ("words", "int3 per channel, rounded to the nearest: its rows are looked up"),
        ("never", "int3 per channel, rounded to the nearest: the network never calls it"),
    ]
    assert coverage.left == []


def test_a_table_that_an_output_layer_shares_is_rounded_once_and_to_the_nearest():
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)).eval()
    model[2].weight = model[0].weight
    workload = workload_of(copy.deepcopy(model), torch.randint(0, 20, (8, 5)))
    with recording() as coverage:
        after = QuantizeGptq().apply(model, workload)
    assert encoding_of(after[0]) is encoding_of(after[2])
    assert dict(coverage.done)["2"].endswith("its rows are looked up by a layer that shares them")
    nearest = QuantizeWeights(bits=4).apply(copy.deepcopy(workload.model), workload)
    assert torch.equal(after[0].weight, nearest[0].weight)
    assert not torch.equal(after[1].weight, nearest[1].weight)


def test_layers_that_share_a_weight_are_rounded_by_what_both_read():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 32, bias=False), rows(256, 32, 0)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(32, 32, bias=False))
    model[2].weight = layer.weight
    workload = workload_of(copy.deepcopy(model), x)
    after = QuantizeGptq(bits=3, sequential=False).apply(model, workload)
    assert encoding_of(after[0]) is encoding_of(after[2])
    first, second = x, torch.tanh(layer(x)).detach()
    weight = workload.model[0].weight.detach()
    hessian = (first.T @ first + second.T @ second).unsqueeze(0) / 512
    scale = affine_scale(weight, 3, 0, search=True).unsqueeze(1).expand(32, 32)
    alone = gptq(weight.unsqueeze(0), scale.unsqueeze(0), hessian, 3, 0.01, falling(hessian))
    assert float((alone[0] == after[0].weight).float().mean()) > 0.9  # sums in another order may round another way
    hessian = (first.T @ first).unsqueeze(0) / 256
    by_one = gptq(weight.unsqueeze(0), scale.unsqueeze(0), hessian, 3, 0.01, falling(hessian))
    assert float((by_one[0] == after[0].weight).float().mean()) < 0.8


def test_pruned_weights_stay_zero_and_their_errors_are_not_forgotten():
    torch.manual_seed(0)
    x = rows(768, 64, 0)
    workload = workload_of(nn.Sequential(nn.Linear(64, 48)), x[:512])
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(workload.model), workload)
    zero = pruned[0].weight == 0
    off = []
    for step in (QuantizeWeights(bits=4), QuantizeGptq(bits=4)):
        rounded = step.apply(copy.deepcopy(pruned), workload)
        assert bool((rounded[0].weight[zero] == 0).all())
        off.append(float((rounded(x[512:]) - pruned(x[512:])).square().mean().detach()))
    assert off[1] < 0.6 * off[0]
    trained = DistillSoft(steps=3, lr=0.1).apply(rounded, workload)
    assert bool((trained[0].weight[zero] == 0).all())
    assert isinstance(encoding_of(pruned[0]), Masked)


@pytest.mark.parametrize("block", [0, 32])
def test_distillation_keeps_weights_on_the_grid(block):
    workload = networks()["mlp"]
    rounded = QuantizeGptq(bits=3, block=block).apply(copy.deepcopy(workload.model), workload)
    before, scale = rounded[0].weight.clone(), encoding_of(rounded[0]).scale.clone()
    trained = DistillSoft(epochs=3, lr=0.05).apply(rounded, workload)
    encoding = encoding_of(trained[0])
    assert torch.equal(encoding.scale, scale)
    assert torch.equal(encoding.project(trained[0].weight), trained[0].weight)
    assert not torch.equal(trained[0].weight, before)


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.parametrize(("bits", "block"), [(3, 32), (2, 0), (6, 0)])
def test_every_target_runs_it(target, bits, block, tmp_path):
    for network in ("residual", "transformer"):
        workload = networks()[network]
        rounded = QuantizeGptq(bits=bits, block=block).apply(copy.deepcopy(workload.model), workload)
        (tmp_path / network).mkdir()
        check_export(targets.find(target), rounded, workload, tmp_path / network)


def test_what_is_rounded_already_is_refused():
    workload = networks()["mlp"]
    once = QuantizeGptq().apply(copy.deepcopy(workload.model), workload)
    with pytest.raises(RecipeError, match=r"quantize_gptq would quantize '0', which an earlier step .* where: '!0'"):
        QuantizeGptq().apply(once, workload)


def deep(seed: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    layers = [module for _ in range(12) for module in (nn.Linear(48, 48), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers, nn.Linear(48, 10)).eval(), rows(1024, 48, seed)


def gain_of_sequence(bits: int) -> float:
    """Error of the output of deep networks, sequential over not: the median over seeds, which differ much."""
    gains = []
    for seed in range(8):
        model, x = deep(seed)
        off = []
        for sequential in (True, False):
            workload = workload_of(model, x[:768])
            rounded = QuantizeGptq(bits=bits, sequential=sequential).apply(copy.deepcopy(model), workload)
            with torch.no_grad():
                off.append(float((rounded(x[768:]) - model(x[768:])).square().mean()))
        gains.append(off[0] / off[1])
    return sorted(gains)[len(gains) // 2]


def test_layers_that_see_what_was_rounded_before_them_help_where_much_was_lost():
    assert gain_of_sequence(bits=2) < 0.95


def test_layers_that_see_what_was_rounded_before_them_matter_little_where_little_was_lost():
    assert 0.85 < gain_of_sequence(bits=4) < 1.1


def test_each_bit_more_is_closer_and_codes_are_on_the_grid():
    layer, calibration, x = layer_and_data("linear", 0)
    off = [errors(QuantizeGptq(bits=bits), layer, calibration, x)[1] for bits in range(2, 9)]
    assert all(finer < coarser / 2 for coarser, finer in pairwise(off))
    model = QuantizeGptq(bits=3).apply(nn.Sequential(layer), workload_of(nn.Sequential(layer), calibration))
    assert isinstance(encoding_of(model[0]), Affine)

    assert all(row.unique().numel() <= 8 for row in model[0].weight)
