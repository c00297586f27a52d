from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight import passes, targets
from featherweight.errors import LayerError, RecipeError, SettingError, WorkloadError
from featherweight.passes import Pass
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.fold_batchnorm import FoldBatchnorm
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.settings import Range
from featherweight.surgery import done, left
from featherweight.workload import Workload

GOOD = """
steps:
  - prune_magnitude: {share: 0.3, where: "!head"}
  - distill_soft: {epochs: 2, lr: 1e-3}
  - quantize_static
target: openvino
"""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def workload(model: nn.Module | None = None) -> Workload:
    x = torch.randn(8, 8)
    return Workload(model=model or net(), example=(x[:2],), calibration=[(x,)], score=lambda predict: 1.0)


@dataclass(frozen=True, kw_only=True)
class Do(Pass):
    """Whatever a test wants."""

    what: Any = field(default=None, compare=False)
    amount: Annotated[float, Range(0.0, 1.0)] = 0.5

    def __post_init__(self) -> None:
        """`what` is no setting that could come from text."""

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        return self.what(model) or model


def changes(function: Callable[[nn.Module], object]) -> Recipe:
    def what(model: nn.Module) -> object:
        done("0", "changed")
        return function(model)

    return Recipe((Do(what=what),), "onnxruntime")


# ------------------------------------------------------------------------------------------------ text


def test_reads_the_documented_form() -> None:
    recipe = Recipe.from_yaml(GOOD)
    assert recipe.steps == (
        PruneMagnitude(share=0.3, where="!head"),
        DistillSoft(epochs=2.0, lr=1e-3),
        QuantizeStatic(),
    )
    assert recipe.target == "openvino"


def test_two_numbers_with_a_colon_are_text() -> None:
    recipe = Recipe.from_yaml("{steps: [prune_magnitude: {pattern: 2:4}], target: torch}")
    assert recipe.steps == (PruneMagnitude(pattern="2:4"),)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_canonical_text_holds_what_differs_from_the_defaults_in_declared_order() -> None:
    assert Recipe.from_yaml(GOOD).to_yaml() == (
        "steps:\n"
        "  - prune_magnitude: {where: '!head', share: 0.3}\n"
        "  - distill_soft: {epochs: 2.0, lr: 0.001}\n"
        "  - quantize_static\n"
        "target: openvino\n"
    )


STEPS = st.one_of(
    st.just(FoldBatchnorm()),
    st.builds(PruneMagnitude, where=st.text(st.characters(exclude_categories=["Cs", "Cc"])), share=st.floats(0, 0.99)),
    st.builds(DistillSoft, lr=st.floats(1e-6, 1.0), steps=st.integers(0, 10_000_000)),
    st.builds(
        QuantizeWeights, bits=st.sampled_from([4, 8]), where=st.sampled_from(["*", "1e-3", "no", "null", "1:30"])
    ),
)


@given(st.lists(STEPS, max_size=4), st.sampled_from(targets.names()))
def test_survives_its_own_text(steps: list[Pass], target: str) -> None:
    recipe = Recipe(tuple(steps), target)
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and again.digest == recipe.digest and again.to_yaml() == recipe.to_yaml()


def test_every_pass_survives_its_own_text_with_default_settings() -> None:
    for name in passes.names():
        recipe = Recipe((passes.find(name)(),), "openvino")
        assert recipe.to_yaml() == f"steps:\n  - {name}\ntarget: openvino\n"
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_digest_sees_settings_order_target_and_defaults() -> None:
    recipe = Recipe((FoldBatchnorm(), PruneMagnitude(share=0.5)), "openvino")
    assert len(recipe.digest) == 16 and int(recipe.digest, 16) >= 0
    assert recipe.digest == Recipe((FoldBatchnorm(), PruneMagnitude()), "openvino").digest  # 0.5 is the default
    others = [
        Recipe((PruneMagnitude(), FoldBatchnorm()), "openvino"),
        Recipe((FoldBatchnorm(), PruneMagnitude(share=0.25)), "openvino"),
        replace(recipe, target="onnxruntime"),
        Recipe((), "openvino"),
    ]
    assert len({recipe.digest, *(other.digest for other in others)}) == 5


def test_digest_covers_default_settings_so_that_a_changed_default_is_another_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe((PruneMagnitude(share=0.5),), "openvino")
    before = recipe.digest
    monkeypatch.setattr(PruneMagnitude, "settings", lambda self: {"where": "*", "share": 0.4, "scope": "layer"})
    assert recipe.digest != before


BAD = {
    "": "recipe is a nothing (null), not a mapping. Write steps and a target",
    "- fold_batchnorm": "recipe is a list, not a mapping",
    "steps: []": "recipe has no target",
    "target: openvino": "recipe has no steps",
    "steps: []\ntarget: openvino\nbits: 8": "there is no key 'bits'",
    "steps: fold_batchnorm\ntarget: openvino": "steps is a text, not a list",
    "steps:\ntarget: openvino": "steps is a nothing (null), not a list",
    "steps: []\ntarget: cuda": "there is no target 'cuda'. There are: ",
    "steps: []\ntarget: 7": "there is no target 7",
    "steps: []\ntarget: [openvino, torch]": "recipe, target holds several values, which spans a search space",
    "steps: [3]\ntarget: openvino": "recipe, step 1 is a int. Write the name of one pass",
    "steps: [{}]\ntarget: openvino": "recipe, step 1 is a mapping of 0 keys",
    "steps: [{fold_batchnorm: {}, quantize_static: {}}]\ntarget: openvino": "recipe, step 1 is a mapping of 2 keys",
    "steps: [[fold_batchnorm, quantize_static]]\ntarget: openvino": "recipe, step 1 holds several values",
    "steps: [fold_batchnorm, quantise_static]\ntarget: openvino": (
        "recipe, step 2: There is no pass 'quantise_static'. Did you mean 'quantize_static'?"
    ),
    "steps: [{prune_magnitude: 0.3}]\ntarget: openvino": "step 1 (prune_magnitude): its settings are a float",
    "steps: [{prune_magnitude: {share: [0.1, 0.2]}}]\ntarget: openvino": (
        "recipe, step 1 (prune_magnitude), share holds several values"
    ),
    "steps: []\nsteps: []\ntarget: openvino": "recipe is no YAML in line 2: the key 'steps' occurs twice",
    "steps: [{prune_magnitude: {share: 0.1, share: 0.2}}]\ntarget: openvino": "the key 'share' occurs twice",
    "steps: [&a fold_batchnorm, *a]\ntarget: openvino": "anchors and aliases are not taken",
    "steps: !!python/object/apply:os.system [true]\ntarget: openvino": "recipe is no YAML in line 1",
    "steps: [\ntarget: openvino": "recipe is no YAML in line 2",
    "{[1]: 2}": "a key is no plain word",
    "steps: \x00": "recipe is no YAML",
    "[" * 5000: "recipe is no YAML",
    "#" * 2_000_000: "more than the 1,048,576",
}


@pytest.mark.parametrize("text", BAD, ids=[text[:40] for text in BAD])
def test_refuses_with_the_place_and_what_to_do(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).rstrip().endswith((".", "?"))


def test_settings_are_checked_before_anything_is_made_of_them() -> None:
    with pytest.raises(
        SettingError, match=r"my.yaml, step 1 \(prune_magnitude\): share=2.0 is out of range: .* 0 to 0.99"
    ):
        Recipe.from_yaml("steps: [{prune_magnitude: {share: 2.0}}]\ntarget: openvino", where="my.yaml")


# ------------------------------------------------------------------------------------------------ running


def test_applies_the_steps_in_order_and_leaves_the_workload_alone() -> None:
    task = workload()
    before = copy.deepcopy(task.model.state_dict())
    said: list[str] = []
    recipe = Recipe((PruneMagnitude(share=0.5), QuantizeWeights()), "onnxruntime")
    model, coverage = compress_model(recipe, task, progress=said.append)
    assert said == ["1/2 prune_magnitude", "2/2 quantize_weights"]
    assert [layer for layer, _ in coverage.done] == ["0", "2", "0", "2"]
    assert model.get_submodule("0").weight.eq(0).float().mean() >= 0.5
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not model.training and model is not task.model


def test_no_steps_give_an_equal_copy() -> None:
    task = workload()
    model, coverage = compress_model(Recipe((), "openvino"), task)
    assert torch.equal(model(task.example[0]), task.model(task.example[0])) and not coverage.as_rows()


def test_same_seed_same_result_and_the_global_generators_go_on_undisturbed() -> None:
    def noise(model: nn.Module) -> None:
        with torch.no_grad():
            weight = model.get_submodule("0").weight
            weight.add_(torch.randn_like(weight) * random.random() * np.random.rand())  # noqa: NPY002

    task, recipe = workload(), changes(noise)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    one, two, other = (compress_model(recipe, task, seed=seed)[0].get_submodule("0").weight for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]  # noqa: NPY002


def test_generators_are_restored_after_an_error_too() -> None:
    def fail(model: nn.Module) -> None:
        torch.rand(3)
        raise KeyError("lost")

    task = workload()
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(KeyError) as caught:
        compress_model(changes(fail), task)
    assert caught.value.__notes__ == ["Step 1 (test_recipe) of the recipe raised it."]
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_step_that_changes_nothing_is_an_error_with_its_reasons() -> None:
    def skip(model: nn.Module) -> None:
        left("0", "too small")

    with pytest.raises(LayerError, match=r"Step 1 \(test_recipe\) changed nothing: .* It left 0: too small. Leave the"):
        compress_model(Recipe((Do(what=skip),), "openvino"), workload())


def test_a_step_for_layers_that_an_earlier_one_removed_is_passed_over_and_that_is_said() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0.1 * self.inner(x)

    model = nn.Sequential(nn.Linear(4, 4), *(Adds() for _ in range(4)))
    x = torch.randn(8, 4)
    given = Workload(model.eval(), (x[:2],), [(x,)], lambda predict: 1.0)
    steps = (passes.build("drop_layers", {"share": 0.5}, "here"), QuantizeWeights(where="4.inner"))
    found, coverage = compress_model(Recipe(steps, "torch"), given)
    assert len(found) == 3
    assert ("4.inner", "an earlier step removed it, so there is nothing left for quantize_weights to treat") in (
        coverage.left
    )
    with pytest.raises(LayerError, match=r"5\.inner"):
        compress_model(Recipe((*steps[:1], QuantizeWeights(where="5.inner")), "torch"), given)


def test_errors_of_passes_name_the_step() -> None:
    recipe = Recipe((QuantizeWeights(), QuantizeStatic()), "openvino")
    with pytest.raises(RecipeError, match=r"Step 2 \(quantize_static\): .*earlier step"):
        compress_model(recipe, workload())
    with pytest.raises(LayerError, match=r"Step 1 \(prune_magnitude\): where='x' matches none"):
        compress_model(Recipe((PruneMagnitude(where="x"),), "openvino"), workload())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda model: nn.Sequential(model, nn.Linear(4, 3)),
            "changed what the network returns: (2, 3) of float32, where",
        ),
        (lambda model: model.double(), "left a network that fails on the example"),
        (lambda model: nn.Sequential(nn.Identity(), nn.Linear(9, 4)), "left a network that fails on the example"),
        (lambda model: nn.init.constant_(model.get_submodule("2").weight, torch.nan), "made output 0 NaN or infinite"),
    ],
    ids=["shape", "dtype", "input", "nan"],
)
def test_outputs_are_checked_after_each_step(broken: Callable[[nn.Module], nn.Module], message: str) -> None:
    def what(model: nn.Module) -> nn.Module | None:
        result = broken(model)
        return result if isinstance(result, nn.Module) else None

    with pytest.raises(LayerError) as caught:
        compress_model(changes(what), workload())
    assert str(caught.value).startswith("Step 1 (test_recipe)") and message in str(caught.value)


def test_a_step_cannot_leave_the_network_in_train_mode() -> None:
    model, _ = compress_model(changes(lambda model: model.train() and None), workload())
    assert not any(module.training for module in model.modules())


def test_a_model_that_cannot_be_copied_is_the_workloads_fault() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("cannot pickle a lock")

    with pytest.raises(WorkloadError, match="cannot be copied: TypeError: cannot pickle a lock"):
        compress_model(Recipe((), "openvino"), workload(Stubborn()))


def test_a_student_of_the_users_own_is_trained_instead_of_a_copy() -> None:
    x = torch.randn(64, 6)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    workload = Workload(teacher, (x[:2],), [(x,)], lambda predict: 0.0, student=student)
    before = [value.clone() for net in (teacher, student) for value in net.state_dict().values()]
    untrained, _ = compress_model(Recipe((), "torch"), workload)
    steps = (DistillSoft(epochs=100, loss="mse"), QuantizeWeights())
    trained, coverage = compress_model(Recipe(steps, "torch"), workload)
    assert all(map(torch.equal, before, [v for net in (teacher, student) for v in net.state_dict().values()]))
    assert trained[0].out_features == 8 and {layer for layer, _ in coverage.done} == {"0", "2"}
    errors = [(net(x) - teacher(x)).square().mean().item() for net in (untrained, trained)]
    assert errors[1] < 0.3 * errors[0]
    with pytest.raises(
        WorkloadError, match=r"student returns \(2, 4\) of float32 for example, but model returns \(2, 3\)"
    ):
        compress_model(Recipe((), "torch"), replace(workload, student=nn.Linear(6, 4).eval()))
