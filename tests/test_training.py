"""The loop itself: rates, and the layout of pictures. What it is for is tested with the passes that use it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from featherweight import passes
from featherweight.surgery import recording
from featherweight.testing import networks
from featherweight.training import rate, relative_rates, report, train
from featherweight.workload import Workload


def test_the_rate_warms_up_and_ends_near_zero():
    rates = [rate(step, 100) for step in range(100)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 9
    assert rates[-1] < 0.01
    assert rate(0, 1) == 1.0


def test_rates_follow_the_size_of_the_weights():
    small, large = nn.Parameter(torch.full((4,), 0.1)), nn.Parameter(torch.full((4,), 10.0))
    rates = [group["lr"] for group in relative_rates([small, large, nn.Parameter(torch.zeros(4))], 0.01)]
    assert rates == pytest.approx([0.001, 0.1, 0.01 * 1e-3])


class Depthwise(nn.Module):
    """Convolutions channel by channel; what they return is viewed as rows, or reshaped."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        self.views, self.conv, self.head = views, nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4 * 36, 2)
        self.contiguous: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        self.contiguous.append(x.is_contiguous())
        return self.head(x.view(x.shape[0], -1) if self.views else x.flatten(1))


@pytest.mark.parametrize("views", [True, False])
def test_pictures_have_channels_last_where_depthwise_networks_can_take_it(views):
    torch.manual_seed(0)
    model, x = Depthwise(views).eval(), torch.randn(3, 4, 8, 8)
    workload = Workload(model, (x,), [(x,)] * 4, lambda predict: 0.0)
    before = model(x).detach()
    model.contiguous.clear()
    losses, layers = train(
        model, workload, lambda b, _: model(b[0]).square().mean(), step="p", where="*", epochs=2, steps=0, lr=0.01
    )
    assert len(losses) == 8 and losses[-1] < losses[0] and layers == ["conv", "head"]
    assert model.contiguous[-4:] == [views] * 4
    assert all(p.is_contiguous() for p in model.parameters()) and not torch.equal(model(x), before)


def test_the_loss_is_given_targets_where_there_are_any_and_its_own_parameters_are_trained():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).eval(), torch.randn(4, 3)
    scale, seen = nn.Parameter(torch.ones(2)), []

    def loss(batch, target):
        seen.append(target)
        return (model(batch[0]) * scale - 1).square().mean()

    data = [((x,), "a"), (x,), [[x], None]]
    workload = Workload(model, (x,), [(x,)], lambda predict: 0.0, train=data)
    losses, _ = train(model, workload, loss, step="p", where="*", epochs=2, steps=0, lr=0.05, besides=[scale])
    assert seen == ["a", None, None] * 2 and losses[-1] < losses[0]
    assert not torch.equal(scale, torch.ones(2)) and all(p.grad is None for p in model.parameters())


def test_the_report_names_every_layer_and_the_losses_of_the_ends():
    with recording() as coverage:
        report(["a", "b"], [4.0, 2.0, *[9.0] * 16, 1.0, 0.0], "kl")
    assert coverage.done == [(name, "distilled 20 steps (kl), loss 3 → 0.5") for name in "ab"]


@pytest.mark.parametrize("name", ["distill_soft", "distill_hard", "distill_features", "distill_attribution"])
def test_with_bfloat16_the_student_alone_is_rounded_and_learns_as_well(name, monkeypatch):
    workload = networks()["residual"]
    (x,) = workload.calibration[0]
    student = copy.deepcopy(workload.model)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.5 * p.square().mean().sqrt() * torch.randn_like(p)
    computed: dict[int, set[torch.dtype]] = {id(student): set(), id(workload.model): set()}
    handles = [
        net.head.register_forward_hook(lambda _, __, y, net=net: computed[id(net)].add(y.dtype) or None)
        for net in (student, workload.model)
    ]
    rounded, exact = (
        passes.find(name)(epochs=6, precision=precision).apply(net, workload)
        for precision, net in (("bfloat16", student), ("float32", copy.deepcopy(student)))
    )
    for handle in handles:
        handle.remove()
    assert computed == {id(student): {torch.bfloat16, torch.float32}, id(workload.model): {torch.float32}}
    assert rounded(x).dtype == torch.float32 and all(p.dtype == torch.float32 for p in rounded.parameters())
    assert "forward" not in vars(rounded)
    with torch.no_grad():
        assert 0 < (rounded(x) - exact(x)).norm() < 0.05 * exact(x).norm()
