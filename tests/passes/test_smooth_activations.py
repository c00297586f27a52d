"""SmoothQuant: the same function, with inputs that one scale fits; where it helps and where nothing can be moved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import LayerError, RecipeError
from featherweight.hooks import (
    watch_inputs,
)
from featherweight.passes.fold_batchnorm import FoldBatchnorm
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.smooth_activations import SmoothActivations
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import (
    recording,
)
from featherweight.testing import networks, run
from featherweight.workload import Workload


class Block(nn.Module):
    """(n, 6, 64) to the same: attention and a feed-forward layer, each added to what a norm was taken of."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.before, self.between = norm(64), norm(64)
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        y = self.before(x)
        x = x + self.out(F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y)))
        return x + self.down(torch.relu(self.up(self.between(x))))


def loud(norm, seed: int) -> Workload:
    """Norms whose gains make every sixteenth channel sixty times as loud, as in large language models."""
    torch.manual_seed(seed)
    model = Block(norm).eval()
    with torch.no_grad():
        for layer in (model.before, model.between):
            layer.weight[::16] *= 60
    x = torch.randn(48, 6, 64)
    return Workload(model, (x[:2],), [(part,) for part in x.split(16)], lambda predict: 0.0)


def error(model: nn.Module, workload: Workload) -> float:
    x = torch.randn(32, 6, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(x) - workload.model(x)).norm() / (workload.model(x) - x).norm())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("seed", range(2))
def test_loud_channels_cost_int8_less(norm, seed):
    workload = loud(norm, seed)
    plain, smooth = (
        compress_model(Recipe((*steps, QuantizeStatic()), "torch"), workload)[0]
        for steps in ((), (SmoothActivations(),))
    )
    assert error(smooth, workload) < 0.75 * error(plain, workload)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_function_stays_and_inputs_become_alike(norm):
    workload = loud(norm, 0)
    after = SmoothActivations(power=1.0).apply(copy.deepcopy(workload.model), workload)
    assert error(after, workload) < 1e-5
    spread = []
    for model in (workload.model, after):
        seen = {}
        watch_inputs(model, {"up": model.up}, workload.calibration, lambda _, x, seen=seen: seen.setdefault("x", x))
        largest = seen["x"].abs().flatten(0, 1).amax(0)
        spread.append(float(largest.max() / largest.min()))
    assert spread[0] > 30
    assert spread[1] < 3


def test_half_of_it_is_better_than_all_or_nothing():
    workload, off = loud(nn.LayerNorm, 0), []
    for power in (0.0, 0.5, 1.0):
        steps = (SmoothActivations(power=power), QuantizeStatic())
        off.append(error(compress_model(Recipe(steps, "torch"), workload)[0], workload))
    assert off[1] < min(off[0], off[2])


@pytest.mark.parametrize("name", ["residual", "mlp", "transformer", "stacked"])
def test_real_networks_keep_their_function(name):
    workload = networks()[name]
    steps = (FoldBatchnorm(), SmoothActivations()) if name == "residual" else (SmoothActivations(),)
    model, _ = compress_model(Recipe(steps, "torch"), workload)
    (before,), (after,) = run(workload.model, workload.calibration[0]), run(model, workload.calibration[0])
    assert abs(before - after).max() < 1e-4


def test_what_was_done_and_what_was_left_is_said():
    workload = networks()["transformer"]
    with recording() as coverage:
        SmoothActivations(where="*.query, *.key, *.up, *.down").apply(copy.deepcopy(workload.model), workload)
    assert [layer for layer, _ in coverage.done] == ["blocks.0.up", "blocks.1.up"]
    assert coverage.done[0][1].endswith(", by blocks.0.norm2")
    nothing = "what it reads comes from no layer or norm whose channels can be scaled"
    for block in ("blocks.0", "blocks.1"):
        reason = f"{block}.value, which is left out, reads the same channels"
        expected = {f"{block}.query": reason, f"{block}.key": reason, f"{block}.down": nothing}
        assert expected.items() <= dict(coverage.left).items()


class PostNorm(nn.Module):
    """What the norm gives is added to later, so its scales must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.norm(x)
        return y + self.down(F.gelu(self.up(y)))


def test_norms_that_are_added_to_are_left():
    x = torch.randn(4, 8)
    workload = Workload(PostNorm().eval(), (x,), [(x,)], lambda predict: 0.0)
    with pytest.raises(
        LayerError, match="up: the channels that it reads, of norm, must stay: its output goes through add"
    ):
        compress_model(Recipe((SmoothActivations(where="up"),), "torch"), workload)


def test_after_rounding_it_is_refused():
    message = r"Step 2 .* rescale the weights of 'query', .* such as smooth_activations, come before .* quantize_static"
    with pytest.raises(RecipeError, match=message):
        compress_model(Recipe((QuantizeStatic(), SmoothActivations()), "torch"), loud(nn.LayerNorm, 0))
