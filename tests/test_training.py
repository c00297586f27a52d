"""The loop itself: rates, and the layout of pictures. What it is for is tested with the passes that use it."""

import pytest
import torch
from torch import Tensor, nn

from featherweight.training import rate, relative_rates, train
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
        model, workload, lambda b: model(b[0]).square().mean(), step="p", where="*", epochs=2, steps=0, lr=0.01
    )
    assert len(losses) == 8 and losses[-1] < losses[0] and layers == ["conv", "head"]
    assert model.contiguous[-4:] == [views] * 4
    assert all(p.is_contiguous() for p in model.parameters()) and not torch.equal(model(x), before)
