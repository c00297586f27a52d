"""AutoRound: further from the weights than nearest rounding, closer to the outputs; what its parts are worth."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from featherweight import gram
from featherweight.encodings import affine_scale, grid
from featherweight.errors import RecipeError
from featherweight.passes import Pass
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_autoround import QuantizeAutoround, descended, learned_rounding
from featherweight.passes.quantize_gptq import QuantizeGptq, gptq
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encoding_of, recording
from featherweight.workload import Workload
from tests.loud import output_errors, weight_errors, workload

LAYERS = ("grouped", "depthwise", "mixed", "up", "head")


def applied(step: Pass, given: Workload) -> nn.Module:
    return step.apply(copy.deepcopy(given.model), given)


def correlated(out: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the Gram matrix of inputs that hang together, and scales of three bits for every weight."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, out, inputs, generator=draw)
    mixing = torch.randn(inputs // 4, inputs, generator=draw) * torch.logspace(-1, 0, inputs // 4).unsqueeze(1)
    x = torch.randn(1000, inputs // 4, generator=draw) @ mixing + 0.1 * torch.randn(1000, inputs, generator=draw)
    scales = affine_scale(weight[0], 3, 0, search=True).view(1, out, 1).expand_as(weight)
    return weight, (x.T @ x / 1000).unsqueeze(0), scales


def loss(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    return ((rounded - weight) @ hessian * (rounded - weight)).sum(-1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("bits", "block"), [(4, 0), (4, 32), (3, 0), (2, 0)])
def test_worse_on_weights_and_better_on_outputs_than_the_nearest(bits: int, block: int, seed: int) -> None:
    given, unseen = workload(seed), workload(seed + 100).calibration
    nearest, learned = (applied(kind(bits=bits, block=block), given) for kind in (QuantizeWeights, QuantizeAutoround))
    off, weights = ([f(given.model, model, *rest) for model in (nearest, learned)] for f, *rest in (
        (output_errors, unseen), (weight_errors,)))  # fmt: skip
    for name in LAYERS:
        assert weights[1][name] > weights[0][name]
        assert off[1][name] < 0.95 * off[0][name], name
    assert sum(off[1].values()) < 0.75 * sum(off[0].values())


def test_no_further_off_than_gptq_which_feeds_on_the_errors_of_single_weights() -> None:
    ratios = []
    for seed in range(6):
        weight, hessian, scales = correlated(32, 96, seed)
        learned = loss(weight, learned_rounding(weight, scales, hessian, 3, 100), hessian).sum()
        ratios.append(float(learned / loss(weight, gptq(weight, scales, hessian, 3, 0.01), hessian).sum()))
    assert sorted(ratios)[3] < 1.0


def test_learning_block_by_block_is_better_than_all_at_once_and_than_feeding_on_alone() -> None:
    for seed in range(4):
        weight, hessian, scales = correlated(32, 96, seed)
        blocks, fed_on = (learned_rounding(weight, scales, hessian, 3, steps) for steps in (100, 0))
        at_once, nearest = (descended(weight, scales, hessian, 3, steps) for steps in (100, 0))
        off = [float(loss(weight, found, hessian).sum()) for found in (blocks, fed_on, at_once, nearest)]
        assert off[0] < 0.97 * off[1]
        assert off[0] < 0.8 * off[2] < 0.6 * off[3]


def test_no_row_ends_up_further_off_than_nearest_rounding_and_none_moves_by_more_than_a_step() -> None:
    weight, hessian, scales = correlated(32, 16, 0)
    nearest = (weight / scales).round().clamp(*grid(3)) * scales
    found = descended(weight, scales, hessian, 3, 50)
    assert bool((loss(weight, found, hessian) <= loss(weight, nearest, hessian)).all())
    assert bool(((found - nearest).abs() <= scales * 1.001).all())
    assert torch.equal(descended(weight, scales, hessian, 3, 0), nearest)


def test_few_inputs_come_near_to_the_best_of_all_roundings() -> None:
    weight, hessian, scales = correlated(24, 8, 3)
    floor = (weight / scales).floor()
    ups = torch.cartesian_prod(*[torch.arange(2.0)] * 8).unsqueeze(1).unsqueeze(1)
    all_of_them = (floor + ups).clamp(*grid(3)) * scales
    best = loss(weight, all_of_them, hessian).amin(0).sum()
    nearest, found = (loss(weight, descended(weight, scales, hessian, 3, steps), hessian).sum() for steps in (0, 200))
    assert found < best + 0.15 * (nearest - best)


def test_it_gains_nothing_where_inputs_have_nothing_to_do_with_one_another() -> None:
    weight, _, scales = correlated(8, 40, 0)
    found = learned_rounding(weight, scales, torch.diag(torch.linspace(1, 2, 40)).unsqueeze(0), 3, 100)
    assert torch.equal(found, descended(weight, scales, torch.eye(40).unsqueeze(0), 3, 0))


def test_inputs_that_are_always_zero_round_to_the_nearest() -> None:
    weight, hessian, scales = correlated(4, 24, 0)
    hessian[:, [3, 7]], hessian[:, :, [3, 7]] = 0, 0
    nearest = descended(weight, scales, hessian, 3, 0)
    assert torch.equal(learned_rounding(weight, scales, hessian, 3, 50)[..., [3, 7]], nearest[..., [3, 7]])
    assert torch.equal(learned_rounding(weight, scales, torch.zeros_like(hessian), 3, 50), nearest)


def test_more_bits_are_closer() -> None:
    given = workload(0)
    off = [
        output_errors(given.model, applied(QuantizeAutoround(bits=b), given), given.calibration) for b in (2, 4, 6, 8)
    ]
    totals = [sum(errors.values()) for errors in off]
    assert all(finer < 0.5 * coarser for coarser, finer in pairwise(totals))


class Tied(nn.Module):
    """An embedding that the last layer shares, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle, self.never = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.thin, self.last = nn.Linear(1, 16), nn.Linear(16, 30, bias=False)
        self.last.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.words(ids))
        return self.last(x + self.thin(x[..., :1]))


def test_what_was_done_to_each_layer_is_said() -> None:
    model, ids = Tied().eval(), torch.randint(0, 30, (8, 5))
    with recording() as coverage:
        after = applied(QuantizeAutoround(bits=3), Workload(model, (ids,), [(ids,)], lambda predict: 0.0))
    shared = "int3 per channel, rounded to the nearest: its rows are looked up by a layer that shares them"
    assert dict(coverage.done) == {
        "words": shared,
        "last": shared,
        "middle": "int3 per channel, rounding learned",
        "never": "int3 per channel, rounded to the nearest: the network never calls it",
    }
    assert coverage.left == [("thin", "its rows hold one weight each: a scale would weigh more than it saves")]
    assert encoding_of(after.words) is encoding_of(after.last)


def test_gram_matrices_that_do_not_fit_into_memory_together_are_taken_in_turn(monkeypatch) -> None:
    given = workload(0)
    together = applied(QuantizeAutoround(), given)
    monkeypatch.setattr(gram, "HELD", 1)
    in_turn = output_errors(given.model, applied(QuantizeAutoround(), given), given.calibration)
    errors = output_errors(given.model, together, given.calibration)
    assert in_turn["grouped"] == errors["grouped"]
    assert sum(in_turn.values()) == pytest.approx(sum(errors.values()), rel=0.1)


def test_zeros_survive_and_distillation_keeps_weights_on_the_grid() -> None:
    given = workload(0)
    pruned = PruneMagnitude(share=0.5).apply(copy.deepcopy(given.model), given)
    zero = pruned.up.weight == 0
    off = []
    for kind in (QuantizeWeights, QuantizeAutoround):
        rounded = kind(bits=3).apply(copy.deepcopy(pruned), given)
        assert bool((rounded.up.weight[zero] == 0).all())
        off.append(output_errors(pruned, rounded, given.calibration)["up"])
    assert off[1] < 0.9 * off[0]
    before, encoding = rounded.up.weight.clone(), encoding_of(rounded.up)
    trained = DistillSoft(epochs=3, lr=0.3).apply(rounded, given)
    assert bool((trained.up.weight[zero] == 0).all())
    assert torch.equal(encoding.project(trained.up.weight), trained.up.weight)
    assert not torch.equal(trained.up.weight, before)


def test_what_is_rounded_already_is_refused() -> None:
    given = workload(0)
    once = applied(QuantizeGptq(), given)
    with pytest.raises(RecipeError, match=r"quantize_autoround would quantize 'grouped', which an earlier step"):
        QuantizeAutoround().apply(once, given)
