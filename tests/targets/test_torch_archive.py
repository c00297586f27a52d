"""The torch target reads data only: archives that would unpickle or evaluate something are refused."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.errors import ArtifactError
from featherweight.targets.torch import check_archive
from featherweight.workload import Workload


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


def test_what_was_written_is_accepted_and_holds_no_pickle(archive):
    check_archive(archive)
    with zipfile.ZipFile(archive) as opened:
        assert all(item.file_size == 0 for item in opened.infolist() if "sample_inputs" in item.filename)


def test_pickled_inputs_are_refused(archive, tmp_path):
    bad = changed(archive, tmp_path, "sample_inputs/model.pt", lambda data: b"\x80\x04pickle")
    with pytest.raises(ArtifactError, match=r"contains .*sample_inputs/model\.pt, which would have to be unpickled"):
        check_archive(bad)


def test_pickled_weights_are_refused(archive, tmp_path):
    edit = lambda data: data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)  # noqa: E731
    with pytest.raises(ArtifactError, match="holds a pickled tensor"):
        check_archive(changed(archive, tmp_path, "model_weights_config.json", edit))


def test_other_calls_are_refused(archive, tmp_path):
    edit = lambda data: data.replace(b"torch.ops.aten.relu.default", b"os.system")  # noqa: E731
    with pytest.raises(ArtifactError, match=r"calls 'os\.system'"):
        check_archive(changed(archive, tmp_path, "models/model.json", edit))


def test_sizes_that_are_code_are_refused(archive, tmp_path):
    def edit(data: bytes) -> bytes:
        program = json.dumps(json.loads(data))
        assert "Symbol('s" in program
        return program.replace("Symbol('s", "__import__('os').system('s", 1).encode()

    with pytest.raises(ArtifactError, match="has the size"):
        check_archive(changed(archive, tmp_path, "models/model.json", edit))


def test_garbage_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="it cannot be read"):
        check_archive(tmp_path / "model.pt2")
