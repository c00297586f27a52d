"""What answers are compared by: the formulas, which outputs are logits, and labels that are none."""

import pytest
import torch
from torch import nn

from featherweight.errors import WorkloadError
from featherweight.losses import (
    IGNORED,
    checked_labels,
    kinds_of,
    label_loss,
    looks_like_logits,
    refuse_without_logits,
    relative_error,
    soft_loss,
)
from featherweight.workload import Workload


def test_the_soft_loss_is_hintons():
    s, t = torch.randn(5, 4), torch.randn(5, 4)
    p, q = torch.softmax(t / 3, -1), torch.softmax(s / 3, -1)
    assert torch.isclose(soft_loss(s, t, 3.0), 9 * (p * (p / q).log()).sum(-1).mean())


def test_the_squared_temperature_keeps_gradients_of_one_size():
    t = torch.randn(64, 10)

    def gradient(temperature: float) -> float:
        s = torch.zeros(64, 10, requires_grad=True)
        soft_loss(s, t, temperature).backward()
        return float(s.grad.norm())

    assert 0.5 < gradient(8.0) / gradient(2.0) < 2


def test_positions_are_averaged_like_examples():
    s, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.isclose(soft_loss(s, t, 2.0), soft_loss(s.flatten(0, 1), t.flatten(0, 1), 2.0))
    labels = torch.tensor([[0, 1, 3], [2, 2, 1]])
    assert torch.isclose(label_loss(s, labels), label_loss(s.flatten(0, 1), labels.flatten()))


def test_positions_without_a_label_do_not_count():
    logits = torch.randn(4, 3)
    labels = torch.tensor([1, IGNORED, 0, IGNORED])
    assert torch.isclose(label_loss(logits, labels), label_loss(logits[::2], labels[::2]))
    assert label_loss(logits, torch.full((4,), IGNORED)) == 0


def test_the_relative_error_has_no_unit():
    s, t = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.isclose(relative_error(s, t), relative_error(100 * s + 7, 100 * t + 7), rtol=1e-4)
    assert relative_error(torch.full((5, 4), float(t.mean())), t).item() == pytest.approx(1.0)


def test_kinds_follow_outputs():
    class Several(nn.Module):
        def forward(self, x):
            return x, x.softmax(-1), x[:, :1], x.argmax(-1)

    x = 3 * torch.randn(8, 4)
    workload = Workload(Several(), (x,), [(x,)], lambda predict: 0.0)
    assert kinds_of(workload) == ("kl", "mse", "mse", "")
    assert kinds_of(workload, "mse") == ("mse", "mse", "mse", "")
    refuse_without_logits(workload, kinds_of(workload), "distill_x")
    with pytest.raises(WorkloadError, match=r"distill_x needs logits.*returns \(8, 4\) of float32, .*\(8,\) of int64"):
        refuse_without_logits(workload, ("mse",), "distill_x")


def test_shapes_and_values_tell_logits():
    x = torch.randn(2, 3)
    assert looks_like_logits(x) and looks_like_logits(x[:, None]) and not looks_like_logits(x[:, None, None])
    assert not looks_like_logits(x, nn.LayerNorm(3)) and not looks_like_logits(x, nn.Tanh())


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (None, "yields batches without targets"),
        ([0, 1], "yields targets of type list"),
        (torch.zeros(2), "yields targets of float32"),
        (torch.zeros(2, 1, dtype=torch.long), r"yields targets of shape \(2, 1\) for logits \(2, 5\)"),
        (torch.tensor([0, 5]), "yields targets from 0 to 5 for 5 classes"),
        (torch.tensor([-1, 0]), "yields targets from -1 to 0 for 5 classes"),
    ],
)
def test_labels_that_are_none(target, problem):
    with pytest.raises(WorkloadError, match=rf"{problem}. Yield pairs .* tensor \(2,\) of whole numbers from 0 to 4"):
        checked_labels(target, torch.randn(2, 5), "distill_x")


def test_labels_that_are_some():
    target = torch.tensor([4, IGNORED], dtype=torch.int32)
    assert checked_labels(target, torch.randn(2, 5), "distill_x") is target
