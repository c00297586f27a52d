"""The torch target reads data only: archives that would unpickle or evaluate something are refused."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.artifact import build
from featherweight.errors import ArtifactError, ExportError
from featherweight.recipe import Recipe
from featherweight.targets.torch import _is_size, check_archive
from featherweight.testing import networks
from featherweight.workload import Workload, outputs


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    example = (torch.randn(1, 4),)
    targets.find("torch").export(model, Workload(model, example, [example], lambda predict: 0.0), folder)
    return folder / "model.pt2"


def changed(archive: Path, tmp_path: Path, ending: str, edit) -> Path:
    """A copy of the archive in which the record whose name ends so was edited."""
    copy = tmp_path / "model.pt2"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(copy, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(item.filename, edit(data) if item.filename.endswith(ending) else data)
    return copy


def edited(change):
    """An edit of a JSON record by a function that is given the parsed value."""

    def edit(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return edit


def test_what_was_written_is_accepted_and_holds_no_pickle_and_no_source(archive):
    check_archive(archive)
    with zipfile.ZipFile(archive) as opened:
        assert all(item.file_size == 0 for item in opened.infolist() if "sample_inputs" in item.filename)
        (name,) = [name for name in opened.namelist() if name.endswith("models/model.json")]
        assert json.loads(opened.read(name))["guards_code"] == []


def test_files_do_not_tell_when_they_were_written(archive):
    with zipfile.ZipFile(archive) as opened:
        assert {item.date_time for item in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_pickled_inputs_are_refused(archive, tmp_path):
    bad = changed(archive, tmp_path, "sample_inputs/model.pt", lambda data: b"\x80\x04pickle")
    with pytest.raises(ArtifactError, match=r"contains .*sample_inputs/model\.pt, which would have to be unpickled"):
        check_archive(bad)


def test_pickled_weights_are_refused(archive, tmp_path):
    edit = lambda data: data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)  # noqa: E731
    with pytest.raises(ArtifactError, match="holds a pickled tensor"):
        check_archive(changed(archive, tmp_path, "model_weights_config.json", edit))


@pytest.mark.parametrize("key", ["target", "as_operator"])
@pytest.mark.parametrize(
    "call", ["os.system", "_operator.attrgetter", "_operator.methodcaller", "torch.ops.aten.from_file.default"]
)
def test_other_calls_are_refused(archive, tmp_path, call, key):
    def change(program):
        (relu,) = [n for n in program["graph_module"]["graph"]["nodes"] if n["target"] == "torch.ops.aten.relu.default"]
        if key == "target":
            relu["target"] = call
        else:
            relu["inputs"][0]["arg"] = {"as_operator": call}

    with pytest.raises(ArtifactError, match=f"calls '{call}'"):
        check_archive(changed(archive, tmp_path, "models/model.json", edited(change)))


@pytest.mark.parametrize("payload", ["opaque_obj_0", "custom_obj_0"])
def test_objects_among_constants_are_refused(archive, tmp_path, payload):
    def change(constants):
        constants["config"]["thing"] = {"path_name": payload, "is_param": False, "use_pickle": False}

    with pytest.raises(ArtifactError, match=f"reads '{payload}', which is no tensor"):
        check_archive(changed(archive, tmp_path, "model_constants_config.json", edited(change)))


def test_records_that_are_no_tensors_are_refused(archive, tmp_path):
    bad = changed(archive, tmp_path, "none", bytes)
    with zipfile.ZipFile(bad, "a") as opened:
        opened.writestr("model/data/constants/opaque_obj_0", b"\x80\x04pickle")
    with pytest.raises(ArtifactError, match=r"contains 'model/data/constants/opaque_obj_0', which is neither tensor"):
        check_archive(bad)


def test_guards_are_refused(archive, tmp_path):
    edit = edited(lambda program: program.update(guards_code=["L['x'].size()[0] <= 8"]))
    with pytest.raises(ArtifactError, match="holds source code, as guards"):
        check_archive(changed(archive, tmp_path, "models/model.json", edit))


def test_names_of_inputs_that_are_source_are_refused(archive, tmp_path):
    def change(program):
        (entry,) = [e for e in program["graph_module"]["module_call_graph"] if e["fqn"] == ""]
        version, spec = json.loads(entry["signature"]["in_spec"])
        spec["children_spec"][1]["context"] = json.dumps(["x=__import__('os').system('true')"])
        entry["signature"]["in_spec"] = json.dumps([version, spec])

    with pytest.raises(ArtifactError, match='has the text "x=__import__'):
        check_archive(changed(archive, tmp_path, "models/model.json", edited(change)))


def test_sizes_that_are_code_are_refused(archive, tmp_path):
    def edit(data: bytes) -> bytes:
        program = json.dumps(json.loads(data))
        assert "Symbol('s" in program
        return program.replace("Symbol('s", "__import__('os').system('s", 1).encode()

    with pytest.raises(ArtifactError, match="has the size"):
        check_archive(changed(archive, tmp_path, "models/model.json", edit))


@pytest.mark.parametrize(
    "size",
    [
        "Pow(Integer(9), Integer(9))",
        "Mul(Integer(2), Symbol('s77', positive=exit()))",
        "9**9**9",
        "Add(Integer(1), Symbol)",
        "Mul(@, @)" * 2,
        f"Integer({10**20})",
        "Add(" * 60 + "Integer(1)" + ")" * 60,
    ],
)
def test_sizes_are_a_closed_language(size):
    assert not _is_size(size)


def test_garbage_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="it cannot be read"):
        check_archive(tmp_path / "model.pt2")


class Function(nn.Module):
    """A function of a tensor and some layers, as a network."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.layers)


def under_no_grad(x: torch.Tensor, first: nn.Module, last: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        y = first(x)
        with torch.autocast("cpu", enabled=False):
            y = last(y) + y
    return y


def under_autocast(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x).float()


DERIVED_SIZES = {
    "reshape": Function(lambda x: x.reshape(x.shape[0] * 2, 4)),
    "repeat": Function(lambda x: x.repeat(3, 1)),
    "concatenation": Function(lambda x: torch.cat([x, x[:1]])),
    "maximum": Function(lambda x: x.sum() + x.new_zeros(max(x.shape[0], 2), 3)),
    "root": Function(lambda x: x / x.shape[0] ** 0.5),
    "pairs": Function(lambda x: (x[:, None] + x[None]).view(-1, 8)),
    "strided convolution": Function(
        lambda x: nn.functional.conv1d(x.T[None], torch.ones(4, 8, 2), stride=2, padding=2)[0].T.reshape(-1)
    ),
    "einsum": Function(lambda x: torch.einsum("bi,bj->bij", x, x)),
    "lstm": Function(lambda x, lstm: lstm(x[:, None])[0], nn.LSTM(8, 8, batch_first=True)),
    "flat view": Function(lambda x, layer: layer(x.view(-1, 4)).view(x.size(0), 2, 4), nn.Linear(4, 4)),
    "attention": Function(lambda x, layer: layer(x.view(-1, 2, 4)), nn.TransformerEncoderLayer(4, 2, 8)),
    "no_grad": Function(under_no_grad, nn.Linear(8, 8), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("name", DERIVED_SIZES)
def test_what_is_written_can_be_read(name, tmp_path):
    model = DERIVED_SIZES[name].eval()
    workload = Workload(model, (torch.randn(3, 8),), [], lambda predict: 0.0)
    runtime = targets.find("torch")
    runtime.export(model, workload, tmp_path)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8)
        found = runtime.load(tmp_path, threads=1)([x.numpy()])
        with torch.no_grad():
            wanted = outputs(model(x))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other)


class Answer(dict):
    """What a network of some library returns."""


def test_reading_needs_no_class_of_what_the_network_returns(tmp_path):
    from torch.utils import _pytree

    _pytree.register_pytree_node(
        Answer,
        lambda answer: (list(answer.values()), list(answer)),
        lambda values, keys: Answer(zip(keys, values, strict=True)),
        serialized_type_name="some.library.Answer",
    )
    model, x = Function(lambda x: Answer(twice=2 * x, sum=x.sum(1))).eval(), torch.randn(3, 8)
    runtime = targets.find("torch")
    runtime.export(model, Workload(model, (x,), [], lambda predict: 0.0), tmp_path)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        assert not any(b"Answer" in archive.read(name) for name in archive.namelist())
    twice, total = runtime.load(tmp_path, threads=1)([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(twice), 2 * x)
    torch.testing.assert_close(torch.from_numpy(total), x.sum(1))


def test_what_could_not_be_read_is_not_written(tmp_path):
    model = Function(under_autocast, nn.Linear(8, 8)).eval()
    workload = Workload(model, (torch.randn(3, 8),), [], lambda predict: 0.0)
    with pytest.raises(ExportError, match=r"calls '.*wrap_with_autocast'\. Replace .* take torch\.autocast out"):
        targets.find("torch").export(model, workload, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_process_finds_the_operators_that_a_program_names(tmp_path):
    build(Recipe.from_yaml("steps: [quantize_static]\ntarget: torch"), networks()["mlp"], tmp_path / "artifact")
    script = (
        "import sys, pathlib\nfrom featherweight.targets.torch import positional\npositional(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, tmp_path / "artifact" / "model.pt2"]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


def test_threads_are_as_before(archive):
    before = torch.get_num_threads()
    runtime, inputs = targets.find("torch"), [torch.randn(1, 4).numpy()]
    runtime.load(archive.parent, before + 1)(inputs)
    assert torch.get_num_threads() == before
    runtime.profile(archive.parent, inputs, before + 1)
    assert torch.get_num_threads() == before


def test_an_archive_of_another_version_is_refused_with_what_to_do(archive, tmp_path):
    def renamed(data: bytes) -> bytes:
        assert b"torch.ops.aten.linear.default" in data
        return data.replace(b"torch.ops.aten.linear.default", b"torch.ops.aten.linear.of_old")

    old = changed(archive, tmp_path, "models/model.json", renamed)
    check_archive(old)
    with pytest.raises(ArtifactError, match=r"cannot read .* another version of torch or Featherweight\. Export"):
        targets.find("torch").load(old.parent, threads=1)
