"""What pools are given to do in tests; a module of its own, so that a process that does it has little to load."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def about_me(number: int) -> tuple[int, int, tuple[int, ...]]:
    time.sleep(0.1)
    return number, os.getpid(), tuple(sorted(os.sched_getaffinity(0)))


def die(flag: Path | None) -> str:
    """Once where the file is new, else always."""
    if flag is None or not flag.exists():
        if flag is not None:
            flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def full() -> None:
    raise OSError(28, "No space left", "/there")


def hang(flag: Path) -> None:
    flag.write_text(str(os.getpid()))
    time.sleep(100)
