from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from featherweight import outputs
from featherweight.arrays import Rows
from featherweight.errors import DataError
from featherweight.outputs import OutFile

X = np.arange(30, dtype=np.float32).reshape(10, 3)
LABELS = np.arange(10)[::-1].copy()
SPECS = [Rows("output0", (3,), "<f4"), Rows("output1", (), "<i8")]


def test_rows_are_written_in_any_order(tmp_path):
    path = tmp_path / "out.npz"
    with OutFile(path, SPECS, 10, "key") as file:
        for begin, end in [(6, 10), (0, 2), (2, 6)]:
            assert not path.exists()
            file.write(begin, [X[begin:end], LABELS[begin:end]])
        file.finish()
    with np.load(path) as found:
        assert np.array_equal(found["output0"], X) and np.array_equal(found["output1"], LABELS)
    assert list(tmp_path.iterdir()) == [path]


def test_a_single_output_needs_no_archive(tmp_path):
    with OutFile(tmp_path / "out.npy", SPECS[:1], 10, "key") as file:
        file.write(0, [X])
        file.finish()
    assert np.array_equal(np.load(tmp_path / "out.npy"), X)


def test_what_is_missing_is_noticed(tmp_path):
    with OutFile(tmp_path / "out.npz", SPECS[:1], 10, "key") as file:
        file.write(2, [X[2:]])
        with pytest.raises(DataError, match=r"rows \[\(0, 2\)\] are missing"):
            file.finish()
    assert not (tmp_path / "out.npz").exists()


def test_what_was_written_is_there_after_an_interruption(tmp_path):
    with OutFile(tmp_path / "out.npz", SPECS[:1], 10, "key") as file:
        file.write(2, [X[2:5]])
    with OutFile(tmp_path / "out.npz", SPECS[:1], 10, "key") as file:
        assert file.left() == [(0, 2), (5, 10)]
        file.write(0, [X[:2]])
        file.write(5, [X[5:]])
        file.finish()
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["output0"], X)
    with pytest.raises(DataError, match="exists already"):
        OutFile(tmp_path / "out.npz", SPECS[:1], 10, "other")


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    with OutFile(tmp_path / "out.npz", SPECS[:1], 10, "key"):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_another_key_begins_anew(tmp_path):
    with OutFile(tmp_path / "out.npz", SPECS[:1], 10, "key") as file:
        file.write(2, [X[2:5]])
    with OutFile(tmp_path / "out.npz", SPECS[:1], 10, "other") as file:
        assert file.left() == [(0, 10)]


def test_what_did_not_reach_the_disk_is_not_noted(tmp_path, monkeypatch):
    """A process that is killed leaves only rows that it noted, and notes them after they are on disk."""
    monkeypatch.setattr(outputs, "COMMIT_S", 0.0)
    file = OutFile(tmp_path / "out.npz", SPECS[:1], 10, "key")
    file.write(0, [X[:4]])
    monkeypatch.setattr(outputs, "COMMIT_S", 1e9)
    file.write(4, [X[4:6]])
    file._stack.close()  # as a kill would, without a last note
    journal = tmp_path / "out.npz.key.partial" / "done"
    journal.write_bytes(journal.read_bytes() + b"half")
    with OutFile(tmp_path / "out.npz", SPECS[:1], 10, "key") as again:
        assert again.left() == [(4, 10)]


def test_two_do_not_write_the_same_file(tmp_path):
    first = OutFile(tmp_path / "out.npz", SPECS, 10, "key")
    with first, pytest.raises(DataError, match="is being written by another process"):
        OutFile(tmp_path / "out.npz", SPECS, 10, "key")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.csv", "Give it the ending .npz"),
        ("out.npy", "holds one array, but there are 2 outputs"),
        ("file/out.npz", "cannot be written: Not a directory"),
    ],
)
def test_places_that_do_not_do_are_refused(name, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=message):
        OutFile(tmp_path / name, SPECS, 10, "key")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Sixteen times the rows, the same peak: within a few MB, which the allocator keeps."""
    script = """
import sys
from pathlib import Path
import numpy as np
from featherweight.arrays import InFile
from featherweight.outputs import OutFile
with InFile(Path(sys.argv[1])) as file, OutFile(Path(sys.argv[2]), file.specs, file.rows, "key") as out:
    place = np.empty((64, *file.specs[0].shape), np.float32)
    for begin in range(0, file.rows, 64):
        file.read([place])
        out.write(begin, [place])
    file.finish()
    out.finish()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    peaks = []
    for rows in (1024, 16384):
        path = tmp_path / f"{rows}.npz"
        np.savez(path, x=np.zeros((rows, 1024), np.float32))
        command = [sys.executable, "-c", script, path, tmp_path / f"{rows}.out.npz"]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 16_000, peaks  # kB; the larger file has 67,000 of them
