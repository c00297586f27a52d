"""What becomes of freed memory, where the C library is glibc; elsewhere nothing is changed.

glibc keeps small pieces for those who ask next, and gives large ones back at once. The one is too much where little
of what was held is needed again, the other too little where the same tensors are made over and over.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Inside the block, freed memory stays the process's: fresh pages for each tensor cost up to a fifth of a step."""
    if (glibc := _glibc()) is None:
        yield
        return
    glibc.mallopt(MMAP_MAX, 0)
    glibc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        glibc.mallopt(MMAP_MAX, 65536)
        glibc.mallopt(TRIM_THRESHOLD, 2**17)
        give_back()


def give_back() -> None:
    """Gives pages that nothing lies in back to the system, in milliseconds."""
    if (glibc := _glibc()) is not None:
        glibc.malloc_trim(0)
