"""Recipes: an ordered list of passes and a target, equal to their YAML text; and running their passes.

    steps:
      - prune_channels: {share: 0.3}
      - quantize_static
    target: openvino

What a pass does is its own affair, and what becomes of the network afterwards `artifact`'s.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from featherweight import passes, targets
from featherweight.errors import FeatherweightError, LayerError, RecipeError, WorkloadError
from featherweight.passes import Pass
from featherweight.settings import settings_of
from featherweight.surgery import Coverage, left, matches, open_recurrent, recording, use_linear
from featherweight.workload import Workload, call, check_student, outputs

LONGEST_TEXT = 1 << 20  # characters of YAML
FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")  # 1e-3 is a number here, though not in YAML 1.1
RATIO = re.compile(r"\d+:\d+$")  # 2:4 is text here, though a number to base 60 in YAML 1.1
EXAMPLE = "{steps: [quantize_static], target: openvino}"


@dataclass(frozen=True)
class Recipe:
    """What is done to a network, in order, and where the result runs.

    >>> Recipe(steps=(), target="onnxruntime").to_yaml()
    'steps: []\\ntarget: onnxruntime\\n'
    """

    steps: tuple[Pass, ...]
    target: str

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """The recipe that `text` spells; `where` names it in messages.

        Raises:
            RecipeError: it is no recipe; the message names the step and what to do.
            SettingError: a setting of a step is unknown, of the wrong type or out of range.
        """
        content = _parsed(text, where)
        if not isinstance(content, dict):
            raise RecipeError(
                f"{where} is a {_kind(content)}, not a mapping. Write steps and a target, such as {EXAMPLE}."
            )
        for key in content:
            if key not in ("steps", "target"):
                raise RecipeError(f"{where}: there is no key {key!r}. A recipe has steps and target; take it out.")
        for key in ("steps", "target"):
            if key not in content:
                raise RecipeError(f"{where} has no {key}. Write both steps and target, such as {EXAMPLE}.")
        steps, target = content["steps"], content["target"]
        if not isinstance(steps, list):
            raise RecipeError(
                f"{where}: steps is a {_kind(steps)}, not a list. Write one step per line, each with a dash, or "
                "[] for none."
            )
        _check_target(target, where)
        return cls(tuple(_step(step, f"{where}, step {i}") for i, step in enumerate(steps, start=1)), target)

    def to_yaml(self) -> str:
        """The canonical text: settings that differ from their defaults, in the order in which passes declare them."""
        return self._text(every=False)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for all settings, defaults included, and the target."""
        return hashlib.sha256(self._text(every=True).encode()).hexdigest()[:16]

    def _text(self, every: bool) -> str:
        lines = []
        for step in self.steps:
            known = settings_of(type(step))
            told = {k: v for k, v in step.settings().items() if every or v != known[k].default}
            lines.append(f"  - {step.name()}: {_inline(told)}" if told else f"  - {step.name()}")
        return "\n".join(["steps:", *lines] if lines else ["steps: []"]) + f"\ntarget: {_inline(self.target)}\n"


def compress_model(
    recipe: Recipe, workload: Workload, seed: int = 0, progress: Callable[[str], None] | None = None
) -> tuple[nn.Module, Coverage]:
    """A copy of the workload's network, or its student, after all steps of the recipe, and what they did to each layer.

    All chance comes from `seed`; the state of the global generators is afterwards as it was before.

    Args:
        recipe: its target is not looked at.
        workload: its networks are left as they are.
        seed: for torch, NumPy and random.
        progress: told the name of each step before it begins.

    Raises:
        LayerError: a step changed nothing, though what it is for is still there, or broke the network's outputs.
        RecipeError: the steps do not fit together.
        WorkloadError: the student is unlike the model, or the network cannot be copied.
    """
    check_student(workload)
    try:
        model = copy.deepcopy(workload.start)
    except Exception as error:
        raise WorkloadError(
            f"The model cannot be copied: {type(error).__name__}: {error}. Every recipe works on a copy: keep what "
            "copy.deepcopy cannot handle (locks, files, generators) out of the module."
        ) from error
    before = _example_outputs(model, workload)
    use_linear(model)
    open_recurrent(model)
    names = [name for name, _ in model.named_modules()]
    with seeded(seed), recording() as coverage:
        for number, step in enumerate(recipe.steps, start=1):
            label = f"Step {number} ({step.name()})"
            if progress is not None:
                progress(f"{number}/{len(recipe.steps)} {step.name()}")
            if gone := _removed(step, names, model):
                for name in gone:
                    left(name, f"an earlier step removed it, so there is nothing left for {step.name()} to treat")
                continue
            model = _applied(step, model, workload, coverage, label)
            _check_outputs(_example_outputs(model, workload, label), before, label)
    return model, coverage


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block torch, NumPy and random draw from `seed`; afterwards they go on as if nothing had been."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - passes may draw from it
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


# ------------------------------------------------------------------------------------------------ steps


def _removed(step: Pass, names: Sequence[str], model: nn.Module) -> list[str]:
    """Those of the original's `names` that a step is for, if earlier steps have removed them all."""
    wanted = [name for name in names if matches(name, step.where)]
    return [] if any(matches(name, step.where) for name, _ in model.named_modules()) else wanted


def _applied(step: Pass, model: nn.Module, workload: Workload, coverage: Coverage, label: str) -> nn.Module:
    count = len(coverage.done)
    try:
        model = step.apply(model, workload)
    except FeatherweightError as error:
        raise type(error)(f"{label}: {error}") from error
    except Exception as error:
        error.add_note(f"{label} of the recipe raised it.")
        raise
    if len(coverage.done) == count:
        reasons = [f"{layer}: {why}" for layer, why in coverage.left[-3:]]
        raise LayerError(
            f"{label} changed nothing: where={step.where!r} left no layer that it could treat. "
            + (f"It left {'; '.join(reasons)}. " if reasons else "")
            + "Leave the step out, or choose other layers with where."
        )
    return model.eval()


def _example_outputs(model: nn.Module, workload: Workload, label: str = "") -> tuple[Tensor, ...]:
    try:
        with torch.no_grad():
            return outputs(call(model, workload.example))
    except Exception as error:
        if not label:
            raise
        raise LayerError(
            f"{label} left a network that fails on the example: {type(error).__name__}: {error}. Leave the step out, "
            "or keep it off the layers that it breaks with where."
        ) from error


def _check_outputs(after: tuple[Tensor, ...], before: tuple[Tensor, ...], label: str) -> None:
    def described(found: tuple[Tensor, ...]) -> list[str]:
        return [f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}" for value in found]

    if described(after) != described(before):
        raise LayerError(
            f"{label} changed what the network returns: {', '.join(described(after))}, where the original returns "
            f"{', '.join(described(before))}. Keep it off the last layers with where, such as where: '!head'."
        )
    for index, (new, old) in enumerate(zip(after, before, strict=True)):
        if new.is_floating_point() and bool(old.isfinite().all()) and not bool(new.isfinite().all()):
            raise LayerError(
                f"{label} made output {index} NaN or infinite on the example. Use milder settings, or keep the step "
                "off the layers that it breaks with where."
            )


# ------------------------------------------------------------------------------------------------ text


class _Loader(yaml.SafeLoader):
    """Plain data only; no key twice, no anchors (which can make a short text huge), and 1e-3 is a number, 2:4 text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent) or getattr(self.peek_event(), "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not taken", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key in seen:
                problem = "a key is no plain word" if key is None else f"the key {key!r} occurs twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
    for _digit in "0123456789":  # first of all: of several that match, the first counts
        _side.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", RATIO))


def _parsed(text: str, where: str) -> Any:
    if len(text) > LONGEST_TEXT:
        raise RecipeError(
            f"{where} has {len(text):,} characters, more than the {LONGEST_TEXT:,} that a recipe may have. Is it the "
            "right file?"
        )
    try:
        return yaml.load(text, _Loader)  # derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where} is no YAML{place}: {error.problem or error}. Write it as in: {EXAMPLE}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{where} is no YAML: {reason}. Write it as in: {EXAMPLE}.") from error


def _inline(value: Any) -> str:
    """`value` as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=float("inf"))
    return str(text).removesuffix("\n").removesuffix("\n...")


def _step(step: Any, where: str) -> Pass:
    if isinstance(step, list):
        raise RecipeError(_alternatives(where))
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, dict) or len(step) != 1 or not isinstance(next(iter(step)), str):
        what = f"a mapping of {len(step)} keys" if isinstance(step, dict) else f"a {_kind(step)}"
        raise RecipeError(
            f"{where} is {what}. Write the name of one pass, or the name with its settings, such as "
            "- prune_channels: {share: 0.3}, and one dash per pass."
        )
    ((name, settings),) = step.items()
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise RecipeError(
            f"{where} ({name}): its settings are a {_kind(settings)}, not a mapping. Write them as "
            f"{name}: {{setting: value}}, or the name alone for the defaults."
        )
    for setting, value in settings.items():
        if isinstance(value, (list, dict)):
            raise RecipeError(_alternatives(f"{where} ({name}), {setting}"))
    try:
        return passes.build(name, settings, f"{where} ({name})")
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_target(target: Any, where: str) -> None:
    if isinstance(target, list):
        raise RecipeError(_alternatives(f"{where}, target"))
    if not isinstance(target, str) or target not in targets.names():
        raise RecipeError(
            f"{where}: there is no target {target!r}. There are: {', '.join(targets.names())}. Name one of them."
        )


def _alternatives(where: str) -> str:
    return (
        f"{where} holds several values, which spans a search space; a recipe is one point of it. "
        "Keep one value, or let `featherweight compress` choose."
    )


def _kind(value: Any) -> str:
    return {"NoneType": "nothing (null)", "str": "text", "dict": "mapping"}.get(
        type(value).__name__, type(value).__name__
    )
