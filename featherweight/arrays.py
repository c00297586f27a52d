"""Arrays in files, read a few rows at a time, however large they are: what a network is given.

    inputs.npz     an archive of arrays, as `numpy.savez` and `savez_compressed` write it
    inputs.npy     a single one

Rows are what the first dimension counts; all arrays of a file have as many. Nothing is unpickled, no length is believed
before it was compared with what the file holds, and memory is what the caller provides. Other kinds of file are in
`columns`; what is written, in `outputs`. Which network reads the rows is not known here.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from featherweight.errors import DataError

MOST_ARRAYS = 1000
LARGEST_HEADER = 10_000  # characters, NumPy's own limit for what it has no reason to trust
PIECE = 4 << 20  # bytes that are read at once where rows are only checked
DAMAGED = (OSError, EOFError, zipfile.BadZipFile, zlib.error)
WRITTEN_ARE = "It must be .npz or .npy, as numpy.savez and numpy.save write them."


@dataclass(frozen=True)
class Rows:
    """An array without its number of rows.

    Args:
        name: in the archive; for a single array that of the file.
        shape: of one row.
        dtype: as NumPy writes it, with its byte order (`<f4`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of one row.

        >>> Rows("x", (3, 2), "<f4").bytes
        24
        """
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class InFile:
    """The arrays of a file, to be read once from the first row to the last. A context manager, which closes it.

    Raises:
        DataError: it is no such file, or holds what only unpickling could read; the message says what.
    """

    apart = False  # rows that are passed over are read all the same: see `columns.Input`

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        try:
            streams = self._opened()
            heads = [self._head(name, stream) for name, stream in streams]
        except BaseException:
            self._stack.close()
            raise
        self._streams = [stream for _, stream in streams]
        self.specs = [Rows(name, shape[1:], dtype) for (name, _), (shape, dtype) in zip(streams, heads, strict=True)]
        self.rows = heads[0][0][0]
        for spec, (shape, _) in zip(self.specs, heads, strict=True):
            if shape[0] != self.rows:
                self.close()
                raise DataError(
                    f"In {self.path} {spec.name!r} has {shape[0]} rows, {self.specs[0].name!r} {self.rows}: the first "
                    "dimension counts examples, and must be the same in all arrays. Write the file anew."
                )

    def __enter__(self) -> InFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._stack.close()

    def read(self, places: Sequence[np.ndarray]) -> None:
        """Fills `places`, an array for each of the file's with as many rows, with those that come next.

        Raises:
            DataError: the file ends before, or is damaged.
        """
        for spec, stream, place in zip(self.specs, self._streams, places, strict=True):
            self._fill(spec, stream, memoryview(place).cast("B"))  # type: ignore[arg-type]

    def skip(self, rows: int) -> None:
        """Passes over the next rows, which are read all the same: an archive's digest is that of all of them.

        Raises:
            DataError: as `read`.
        """
        for spec, stream in zip(self.specs, self._streams, strict=True):
            left, piece = rows * spec.bytes, bytearray(PIECE)
            while left:
                part = memoryview(piece)[: min(left, PIECE)]
                self._fill(spec, stream, part)
                left -= len(part)

    def finish(self) -> None:
        """Looks behind the last row, where an archive's own checksum is compared.

        Raises:
            DataError: it is another one, or something follows.
        """
        for spec, stream in zip(self.specs, self._streams, strict=True):
            if self._got(spec, stream, memoryview(bytearray(1))):
                raise DataError(f"In {self.path} something follows the last row of {spec.name!r}. Write the file anew.")

    def _opened(self) -> list[tuple[str, IO[bytes]]]:
        try:
            if self.path.suffix == ".npy":
                return [(self.path.stem, self._stack.enter_context(self.path.open("rb")))]
            if self.path.suffix != ".npz":
                raise DataError(f"{self.path} is no file of arrays. {WRITTEN_ARE}")
            archive = self._stack.enter_context(zipfile.ZipFile(self.path))
            items = [item for item in archive.infolist() if item.filename.endswith(".npy")]
            if not 1 <= len(items) <= MOST_ARRAYS:
                raise DataError(f"{self.path} holds {len(items)} arrays, where 1 to {MOST_ARRAYS} are possible.")
            return [(item.filename[:-4], self._stack.enter_context(archive.open(item))) for item in items]
        except FileNotFoundError as error:
            raise DataError(f"There is no file {self.path}. {WRITTEN_ARE}") from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}. Make it readable.") from error
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{self.path} is no archive of arrays: {error}. {WRITTEN_ARE}") from error

    def _head(self, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], str]:
        """The shape and the dtype that an array's header tells."""
        from numpy.lib import format as npy

        try:
            version = npy.read_magic(stream)
            reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, in_columns, dtype = reader(stream, LARGEST_HEADER)
        except DAMAGED as error:
            raise self._damage(name, error) from error
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{name!r} in {self.path} is no array: {reason}. {WRITTEN_ARE}") from error
        if dtype.hasobject or dtype.kind not in "fiub":
            raise DataError(
                f"{name!r} in {self.path} has dtype {dtype}, which no network reads. Convert it to numbers, and write "
                "the file anew."
            )
        if not shape or not all(shape[1:]):
            raise DataError(
                f"{name!r} in {self.path} has shape {shape}: the first dimension must count examples, and none of the "
                "others may be 0."
            )
        if in_columns and len(shape) > 1:
            raise DataError(
                f"{name!r} in {self.path} is stored column by column, so that its rows cannot be read one after the "
                "other. Write np.ascontiguousarray of it."
            )
        return shape, dtype.str

    def _fill(self, spec: Rows, stream: IO[bytes], place: memoryview) -> None:
        done = 0
        while done < len(place):
            count = self._got(spec, stream, place[done:])
            if not count:
                raise DataError(
                    f"{self.path} ends before the {self.rows} rows of {spec.name!r} that it announces. Write it anew, "
                    "or fetch it again."
                )
            done += count

    def _got(self, spec: Rows, stream: IO[bytes], place: memoryview) -> int:
        try:
            return int(stream.readinto(place))  # type: ignore[attr-defined]  # both kinds of stream have it
        except DAMAGED as error:
            raise self._damage(spec.name, error) from error

    def _damage(self, name: str, error: Exception) -> DataError:
        return DataError(f"{name!r} in {self.path} is damaged: {error}. Write the file anew, or fetch it again.")
