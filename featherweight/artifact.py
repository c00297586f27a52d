"""Artifacts: the folder that ships, what is written in it, and reading it without trusting it.

    best/
      manifest.json         what the folder holds: sizes and digests of files, inputs, outputs, versions
      recipe.yaml           how it was made
      vectors.safetensors   an input and the outputs that it must give
      ...                   the runtime's own files

Nothing of a folder is unpickled or run as code, every size is bounded before anything is allocated, and digests are
checked before a runtime sees a file. Digests guard against damage, not against whoever can write the manifest too.
torch is imported only where tensors are handled, so that a process which runs an artifact need not load it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight import targets
from featherweight.errors import ArtifactError, ExportError, FeatherweightError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from featherweight.recipe import Recipe
    from featherweight.surgery import Coverage
    from featherweight.targets import Runner, Target
    from featherweight.workload import Predict, Workload

FORMAT = 1
MANIFEST, RECIPE, VECTORS = "manifest.json", "recipe.yaml", "vectors.safetensors"
LARGEST_MANIFEST = 16 << 20  # bytes
LARGEST_VECTORS = 1 << 30
LARGEST_FILE = 1 << 40
MOST_FILES = 1000
MOST_VALUES = 1000  # inputs, outputs and dimensions
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
KEYS = {
    "featherweight": str,
    "recipe_digest": str,
    "target": str,
    "files": dict,
    "inputs": list,
    "outputs": list,
    "parameters": int,
    "int8_layers": int,
    "export_error": float,
    "coverage": list,
    "versions": dict,
    "seed": int,
}  # of a manifest, beside format
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
VECTOR_BATCH = 2
CHECKED = 8  # examples on which a file is compared with the network
VECTOR_OUTPUTS = 4096  # values kept of each output
WRONG = 0.5  # relative error of outputs that no rounding explains: the export is refused
TOLERANCE = 0.01  # of an output's largest magnitude: what processors may differ by; whole numbers may not differ
IN_BFLOAT16 = 0.05  # what they may differ by where some compute in bfloat16 and others may not
AGAIN = "Fetch the folder again from where it came, or make it again with `featherweight apply`."


@dataclass(frozen=True)
class Artifact:
    """A folder that ships, checked against its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def bytes(self) -> int:
        """The size of all files, the manifest's own included."""
        return sum((self.folder / name).stat().st_size for name in (MANIFEST, *self.manifest["files"]))

    @property
    def target(self) -> str:
        """The name of the target."""
        return str(self.manifest["target"])

    @property
    def digest(self) -> str:
        """The digest of the recipe that made it."""
        return str(self.manifest["recipe_digest"])

    @property
    def recipe(self) -> str:
        """The text of the recipe that made it."""
        return (self.folder / RECIPE).read_text(encoding="utf-8", errors="replace")

    def load(self, threads: int = 1) -> Runner:
        """The network in its runtime, on arrays.

        Raises:
            ArtifactError: the runtime cannot read its files.
            TargetError: the runtime is not installed.
        """
        target = targets.find(self.target)
        try:
            return target.load(self.folder, threads)
        except FeatherweightError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{self.target} cannot load {self.folder}: {' '.join(str(error).split())[:300]}. Its files are as they "
                "were written, so the runtime may be older than the one that wrote them "
                f"({self.manifest['versions'].get(self.target, 'unknown')}): update it."
            ) from error

    def predict(self, threads: int = 1) -> Predict:
        """The network as `score` receives it: tensors in, by position or by name, and a tensor or a tuple out."""
        import torch

        run, specs = self.load(threads), self.manifest["inputs"]
        ranks = [len(spec["shape"]) for spec in self.manifest["outputs"]]

        def predict(*args: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
            given = _in_order(args, named, specs)
            arrays = [np.ascontiguousarray(value.detach().cpu().numpy()) for value in given]
            found = [torch.from_numpy(value) for value in run(arrays)]
            size = arrays[0].shape[0]
            if [value.dim() for value in found] != ranks or any(value.shape[0] != size for value in found):
                raise ArtifactError(
                    f"{self.folder} returned outputs of {[tuple(v.shape) for v in found]} for a batch of {size}, but "
                    f"its manifest says {[spec['shape'] for spec in self.manifest['outputs']]}. {AGAIN}"
                )
            return found[0] if len(found) == 1 else tuple(found)

        return predict


def build(
    recipe: Recipe,
    workload: Workload,
    folder: Path,
    seed: int = 0,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Artifact:
    """The artifact that `recipe` makes of `workload`, in `folder`, which appears whole or not at all.

    Where several processes were started together, all call it, and train together; the first one writes.

    Args:
        recipe: its passes are run and its target writes the files.
        workload: left as it is.
        folder: new, empty, or (with `overwrite`) an artifact that is to be replaced.
        seed: of all chance in the passes.
        overwrite: whether an artifact that is there may be replaced; nothing else ever is.
        progress: told the name of each step before it begins.

    Raises:
        ArtifactError: the folder cannot be written, or is not ours to replace.
        ExportError: the target cannot hold the network.
        LayerError, RecipeError, TargetError: as `compress_model` and `targets.find` say.
    """
    from featherweight.processes import processes
    from featherweight.recipe import compress_model

    together = processes()
    if together.number:  # trains along, and leaves it to the first to write
        compress_model(recipe, workload, seed, progress)
        together.wait()
        return open_artifact(folder)
    folder = Path(folder) if Path(folder).name not in ("", "..") else Path(folder).resolve()
    _check_free(folder, overwrite)
    target = targets.find(recipe.target)
    with _whole_or_nothing(folder, overwrite) as fresh:
        model, coverage = compress_model(recipe, workload, seed, progress)
        check_floats(model, target)
        manifest = _manifest(recipe, workload, model, coverage, seed)
        if progress is not None:
            progress(f"export to {recipe.target}")
        target.export(model, workload, fresh)
        _check_exported(fresh, recipe.target)
        (fresh / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        _write_vectors(fresh, manifest, workload, model)
        manifest["files"] = {
            name: {"bytes": (fresh / name).stat().st_size, "sha256": _sha256(fresh / name)}
            for name in sorted(path.name for path in fresh.iterdir())
        }
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    together.wait()
    return open_artifact(folder)


def open_artifact(folder: Path) -> Artifact:
    """The artifact in `folder`, after its manifest, the names and sizes of its files and their digests were checked.

    Raises:
        ArtifactError: something is not as it was written; the message says what.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    problems = _file_problems(folder, manifest["files"])
    if problems:
        raise ArtifactError(f"{folder} is not as it was written: {'; '.join(problems[:5])}. {AGAIN}")
    return Artifact(folder, manifest)


def verify(folder: Path) -> list[str]:
    """What is wrong with the artifact in `folder`: nothing, if the list is empty.

    Files are compared with their digests; then the stored input is run, and outputs must agree with the stored ones
    within `TOLERANCE` of the largest magnitude (whole numbers and booleans exactly).

    Raises:
        TargetError: its runtime is not installed, so that nothing can be said about its outputs.
    """
    try:
        artifact = open_artifact(folder)
        return _vector_problems(artifact, artifact.load(threads=1))
    except ArtifactError as error:
        return [str(error)]


def replace_artifact(source: Path, folder: Path) -> None:
    """Copies the artifact in `source` to `folder`, where at every moment stands the old one or the new one, whole.

    Raises:
        ArtifactError: `folder` cannot be written, or holds something that is no artifact.
    """
    with _whole_or_nothing(folder, overwrite=True) as fresh:
        for path in source.iterdir():
            shutil.copyfile(path, fresh / path.name)


def write_artifact(files: Mapping[str, bytes], folder: Path) -> Artifact:
    """The artifact whose files were made elsewhere, in `folder`, where it appears whole or not at all.

    Raises:
        ArtifactError: `folder` cannot be written, or the files are not those that their manifest lists.
    """
    if strange := [name for name in files if not FILE_NAME.fullmatch(name)]:
        raise ArtifactError(f"The file name {strange[0][:80]!r} is not allowed in an artifact, so it was not written.")
    with _whole_or_nothing(folder, overwrite=True) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        open_artifact(fresh)
    return open_artifact(folder)


def write_text_atomic(path: Path, text: str) -> None:
    """`text` in the file `path`, which at every moment holds either the old text or the new one, whole.

    Raises:
        ArtifactError: it cannot be written; the message says why.
    """
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def versions_of(target: str) -> dict[str, str]:
    """The versions of Python, Featherweight, NumPy, torch and the modules that `target` needs (`eager`: none)."""
    needed = targets.find(target).requires if target in targets.names() else ()
    found = {"python": platform.python_version()}
    for name in ("featherweight", "numpy", "torch", *needed):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_floats(model: nn.Module, target: Target) -> None:
    """Refuses a network whose floats the target cannot be told to compute as they are meant to be.

    Raises:
        ExportError: it is so.
    """
    from featherweight.surgery import floats_of

    if (wanted := floats_of(model)) not in target.float_precisions:
        able = [name for name in targets.installed() if wanted in targets.find(name).float_precisions]
        raise ExportError(
            f"{target.name()} cannot be told to compute in {wanted}, as a step of the recipe wants. Leave that step "
            f"out, or choose a target that can; installed are {', '.join(able) or 'none'}."
        )


# ------------------------------------------------------------------------------------------------ writing


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "a symbolic link" if folder.is_symlink() else "a file"
        raise ArtifactError(f"{folder} is {kind}, where an artifact would be a folder. Choose another name.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        _read_manifest(folder)
    except ArtifactError as error:
        raise ArtifactError(
            f"{folder} holds files that are no artifact, so it is not replaced. Choose a new or an empty folder."
        ) from error
    if not overwrite:
        raise ArtifactError(
            f"{folder} holds an artifact already. Choose another folder, or allow it to be replaced (overwrite=True)."
        )


@contextlib.contextmanager
def _whole_or_nothing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its name when the block ends well and vanishes when it does not."""
    ending = f"{os.getpid()}-{secrets.token_hex(4)}.partial"
    fresh, old = (folder.parent / f".{folder.name}.{kind}{ending}" for kind in ("", "old."))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield fresh
        for path in fresh.iterdir():
            _sync(path)
        _sync(fresh)
        _check_free(folder, overwrite)  # again: it may have been filled in the meantime
        try:
            if folder.exists() and any(folder.iterdir()):
                folder.rename(old)
            fresh.rename(folder)
            _sync(folder.parent)
        except OSError as error:
            raise _unwritable(folder, error) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(fresh, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
    reason = "a file is where a folder would be" if in_the_way else error.strerror or type(error).__name__
    return ArtifactError(f"{path} cannot be written: {reason}. Choose a place that may be written and has room.")


def _sync(path: Path) -> None:
    """A file or folder reaches the disk before what follows does."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_exported(folder: Path, target: str) -> None:
    written = list(folder.iterdir())
    for path in written:
        if not path.is_file() or path.is_symlink() or not FILE_NAME.fullmatch(path.name):
            raise ExportError(
                f"{target} wrote {path.name!r}, which an artifact cannot hold: files lie flat in its folder and are "
                "named with letters, digits, dots and dashes. Mend the target's export."
            )
        if path.name in (MANIFEST, RECIPE, VECTORS):
            raise ExportError(f"{target} wrote {path.name!r}, a name of the artifact's own. Mend the target's export.")
    if not written:
        raise ExportError(f"{target} wrote no file. Mend the target's export.")


def _manifest(recipe: Recipe, workload: Workload, model: nn.Module, coverage: Coverage, seed: int) -> dict[str, Any]:
    import torch

    from featherweight.surgery import floats_of
    from featherweight.workload import call, input_names, outputs, tensors

    with torch.no_grad():
        found = outputs(call(model, workload.example))
    names = input_names(workload.start, workload.example)
    versions = versions_of(recipe.target)
    return {
        "format": FORMAT,
        "featherweight": versions.get("featherweight", "unknown"),
        "recipe_digest": recipe.digest,
        "target": recipe.target,
        "inputs": [
            {"name": name, **_spec(value)} for name, value in zip(names, tensors(workload.example), strict=True)
        ],
        "outputs": [_spec(value) for value in found],
        "parameters": count_parameters(model),
        "int8_layers": _int8_layers(model),
        "export_error": 0.0,
        "floats": floats_of(model),
        "coverage": coverage.as_rows(),
        "versions": versions,
        "seed": seed,
    }


def count_parameters(model: nn.Module) -> int:
    """The number of weights that `model` stores, in whatever form; shared ones count once."""
    from featherweight.surgery import encodings

    stored = {id(encoding): encoding.decode().numel() for encoding in encodings(model).values()}
    return sum(parameter.numel() for parameter in model.parameters()) + sum(stored.values())


def _int8_layers(model: nn.Module) -> int:
    """How many layers have both their inputs and their weights in bytes, and so should run in int8."""
    from featherweight.encodings import PACKED_BITS, Affine
    from featherweight.surgery import encoding_of, input_quantizer

    found = 0
    for layer in model.modules():
        if input_quantizer(layer) is not None:
            encoding = encoding_of(layer)
            found += isinstance(encoding, Affine) and encoding.bits > PACKED_BITS and not encoding.block
    return found


def _spec(value: Tensor) -> dict[str, Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(
            f"The network reads or returns {dtype}, which an artifact cannot pass on. It can pass {', '.join(DTYPES)}: "
            "convert inside the network."
        )
    return {"dtype": dtype, "shape": [None, *value.shape[1:]]}


def _write_vectors(folder: Path, manifest: dict[str, Any], workload: Workload, model: nn.Module) -> None:
    """The first examples and what the artifact itself makes of them, after a look at what the network makes of them."""
    import torch
    from safetensors.numpy import save_file

    from featherweight.damage import first_examples
    from featherweight.workload import call, outputs, tensors

    def both(batch: Any) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        inputs = [value.contiguous().numpy() for value in tensors(batch)]
        with torch.no_grad():
            wanted = [value.numpy() for value in outputs(call(model, batch))]
        return inputs, _run(manifest["target"], folder, inputs), wanted

    inputs, found, wanted = both(first_examples([workload.example], VECTOR_BATCH))
    if [(value.shape, value.dtype) for value in found] != [(value.shape, value.dtype) for value in wanted]:
        raise ExportError(
            f"{manifest['target']} returns {[(v.shape, str(v.dtype)) for v in found]}, where the network returns "
            f"{[(v.shape, str(v.dtype)) for v in wanted]}. That is our fault: report it, and choose another target."
        )
    # of several examples, for the outputs for one may be next to nothing, and any error large beside them
    _, *several = both(first_examples(workload.calibration[:CHECKED], CHECKED))
    error = max(map(_relative_error, *several))
    if not error <= WRONG:
        in_floats = manifest["floats"] == "float32"
        blamed = (
            "Report it as our fault, and"
            if in_floats
            else f"It may not bear {manifest['floats']}: leave that step out, or"
        )
        raise ExportError(
            f"What {manifest['target']} computes is not what the compressed network computes: the norm of the "
            f"difference is {error:.2g} of that of the outputs. {blamed} choose another target."
        )
    manifest["export_error"] = float(error)
    stored = {f"input{index}": value for index, value in enumerate(inputs)}
    stored |= {f"output{index}": _thinned(value) for index, value in enumerate(found)}
    save_file({name: np.ascontiguousarray(value) for name, value in stored.items()}, folder / VECTORS)


def _run(target: str, folder: Path, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What `target` makes of `inputs` with the files that it has just written."""
    runtime = targets.find(target)
    try:
        return runtime.load(folder, threads=1)(inputs)
    except FeatherweightError:
        raise
    except Exception as error:
        raise ExportError(
            f"{target} cannot run what it was given: {' '.join(str(error).split())[:300]}. Choose another target, or "
            "keep the steps off some layers with where until it can."
        ) from error


def _relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference over the norm of what was wanted, where that is finite; of whole numbers 0."""
    if wanted.dtype.kind != "f":
        return 0.0
    finite = np.isfinite(wanted)
    a, b = found[finite].astype(np.float64), wanted[finite].astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))


def _thinned(values: np.ndarray) -> np.ndarray:
    """All of a small array, or evenly spaced values of a large one."""
    if values.size <= VECTOR_OUTPUTS:
        return values
    return values.reshape(-1)[np.linspace(0, values.size - 1, VECTOR_OUTPUTS).astype(np.int64)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ reading


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder. Give the folder of an artifact: the one with {MANIFEST}.")
    path = folder / MANIFEST
    try:
        content = json.loads(
            _read_bounded(path, LARGEST_MANIFEST), object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is no manifest: it is not JSON ({str(error)[:200]}). {AGAIN}") from error
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {str(content.get('format'))[:40]!r}, but this version reads format {FORMAT}. "
            "Install the version of Featherweight that wrote it, or make the artifact again."
        )
    complaint = next(_complaints(content), None)
    if complaint is not None:
        raise ArtifactError(f"{path} is no manifest: {complaint[:300]}. {AGAIN}")
    return content


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is no regular file. {AGAIN}")
        if status.st_size > limit:
            raise ArtifactError(
                f"{path} has {status.st_size:,} bytes, more than the {limit:,} that it may have. {AGAIN}"
            )
        with path.open("rb") as file:
            return file.read(limit)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path.parent} is no artifact: it has no {path.name}. Give the folder that `featherweight apply` or "
            "`compress` wrote (best/)."
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}. Make it readable.") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _complaints(manifest: Any) -> Iterator[str]:
    """What is wrong with the form of a manifest; the files are looked at elsewhere."""
    if not isinstance(manifest, dict):
        yield f"it is a {type(manifest).__name__}, not an object"
        return
    for key, kind in KEYS.items():
        if type(manifest.get(key)) is not kind:
            yield f"{key} is {'missing' if key not in manifest else f'no {kind.__name__}'}"
            return
    if not re.fullmatch(r"[0-9a-f]{16}", manifest["recipe_digest"]):
        yield "recipe_digest is not 16 hexadecimal digits"
    if manifest["target"] not in targets.names():
        yield f"target {manifest['target'][:40]!r} is none of {', '.join(targets.names())}"
    for key in ("parameters", "int8_layers"):
        if manifest[key] < 0:
            yield f"{key} is negative"
    yield from _file_complaints(manifest["files"])
    for key in ("inputs", "outputs"):
        yield from _value_complaints(manifest[key], key)
    rows = manifest["coverage"]
    if not all(
        isinstance(row, dict) and "layer" in row and all(isinstance(value, str) for value in row.values())
        for row in rows
    ):
        yield "coverage is no list of rows of text"
    if not all(isinstance(value, str) for value in manifest["versions"].values()):
        yield "versions are not all text"


def _file_complaints(files: dict[str, Any]) -> Iterator[str]:
    if len(files) > MOST_FILES:
        yield f"it lists {len(files)} files, more than {MOST_FILES}"
    for name, about in files.items():
        if not FILE_NAME.fullmatch(name):
            yield f"the file name {name[:80]!r} is not allowed: it must be of letters, digits, dots and dashes"
        elif name == MANIFEST:
            yield f"it lists {MANIFEST} itself"
        elif not isinstance(about, dict) or set(about) != {"bytes", "sha256"}:
            yield f"of {name} it does not say bytes and sha256"
        elif type(about["bytes"]) is not int or not 0 <= about["bytes"] <= LARGEST_FILE:
            yield f"{name} is said to have {str(about['bytes'])[:40]} bytes, which is no size up to {LARGEST_FILE}"
        elif not isinstance(about["sha256"], str) or not re.fullmatch(r"[0-9a-f]{64}", about["sha256"]):
            yield f"the sha256 of {name} is not 64 hexadecimal digits"
    for name in (RECIPE, VECTORS):
        if name not in files:
            yield f"it does not list {name}"


def _value_complaints(specs: list[Any], what: str) -> Iterator[str]:
    if not 1 <= len(specs) <= MOST_VALUES:
        yield f"it has {len(specs)} {what}, where 1 to {MOST_VALUES} are possible"
    names = [spec.get("name") if isinstance(spec, dict) else None for spec in specs]
    if what == "inputs" and (not all(isinstance(n, str) and n for n in names) or len(set(names)) != len(names)):
        yield "the inputs do not all have a name of their own"
    for index, spec in enumerate(specs):
        shape = spec.get("shape") if isinstance(spec, dict) else None
        if not isinstance(shape, list) or not 1 <= len(shape) <= MOST_VALUES or shape[0] is not None:
            yield f"{what}[{index}] has no shape that begins with null, the batch"
        elif not all(type(size) is int and 0 <= size <= LARGEST_FILE for size in shape[1:]):
            yield f"{what}[{index}] has a size in its shape that is no whole number up to {LARGEST_FILE}"
        elif spec.get("dtype") not in DTYPES:
            yield f"{what}[{index}] has dtype {str(spec.get('dtype'))[:40]!r}, none of {', '.join(DTYPES)}"


def _file_problems(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the files of a folder differ from those of its manifest: sizes first, so that digests read no more."""
    try:
        with os.scandir(folder) as entries:
            present = {entry.name: entry for _, entry in zip(range(2 * MOST_FILES), entries, strict=False)}
            problems = [f"{name[:80]!r} is not in the manifest" for name in sorted(present.keys() - files - {MANIFEST})]
            for name, about in files.items():
                if name not in present:
                    problems.append(f"{name} is missing")
                elif not present[name].is_file(follow_symlinks=False):
                    problems.append(f"{name} is no regular file")
                elif (size := present[name].stat(follow_symlinks=False).st_size) != about["bytes"]:
                    problems.append(f"{name} has {size:,} bytes instead of {about['bytes']:,}")
                elif _sha256(folder / name) != about["sha256"]:
                    problems.append(f"{name} has another content than its digest says")
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror}. Make it readable.") from error
    return problems


# ------------------------------------------------------------------------------------------------ running


def _in_order(args: tuple[Tensor, ...], named: Mapping[str, Tensor], specs: list[dict[str, Any]]) -> list[Tensor]:
    """The tensors that the network reads, in its order, checked against the manifest."""
    names = [spec["name"] for spec in specs]
    wanted = ", ".join(f"{s['name']}: {s['dtype']} {['batch', *s['shape'][1:]]}" for s in specs)
    unknown, missing = sorted(named.keys() - names[len(args) :]), [n for n in names[len(args) :] if n not in named]
    if len(args) > len(names) or unknown or missing:
        raise ArtifactError(
            f"predict got {len(args)} tensors by position and {sorted(named) or 'none'} by name, but the artifact "
            f"reads {wanted}. Give each of them once."
        )
    given = [*args, *(named[name] for name in names[len(args) :])]
    for value, spec in zip(given, specs, strict=True):
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if dtype != spec["dtype"] or not shape or list(shape[1:]) != spec["shape"][1:] or shape[0] != given[0].shape[0]:
            raise ArtifactError(
                f"predict got {dtype} {list(shape)} for {spec['name']!r}, but the artifact reads {wanted}, with one "
                "batch size for all. Convert, pad or crop the data to that."
            )
    if given[0].shape[0] == 0:
        raise ArtifactError("predict got an empty batch. Give it at least one example.")
    return given


def stored_vectors(artifact: Artifact) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The inputs that an artifact ships with, and the outputs that they must give, of which the first values are kept.

    Raises:
        ArtifactError: they cannot be read, or the inputs are not what the network reads.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    specs = artifact.manifest["inputs"]
    try:
        vectors = load(_read_bounded(artifact.folder / VECTORS, LARGEST_VECTORS))
        inputs = [vectors[f"input{index}"] for index in range(len(specs))]
        wanted = [vectors[f"output{index}"] for index in range(len(artifact.manifest["outputs"]))]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{VECTORS} cannot be read: {type(error).__name__} {str(error)[:200]}. {AGAIN}") from error
    for value, spec in zip(inputs, specs, strict=True):
        if str(value.dtype) != spec["dtype"] or list(value.shape[1:]) != spec["shape"][1:]:
            raise ArtifactError(f"{VECTORS} holds inputs of other shapes than {MANIFEST} says. {AGAIN}")
    return inputs, wanted


def _vector_problems(artifact: Artifact, run: Runner) -> list[str]:
    inputs, wanted = stored_vectors(artifact)  # verify lists what this raises
    try:
        found = run(inputs)
    except Exception as error:
        return [f"{artifact.target} failed on the stored input: {' '.join(str(error).split())[:300]}. {AGAIN}"]
    if len(found) != len(wanted):
        return [f"The network returns {len(found)} outputs instead of {len(wanted)}. {AGAIN}"]
    compared = [_difference(_thinned(a), b) for a, b in zip(found, wanted, strict=True)]
    allowed = IN_BFLOAT16 if artifact.manifest.get("floats") == "bfloat16" else TOLERANCE
    return [
        f"Output {index} differs from the stored one by {share:.2g} of its largest magnitude, more than {allowed:g}: "
        f"this machine or runtime computes something else. Do not use the artifact here; make it again on this machine."
        for index, share in enumerate(compared)
        if not share <= (allowed if wanted[index].dtype.kind == "f" else 0.0)
    ]


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the largest magnitude; infinite where shapes, types, NaNs or infinities differ."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(np.abs(b[finite]).max(), np.finfo(np.float32).tiny))
