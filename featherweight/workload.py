"""The user's side of the contract: a network, its data and how to score it.

`Workload` is what users build, `load` finds it in their file, `check` tells what is wrong with it before
anything is spent. What happens to the network afterwards is not known here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.errors import WorkloadError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Batch = tuple[Tensor, ...] | Mapping[str, Tensor]
Predict = Callable[..., Any]  # predict(*tensors) -> tensor | tuple of tensors
Score = Callable[[Predict], float | Sequence[float]]


@dataclass(frozen=True, eq=False)
class Workload:
    """A trained network, what it reads, and what "works" means.

    Args:
        model: in eval mode; never modified.
        example: one batch, a tuple of positional or a dict of keyword tensors; dim 0 is the batch.
        calibration: unlabelled batches like `example`, of any batch size.
        score: `score(predict)` is the quality, higher is better: one number, or one number per example (which
            makes the comparison paired and the interval exact).
        test_score: the same on data that the search never sees.
        train: a re-iterable of batches, or of (batch, target) pairs, for distillation. Where targets are labels of what
            the model returns as logits (whole numbers, -100 for none), what the search rounds learns from them, too.
        probe: held-out (batch, labels) pairs, for evidence on behaviour.
        student: a network of your own, in eval mode, that recipes start from instead of a copy of `model`: it takes and
            returns the same, and where in recipes names its layers. `model` stays the teacher of distillation and the
            original of every comparison, so a student that was not trained needs recipes that begin with
            distillation. Never modified.
        source: where `load` found it, so that a fresh process can load it again; set by `load`.
    """

    model: nn.Module
    example: Batch
    calibration: Sequence[Batch]
    score: Score
    test_score: Score | None = None
    train: Iterable[Any] | None = None
    probe: Sequence[Any] = ()
    student: nn.Module | None = field(default=None, kw_only=True)
    source: str | None = field(default=None, kw_only=True)

    @property
    def start(self) -> nn.Module:
        """What recipes work on a copy of: the student, or else the model."""
        return self.model if self.student is None else self.student


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """`model` on one batch, positional or by keyword as the batch is given."""
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def tensors(batch: Batch) -> tuple[Tensor, ...]:
    """The tensors of a batch in order."""
    return tuple(batch.values()) if isinstance(batch, Mapping) else tuple(batch)


def like(batch: Batch, values: Sequence[Tensor]) -> Batch:
    """`values` in the form of `batch`: a dict with its keys, or a tuple."""
    return dict(zip(batch, values, strict=True)) if isinstance(batch, Mapping) else tuple(values)


def raw(value: Tensor) -> np.ndarray:
    """The tensor's bytes in order, (number of bytes,)."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def count_batches(data: Iterable[Any]) -> int:
    """How many items `data` yields, by its length where it has one."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in data)


def input_names(model: nn.Module, example: Batch) -> tuple[str, ...]:
    """One name per tensor: the keys of a dict, or the parameters of `model.forward`."""
    if isinstance(example, Mapping):
        return tuple(example)
    taken = inspect.signature(model.forward).parameters.values()
    parameters = [p.name for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(parameters[i] if i < len(parameters) else f"input{i}" for i in range(len(example)))


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What a network returned, flattened to its tensors: a tensor, a tuple or list, or a mapping of them."""
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)):
        found = tuple(tensor for part in result if part is not None for tensor in outputs(part))
        if found:
            return found
    raise WorkloadError(
        f"The model returned a {type(result).__name__}, from which no tensor can be read. "
        "Wrap the model in a module whose forward returns a tensor or a tuple of tensors."
    )


def predictor(model: nn.Module) -> Predict:
    """`model` as `score` receives it: no gradients, outputs as a tensor or a tuple."""

    def predict(*args: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            found = outputs(model(*args, **named))
        return found[0] if len(found) == 1 else found

    return predict


def scores(score: Score, predict: Predict, what: str = "score") -> Tensor:
    """`score(predict)` as a (n,) double tensor: n examples, or n = 1 where it returned one number.

    Raises:
        WorkloadError: it raised, returned no number, or returned NaN or infinity.
    """
    try:
        result = score(predict)
    except Exception as error:
        raise WorkloadError(
            f"{what}(predict) raised {type(error).__name__}: {error}. It was called with a function that takes the "
            f"tensors of a batch and returns the network's outputs. Run it on the model yourself and mend it."
        ) from error
    try:
        values = torch.as_tensor(result, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WorkloadError(
            f"{what}(predict) returned a {type(result).__name__}, but one number or one number per example is "
            f"needed (higher is better). Return a float or a sequence of floats."
        ) from error
    if values.numel() == 0:
        raise WorkloadError(f"{what}(predict) returned no values: its data is empty. Give it examples to score.")
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise WorkloadError(
            f"{what}(predict) returned {bad} values of {values.numel()} that are NaN or infinite, so nothing can be "
            "compared with them. Make it return finite numbers."
        )
    return values


def load(spec: str) -> Workload:
    """The workload behind `file.py`, `file.py:name` or `pkg.mod:name` (the name defaults to `workload`)."""
    path, name, make = _function(spec, "workload", "-> Workload")
    try:
        found = make()
    except WorkloadError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"{name}() in {path} raised {type(error).__name__}: {error}. Run it by itself and mend it."
        ) from error
    if not isinstance(found, Workload):
        raise WorkloadError(
            f"{name}() in {path} returned a {type(found).__name__}, not a Workload. "
            "Return featherweight.Workload(model=…, example=…, calibration=…, score=…)."
        )
    located = f"{Path(path).resolve()}:{name}" if path.endswith(".py") else f"{path}:{name}"
    loaded = Workload(**{**{k: getattr(found, k) for k in found.__dataclass_fields__}, "source": located})
    check(loaded)
    return loaded


def function(spec: str, usual: str) -> Callable[..., Any]:
    """The function behind `file.py`, `file.py:name` or `pkg.mod:name`; `usual` is its name where none is given.

    Raises:
        WorkloadError: there is none, or what defines it cannot be imported.
    """
    return _function(spec, usual, "")[2]


def _function(spec: str, usual: str, returns: str) -> tuple[str, str, Callable[..., Any]]:
    """File or module, name, and the function of that name."""
    drive = spec[:2] if len(spec) > 2 and spec[1] == ":" and spec[2] in "\\/" else ""
    path, _, name = spec.removeprefix(drive).partition(":")
    path, name = drive + path, name or usual
    module = _module_from_file(Path(path), spec) if path.endswith(".py") else _module_by_name(path, spec)
    if not callable(found := getattr(module, name, None)):
        defined = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        add = f"Add `def {name}() {returns}`, or name" if returns else "Name"
        raise WorkloadError(
            f"{path} has no function {name}(). It defines: {', '.join(defined) or 'no functions'}. "
            f"{add} another one as {path}:NAME."
        )
    return path, name, found


def _module_from_file(path: Path, spec: str) -> Any:
    if not path.is_file():
        raise WorkloadError(f"There is no file {path}. Give the path of a Python file that defines workload().")
    _join_path(path.resolve().parent)  # as for `python file.py`, so that a workload may import its neighbours
    module_spec = importlib.util.spec_from_file_location(f"featherweight_workload_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    return _executed(lambda: module_spec.loader.exec_module(module) or module, spec)  # type: ignore[union-attr]


def _module_by_name(name: str, spec: str) -> Any:
    _join_path(Path.cwd())  # as for `python -m name`; the installed command would not find it otherwise
    return _executed(lambda: importlib.import_module(name), spec)


def _join_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _executed(run: Callable[[], Any], spec: str) -> Any:
    try:
        return run()
    except Exception as error:
        raise WorkloadError(
            f"{spec} could not be imported: {type(error).__name__}: {error}. "
            "Name a Python file or an importable module with a function workload(), and mend what it raises."
        ) from error


def check(workload: Workload) -> None:
    """Raises a WorkloadError that says what is wrong; silent when the contract holds."""
    _check_model(workload.model, "model")
    _check_batch(workload.example, "example")
    if not isinstance(workload.calibration, Sequence):
        raise WorkloadError(
            f"calibration is a {type(workload.calibration).__name__}, but it is read more than once and by position. "
            "Give a list of batches, of a loader the first few: list(itertools.islice(loader, 8))."
        )
    if not workload.calibration:
        raise WorkloadError(
            "calibration is empty, but ranges and importances are measured on it. "
            "Give a few unlabelled batches like example, some hundred inputs in all."
        )
    for index, batch in enumerate(workload.calibration):
        _check_batch(batch, f"calibration[{index}]")
        _check_like(batch, workload.example, f"calibration[{index}]")
    for name in ("score", "test_score"):
        value = getattr(workload, name)
        if not callable(value) and not (value is None and name == "test_score"):
            raise WorkloadError(f"{name} is a {type(value).__name__}, not a function. Give {name}(predict) -> float.")
    _check_forward(workload)
    check_student(workload)


def check_student(workload: Workload) -> None:
    """Raises a WorkloadError where there is a student that cannot stand in for the model."""
    if workload.student is None:
        return
    _check_model(workload.student, "student")
    batch = workload.example
    names, wanted = (input_names(net, batch) for net in (workload.student, workload.model))
    if names != wanted and not _takes_anything(workload.model):
        raise WorkloadError(
            f"student takes {', '.join(names)}, but model takes {', '.join(wanted)}, and files that ship name their "
            "inputs so. Give the parameters of its forward the same names and order."
        )
    try:
        found = _described(workload.student, batch)
    except Exception as error:
        raise WorkloadError(
            f"student failed on example: {type(error).__name__}: {error}. It must take what model.forward takes."
        ) from error
    if found != (wanted_outputs := _described(workload.model, batch)):
        raise WorkloadError(
            f"student returns {', '.join(found)} for example, but model returns {', '.join(wanted_outputs)}. "
            "Give it the same number of outputs, of the same shapes and types."
        )


def _takes_anything(model: nn.Module) -> bool:
    """Whether it passes on what it is given, whatever that is called, as an ensemble does."""
    return any(p.kind == p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


def _described(model: nn.Module, batch: Batch) -> list[str]:
    """Shapes and types of the outputs."""
    with torch.no_grad():
        found = outputs(call(model, batch))
    return [f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}" for value in found]


def _check_model(model: Any, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"{what} is a {type(model).__name__}, not a torch.nn.Module. Give the network itself.")
    training = [name or f"the {what} itself" for name, module in model.named_modules() if module.training]
    if training:
        raise WorkloadError(
            f"{what} is in train mode ({len(training)} modules, first {training[0]!r}): dropout and batch norms would "
            f"make every run differ. Call {what}.eval() before building the Workload."
        )


def _check_batch(batch: Any, what: str) -> None:
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(values, (tuple, list)) or not values or not all(isinstance(v, Tensor) for v in values):
        raise WorkloadError(
            f"{what} is not a batch: it must be a non-empty tuple of tensors, or a dict from names to tensors, but "
            f"it is a {type(batch).__name__}. A batch of one tensor is written (x,)."
        )
    if exotic := [str(value.dtype) for value in values if value.dtype in (torch.bfloat16, *FLOAT8)]:
        raise WorkloadError(
            f"{what} holds {exotic[0].removeprefix('torch.')}, which runtimes cannot be fed with. Convert inside the "
            "network's forward, and give it float32."
        )
    sizes = [value.shape[0] if value.dim() else None for value in values]
    if None in sizes or len(set(sizes)) > 1 or sizes[0] == 0:
        raise WorkloadError(
            f"{what} has tensors of shapes {[tuple(v.shape) for v in values]}: dim 0 must be the batch, not empty and "
            "the same for all. Give every tensor the same batch size."
        )


def _check_like(batch: Batch, example: Batch, what: str) -> None:
    if isinstance(batch, Mapping) != isinstance(example, Mapping):
        raise WorkloadError(f"{what} and example differ in kind: one is a dict, one a tuple. Make both the same.")
    if isinstance(batch, Mapping) and isinstance(example, Mapping) and list(batch) != list(example):
        raise WorkloadError(f"{what} has keys {list(batch)}, example {list(example)}. Use the same keys and order.")
    given, wanted = tensors(batch), tensors(example)
    if len(given) != len(wanted):
        raise WorkloadError(f"{what} has {len(given)} tensors, example {len(wanted)}. Give the same tensors.")
    for index, (a, b) in enumerate(zip(given, wanted, strict=True)):
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise WorkloadError(
                f"{what}[{index}] is {tuple(a.shape)} of {a.dtype}, example[{index}] {tuple(b.shape)} of {b.dtype}: "
                "they must agree but for the batch. Pad or convert the data to one shape and type."
            )


def _check_forward(workload: Workload) -> None:
    batch = workload.calibration[0]
    try:
        with torch.no_grad():
            found = outputs(call(workload.model, batch))
    except WorkloadError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"The model failed on calibration[0]: {type(error).__name__}: {error}. "
            "example and calibration must be what model.forward takes."
        ) from error
    size = tensors(batch)[0].shape[0]
    for index, output in enumerate(found):
        if output.dim() == 0 or output.shape[0] != size:
            raise WorkloadError(
                f"Output {index} of the model has shape {tuple(output.shape)} for a batch of {size}: dim 0 must be "
                "the batch. Return per-example outputs."
            )
        if not bool(torch.isfinite(output).all()):
            raise WorkloadError(
                f"Output {index} of the model is NaN or infinite on calibration[0]. Mend the network or the data first."
            )
