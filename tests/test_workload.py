"""What a workload must be, how one is found, and what is said when something is wrong with it."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.errors import WorkloadError
from featherweight.workload import (
    Workload,
    call,
    check,
    input_names,
    like,
    load,
    outputs,
    predictor,
    scores,
    tensors,
)

X = torch.arange(8.0).reshape(2, 4)


class Two(nn.Module):
    """Takes two inputs and returns what it is told to."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, y: Tensor, *rest: Tensor, scale: float = 1.0, **options: Any) -> Any:
        return x + y if self.answer is None else self.answer


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0]


def linear(**changes: Any) -> Workload:
    good = Workload(nn.Linear(4, 3).eval(), (X,), [(X,), (X[:1],)], lambda predict: predict(X).mean().item())
    return dataclasses.replace(good, **changes)


def refusal(workload: Workload) -> str:
    with pytest.raises(WorkloadError) as refused:
        check(workload)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------- batches


def test_batches_are_positional_or_by_keyword() -> None:
    named = {"y": X, "x": 2 * X}
    assert torch.equal(call(Two().eval(), (X, X)), 2 * X)
    assert torch.equal(call(Two().eval(), named), 3 * X)
    assert tensors(named)[1] is named["x"]
    assert tensors((X,)) == (X,)


@given(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1), st.booleans())
def test_like_keeps_the_form_and_order(names: list[str], by_name: bool) -> None:
    values = [torch.full((1,), float(i)) for i in range(len(names))]
    batch = dict.fromkeys(names, X) if by_name else (X,) * len(names)
    made = like(batch, values)
    assert type(made) is type(batch)
    assert list(tensors(made)) == values
    assert not by_name or list(made) == names
    if by_name:
        with pytest.raises(ValueError, match="shorter"):
            like(batch, values[1:])


@pytest.mark.parametrize(
    ("model", "example", "names"),
    [
        (nn.Linear(4, 3), (X,), ("input",)),
        (Two(), (X, X), ("x", "y")),
        (Two(), (X, X, X, X), ("x", "y", "input2", "input3")),
        (Two(), {"y": X, "x": X}, ("y", "x")),
        (Anything(), (X, X), ("input0", "input1")),
    ],
)
def test_inputs_have_the_names_of_forward(model: nn.Module, example: Any, names: tuple[str, ...]) -> None:
    assert input_names(model, example) == names


# ---------------------------------------------------------------------------------------------------- outputs


def test_outputs_are_flattened_in_order() -> None:
    a, b, c = X, X + 1, X + 2
    assert outputs(a) == (a,)
    assert all(x is y for x, y in zip(outputs([a, (b, None), {"c": c}]), (a, b, c), strict=True))
    assert outputs(OrderedDict(logits=a, cache=None))[0] is a


@pytest.mark.parametrize("answer", ["text", 1.0, (), [None], {}, None, (X, "text")])
def test_outputs_without_tensors_are_refused(answer: object) -> None:
    with pytest.raises(WorkloadError, match=r"returned a \w+, from which no tensor can be read\. Wrap the model"):
        outputs(answer)


def test_predictor_computes_without_gradients_and_unwraps_one_output() -> None:
    layer = nn.Linear(4, 3).eval()
    found = predictor(layer)(X)
    assert torch.equal(found, layer(X))
    assert not found.requires_grad
    assert isinstance(predictor(Two((X, X)))(X, X), tuple)
    assert torch.equal(predictor(Two())(x=X, y=X), 2 * X)


# ---------------------------------------------------------------------------------------------------- scores


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_scores_keep_doubles_exactly(values: list[float]) -> None:
    for given_values in (values, tuple(values), np.array(values), torch.tensor(values, dtype=torch.float64)):
        found = scores(lambda _, v=given_values: v, lambda x: x)  # type: ignore[misc]
        assert found.dtype == torch.float64
        assert found.tolist() == values


@pytest.mark.parametrize("one", [0.75, 1, True, np.float32(0.75), torch.tensor(0.75)])
def test_one_number_is_one_score(one: Any) -> None:
    assert scores(lambda _: one, lambda x: x).tolist() == [float(one)]


@pytest.mark.parametrize("bad", ["high", None, {"accuracy": 0.5}, ["a"], object()])
def test_scores_that_are_no_numbers_are_refused(bad: Any) -> None:
    with pytest.raises(WorkloadError, match=rf"test_score\(predict\) returned a {type(bad).__name__}, but one number"):
        scores(lambda _: bad, lambda x: x, "test_score")


def test_scores_that_are_empty_nan_or_raise_are_refused() -> None:
    with pytest.raises(WorkloadError, match=r"score\(predict\) returned no values: its data is empty"):
        scores(lambda _: [], lambda x: x)
    with pytest.raises(WorkloadError, match="returned 2 values of 3 that are NaN or infinite"):
        scores(lambda _: [float("nan"), 0.0, float("inf")], lambda x: x)
    with pytest.raises(WorkloadError, match=r"score\(predict\) raised KeyError: 'labels'\.") as refused:
        scores(lambda _: {}["labels"], lambda x: x)
    assert isinstance(refused.value.__cause__, KeyError)


# ---------------------------------------------------------------------------------------------------- check


def test_a_good_workload_passes_and_is_left_as_it_was() -> None:
    workload = linear(test_score=lambda predict: 1.0)
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    check(workload)
    check(linear(model=Two().eval(), example={"x": X, "y": X}, calibration=[{"x": X, "y": X}]))
    check(
        linear(model=Two(torch.zeros(2, 0)).eval(), example=(X, X), calibration=((X, X),))
    )  # outputs may hold nothing
    assert all(torch.equal(value, before[name]) for name, value in workload.model.state_dict().items())
    assert not workload.model.training


def ints(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": lambda x: x}, "model is a function, not a torch.nn.Module."),
        ({"model": nn.Linear(4, 3)}, "train mode (1 modules, first 'the model itself')"),
        ({"model": nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval().requires_grad_(False)}, None),
        ({"example": X}, "example is not a batch: it must be a non-empty tuple of tensors"),
        ({"example": X}, "it is a Tensor. A batch of one tensor is written (x,)."),
        ({"example": ()}, "example is not a batch"),
        ({"example": {}}, "example is not a batch"),
        ({"example": (X, 1.0)}, "example is not a batch"),
        ({"example": (torch.tensor(1.0),)}, "example has tensors of shapes [()]: dim 0 must be the batch"),
        ({"example": (X, X[:1])}, "example has tensors of shapes [(2, 4), (1, 4)]"),
        ({"example": (X[:0],)}, "dim 0 must be the batch, not empty"),
        ({"calibration": []}, "calibration is empty"),
        ({"calibration": iter([(X,)])}, "calibration is a list_iterator, but it is read more than once"),
        ({"calibration": torch.utils.data.DataLoader([X])}, "calibration is a DataLoader"),
        ({"calibration": [(X,), X]}, "calibration[1] is not a batch"),
        ({"calibration": [{"x": X}]}, "calibration[0] and example differ in kind"),
        ({"calibration": [(X, X)]}, "calibration[0] has 2 tensors, example 1."),
        ({"calibration": [(X,), (X[:, :3],)]}, "calibration[1][0] is (2, 3) of torch.float32, example[0] (2, 4)"),
        ({"calibration": [(ints((2, 4)),)]}, "calibration[0][0] is (2, 4) of torch.int64"),
        ({"example": {"x": X}, "calibration": [{"y": X}]}, "calibration[0] has keys ['y'], example ['x']."),
        ({"score": 0.9}, "score is a float, not a function. Give score(predict) -> float."),
        ({"score": None}, "score is a NoneType, not a function."),
        ({"test_score": 0.9}, "test_score is a float, not a function."),
        ({"model": nn.Linear(5, 3).eval()}, "The model failed on calibration[0]: RuntimeError: "),
        ({"model": nn.Flatten(0).eval()}, "Output 0 of the model has shape (8,) for a batch of 2"),
        ({"model": nn.Threshold(9.0, float("nan")).eval()}, "Output 0 of the model is NaN or infinite"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], said: str | None) -> None:
    if said is None:
        check(linear(**changes))
    else:
        assert said in refusal(linear(**changes))


def test_the_first_module_in_train_mode_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
    model[1].train()
    assert "(1 modules, first '1')" in refusal(linear(model=model))


def test_a_model_that_returns_no_tensor_is_refused_as_such() -> None:
    message = refusal(linear(model=Two("text").eval(), example=(X, X), calibration=[(X, X)]))
    assert message.startswith("The model returned a str")
    scalar = refusal(linear(model=Two((X, torch.tensor(1.0))).eval(), example=(X, X), calibration=[(X, X)]))
    assert scalar.startswith("Output 1 of the model has shape () for a batch of 2")


class Renamed(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, :3]


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)).eval(), None),
        (lambda x: x, "student is a function, not a torch.nn.Module."),
        (nn.Linear(4, 3), "student is in train mode (1 modules, first 'the student itself')"),
        (nn.Linear(5, 3).eval(), "student failed on example: RuntimeError: "),
        (nn.Linear(4, 2).eval(), "student returns (2, 2) of float32 for example, but model returns (2, 3) of float32."),
        (nn.Linear(4, 3).double().eval(), "student failed on example: RuntimeError: "),
        (Renamed().eval(), "student takes rows, but model takes input, and files that ship name their inputs so."),
    ],
)
def test_a_student_can_stand_in_for_the_model(student: Any, said: str | None) -> None:
    workload = linear(student=student)
    if said is None:
        check(workload)
        assert workload.start is student and linear().start is not student
    else:
        assert said in refusal(workload)


# ---------------------------------------------------------------------------------------------------- load

FILE = """
import torch
from featherweight.workload import Workload
from {neighbour} import SIZE

def workload():
    x = torch.ones(2, SIZE)
    return Workload(torch.nn.Linear(SIZE, 1).eval(), (x,), [(x,)], lambda predict: 1.0)

def broken():
    raise KeyError("weights")

def foreign():
    return torch.nn.Linear(1, 1)

def untrained():
    made = workload()
    made.model.train()
    return made

def _private():
    pass

number = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workload file with a neighbour that it imports; what the import leaves behind is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    neighbour = f"neighbour_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{neighbour}.py").write_text("SIZE = 5\n")
    path = tmp_path / "example.py"
    path.write_text(FILE.format(neighbour=neighbour))
    return path


def load_refusal(spec: str) -> str:
    with pytest.raises(WorkloadError) as refused:
        load(spec)
    return str(refused.value)


def test_load_from_a_file_tells_where_it_was_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    for spec in ("example.py", "example.py:workload", f"{file}:workload", f"{file}:"):
        assert load(spec).source == f"{file}:workload"
    assert load(load("example.py").source or "").example[0].shape == (2, 5)


def test_load_from_a_module_in_the_current_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.rename(file.with_name("named_workload.py"))
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(Path.cwd()))])
    assert load("named_workload").source == "named_workload:workload"


def test_load_says_what_is_wrong(file: Path) -> None:
    assert load_refusal("no/such.py") == (
        "There is no file no/such.py. Give the path of a Python file that defines workload()."
    )
    assert load_refusal("C:\\no\\such.py:other").startswith("There is no file C:\\no\\such.py.")
    assert "has no function other(). It defines: broken, foreign, untrained, workload." in load_refusal(f"{file}:other")
    assert f"broken() in {file} raised KeyError: 'weights'." in load_refusal(f"{file}:broken")
    assert "returned a Linear, not a Workload." in load_refusal(f"{file}:foreign")
    assert "model is in train mode" in load_refusal(f"{file}:untrained")
    assert "has no function number(). It defines: " in load_refusal(f"{file}:number")
    for spec in ("no_such_module_anywhere", "no/such", "", ".relative"):
        assert f"{spec} could not be imported: " in load_refusal(spec)


def test_load_names_what_a_file_raises(file: Path) -> None:
    file.write_text("import no_such_module_anywhere")
    assert "could not be imported: ModuleNotFoundError: No module named 'no_such_module_anywhere'" in load_refusal(
        str(file)
    )
    file.write_text("def workload(:")
    assert "could not be imported: SyntaxError" in load_refusal(str(file))
    file.write_text("x = 1")
    assert "It defines: no functions." in load_refusal(str(file))


def test_checking_leaves_nothing_in_caches_that_could_not_be_trained() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.places = nn.Parameter(torch.ones(4)), {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] not in self.places:
                self.places[x.shape[1]] = torch.arange(x.shape[1]).float()
            return x + self.scale * self.places[x.shape[1]]

    model, batch = Caching().eval(), (torch.randn(2, 4),)
    check(Workload(model, batch, [batch], lambda predict: 0.0))
    predictor(model)(*batch)
    model(*batch).sum().backward()
    assert model.scale.grad is not None
