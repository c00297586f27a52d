"""Distillation of reasons: after it, a compressed network reads its answers from where the original does."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.encodings import Affine, Masked
from featherweight.errors import LayerError, WorkloadError
from featherweight.passes import Pass
from featherweight.passes.distill_attribution import DistillAttribution, attribution, drift, top_logits
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_channels import PruneChannels
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_dynamic import QuantizeDynamic
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import Coverage, encoding_of, recording
from featherweight.testing import networks, state
from featherweight.workload import Workload
from tests.gratings import gratings, workload

HELD_OUT, _ = gratings(300, seed=9)
KINDS = ("gradient", "gradient_x_input")


def taught(data: Workload, *steps: Pass, seed: int = 0) -> tuple[nn.Module, Coverage]:
    return compress_model(Recipe(steps, "torch"), data, seed)


def map_of(net: nn.Module, likely: Tensor, kind: str) -> Tensor:
    """By the definition: the gradient of the logit of `likely` with respect to the pixels, example by example."""
    x = HELD_OUT.clone().requires_grad_()
    net(x).gather(1, likely[:, None]).sum().backward()
    return (x.grad if kind == "gradient" else x.detach() * x.grad).flatten(1)


def drift_of(student: nn.Module, teacher: nn.Module, kind: str) -> float:
    likely = teacher(HELD_OUT).argmax(-1)
    return float(1 - F.cosine_similarity(*(map_of(net, likely, kind) for net in (student, teacher))).mean())


# ------------------------------------------------------------------------------------------------ mathematics


def test_attributions_by_value_and_by_position():
    x, g = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(attribution(x, g, "gradient", None), g.flatten(1))
    assert torch.equal(attribution(x, g, "gradient_x_input", None), (x * g).flatten(1))
    assert torch.allclose(attribution(x, g, "gradient", 2), g.norm(dim=2), atol=1e-5)
    assert torch.allclose(attribution(x, g, "gradient_x_input", 2), (x * g).sum(2))


def test_the_product_with_the_input_of_a_linear_network_adds_up_to_its_logit():
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(4, 5, requires_grad=True)
    logits = layer(x)
    (gradient,) = torch.autograd.grad(top_logits(logits, logits), x)
    assert torch.allclose(attribution(x, gradient, "gradient_x_input", None).sum(1), logits.max(1).values, atol=1e-5)


def test_drift_has_no_unit_and_parks_distance_is_twice_it():
    a, b = torch.randn(6, 9), torch.randn(6, 9)
    assert torch.isclose(drift(a, b), drift(5 * a, 0.1 * b), atol=1e-6)
    distance = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
    assert torch.isclose(distance, 2 * drift(a, b), atol=1e-5)
    assert drift(a, a).abs() < 1e-6 and drift(torch.zeros(6, 9), b) == 1


# ------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reasons_drift_less_than_with_outputs_alone(kind, seed):
    x, _ = gratings(512, seed=20 + seed)
    data = replace(workload(), train=[(part,) for part in x.split(32)])
    broken = PruneChannels(share=0.3)
    soft, _ = taught(data, broken, DistillSoft(epochs=4))
    reasoned, _ = taught(data, broken, DistillAttribution(epochs=4, kind=kind, weight=100.0))
    assert drift_of(reasoned, data.model, kind) < 0.9 * drift_of(soft, data.model, kind)


class Words(nn.Module):
    """(n, 6) whole numbers to (n, 3), through `width` features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(20, width), nn.Linear(6 * width, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.words(ids).flatten(1))))


@pytest.mark.parametrize("kind", KINDS)
def test_words_have_reasons_too_and_the_student_may_be_narrower(kind):
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (256, 6))
    data = Workload(Words(8).eval(), (ids[:2],), [(part,) for part in ids.split(32)], lambda predict: 0.0)
    student = Words(4).eval()

    def drift_by_words(net: nn.Module) -> float:
        maps = []
        for each in (net, data.model):
            x = each.words(ids).detach().requires_grad_()
            logits = each.head(torch.tanh(each.hidden(x.flatten(1))))
            (gradient,) = torch.autograd.grad(top_logits(logits, data.model(ids)), x)
            maps.append(gradient.norm(dim=2) if kind == "gradient" else (x.detach() * gradient).sum(2))
        return float(drift(*maps))

    soft = DistillSoft(epochs=10).apply(copy.deepcopy(student), data)
    with recording() as coverage:
        reasoned = DistillAttribution(epochs=10, kind=kind).apply(copy.deepcopy(student), data)
    assert coverage.done[0][1].startswith(f"distilled 80 steps (kl, {kind} of words), loss ")
    assert drift_by_words(reasoned) < 0.8 * drift_by_words(soft)


# ------------------------------------------------------------------------------------------------ what it keeps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", list(networks()))
def test_gradients_pass_twice_through_all_that_is_rounded_and_masks_and_grids_stay(network, kind):
    data = networks()[network]
    before = state(data.model)
    steps: tuple[Pass, ...] = (PruneMagnitude(share=0.5), QuantizeStatic())
    untaught, _ = taught(data, *steps)
    model, _ = taught(data, *steps, DistillAttribution(kind=kind))
    assert state(data.model) == before
    moved = 0
    for name, layer in model.named_modules():
        ours, theirs = encoding_of(layer), encoding_of(untaught.get_submodule(name))
        if isinstance(ours, Affine):
            assert torch.equal(ours.scale, theirs.scale)
            if ours.mask is not None:
                assert not ours.decode()[~ours.mask].any()
            moved += not torch.equal(ours.decode(), theirs.decode())
    assert moved


@pytest.mark.parametrize("step", [QuantizeDynamic(), QuantizeWeights(bits=4), PruneMagnitude(share=0.5)])
def test_gradients_pass_twice_through_other_encodings(step):
    data = networks()["mlp"]
    model, _ = taught(data, step, DistillAttribution())
    assert isinstance(encoding_of(model[0]), (Affine, Masked))


def test_a_second_gradient_through_rounding_is_that_of_no_rounding():
    """Straight through both times: the gradient of the drift equals that of a network whose weights are on the grid."""
    data = networks()["mlp"]
    rounded, _ = taught(data, QuantizeWeights(bits=8))
    plain = copy.deepcopy(data.model)
    for ours, theirs in zip(plain, rounded, strict=True):
        if isinstance(ours, nn.Linear):
            ours.weight.data = theirs.weight.detach().clone()
            encoding_of(theirs).thaw()

    def gradient(net: nn.Module, weight: Tensor) -> Tensor:
        x = data.calibration[0][0].clone().requires_grad_()
        (first,) = torch.autograd.grad(net(x).amax(1).sum(), x, create_graph=True)
        return torch.autograd.grad(drift(first, torch.ones_like(first)), weight)[0]

    assert torch.allclose(
        gradient(rounded, encoding_of(rounded[0]).latent), gradient(plain, plain[0].weight), atol=1e-6
    )


def test_a_frozen_embedding_has_reasons_all_the_same():
    data = networks()["transformer"]
    frozen = copy.deepcopy(data.model)
    frozen.words.requires_grad_(False)
    data = Workload(frozen, data.example, data.calibration, data.score)
    model, _ = taught(data, DistillAttribution(where="head, down"))
    assert torch.equal(model.words.weight, frozen.words.weight) and not torch.equal(
        model.head.weight, frozen.head.weight
    )


# ------------------------------------------------------------------------------------------------ what goes wrong


class Once(torch.autograd.Function):
    """The identity, with a gradient that has none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.clone()


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.words = how, nn.Linear(4, 3), nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "once":
            return self.layer(Once.apply(x))
        if self.how == "apart":
            return self.layer(x.detach())
        if self.how == "probabilities":
            return self.layer(x).softmax(-1)
        return torch.nn.functional.one_hot(x % 3, 3).float() @ self.layer.weight[:, :3]


FLOATS, WHOLE = torch.randn(8, 4), torch.randint(0, 9, (8,))


@pytest.mark.parametrize(
    ("how", "x", "error", "message"),
    [
        ("once", FLOATS, LayerError, "needs gradients of gradients, and an operator of the network has none"),
        ("apart", FLOATS, LayerError, "do not depend on the model's inputs in a way that has a gradient"),
        ("probabilities", FLOATS, WorkloadError, "distill_attribution needs logits"),
        ("whole", WHOLE, LayerError, "the inputs are whole numbers, which have no gradients, and no layer of Odd"),
    ],
)
def test_networks_without_reasons(how, x, error, message):
    data = Workload(Odd(how).eval(), (x,), [(x,)], lambda predict: 0.0)
    with pytest.raises(error, match=message):
        DistillAttribution().apply(copy.deepcopy(data.model), data)
