"""Folding: the same function with fewer layers, only where it is the same function."""

import copy

import pytest
import torch
from torch import nn

from featherweight.encodings import Affine, Masked, affine_scale
from featherweight.errors import LayerError, RecipeError
from featherweight.passes.fold_batchnorm import FoldBatchnorm
from featherweight.surgery import encode, encoding_of, recording
from featherweight.testing import networks, resized, run
from featherweight.workload import Workload


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """`model` with batch norms that have seen data and mean something, in eval mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
            if module.running_var is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.2, 3.0)
    return model.eval()


def folded(model: nn.Module, x: torch.Tensor, **settings):
    """The network before, after, and what was said of it."""
    model = settled(model, x)
    workload = Workload(model, (x,), [(x,)], lambda predict: 0.0)
    with recording() as coverage:
        after = FoldBatchnorm(**settings).apply(copy.deepcopy(model), workload)
    return model, after, coverage


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) for m in model.modules())


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_real_networks_keep_their_function_and_lose_all_batch_norms(name):
    workload = networks()[name]
    model = FoldBatchnorm().apply(copy.deepcopy(workload.model), workload)
    batch = resized(workload.calibration[0], 32)
    assert norms_in(model) == 0
    (before,), (after,) = run(workload.model, batch), run(model, batch)
    assert abs(before - after).max() < 1e-5


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed 2d, groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
    "linear, no gain": (nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), (3, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer_keeps_its_function(layer):
    first, norm, shape = LAYERS[layer]
    x = torch.randn(shape)
    model, after, coverage = folded(nn.Sequential(first, norm), x)
    assert coverage.done == [("1", "folded into 0")]
    assert norms_in(after) == 0
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)


class ByGraph(nn.Module):
    """Registered in an order that is not the order of the computation."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_of_b, self.b, self.norm_of_a = (
            nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        )  # fmt: skip

    def forward(self, x):
        return self.norm_of_b(self.b(torch.relu(self.norm_of_a(self.a(x)))))


def test_pairs_come_from_the_graph_not_from_the_order_of_modules():
    x = torch.randn(2, 3, 5, 5)
    model, after, coverage = folded(ByGraph(), x)
    assert dict(coverage.done) == {"norm_of_a": "folded into a", "norm_of_b": "folded into b"}
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


class LayerCalledTwice(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(torch.relu(self.conv(x))))


class PreActivation(ReadTwice):
    def forward(self, x):
        return self.conv(torch.relu(self.norm(x)))


class AfterActivation(ReadTwice):
    def forward(self, x):
        return self.norm(torch.relu(self.conv(x)))


class OverPositions(nn.Module):
    """The norm is over dimension 1, which is as long as the features of the linear layer but is not they."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.linear(x[:, 0]))


class OfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.conv(x))


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class OfAnotherKind(ReadTwice):
    def __init__(self):
        super().__init__()
        self.norm = NormAndActivation(3)

    def forward(self, x):
        return self.norm(self.conv(x))


class AfterAnotherKind(OfAnotherKind):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = Standardised(3, 3, 1), nn.BatchNorm2d(3)


class AfterSpectralNorm(AfterAnotherKind):
    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OfAnotherKind, "is of kind NormAndActivation, which may do more than normalise"),
        (AfterAnotherKind, "conv is of kind Standardised, which may do more than its weight says"),
        (AfterSpectralNorm, "the weight of conv is computed anew at every run, by weight norm or the like"),
        (ReadTwice, "the output of conv is read elsewhere too, before normalisation"),
        (CalledTwice, "it or the layer before it is called more than once"),
        (LayerCalledTwice, "it or the layer before it is called more than once"),
        (PreActivation, "what comes before it is no convolution or linear layer"),
        (AfterActivation, "what comes before it is no convolution or linear layer"),
        (OverPositions, "it normalises dimension 1, not the features of linear"),
        (OfTheBatch, "it has no running statistics: it normalises each batch by itself"),
    ],
)
def test_what_cannot_be_folded_is_left_with_the_reason(kind, reason):
    x = torch.randn(2, 3, 5, 5)
    model, after, coverage = folded(kind(), x)
    assert coverage.done == []
    assert coverage.left == [("norm", reason)]
    torch.testing.assert_close(after(x), model(x))


def test_where_names_batch_norms():
    x = torch.randn(2, 3, 5, 5)
    _, after, coverage = folded(ByGraph(), x, where="norm_of_a")
    assert norms_in(after) == 1
    assert coverage.done == [("norm_of_a", "folded into a")]
    with pytest.raises(LayerError, match=r"matches none of the 2 .* They are: norm_of_b, norm_of_a"):
        folded(ByGraph(), x, where="a")


def test_tiny_variances_do_not_lose_precision():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(conv, norm).eval()
    norm.running_var.fill_(1e-12)
    norm.running_mean.copy_(conv(x).mean((0, 2, 3)).detach())
    after = FoldBatchnorm().apply(copy.deepcopy(model), Workload(model, (x,), [(x,)], lambda predict: 0.0))
    torch.testing.assert_close(after(x), model(x), rtol=1e-4, atol=1e-4)


def test_folding_before_quantization_is_what_makes_rounding_see_the_weights_that_run():
    """Channels whose norms differ by 1000 share no scale: rounding per tensor must come after folding or before, and
    after it the error is of the function that runs."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6)
    model = settled(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), x)
    with torch.no_grad():
        model[0].weight *= torch.logspace(-3, 0, 8).view(-1, 1, 1, 1)
        model[1].running_var.copy_(torch.logspace(-6, 0, 8))
        model[1].running_mean.zero_()
    wanted = model(x)
    workload = Workload(model, (x,), [(x,)], lambda predict: 0.0)
    errors = []
    for steps in ([], [FoldBatchnorm()]):
        rounded = copy.deepcopy(model)
        for step in steps:
            rounded = step.apply(rounded, workload)
        weight = rounded[0].weight
        encode(rounded[0], Affine(weight, affine_scale(weight, 8, -1), bits=8, axis=-1))
        errors.append((rounded(x) - wanted).square().mean().item())
    assert errors[1] < 0.1 * errors[0]


def test_rounded_weights_are_refused_and_masked_ones_keep_their_zeros():
    x = torch.randn(2, 3, 5, 5)
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), x)
    workload = Workload(model, (x,), [(x,)], lambda predict: 0.0)
    rounded = copy.deepcopy(model)
    encode(rounded[0], Affine(rounded[0].weight, affine_scale(rounded[0].weight, 8, 0), bits=8))
    with pytest.raises(
        RecipeError, match=r"'0', which an earlier step stored as int8 per channel\. Put fold_batchnorm before"
    ):
        FoldBatchnorm().apply(rounded, workload)
    masked = copy.deepcopy(model)
    mask = torch.rand_like(masked[0].weight) > 0.5
    encode(masked[0], Masked(masked[0].weight, mask))
    wanted = masked(x)
    after = FoldBatchnorm().apply(masked, workload)
    assert isinstance(encoding_of(after[0]), Masked)
    assert bool((after[0].weight[~mask] == 0).all())
    torch.testing.assert_close(after(x), wanted, rtol=1e-5, atol=1e-5)
