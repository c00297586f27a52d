from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from featherweight import artifact as artifacts
from featherweight import targets
from featherweight.artifact import (
    Artifact,
    build,
    count_parameters,
    open_artifact,
    verify,
    versions_of,
    write_text_atomic,
)
from featherweight.errors import ArtifactError, ExportError, LayerError, TargetError
from featherweight.passes import Pass
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe
from featherweight.surgery import done
from featherweight.targets import Arrays, Kernel, Runner, Target
from featherweight.workload import Workload, outputs

INSTALLED = targets.installed()
RECIPE = Recipe((PruneMagnitude(share=0.6),), "standin")


class Net(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(3, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.left(x)) * self.right(mask)
        return hidden, hidden.sum(-1)


class Standin(Target):
    """Matrices in a safetensors file, computed by NumPy."""

    requires = ("numpy",)
    loads = 0

    @classmethod
    def name(cls) -> str:
        return "standin"

    def export(self, model: nn.Module, workload: Workload, folder: Path) -> None:
        layers = {"left": model.left, "right": model.right}
        dense = {f"{n}.{t}": getattr(layers[n], t).detach().numpy() for n in layers for t in ("weight", "bias")}
        save_file(dense, folder / "weights.bin")

    def load(self, folder: Path, threads: int) -> Runner:
        Standin.loads += 1
        w = load_file(folder / "weights.bin")

        def run(inputs: Arrays) -> list[np.ndarray]:
            x, mask = inputs
            right = mask @ w["right.weight"].T + w["right.bias"]
            hidden = np.maximum(x @ w["left.weight"].T + w["left.bias"], 0) * right
            return [hidden, hidden.sum(-1)]

        return run

    def profile(self, folder: Path, inputs: Arrays, threads: int) -> list[Kernel]:
        return []


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    real_names, real_find = targets.names(), targets.find
    monkeypatch.setattr(targets, "names", lambda: (*real_names, "standin"))
    monkeypatch.setattr(targets, "find", lambda name: Standin() if name == "standin" else real_find(name))
    Standin.loads = 0


@pytest.fixture
def workload() -> Workload:
    example = {"x": torch.randn(3, 6), "mask": torch.randn(3, 3)}
    return Workload(model=Net().eval(), example=example, calibration=[example], score=lambda predict: 1.0)


@pytest.fixture
def artifact(workload: Workload, tmp_path: Path) -> Artifact:
    return build(RECIPE, workload, tmp_path / "best")


# ------------------------------------------------------------------------------------------------ what is written


def test_says_what_it_is(artifact: Artifact) -> None:
    assert {path.name for path in artifact.folder.iterdir()} == {
        "manifest.json",
        "recipe.yaml",
        "vectors.safetensors",
        "weights.bin",
    }
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    assert manifest == artifact.manifest and manifest["format"] == 1
    assert artifact.recipe == RECIPE.to_yaml() and artifact.digest == RECIPE.digest and artifact.target == "standin"
    assert manifest["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": [None, 6]},
        {"name": "mask", "dtype": "float32", "shape": [None, 3]},
    ]
    assert manifest["outputs"] == [
        {"dtype": "float32", "shape": [None, 16]},
        {"dtype": "float32", "shape": [None]},
    ]
    assert manifest["parameters"] == (6 + 1) * 16 + (3 + 1) * 16 and manifest["int8_layers"] == 0
    assert [row["layer"] for row in manifest["coverage"]] == ["left", "right"]
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_its_bytes_are_those_of_all_its_files(artifact: Artifact) -> None:
    assert artifact.bytes == sum(path.stat().st_size for path in artifact.folder.iterdir())


def test_same_seed_same_bytes(workload: Workload, tmp_path: Path) -> None:
    one, two = (build(RECIPE, workload, tmp_path / name, seed=3) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one.folder.iterdir()} == {
        p.name: p.read_bytes() for p in two.folder.iterdir()
    }


def test_counts_stored_weights_and_int8_layers(workload: Workload, tmp_path: Path) -> None:
    plain = count_parameters(workload.model)
    stored = build(Recipe((QuantizeWeights(),), "standin"), workload, tmp_path / "stored")
    static = build(Recipe((QuantizeStatic(),), "standin"), workload, tmp_path / "static")
    assert stored.manifest["parameters"] == static.manifest["parameters"] == plain
    assert (stored.manifest["int8_layers"], static.manifest["int8_layers"]) == (0, 2)


def test_appears_whole_or_not_at_all(workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def interrupted(self: Standin, model: nn.Module, workload: Workload, folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(Standin, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(RECIPE, workload, tmp_path / "best")
    assert seen and "best" not in seen[0], "it must be written elsewhere first"
    assert list(tmp_path.iterdir()) == [], "nothing may stay behind"


def test_replaces_an_artifact_only_when_allowed_and_only_at_the_end(
    artifact: Artifact, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Recipe((PruneMagnitude(share=0.75),), "standin")
    with pytest.raises(ArtifactError, match="holds an artifact already"):
        build(other, workload, artifact.folder)
    with monkeypatch.context() as patch:
        patch.setattr(Standin, "export", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(other, workload, artifact.folder, overwrite=True)
    assert open_artifact(artifact.folder).digest == RECIPE.digest
    assert build(other, workload, artifact.folder, overwrite=True).digest == other.digest
    assert list(artifact.folder.parent.iterdir()) == [artifact.folder]


def test_a_failed_rename_brings_the_old_artifact_back(
    artifact: Artifact, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = Path.rename, []

    def failing(self: Path, other: Path) -> Path:
        calls.append(self.name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match="cannot be written: No space left on device"):
        build(RECIPE, workload, artifact.folder, overwrite=True)
    assert open_artifact(artifact.folder).digest == RECIPE.digest
    assert list(artifact.folder.parent.iterdir()) == [artifact.folder]


def test_never_replaces_what_is_no_artifact(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name, message in (
        ("photos", "holds files that are no artifact"),
        ("photos/cat.jpg", "is a file"),
        ("link", "is a symbolic link"),
    ):
        with pytest.raises(ArtifactError, match=message):
            build(RECIPE, workload, tmp_path / name, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow"


def test_fills_an_empty_folder_and_makes_missing_parents(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert build(RECIPE, workload, tmp_path / "empty").folder == tmp_path / "empty"
    assert verify(build(RECIPE, workload, tmp_path / "a" / "b" / "c").folder) == []


def test_says_where_it_cannot_write(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"a file is where a folder would be\. Choose a place that may be"):
        build(RECIPE, workload, tmp_path / "file" / "best")


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (lambda folder: None, "standin wrote no file"),
        (lambda folder: (folder / "sub").mkdir(), "wrote 'sub', which an artifact cannot hold"),
        (lambda folder: (folder / ".hidden").write_text(""), "wrote '.hidden', which an artifact cannot hold"),
        (lambda folder: (folder / "link").symlink_to("/etc/passwd"), "wrote 'link', which an artifact cannot hold"),
        (lambda folder: (folder / "recipe.yaml").write_text(""), "wrote 'recipe.yaml', a name of the artifact's own"),
    ],
)
def test_refuses_what_a_target_should_not_write(
    export: Callable[[Path], object], message: str, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Standin, "export", lambda self, model, workload, folder: export(folder) and None)
    with pytest.raises(ExportError, match=message):
        build(RECIPE, workload, tmp_path / "best")


def test_refuses_a_target_whose_outputs_have_another_form(
    workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Standin, "load", lambda self, folder, threads: lambda inputs: [np.zeros((2, 16))])
    with pytest.raises(ExportError, match=r"standin returns \[\(\(2, 16\), 'float64'\)\], where the network returns"):
        build(RECIPE, workload, tmp_path / "best")


def test_refuses_what_a_target_cannot_run(workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Target, folder: Path, threads: int) -> Runner:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(Standin, "load", load)
    with pytest.raises(ExportError, match=r"standin cannot run what it was given: no kernel for this\. Choose another"):
        build(RECIPE, workload, tmp_path / "best")


def test_refuses_types_that_cannot_be_passed_on(tmp_path: Path) -> None:
    example = (torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3))
    complex_workload = Workload(Both().eval(), example, [example], score=lambda predict: 1.0)
    with pytest.raises(ExportError, match="reads or returns complex64"):
        build(Recipe((Note(),), "standin"), complex_workload, tmp_path / "best")


class Both(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mask + x.real


@dataclass(frozen=True, kw_only=True)
class Note(Pass):
    """Says that it did something."""

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        model.register_buffer("note", torch.zeros(1))
        done("", "noted")
        return model


def test_stored_outputs_of_large_networks_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "VECTOR_OUTPUTS", 5)
    example = (torch.randn(3, 6), torch.randn(3, 3))
    task = Workload(Net().eval(), example, [example], score=lambda predict: 1.0)
    made = build(RECIPE, task, tmp_path / "best")
    stored = load_file(made.folder / "vectors.safetensors")
    assert stored["input0"].shape == (2, 6), "two examples are enough"
    whole = made.load()([stored["input0"], stored["input1"]])[0].reshape(-1)
    assert stored["output0"].tolist() == [whole[i] for i in (0, 7, 15, 23, 31)]
    assert stored["output1"].shape == (2,)
    assert verify(made.folder) == []


# ------------------------------------------------------------------------------------------------ what is refused


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the manifest of a folder."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def flip(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[-1] ^= 1
    (folder / "weights.bin").write_bytes(content)


def as_link(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return apply


def rename_listed(name: str) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("weights.bin")

    return change


def manifest_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_text(text)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / "weights.bin", 100), "weights.bin has 100 bytes instead of"),
    "flipped byte": (flip, "weights.bin has another content than its digest says"),
    "longer": (lambda f: os.truncate(f / "weights.bin", 1 << 40), "weights.bin has 1,099,511,627,776 bytes instead of"),
    "other recipe": (
        lambda f: (f / "recipe.yaml").write_text((f / "recipe.yaml").read_text().replace("0.6", "0.7")),
        "recipe.yaml has another content",
    ),
    "missing file": (lambda f: (f / "weights.bin").unlink(), "weights.bin is missing"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "is no artifact: it has no manifest.json"),
    "extra file": (lambda f: (f / "run.py").write_text(""), "'run.py' is not in the manifest"),
    "extra folder": (lambda f: (f / "sub").mkdir(), "'sub' is not in the manifest"),
    "linked file": (as_link("weights.bin"), "weights.bin is no regular file"),
    "linked manifest": (as_link("manifest.json"), "manifest.json is no regular file"),
    "folder for a file": (
        lambda f: ((f / "weights.bin").unlink(), (f / "weights.bin").mkdir()),
        "weights.bin is no regular file",
    ),
    "empty manifest": (manifest_of(""), "it is not JSON"),
    "manifest no JSON": (manifest_of("{'format': 1}"), "it is not JSON"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 200), "it is not JSON"),
    "manifest binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "it is not JSON"),
    "manifest pickled": (lambda f: (f / "manifest.json").write_bytes(pickle.dumps(Bomb())), "it is not JSON"),
    "manifest deep": (manifest_of("[" * 100_000), "it is not JSON"),
    "manifest huge": (lambda f: os.truncate(f / "manifest.json", 1 << 34), "17,179,869,184 bytes, more than the"),
    "manifest list": (manifest_of("[1, 2]"), "it is a list, not an object"),
    "manifest NaN": (manifest_of('{"format": NaN}'), "NaN is no number"),
    "manifest twice": (manifest_of('{"format": 1, "format": 1}'), "a key occurs twice"),
    "manifest long number": (manifest_of('{"format": ' + "9" * 9000 + "}"), "it is not JSON"),
    "other format": (edit(lambda m: m.update(format=2)), "has format '2', but this version reads format 1"),
    "no format": (edit(lambda m: m.pop("format")), "has format 'None'"),
    "no target": (edit(lambda m: m.pop("target")), "target is missing"),
    "unknown target": (edit(lambda m: m.update(target="os")), "target 'os' is none of"),
    "target no text": (edit(lambda m: m.update(target=["standin"])), "target is no str"),
    "seed no number": (edit(lambda m: m.update(seed=True)), "seed is no int"),
    "negative parameters": (edit(lambda m: m.update(parameters=-1)), "parameters is negative"),
    "digest": (edit(lambda m: m.update(recipe_digest="../../x")), "recipe_digest is not 16 hexadecimal digits"),
    "files no object": (edit(lambda m: m.update(files=[])), "files is no dict"),
    "parent": (edit(rename_listed("../best/weights.bin")), "the file name '../best/weights.bin' is not allowed"),
    "two dots": (edit(rename_listed("..")), "the file name '..' is not allowed"),
    "absolute": (edit(rename_listed("/etc/passwd")), "the file name '/etc/passwd' is not allowed"),
    "backslash": (edit(rename_listed("..\\weights.bin")), "is not allowed"),
    "zero byte": (edit(rename_listed("weights\0.bin")), "is not allowed"),
    "line end": (edit(rename_listed("weights.bin\n")), "is not allowed"),
    "long name": (edit(rename_listed("w" * 5000)), "is not allowed"),
    "lists itself": (edit(rename_listed("manifest.json")), "it lists manifest.json itself"),
    "absurd size": (edit(lambda m: m["files"]["weights.bin"].update(bytes=1 << 62)), "which is no size"),
    "negative size": (edit(lambda m: m["files"]["weights.bin"].update(bytes=-1)), "which is no size"),
    "size no number": (edit(lambda m: m["files"]["weights.bin"].update(bytes=1e3)), "which is no size"),
    "no digest": (edit(lambda m: m["files"]["weights.bin"].pop("sha256")), "does not say bytes and sha256"),
    "short digest": (edit(lambda m: m["files"]["weights.bin"].update(sha256="ab")), "is not 64 hexadecimal digits"),
    "no vectors": (edit(lambda m: m["files"].pop("vectors.safetensors")), "does not list vectors.safetensors"),
    "many files": (
        edit(lambda m: m["files"].update({f"f{i}": m["files"]["weights.bin"] for i in range(2000)})),
        "lists 2003 files, more than 1000",
    ),
    "no inputs": (edit(lambda m: m.update(inputs=[])), "it has 0 inputs"),
    "nameless": (edit(lambda m: m["inputs"][0].pop("name")), "inputs do not all have a name of their own"),
    "same name": (edit(lambda m: m["inputs"][0].update(name="mask")), "inputs do not all have a name of their own"),
    "shape": (edit(lambda m: m["inputs"][0].update(shape=[3, 6])), "inputs[0] has no shape that begins with null"),
    "huge shape": (edit(lambda m: m["inputs"][0].update(shape=[None, 1 << 62])), "inputs[0] has a size in its shape"),
    "long shape": (edit(lambda m: m["inputs"][0].update(shape=[None] * 10_000)), "inputs[0] has no shape"),
    "dtype": (edit(lambda m: m["outputs"][0].update(dtype="object")), "outputs[0] has dtype 'object'"),
    "coverage": (edit(lambda m: m.update(coverage=[3])), "coverage is no list of rows of text"),
    "versions": (edit(lambda m: m.update(versions={"torch": 2})), "versions are not all text"),
}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_before_a_runtime_sees_it(damage: str, artifact: Artifact) -> None:
    change, message = DAMAGE[damage]
    change(artifact.folder)
    Standin.loads = 0
    with pytest.raises(ArtifactError) as caught:
        open_artifact(artifact.folder)
    text = str(caught.value)
    assert message in text and str(artifact.folder) in text
    assert len(text) < 1500 and text.endswith(".") and "\n" not in text
    assert verify(artifact.folder) == [text]
    assert Standin.loads == 0


def test_a_pipe_in_the_place_of_a_file_is_not_read(artifact: Artifact) -> None:
    for name in ("weights.bin", "manifest.json"):
        content = (artifact.folder / name).read_bytes()
        (artifact.folder / name).unlink()
        os.mkfifo(artifact.folder / name)
        with pytest.raises(ArtifactError, match="is no regular file"):
            open_artifact(artifact.folder)
        (artifact.folder / name).unlink()
        (artifact.folder / name).write_bytes(content)
    assert verify(artifact.folder) == []


def test_says_all_that_differs_at_once(artifact: Artifact) -> None:
    flip(artifact.folder)
    (artifact.folder / "recipe.yaml").unlink()
    (artifact.folder / "extra").write_text("")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(artifact.folder)
    assert all(name in str(caught.value) for name in ("weights.bin", "recipe.yaml is missing", "'extra'"))


def test_what_is_no_folder_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no folder\. Give the folder of an artifact"):
        open_artifact(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ vectors


def forge(artifact: Artifact, name: str, content: bytes) -> None:
    """Replaces a file and its digest, as somebody could who means it."""
    import hashlib

    (artifact.folder / name).write_bytes(content)
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(lambda manifest: manifest["files"].update({name: about}))(artifact.folder)


def test_verify_runs_the_stored_input(artifact: Artifact) -> None:
    assert verify(artifact.folder) == []
    weights = load_file(artifact.folder / "weights.bin")
    weights["left.weight"] *= 1.2
    save_file(weights, artifact.folder / "weights.bin")
    forge(artifact, "weights.bin", (artifact.folder / "weights.bin").read_bytes())
    problems = verify(artifact.folder)
    assert len(problems) == 2
    assert problems[0].startswith("Output 0 differs from the stored one by 0.") and "more than 0.01" in problems[0]


def test_verify_tolerates_what_processors_differ_by(artifact: Artifact) -> None:
    weights = load_file(artifact.folder / "weights.bin")
    weights["left.weight"] *= 1.001
    save_file(weights, artifact.folder / "weights.bin")
    forge(artifact, "weights.bin", (artifact.folder / "weights.bin").read_bytes())
    assert verify(artifact.folder) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, (1 << 60).to_bytes(8, "little") + b"{}", pickle.dumps(Bomb())],
    ids=["empty", "zeros", "absurd length", "pickle"],
)
def test_verify_survives_forged_vectors(content: bytes, artifact: Artifact) -> None:
    forge(artifact, "vectors.safetensors", content)
    (problem,) = verify(artifact.folder)
    assert problem.startswith("vectors.safetensors cannot be read")


def test_verify_survives_vectors_of_another_network(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "other"
    shapes = {"input0": (2, 7), "input1": (2, 3), "output0": (2, 16), "output1": (2,)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    forge(artifact, "vectors.safetensors", path.read_bytes())
    assert verify(artifact.folder)[0].startswith("vectors.safetensors holds inputs of other shapes")


def test_difference_is_infinite_where_it_cannot_be_measured() -> None:
    one, nan, inf = np.float32([1, 2]), np.float32([1, np.nan]), np.float32([1, np.inf])
    for a, b in ((one, np.float32([1])), (one, np.float64([1, 2])), (one, nan), (nan, one), (inf, nan), (inf, -inf)):
        assert artifacts._difference(a, b) == np.inf
    for same in (one, nan, inf, np.float32([np.nan]), np.float32([0, 0])):
        assert artifacts._difference(same, same) == 0
    assert artifacts._difference(np.float32([1, 2.1]), one) == pytest.approx(0.05)


# ------------------------------------------------------------------------------------------------ predict


def test_predicts_by_position_by_name_and_mixed(artifact: Artifact, workload: Workload) -> None:
    predict = artifact.predict()
    x, mask = torch.randn(5, 6), torch.randn(5, 3)
    results = [predict(x, mask), predict(x=x, mask=mask), predict(mask=mask, x=x), predict(x, mask=mask)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    assert [value.shape for value in results[0]] == [(5, 16), (5,)]
    assert not results[0][0].requires_grad


def test_predict_takes_views_and_tensors_with_gradients(artifact: Artifact) -> None:
    x, mask = torch.randn(6, 5, requires_grad=True).T, torch.randn(5, 6)[:, ::2]
    ours = artifact.predict()(x, mask)[0]
    assert torch.equal(ours, artifact.predict()(x.detach().clone(), mask.contiguous())[0])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((torch.zeros(2, 6),), {}),
        ((torch.zeros(2, 6), torch.zeros(2, 3), torch.zeros(2, 3)), {}),
        ((torch.zeros(2, 6),), {"y": torch.zeros(2, 3)}),
        ((torch.zeros(2, 6), torch.zeros(2, 3)), {"x": torch.zeros(2, 6)}),
        ((torch.zeros(2, 7), torch.zeros(2, 3)), {}),
        ((torch.zeros(6), torch.zeros(2, 3)), {}),
        ((torch.tensor(0.0), torch.zeros(2, 3)), {}),
        ((torch.zeros(2, 6), torch.zeros(3, 3)), {}),
        ((torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 3)), {}),
        ((torch.zeros(0, 6), torch.zeros(0, 3)), {}),
    ],
)
def test_predict_refuses_what_the_network_does_not_read(
    args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor], artifact: Artifact
) -> None:
    with pytest.raises(ArtifactError, match=r"^predict got"):
        artifact.predict()(*args, **named)


def test_a_runtime_that_cannot_read_its_file_is_explained(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Standin, "load", lambda self, folder, threads: 1 / 0)
    with pytest.raises(ArtifactError, match=r"standin cannot load .*: division by zero\. .*: update it"):
        artifact.load()
    assert verify(artifact.folder)[0].startswith("standin cannot load")


def test_a_missing_runtime_names_the_extra(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Target:
        raise TargetError("Target 'standin' needs x, which is not installed.")

    monkeypatch.setattr(targets, "find", missing)
    with pytest.raises(TargetError):
        verify(artifact.folder)


# ------------------------------------------------------------------------------------------------ text files


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "trial.json"
    texts = {"old " * 50_000, "new " * 100_000}
    write_text_atomic(path, "old " * 50_000)
    stop, seen = threading.Event(), set()

    def watch() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        for text in sorted(texts):
            write_text_atomic(path, text)
    stop.set()
    watcher.join()
    assert seen <= texts
    assert [found.name for found in path.parent.iterdir()] == ["trial.json"]


def test_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "t.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(tmp_path / "t.json", "\ud800")
    assert (tmp_path / "t.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ArtifactError, match="cannot be written: a file is where a folder would be"):
        write_text_atomic(tmp_path / "t.json" / "x", "new")


def test_versions_name_what_is_installed() -> None:
    assert versions_of("eager")["numpy"] == np.__version__
    assert {"python", "torch"} <= versions_of("standin").keys()


# ------------------------------------------------------------------------------------------------ real targets


@pytest.mark.parametrize("target", INSTALLED)
@pytest.mark.filterwarnings("ignore")  # of exporters; their own tests name them
def test_real_targets(target: str, workload: Workload, tmp_path: Path) -> None:
    made = build(Recipe((QuantizeWeights(),), target), workload, tmp_path / "best")
    assert verify(made.folder) == []
    x, mask = torch.randn(5, 6), torch.randn(5, 3)
    with torch.inference_mode():
        wanted = workload.model(x, mask)
    for a, b in zip(outputs(made.predict()(x=x, mask=mask)), wanted, strict=True):
        assert torch.allclose(a, b, atol=0.05)
    assert made.manifest["versions"].keys() >= {"python", "torch"}


@pytest.mark.parametrize("target", [name for name in INSTALLED if name != "torch"])
@pytest.mark.filterwarnings("ignore")
def test_running_an_artifact_needs_no_torch(target: str, workload: Workload, tmp_path: Path) -> None:
    made = build(Recipe((), target), workload, tmp_path / "best")
    code = f"""
import sys, numpy
from pathlib import Path
from featherweight.artifact import open_artifact
run = open_artifact(Path({str(made.folder)!r})).load(threads=1)
print([value.shape for value in run([numpy.zeros((4, 6), "f"), numpy.zeros((4, 3), "f")])], "torch" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert found.stdout.strip() == "[(4, 16), (4,)] False", found.stderr


def test_a_step_that_fails_leaves_nothing(workload: Workload, tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="Step 1"):
        build(Recipe((PruneMagnitude(where="nothing"),), "standin"), workload, tmp_path / "best")
    assert list(tmp_path.iterdir()) == []


def test_outputs_next_to_nothing_for_the_example_are_no_reason_to_refuse_a_file(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(16, 16)
    model = nn.Linear(16, 4).eval()
    with torch.no_grad():
        model.bias.copy_(-0.999 * (x[0] @ model.weight.T))
    workload = Workload(model, (x[:1],), [(x,)], lambda predict: 0.0)
    real = artifacts._run
    monkeypatch.setattr(
        artifacts, "_run", lambda *given: [value + 0.02 for value in real(*given)]
    )  # as rounding is off
    assert build(Recipe((), "torch"), workload, tmp_path / "a").manifest["export_error"] < 0.1
    monkeypatch.setattr(artifacts, "_run", lambda *given: [value * 2 for value in real(*given)])
    with pytest.raises(ExportError, match="is not what the compressed network computes"):
        build(Recipe((), "torch"), workload, tmp_path / "b")
