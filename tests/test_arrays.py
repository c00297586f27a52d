from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from featherweight.arrays import InFile
from featherweight.errors import DataError

X = np.arange(30, dtype=np.float32).reshape(10, 3)
LABELS = np.arange(10)[::-1].copy()


def read(path: Path, counts: list[int]) -> list[np.ndarray]:
    """All rows of a file, so many at a time."""
    with InFile(path) as file:
        parts = []
        for count in counts:
            places = [np.empty((count, *spec.shape), spec.dtype) for spec in file.specs]
            file.read(places)
            parts.append(places)
        file.finish()
    return [np.concatenate(found) for found in zip(*parts, strict=True)]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_rows_of_an_archive_come_as_they_were_written(write, tmp_path):
    write(tmp_path / "in.npz", x=X, labels=LABELS)
    x, labels = read(tmp_path / "in.npz", [4, 1, 5])
    assert np.array_equal(x, X) and np.array_equal(labels, LABELS)
    assert (x.dtype, labels.dtype) == (X.dtype, LABELS.dtype)


def test_a_single_array_needs_no_archive(tmp_path):
    np.save(tmp_path / "in.npy", X)
    (found,) = read(tmp_path / "in.npy", [10])
    assert np.array_equal(found, X)


def test_rows_are_passed_over(tmp_path):
    np.savez(tmp_path / "in.npz", x=X)
    with InFile(tmp_path / "in.npz") as file:
        file.skip(7)
        place = np.empty((3, 3), np.float32)
        file.read([place])
        file.finish()
    assert np.array_equal(place, X[7:])


def damaged(path: Path) -> None:
    """One byte of the last array is another."""
    content = bytearray(path.read_bytes())
    at = content.rindex(X[9].tobytes())
    content[at] ^= 1
    path.write_bytes(content)


def of_objects(path: Path) -> None:
    np.savez(path, x=np.array([{}, {}], dtype=object))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def announces_more(path: Path) -> None:
    np.save(path.with_suffix(".npy"), X)
    content = path.with_suffix(".npy").read_bytes().replace(b"(10, 3)", b"(99, 3)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "'x' in .* is damaged: Bad CRC-32"),
        (of_objects, "dtype object, which no network reads"),
        (cut_off, "is no archive of arrays: File is not a zip file"),
        (announces_more, "ends before the 99 rows of 'x' that it announces"),
        (lambda path: np.savez(path, x=X, y=X[:3]), "'y' has 3 rows, 'x' 10"),
        (lambda path: np.savez(path, x=np.float32(3)), r"has shape \(\): the first dimension must count"),
        (lambda path: np.savez(path, x=np.asfortranarray(X)), "column by column"),
        (lambda path: np.savez(path), "holds 0 arrays"),
        (lambda path: path.unlink(), "There is no file"),
        (lambda path: path.unlink() or path.mkdir(), "cannot be read: Is a directory"),
    ],
)
def test_bad_files_are_refused_with_a_reason(spoil, message, tmp_path):
    path = tmp_path / "in.npz"
    np.savez(path, x=X)
    spoil(path)
    with pytest.raises(DataError, match=message):
        read_through(path)


def read_through(path):
    with InFile(path) as file:
        file.skip(file.rows)
        file.finish()


def test_an_unknown_ending_is_refused(tmp_path):
    (tmp_path / "in.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"in.csv is no file of arrays. It must be .npz or .npy"):
        InFile(tmp_path / "in.csv")
