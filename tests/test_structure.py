"""The shape of the package itself: imports point down, nothing heavy is imported for nothing, names resolve."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import featherweight

ROOT = Path(featherweight.__file__).parent
# Low to high. A module imports from its own layer or below; what lies in a folder is in its folder's layer.
LAYERS = (
    {"errors", "machine", "settings"},
    {
        "workload",
        "abreast",
        "batch_norms",
        "encodings",
        "surgery",
        "coupling",
        "channel_rules",
        "checkpoints",
        "damage",
        "gram",
        "hooks",
        "rescaling",
        "devices",
        "int8",
        "masks",
        "memory",
        "low_rank",
        "losses",
        "onnx_graph",
        "onnx_pairs",
        "sparse",
        "processes",
        "replay",
        "teacher",
        "training",
    },
    {"passes", "targets"},
    {"artifact", "ensemble", "recipe", "timing"},
    {
        "arrays",
        "codec",
        "columns",
        "combining",
        "job",
        "layer_split",
        "measure",
        "outputs",
        "parallel",
        "replica",
        "tensor_split",
    },
    {
        "allocation",
        "behaviour",
        "candidates",
        "cost_table",
        "damage_table",
        "facts",
        "feasibility",
        "fragile",
        "knobs",
        "making",
        "progress",
        "result",
        "search",
        "shape_costs",
        "shaping",
        "storing",
        "strategy",
        "tables",
        "trials",
        "cluster",
        "pools",
        "distributed",
    },
    {"report", "testing"},
    {"cli", "__main__", "featherweight"},
)
OPTIONAL = (
    "accelerate",
    "nncf",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "pandas",
    "PIL",
    "pyarrow",
    "ray",
    "torchao",
    "transformers",
)


def _name(path: Path) -> str:
    """`passes/wanda.py` -> `featherweight.passes.wanda`."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _named(node: ast.AST, module: str) -> Iterator[str]:
    """The dotted names that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        base = base if node.level else str(node.module)
        yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def _imports(module: str) -> frozenset[str]:
    """The modules of ours that `module` imports anywhere: at the top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(_tree(module)):
        for name in _named(node, module):
            if name.split(".")[0] == "featherweight":
                while name not in MODULES:  # a function or class: its module is what is imported
                    name = name.rpartition(".")[0]
                found.add(name)
    return frozenset(found - {module})


def _unit(module: str) -> str:
    """The top-level module or folder that `module` belongs to; the package's own __init__ is `featherweight`."""
    return [*module.split("."), module][1]


def _layer(module: str) -> int:
    return next((level for level, units in enumerate(LAYERS) if _unit(module) in units), len(LAYERS))


def _leaf(module: str) -> tuple[str, str] | None:
    """`("passes", "wanda")` for a file in a folder; None for the folder's own __init__ and all others."""
    parts = module.split(".")
    return (parts[1], parts[2]) if len(parts) > 2 else None


def test_every_module_has_a_layer() -> None:
    unknown = sorted({_unit(module) for module in MODULES} - set().union(*LAYERS))
    assert not unknown, f"Add {', '.join(unknown)} to LAYERS in tests/test_structure.py, above all that it imports."


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    upward = sorted(other for other in _imports(module) if _layer(other) > _layer(module))
    assert not upward, f"{module} imports {', '.join(upward)} from a layer above its own; see LAYERS in this file."


@pytest.mark.parametrize("module", [module for module in MODULES if _unit(module) in ("passes", "targets")])
def test_passes_and_targets_do_not_know_one_another(module: str) -> None:
    own = f"featherweight.{_unit(module)}"
    known = sorted(
        other
        for other in _imports(module)
        if _unit(other) in ("passes", "targets")
        and not (other == own or (_unit(other) == _unit(module) and _leaf(other)[1].startswith("_")))  # type: ignore[index]
    )
    assert not known, (
        f"{module} imports {', '.join(known)}: of its folder it may know {own} and files named _*.py only."
    )


def test_the_report_reads_trials_and_knows_nothing_of_the_search() -> None:
    below, known = ["featherweight.report"], set()
    while below:
        known.add(module := below.pop())
        below.extend(_imports(module) - known)
    assert "featherweight.trials" in known and "featherweight.search" not in known


def test_imports_form_no_cycle() -> None:
    try:
        graphlib.TopologicalSorter({module: _imports(module) for module in MODULES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail("These modules import one another in a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is(module: str) -> None:
    assert (ast.get_docstring(_tree(module)) or "").strip(), f"{module} has no docstring. Say in one line what it is."


def _loaded_after(code: str) -> set[str]:
    """The names of the modules that a fresh interpreter holds after `code`, which must exit with 0."""
    report = "import atexit, json, sys; atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules)))); "
    command = [sys.executable, "-c", report + code]
    ran = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_optional_runtime() -> None:
    assert sorted(set(OPTIONAL) & _loaded_after("import featherweight")) == []


def test_help_does_not_import_torch() -> None:
    run = "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('featherweight', run_name='__main__')"
    assert sorted({"torch", *OPTIONAL} & _loaded_after(run)) == []


def test_all_names_resolve_and_type_checkers_see_the_same_ones() -> None:
    assert featherweight.__all__ == sorted(set(featherweight.__all__))
    for name in featherweight.__all__:
        assert getattr(featherweight, name) is not None
    seen = {name for node in ast.walk(_tree("featherweight")) for name in _named(node, "featherweight")}
    ours = {name.rpartition(".")[2] for name in seen if name.startswith("featherweight.")}
    assert ours == set(featherweight.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        featherweight.no_such_name  # noqa: B018


def test_shapes_are_checked_in_test_runs() -> None:
    encodings = importlib.import_module("featherweight.encodings")
    with pytest.raises(Exception, match="packed") as refused:
        encodings.unpack4(torch.zeros(2, 2, dtype=torch.uint8), 3)
    assert type(refused.value).__name__ == "TypeCheckError"
