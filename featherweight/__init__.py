"""Featherweight takes a trained network, data and a budget, and gives back a smaller and faster one, with proof.

    from featherweight import Budget, compress, load

    result = compress(load("examples/image.py"), Budget(max_drop=0.01), "out")

Names are imported when they are first used, so that a process which only runs an artifact never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherweight.artifact import Artifact as Artifact
    from featherweight.artifact import build as build
    from featherweight.artifact import open_artifact as open_artifact
    from featherweight.artifact import verify as verify
    from featherweight.ensemble import Ensemble as Ensemble
    from featherweight.errors import FeatherweightError as FeatherweightError
    from featherweight.measure import Baseline as Baseline
    from featherweight.measure import Measurement as Measurement
    from featherweight.passes import Pass as Pass
    from featherweight.recipe import Recipe as Recipe
    from featherweight.result import Result as Result
    from featherweight.search import compress as compress
    from featherweight.targets import Target as Target
    from featherweight.trials import Budget as Budget
    from featherweight.workload import Workload as Workload
    from featherweight.workload import load as load

__all__ = [
    "Artifact",
    "Baseline",
    "Budget",
    "Ensemble",
    "FeatherweightError",
    "Measurement",
    "Pass",
    "Recipe",
    "Result",
    "Target",
    "Workload",
    "build",
    "compress",
    "load",
    "open_artifact",
    "verify",
]

_HOMES = {
    "Artifact": "artifact",
    "Baseline": "measure",
    "Budget": "trials",
    "Ensemble": "ensemble",
    "FeatherweightError": "errors",
    "Measurement": "measure",
    "Pass": "passes",
    "Recipe": "recipe",
    "Result": "result",
    "Target": "targets",
    "Workload": "workload",
    "build": "artifact",
    "compress": "search",
    "load": "workload",
    "open_artifact": "artifact",
    "verify": "artifact",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
