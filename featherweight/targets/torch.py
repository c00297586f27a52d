"""PyTorch itself: an exported program, `model.pt2`, for wherever torch is at hand and nothing else.

The file is an archive of JSON and raw tensors. Before it is read it is checked to be no more than that: torch's own
reader would unpickle sample inputs and evaluate size expressions, so files that carry either are refused. When it
is loaded, quantized layers become oneDNN's int8 operators, and weights that are only stored in few bits are decoded
once. Nothing is compiled: the gain over eager is smaller than that of the other targets.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import ArtifactError, ExportError
from featherweight.targets import Arrays, Kernel, Runner, Target

if TYPE_CHECKING:
    from torch import nn

    from featherweight.workload import Workload

OPERATORS = re.compile(r"(torch\.ops\.(aten|featherweight)\.[\w.]+|_operator\.\w+|math\.\w+)")
SYMBOL = re.compile(r"Symbol\('[su]\d+'(, (positive|integer|nonnegative)=(True|False))*\)")
SIZES = re.compile(r"[\d+\-*/(), ]*|-?int_oo")  # what a size may be, once its symbols are taken out
LARGEST_JSON = 64 << 20
INT8_OPERATORS = ("onednn::qconv", "onednn::qlinear")


class Torch(Target):
    """PyTorch without a compiler: int8 through oneDNN's operators."""

    requires = ("torch",)
    extra = "torch"

    def export(self, model: nn.Module, workload: Workload, folder: Path) -> None:
        import torch

        from featherweight.surgery import trace

        program = trace(model, workload.example)
        program._example_inputs = None  # the archive would hold them pickled
        for node in program.graph.nodes:  # where the network was made is nobody's business
            for note in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                node.meta.pop(note, None)
        try:
            torch.export.save(program, folder / "model.pt2")
        except Exception as error:
            raise ExportError(
                f"torch cannot save {type(model).__name__}: {' '.join(str(error).split())[:300]} "
                "Replace the operator that it names, or choose another target."
            ) from error
        _without_pickles(folder / "model.pt2")

    def load(self, folder: Path, threads: int) -> Runner:
        import torch

        from featherweight.int8 import use_int8
        from featherweight.workload import outputs

        check_archive(folder / "model.pt2")
        program = torch.export.load(folder / "model.pt2")
        names = program.call_spec.in_spec.child(1).context or ()  # of inputs given by keyword
        network = use_int8(program.module())

        def call(values: list[torch.Tensor]) -> object:
            return network(**dict(zip(names, values, strict=True))) if names else network(*values)

        def run(inputs: Arrays) -> list[np.ndarray]:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                return [value.numpy() for value in outputs(call([torch.from_numpy(array) for array in inputs]))]

        return run

    def profile(self, folder: Path, inputs: Arrays, threads: int) -> list[Kernel]:
        from torch.profiler import ProfilerActivity, profile

        run = self.load(folder, threads)
        run(inputs)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run(inputs)
        return [
            Kernel(
                event.key,
                event.key,
                "int8" if event.key.startswith(INT8_OPERATORS) else "fp32",
                event.self_cpu_time_total / 1e3,
            )
            for event in profiler.key_averages()
        ]


# -------------------------------------------------------------------------------- the archive is data


def _without_pickles(path: Path) -> None:
    """Empties the record of sample inputs, which torch writes as a pickle even when there are none."""
    kept = path.with_suffix(".kept")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            target.writestr(item.filename, b"" if "/sample_inputs/" in item.filename else source.read(item))
    kept.replace(path)


def check_archive(path: Path) -> None:
    """Raises an ArtifactError unless the archive holds raw tensors and graphs of known operators only."""
    try:
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if item.filename.endswith(".json"):
                    if item.file_size > LARGEST_JSON:
                        raise _refused(path, f"{item.filename} has {item.file_size} bytes")
                    for complaint in _complaints(json.loads(archive.read(item))):
                        raise _refused(path, f"{item.filename} {complaint}")
                elif item.file_size and item.filename.endswith((".pkl", ".so", ".py", ".pt")):
                    raise _refused(path, f"it contains {item.filename}, which would have to be unpickled or run")
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise _refused(path, f"it cannot be read: {error}") from error


def _refused(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is no program that Featherweight wrote: {why}. Export the network again.")


def _complaints(value: Any, key: str = "") -> Iterator[str]:
    """What in a parsed JSON file would make torch's reader do more than read."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            yield "holds a pickled tensor"
        for name, part in value.items():
            yield from _complaints(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _complaints(part, key)
    elif isinstance(value, str):
        if key == "target" and not OPERATORS.fullmatch(value):
            yield f"calls {value!r}"
        if key == "expr_str" and not SIZES.fullmatch(SYMBOL.sub("", value)):
            yield f"has the size {value[:80]!r}"
