"""Arrays written to a file, rows in any order, in memory that does not depend on them: what a network returns.

    outputs.npz        an archive, as `numpy.load` reads it; `outputs.npy` holds a single array
    outputs.parquet    a column for each array

What is there so far lies in a folder beside the file until it is all of it: a run that was killed goes on from there.
Nothing that exists is overwritten, and two runs do not write the same file. What the rows are is not known here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from featherweight.arrays import PIECE, Rows
from featherweight.columns import parquet, write_parquet
from featherweight.errors import DataError

COMMIT_S = 5.0  # what a machine that loses its power may have to do again
RANGE = struct.Struct("<qq")


class OutFile:
    """Arrays that grow on disk, rows in any order, and take the name of `path` when all are there.

    Args:
        path: new, `.npz`, `.parquet`, or `.npy` for a single array.
        specs: of the arrays.
        rows: of each.
        key: of what is computed: a folder of the same key, left by a run that was killed, is gone on with.

    Raises:
        DataError: there is such a file already, it cannot be written, or another run is writing it.
    """

    def __init__(self, path: Path, specs: Sequence[Rows], rows: int, key: str) -> None:
        self.path, self.specs, self.rows = Path(path), list(specs), rows
        check_new(self.path, len(self.specs))
        self.folder = self.path.with_name(f"{self.path.name}.{key[:16]}.partial")
        self._stack = contextlib.ExitStack()
        self._starts: list[int] = []
        try:
            with self._in_our_words():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._journal = self._stack.enter_context((self.folder / "done").open("a+b"))
                self._only_one()
                self._files = [self._stack.enter_context(self._begun(spec)) for spec in self.specs]
                self.done = self._noted()
        except BaseException:
            self._stack.close()
            raise
        self._fresh: list[tuple[int, int]] = []
        self._committed = time.monotonic()

    def __enter__(self) -> OutFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._commit()
        if not self.done:  # nothing to go on with; while it is ours
            shutil.rmtree(self.folder, ignore_errors=True)
        self._stack.close()

    def left(self) -> list[tuple[int, int]]:
        """The ranges of rows that are not there yet, in order: first and behind the last."""
        return list(_between(self.done, self.rows))

    def write(self, begin: int, arrays: Sequence[np.ndarray]) -> None:
        """Puts the rows of `arrays` where they belong, from `begin` on.

        Raises:
            DataError: they cannot be written.
        """
        with self._in_our_words():
            for spec, file, start, array in zip(self.specs, self._files, self._starts, arrays, strict=True):
                file.seek(start + begin * spec.bytes)
                file.write(np.ascontiguousarray(array).data)
            self._fresh.append((begin, begin + len(arrays[0])))
            if time.monotonic() - self._committed > COMMIT_S:
                self._commit()

    def finish(self) -> None:
        """The file is there, whole; the folder is gone.

        Raises:
            DataError: rows are missing, or it cannot be written.
        """
        with self._in_our_words():
            self._commit()
            if self.left():
                raise DataError(f"{self.path} is not written, for rows {self.left()[:3]} are missing. Run it again.")
            whole = {".npz": self._archive, ".npy": self._single, ".parquet": self._parquet}[self.path.suffix]()
            check_new(self.path, len(self.specs))  # again: it may have come in the meantime
            whole.replace(self.path)
            _synced(self.path.parent)
        self._stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begun(self, spec: Rows) -> IO[bytes]:
        """A file with the header of an array, and as long as it will be."""
        from numpy.lib import format as npy

        path = self.folder / spec.name
        file = path.open("r+b" if path.exists() else "x+b")
        header = {"descr": spec.dtype, "fortran_order": False, "shape": (self.rows, *spec.shape)}
        npy.write_array_header_1_0(file, header)
        self._starts.append(file.tell())
        file.truncate(file.tell() + self.rows * spec.bytes)
        return file

    def _only_one(self) -> None:
        """Two that write the same file would undo what the other does."""
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{self.path} is being written by another process. Wait for it, or end it.") from error

    def _noted(self) -> list[tuple[int, int]]:
        """The ranges of rows that an earlier run wrote; half an entry at the end was never finished."""
        self._journal.seek(0)
        content = self._journal.read()
        found = [RANGE.unpack_from(content, at) for at in range(0, len(content) // RANGE.size * RANGE.size, RANGE.size)]
        return _joined((begin, end) for begin, end in found if 0 <= begin < end <= self.rows)

    def _commit(self) -> None:
        """What was written reaches the disk, and only then the note that it is there."""
        if self._fresh:
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
            self._journal.write(b"".join(RANGE.pack(*span) for span in _joined(self._fresh)))
            self._journal.flush()
            os.fsync(self._journal.fileno())
            self.done, self._fresh = _joined([*self.done, *self._fresh]), []
        self._committed = time.monotonic()

    def _single(self) -> Path:
        return self.folder / self.specs[0].name

    def _parquet(self) -> Path:
        path = self.folder / "whole"
        write_parquet({spec.name: self.folder / spec.name for spec in self.specs}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path

    def _archive(self) -> Path:
        """An archive of all arrays, stored as they are."""
        path = self.folder / "whole"
        with path.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for spec in self.specs:
                    source = self.folder / spec.name
                    with source.open("rb") as piece, archive.open(f"{spec.name}.npy", "w", force_zip64=True) as place:
                        shutil.copyfileobj(piece, place, PIECE)
            file.flush()
            os.fsync(file.fileno())
        return path

    @contextlib.contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written: {error.strerror or error}. Choose a place that may be written and has "
                "room."
            ) from error


def check_new(path: Path, arrays: int) -> None:
    """Refuses a path where outputs cannot be written, or where something lies already.

    Raises:
        DataError: it is so.
        TargetError: the library that writes it is not installed.
    """
    if path.suffix not in (".npz", ".npy", ".parquet"):
        raise DataError(
            f"Outputs cannot be written to {path}. Give it the ending .npz or .parquet, or .npy for a single output."
        )
    if path.suffix == ".parquet":
        parquet()
    if path.suffix == ".npy" and arrays > 1:
        raise DataError(f"{path} holds one array, but there are {arrays} outputs. Give it the ending .npz.")
    if path.exists() or path.is_symlink():
        raise DataError(f"{path} exists already, and is not overwritten. Choose another name, or remove it.")


def _joined(spans: Iterator[tuple[int, int]] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch as one.

    >>> _joined([(4, 6), (0, 2), (2, 3)])
    [(0, 3), (4, 6)]
    """
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _between(spans: Sequence[tuple[int, int]], rows: int) -> Iterator[tuple[int, int]]:
    """What ranges in order leave of all rows.

    >>> list(_between([(0, 3), (4, 6)], rows=8))
    [(3, 4), (6, 8)]
    """
    start = 0
    for begin, end in [*spans, (rows, rows)]:
        if begin > start:
            yield start, begin
        start = end


def _synced(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
