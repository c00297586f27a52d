"""Passes: one technique, one file. The file's name is the pass's name everywhere; there is no list to edit.

A file holds its mathematics as functions on tensors, then one frozen dataclass that derives from `Pass`: its
fields are the settings. This module knows how passes are found and built from text, and no technique.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from typing import Any

from torch import nn

from featherweight.errors import RecipeError
from featherweight.settings import check
from featherweight.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One technique with its settings.

    Args:
        where: which layers: names with `*`, separated by commas; those that begin with `!` are left out. Weights of
            recurrent layers are layers of their own: `lstm.ih_l0` is what `lstm` has as `weight_ih_l0`.
    """

    where: str = "*"

    def __post_init__(self) -> None:
        check(type(self), self.settings(), self.name())

    @classmethod
    def name(cls) -> str:
        """The name of the file that defines it."""
        return cls.__module__.rpartition(".")[2]

    def settings(self) -> dict[str, Any]:
        """All settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        """`model` compressed. It belongs to the pass, which may change it in place; `workload.model` does not.

        What was done to which layer, and what was left and why, is said with `surgery.done` and `surgery.left`.
        A pass never calls `workload.score`.
        """


@cache
def names() -> tuple[str, ...]:
    """The names of all passes, from the files in this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


@cache
def find(name: str) -> type[Pass]:
    """The pass called `name`."""
    if name not in names():
        close = get_close_matches(name, names(), 1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(names())}."
        raise RecipeError(f"There is no pass {name!r}. {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise RecipeError(f"passes/{name}.py defines {len(found)} passes. A file holds exactly one subclass of Pass.")
    return found[0]


def build(name: str, settings: Mapping[str, Any], where: str) -> Pass:
    """The pass called `name` with settings that came from text; `where` names the step in messages."""
    kind = find(name)
    return kind(**check(kind, settings, where))
