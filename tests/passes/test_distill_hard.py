"""Hard distillation: what the teacher's first choice alone teaches, and what it does not."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from featherweight.encodings import Affine, Masked
from featherweight.errors import LayerError, WorkloadError
from featherweight.losses import soft_loss
from featherweight.passes import Pass
from featherweight.passes.distill_hard import DistillHard, hard_loss
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_channels import PruneChannels
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import encoding_of, recording
from featherweight.testing import networks
from featherweight.workload import Workload
from tests.gratings import gratings, workload

HELD_OUT, _ = gratings(1000, seed=9)


def data_of(seed: int) -> Workload:
    """The gratings, with other examples to train on."""
    x, _ = gratings(512, seed=20 + seed)
    batches = [(part,) for part in x.split(32)]
    return replace(workload(), calibration=batches[:8], train=batches)


def agreement(student: nn.Module, teacher: nn.Module, x: Tensor = HELD_OUT) -> float:
    """The share of the inputs for which both choose the same class."""
    with torch.no_grad():
        return float((student(x).argmax(-1) == teacher(x).argmax(-1)).float().mean())


def divergence(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return float(soft_loss(student(HELD_OUT), teacher(HELD_OUT), 1.0))


def taught(step: Pass, data: Workload) -> nn.Module:
    return compress_model(Recipe((PruneChannels(share=0.3), step), "torch"), data)[0]


# ------------------------------------------------------------------------------------------------ what it is for


def test_the_loss_asks_for_the_first_choice_and_nothing_else():
    s, t = torch.randn(6, 4), torch.randn(6, 4)
    assert torch.isclose(hard_loss(s, t), nn.functional.cross_entropy(s, t.argmax(-1)))
    assert torch.equal(hard_loss(s, t), hard_loss(s, 100 * t + 5))
    assert not torch.isclose(soft_loss(s, t, 2.0), soft_loss(s, 100 * t, 2.0))


def test_it_recovers_the_choices_of_a_pruned_network_without_labels():
    data = data_of(0)
    pruned, _ = compress_model(Recipe((PruneChannels(share=0.3),), "torch"), data)
    assert agreement(pruned, data.model) < 0.7 < 0.85 < agreement(taught(DistillHard(epochs=2), data), data.model)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_soft_targets_teach_more_on_the_same_budget(seed):
    """How sure the original is, and what else it thinks of. Judged by the first choice, hard labels do as well."""
    data = data_of(seed)
    hard, soft = (taught(kind(epochs=4), data) for kind in (DistillHard, DistillSoft))
    assert divergence(soft, data.model) < 0.7 * divergence(hard, data.model)
    assert abs(agreement(soft, data.model) - agreement(hard, data.model)) < 0.05


# ------------------------------------------------------------------------------------------------ what it keeps


def test_masks_and_grids_stay():
    data = networks()["mlp"]
    steps = (PruneMagnitude(share=0.7, where="0"), QuantizeWeights(bits=4, where="2"))
    before, _ = compress_model(Recipe(steps, "torch"), data)
    after, _ = compress_model(Recipe((*steps, DistillHard(epochs=10, lr=0.03)), "torch"), data)
    assert isinstance(encoding_of(after[0]), Masked) and isinstance(encoding_of(after[2]), Affine)
    assert torch.equal(after[0].weight == 0, before[0].weight == 0)
    assert torch.equal(encoding_of(after[2]).scale, encoding_of(before[2]).scale)
    assert not torch.equal(after[2].weight, before[2].weight)


def test_it_says_what_it_did():
    data = networks()["mlp"]
    with recording() as coverage:
        DistillHard(where="2").apply(copy.deepcopy(data.model), data)
    ((layer, what),) = coverage.done
    assert layer == "2" and what.startswith("distilled 4 steps (hard), loss ")


# ------------------------------------------------------------------------------------------------ what goes wrong


class Ends(nn.Module):
    """A linear layer, and something done to what it returns."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(4, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layer(x))


@pytest.mark.parametrize("end", [nn.Softmax(-1), nn.LayerNorm(3), nn.Unflatten(1, (3, 1))])
def test_outputs_that_are_no_logits(end):
    x = torch.randn(8, 4)
    data = Workload(Ends(end).eval(), (x,), [(x,)], lambda predict: 0.0)
    with pytest.raises(
        WorkloadError, match=r"distill_hard needs logits of classes in the last dimension.*returns \(8, 3"
    ):
        DistillHard().apply(copy.deepcopy(data.model), data)


def test_a_teacher_that_returns_no_numbers():
    x = torch.randn(8, 4)
    x[3] = torch.nan
    data = Workload(Ends(nn.Identity()).eval(), (x,), [(x[:2],)], lambda predict: 0.0, train=[(x,)])
    with pytest.raises(WorkloadError, match=r"distill_hard: .* the original model itself returned NaN"):
        DistillHard().apply(copy.deepcopy(data.model), data)


def test_an_earlier_step_that_changed_the_shape():
    x = torch.randn(4, 4)
    data = Workload(nn.Linear(4, 3).eval(), (x,), [(x,)], lambda predict: 0.0)
    with pytest.raises(LayerError, match=r"distill_hard .* returns \(4, 2\) where the original returns \(4, 3\)"):
        DistillHard().apply(nn.Linear(4, 2), data)
