"""One technique, one file, nothing else edited: a file that is dropped in is a pass everywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight

ROOT = Path(featherweight.__file__).parent.parent

NEW = '''"""Halves weights: of no use, but short.

Source: nobody 2000, arXiv:2000.00000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import nn

from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import done, select
from featherweight.workload import Workload


@dataclass(frozen=True, kw_only=True)
class HalveWeights(Pass):
    """Multiplies the weights of linear layers.

    Args:
        factor: by which they are multiplied.
    """

    factor: Annotated[float, Range(0.1, 1.0)] = 0.5

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        for name, layer in select(model, self.where, (nn.Linear,)).items():
            layer.weight.data *= self.factor
            done(name, f"times {self.factor}")
        return model
'''


@pytest.fixture(scope="module")
def copy_of_the_project(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("project")
    for folder in ("featherweight", "docs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "conftest.py", "tests/conftest.py", "tests/passes/test_contract.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    (root / "featherweight" / "passes" / "halve_weights.py").write_text(NEW)
    return root


def run(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_recipes_and_the_command_line_know_it(copy_of_the_project):
    listed = run(copy_of_the_project, "-m", "featherweight", "list", "passes")
    assert "halve_weights: Multiplies the weights of linear layers." in listed
    assert "factor: float = 0.5 (0.1 to 1)" in listed
    recipe = "{steps: [halve_weights: {factor: 0.25}], target: torch}"
    read = f"from featherweight import Recipe; print(Recipe.from_yaml({recipe!r}).to_yaml())"
    assert "halve_weights: {factor: 0.25}" in run(copy_of_the_project, "-c", read)


def test_the_docs_know_it(copy_of_the_project):
    run(copy_of_the_project, "docs/generate.py")
    page = (copy_of_the_project / "docs" / "passes.md").read_text()
    assert "## halve_weights\n\nHalves weights: of no use, but short." in page
    assert "| `factor` | 0.1 to 1 | `0.5` | by which they are multiplied. |" in page


def test_the_contract_tests_it(copy_of_the_project):
    chosen = "halve_weights and (not exports or mlp)"
    said = run(
        copy_of_the_project,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/passes/test_contract.py",
        "-k",
        chosen,
    )
    assert " passed" in said
    assert "failed" not in said
