from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featherweight.arrays import InFile
from featherweight.columns import CHUNK, Input, open_input, write_parquet
from featherweight.errors import DataError

ROWS = 3 * CHUNK // 2
X = np.random.default_rng(0).normal(size=(ROWS, 2, 3)).astype(np.float32)
LABELS = np.arange(ROWS, dtype=np.int64)


def parquet(path: Path, *, group: int = 700, lists: bool = False, rows: slice = slice(None)) -> Path:
    """X and LABELS as columns: X as Arrow's tensors, or as lists of lists."""
    x = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(X[rows]))
    if lists:
        flat = pa.array(np.ascontiguousarray(X[rows]).reshape(-1))
        x = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 3), 2)
    pq.write_table(pa.table({"x": x, "label": pa.array(LABELS[rows])}), path, row_group_size=group)
    return path


def read(file: Input, counts: list[int]) -> list[np.ndarray]:
    """Rows from where the file stands, so many at a time."""
    parts = []
    for count in counts:
        places = [np.empty((count, *spec.shape), spec.dtype) for spec in file.specs]
        file.read(places)
        parts.append(places)
    return [np.concatenate(found) for found in zip(*parts, strict=True)]


@pytest.mark.parametrize("lists", [False, True])
def test_columns_come_as_they_were_written(lists, tmp_path):
    with open_input(parquet(tmp_path / "in.parquet", lists=lists)) as file:
        assert [(spec.name, spec.shape, spec.dtype) for spec in file.specs] == [
            ("x", (2, 3), "<f4"),
            ("label", (), "<i8"),
        ]
        x, labels = read(file, [5, 1000, ROWS - 1005])
        file.finish()
    assert np.array_equal(x, X) and np.array_equal(labels, LABELS)


@pytest.mark.parametrize("skipped", [1, 699, 700, 701, 1400, ROWS - 1])
def test_rows_of_columns_are_passed_over(skipped, tmp_path):
    with open_input(parquet(tmp_path / "in.parquet")) as file:
        file.skip(skipped)
        _, labels = read(file, [ROWS - skipped])
    assert np.array_equal(labels, LABELS[skipped:])


def test_row_groups_that_are_passed_over_are_not_read(tmp_path):
    path = parquet(tmp_path / "in.parquet")
    content = bytearray(path.read_bytes())
    content[4:5000] = bytes(4996)  # of the first group
    path.write_bytes(content)
    with open_input(path) as file:
        file.skip(700)
        _, labels = read(file, [ROWS - 700])
        assert np.array_equal(labels, LABELS[700:])
    with open_input(path) as file, pytest.raises(DataError, match=r"in\.parquet cannot be read as Parquet"):
        read(file, [700])


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    parquet(tmp_path / "b.parquet", rows=slice(100, None))
    parquet(tmp_path / "a.parquet", rows=slice(0, 100))
    with open_input(tmp_path) as file:
        assert file.rows == ROWS
        x, _ = read(file, [ROWS])
    assert np.array_equal(x, X)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", "b"]), "Column 'x' of .*in.parquet holds string, which is no array"),
        (pa.array([[1.0], [1.0, 2.0]]), "Column 'x' of .*in.parquet holds list<.*>, which is no array"),
        (pa.array([1.0, None]), "Column 'x' of .*in.parquet has 1 nulls"),
    ],
)
def test_columns_that_are_no_arrays_are_refused(column, message, tmp_path):
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=message), open_input(tmp_path / "in.parquet") as file:
        read(file, [2])


def test_other_columns_in_another_file_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table({"y": [1.0]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet has other columns than .*a.parquet"):
        open_input(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, but long enough to hold a footer"])
def test_what_is_no_parquet_is_refused(content, tmp_path):
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"in.parquet cannot be read as Parquet"):
        open_input(tmp_path / "in.parquet")


def test_arrays_are_written_as_columns(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "label.npy", LABELS)
    write_parquet({"x": tmp_path / "x.npy", "label": tmp_path / "label.npy"}, tmp_path / "out.parquet")
    with open_input(tmp_path / "out.parquet") as file:
        x, labels = read(file, [ROWS])
    assert np.array_equal(x, X) and np.array_equal(labels, LABELS)


def pictures(folder: Path) -> list[np.ndarray]:
    """Four images in two folders, in the order in which they are read."""
    found = []
    for number, name in enumerate(["a/0.png", "a/1.PNG", "b.png", "c.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found.append(np.full((4, 5, 3), number, np.uint8))
        Image.fromarray(found[-1]).save(path)
    (folder / "notes.txt").touch()
    return found


def prepare(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def test_images_become_rows(tmp_path):
    wanted = np.stack(pictures(tmp_path)).astype(np.float32) / 255
    with open_input(tmp_path, prepare) as file:
        assert file.rows == 4
        file.skip(1)
        (found,) = read(file, [2, 1])
        file.finish()
    assert np.array_equal(found, wanted[1:])


def test_an_image_that_is_damaged_is_named(tmp_path):
    pictures(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    with open_input(tmp_path, prepare) as file, pytest.raises(DataError, match=r"b.png cannot be read as an image"):
        read(file, [4])


def test_images_of_several_shapes_are_refused(tmp_path):
    pictures(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    with open_input(tmp_path, prepare) as file, pytest.raises(DataError, match=r"The row of .*b.png is .*\(9, 9, 3\)"):
        read(file, [4])


def test_what_the_function_raises_is_said_with_the_image(tmp_path):
    pictures(tmp_path)

    def picky(image: Image.Image) -> np.ndarray:
        raise KeyError("mode")

    with pytest.raises(DataError, match=r"The function for images raised KeyError on .*0.png: 'mode'"):
        open_input(tmp_path, picky)


def test_images_need_a_function(tmp_path):
    pictures(tmp_path)
    with pytest.raises(DataError, match="Say it with --prepare"):
        open_input(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds neither \.parquet files nor images"):
        open_input(tmp_path)


def test_other_files_are_arrays(tmp_path):
    np.save(tmp_path / "in.npy", X)
    with open_input(tmp_path / "in.npy") as file:
        assert isinstance(file, InFile) and file.rows == ROWS
