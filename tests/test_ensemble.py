"""Ensembles of files that ship: better than their members, right about probabilities, and good teachers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import featherweight
from featherweight import Ensemble, Recipe, Workload, build
from featherweight.ensemble import mean_logits
from featherweight.errors import WorkloadError
from featherweight.recipe import compress_model
from featherweight.workload import check, predictor


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(features)))


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points, and which of three they are nearest to, told wrongly of every third."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=rng)
    centres = torch.tensor([[1.0, 0, 1, 0], [-1, 1, 0, 0], [0, -1, -1, 1]])
    return x, torch.cdist(x, centres).argmin(1)


def fitted(seed: int) -> nn.Module:
    """On 150 points of its own, a third of them labelled by chance."""
    torch.manual_seed(seed)
    x, y = data(150, seed)
    y = torch.where(torch.rand(150) < 0.33, torch.randint(3, (150,)), y)
    net = Net(32)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


X, Y = data(2000, seed=99)


def accuracy(predict) -> float:
    return float((predict(X).argmax(1) == Y).float().mean())


def workload_of(model: nn.Module, **more) -> Workload:
    batches = [(part,) for part in data(512, seed=98)[0].split(32)]
    return Workload(model, batches[0], batches, accuracy, train=batches, **more)


@pytest.fixture(scope="module")
def nets() -> list[nn.Module]:
    return [fitted(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def artifacts(nets, tmp_path_factory) -> list[featherweight.Artifact]:
    """Two, for two runtimes."""
    folder = tmp_path_factory.mktemp("members")

    def made(net: nn.Module, recipe: str) -> featherweight.Artifact:
        chosen = Recipe.from_yaml(recipe)
        return build(chosen, workload_of(net), Path(folder / chosen.target))

    return [
        made(nets[0], "steps: [quantize_weights]\ntarget: onnxruntime"),
        made(nets[1], "steps: [quantize_weights]\ntarget: openvino"),
    ]


def test_artifacts_answer_with_the_mean_of_their_probabilities_and_better_than_one(artifacts):
    together = Ensemble(artifacts, logits=True)
    alone = [artifact.predict() for artifact in artifacts]
    wanted = torch.stack([predict(X).softmax(-1) for predict in alone]).mean(0)
    assert torch.allclose(together(X).softmax(-1), wanted, atol=1e-6)
    assert torch.equal(together(features=X), together(X))
    assert accuracy(predictor(together)) > max(map(accuracy, alone))
    assert torch.allclose(Ensemble(artifacts, logits=False)(X), (alone[0](X) + alone[1](X)) / 2, atol=1e-5)


def test_the_mean_of_logits_lets_one_that_is_sure_outvote_others():
    logits = torch.tensor([[0.0, 30.0], [4.0, 0.0], [4.0, 0.0]])
    assert mean_logits(logits).argmax() == 0 and logits.mean(0).argmax() == 1
    assert mean_logits(1000 * logits).isfinite().all()


def test_networks_and_artifacts_teach_a_student_together(artifacts, nets):
    teacher = Ensemble([*artifacts, nets[2]], logits=True)
    student = Net(8).eval()
    workload = workload_of(teacher, student=student)
    check(workload)
    recipe = Recipe.from_yaml("steps: [distill_soft: {epochs: 40, lr: 0.03}]\ntarget: onnxruntime")
    taught, _ = compress_model(recipe, workload)
    by_one, _ = compress_model(recipe, workload_of(nets[2], student=student))
    assert accuracy(taught) > accuracy(by_one) > accuracy(student)


def test_what_a_student_of_an_ensemble_ships_has_the_names_of_its_own_inputs(artifacts, tmp_path):
    workload = workload_of(Ensemble(artifacts, logits=True), student=Net(8).eval())
    made = build(Recipe.from_yaml("steps: [distill_hard]\ntarget: onnxruntime"), workload, tmp_path / "a")
    assert [spec["name"] for spec in made.manifest["inputs"]] == ["features"]
    assert torch.allclose(made.predict()(features=X[:5]), made.predict()(X[:5]))


def test_passes_that_read_inner_layers_or_gradients_say_that_files_have_none(artifacts):
    workload = workload_of(Ensemble(artifacts, logits=True), student=Net(8).eval())
    for name, said in (("distill_features", "take distill_soft instead"), ("distill_attribution", "do not depend on")):
        with pytest.raises(featherweight.FeatherweightError, match=said):
            compress_model(Recipe.from_yaml(f"steps: [{name}]\ntarget: torch"), workload)


class Returns(nn.Module):
    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.values


def test_members_that_cannot_be_averaged():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(WorkloadError, match=r"no members\. Give it artifacts"):
        Ensemble([], logits=True)
    with pytest.raises(WorkloadError, match=r"Member 1 .* returns \(2, 4\) of float32, but member 0 \(2, 3\)"):
        Ensemble([Returns(a), Returns(b)], logits=False)(a)
    with pytest.raises(WorkloadError, match="of which whole numbers have no mean"):
        Ensemble([Returns(a, a.long())], logits=False)(a)


def test_networks_lend_their_weights_and_gradients_flow_through_their_mean(nets):
    together = Ensemble(nets, logits=True)
    assert len(list(together.parameters())) == 12 and not together.training
    x = X[:4].clone().requires_grad_()
    copy.deepcopy(together)(x).sum().backward()
    assert x.grad.abs().sum() > 0
