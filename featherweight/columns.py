"""Inputs that are no arrays in a file: Parquet, and folders of images. And outputs as Parquet.

    inputs.parquet    or a folder of such files, read in the order of their names; a column for each input
    images/           a folder of images, at any depth, in the order of their paths; a function says what is read of one

Columns hold numbers, lists of one length (of such lists, …), or Arrow's tensors of one shape. Pictures differ in what a
network wants of them (size, crop, scale, order of channels), so that the user's function makes a row of each: it is
given a `PIL.Image` and returns one array, or a mapping from names to arrays. Rows are read as `arrays.InFile` reads
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featherweight.arrays import InFile, Rows
from featherweight.errors import DataError, TargetError

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
CHUNK = 1024  # rows of Parquet that are decoded at once
GROUP_BYTES = 8 << 20  # of a row group that is written
Prepare = Callable[[Any], Any]


class Input(Protocol):
    """Rows on disk, to be read once from the first to the last; see `arrays.InFile`."""

    specs: list[Rows]
    rows: int
    apart: bool  # whether it takes little to pass over rows, so that several may read parts of it side by side

    def __enter__(self) -> Input: ...

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        """Closes the files."""

    def read(self, places: Sequence[np.ndarray]) -> None:
        """Fills an array for each of `specs` with the rows that come next."""

    def skip(self, rows: int) -> None:
        """Passes over the next rows."""

    def finish(self) -> None:
        """Looks whether something is wrong behind the last row."""


def open_input(path: Path, prepare: Prepare | None = None) -> Input:
    """The rows in a file or folder, whatever kind it is.

    Args:
        prepare: for images.

    Raises:
        DataError: it cannot be read.
        TargetError: the library that reads it is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        return InParquet([path]) if path.suffix == ".parquet" else InFile(path)
    if files := sorted(path.glob("*.parquet")):
        return InParquet(files)
    pictures = sorted(place for place in path.rglob("*") if place.suffix.lower() in IMAGES)
    if not pictures:
        raise DataError(f"The folder {path} holds neither .parquet files nor images ({', '.join(IMAGES)}).")
    if prepare is None:
        raise DataError(
            f"{path} is a folder of images, and networks differ in what they read of one. Say it with --prepare "
            "FILE.py:NAME, a function that is given a PIL.Image and returns an array for one row."
        )
    return InImages(pictures, prepare)


# ------------------------------------------------------------------------------------------------ Parquet


class InParquet:
    """The columns of Parquet files, one file after the other.

    Raises:
        DataError: a file cannot be read, or holds what is no array.
        TargetError: pyarrow is not installed.
    """

    apart = True  # row groups that are passed over are not read

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._pq = list(files), parquet()
        self.specs: list[Rows] = []
        self.rows = 0
        self._groups: list[tuple[Path, int, int]] = []  # file, number in it, rows
        for path in self._files:
            with _in_our_words(path), self._pq.ParquetFile(path) as file:
                schema, about = file.schema_arrow, file.metadata
                counts = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
            specs = [_column(field, path) for field in schema]
            if self.specs and specs != self.specs:
                raise DataError(f"{path} has other columns than {self._files[0]}. Write them alike.")
            self.specs, self.rows = specs, self.rows + sum(counts)
            self._groups += [(path, number, count) for number, count in enumerate(counts) if count]
        self._left: list[np.ndarray] = [np.empty((0, *spec.shape), spec.dtype) for spec in self.specs]
        self._pieces: Iterator[list[np.ndarray]] = iter(())
        self._at = self._inside = 0  # the row group that comes next, and rows of the one before that were not taken

    def __enter__(self) -> InParquet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open but the row group that is being read, which goes with this."""
        self._pieces = iter(())

    def read(self, places: Sequence[np.ndarray]) -> None:
        """Fills `places` with the rows that come next.

        Raises:
            DataError: there are none, or they cannot be decoded.
        """
        done, wanted = 0, len(places[0])
        while done < wanted:
            taken = self._take(wanted - done)
            for place, array in zip(places, taken, strict=True):
                place[done : done + len(array)] = array
            done += len(taken[0])

    def skip(self, rows: int) -> None:
        """Passes over the next rows; of those a row group holds alone, nothing is read."""
        while rows:
            if not self._inside and self._at < len(self._groups) and self._groups[self._at][2] <= rows:
                rows -= self._groups[self._at][2]
                self._at += 1
            else:
                rows -= len(self._take(rows)[0])

    def finish(self) -> None:
        """Each page is checked as it is decoded: nothing is left to look at."""

    def _take(self, most: int) -> list[np.ndarray]:
        if not self._inside:
            if self._at == len(self._groups):
                raise DataError(f"{self._files[-1]} ends before the rows that it announces. Write it anew.")
            self._pieces, self._inside = self._decoded(*self._groups[self._at][:2]), self._groups[self._at][2]
            self._at += 1
        if not len(self._left[0]):
            piece = next(self._pieces, None)
            if piece is None:
                raise DataError(f"{self._groups[self._at - 1][0]} has fewer rows than it announces. Write it anew.")
            self._left = piece
        taken, self._left = [a[:most] for a in self._left], [a[most:] for a in self._left]
        self._inside -= len(taken[0])
        return taken

    def _decoded(self, path: Path, group: int) -> Iterator[list[np.ndarray]]:
        with _in_our_words(path), self._pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK, row_groups=[group]):
                yield [_array(batch.column(i), spec, path) for i, spec in enumerate(self.specs)]


def parquet() -> Any:
    """The library that reads and writes it.

    Raises:
        TargetError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TargetError(
            "Parquet is read and written by pyarrow, which is not installed. Install it with: pip install "
            "'featherweight[parquet]'."
        ) from error
    return pyarrow.parquet


class _in_our_words:
    """What pyarrow or the system says about a file, said by us."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        import pyarrow

        if isinstance(error, (pyarrow.ArrowException, OSError)):
            raise DataError(
                f"{self._path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}. Write it anew, or "
                "fetch it again."
            ) from error


def _column(field: Any, path: Path) -> Rows:
    """What one row of a column is."""
    import pyarrow as pa

    kind, shape = field.type, []
    if isinstance(kind, pa.FixedShapeTensorType):
        kind, shape = kind.value_type, list(kind.shape)
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"Column {field.name!r} of {path} holds {field.type}, which is no array. Write numbers, lists of one "
            "length, or Arrow's tensors of one shape (pyarrow.FixedShapeTensorArray)."
        )
    return Rows(field.name, tuple(shape), np.dtype(kind.to_pandas_dtype()).str)


def _array(column: Any, spec: Rows, path: Path) -> np.ndarray:
    """A column's rows."""
    import pyarrow as pa

    values, rows = column, len(column)
    if isinstance(values.type, pa.FixedShapeTensorType):
        values = _without_nulls(values.storage, spec, path).flatten()
    while pa.types.is_fixed_size_list(values.type):
        values = _without_nulls(values, spec, path).flatten()
    flat = _without_nulls(values, spec, path).to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.astype(spec.dtype, copy=False)).reshape(rows, *spec.shape)


def _without_nulls(values: Any, spec: Rows, path: Path) -> Any:
    if values.null_count:
        raise DataError(
            f"Column {spec.name!r} of {path} has {values.null_count} nulls. Leave such rows out, or fill them."
        )
    return values


def write_parquet(arrays: Mapping[str, Path], path: Path) -> None:
    """Arrays in `.npy` files as the columns of one Parquet file, a row group at a time."""
    import pyarrow as pa

    pq, found = parquet(), {name: np.load(file, mmap_mode="r") for name, file in arrays.items()}
    rows = len(next(iter(found.values())))
    step = max(1, GROUP_BYTES * rows // max(1, sum(array.nbytes for array in found.values())))
    writer = None
    try:
        for begin in range(0, rows, step):
            columns = {name: _arrow(np.ascontiguousarray(array[begin : begin + step])) for name, array in found.items()}
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _arrow(array: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(array) if array.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(array)


# ------------------------------------------------------------------------------------------------ images


class InImages:
    """Images, each made a row by the user's function.

    Raises:
        DataError: one cannot be decoded, or rows differ in shape.
        TargetError: Pillow is not installed.
    """

    apart = True  # an image that is passed over is not read

    def __init__(self, files: Sequence[Path], prepare: Prepare) -> None:
        self._files, self._prepare, self._at = list(files), prepare, 0
        first = self._row(self._files[0])
        self.rows = len(self._files)
        self.specs = [Rows(name, array.shape, array.dtype.str) for name, array in first.items()]

    def __enter__(self) -> InImages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open."""

    def read(self, places: Sequence[np.ndarray]) -> None:
        """Fills `places` with the rows that come next.

        Raises:
            DataError: an image cannot be decoded, or its row has another shape than the first.
        """
        for number in range(len(places[0])):
            path = self._files[self._at]
            row = self._row(path)
            found = [Rows(name, array.shape, array.dtype.str) for name, array in row.items()]
            if found != self.specs:
                raise DataError(
                    f"The row of {path} is {_said(found)}, that of {self._files[0]} {_said(self.specs)}. Let the "
                    "function return one shape for all images."
                )
            for place, array in zip(places, row.values(), strict=True):
                place[number] = array
            self._at += 1

    def skip(self, rows: int) -> None:
        """Passes over the next images, unread."""
        self._at += rows

    def finish(self) -> None:
        """Nothing follows the last image."""

    def _row(self, path: Path) -> dict[str, np.ndarray]:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise TargetError(
                "Images are read by Pillow, which is not installed: pip install 'featherweight[images]'."
            ) from error
        try:
            with Image.open(path) as image:
                image.load()
                found = self._prepare(image)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}. Mend it, or leave it out.") from error
        except Exception as error:
            raise DataError(f"The function for images raised {type(error).__name__} on {path}: {error}") from error
        rows = dict(found) if isinstance(found, Mapping) else {"image": found}
        return {name: np.asarray(array) for name, array in rows.items()}


def _said(specs: Sequence[Rows]) -> str:
    return json.dumps({spec.name: f"{np.dtype(spec.dtype)} {spec.shape}" for spec in specs})
