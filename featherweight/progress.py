"""What a long run says of itself, and where its time goes. How it looks on a terminal is `cli`'s affair."""

from __future__ import annotations

import re
import time
from pathlib import Path


class Progress:
    """What a long run says of itself; this one keeps silent."""

    def line(self, text: str) -> None:
        """Something is done."""

    def stage(self, text: str) -> None:
        """Something begins."""

    def count(self, done: int, total: int) -> None:
        """So many trials are done of about so many."""

    def saved(self, folder: Path) -> None:
        """The files of the search in `folder` say what is known so far."""

    def close(self) -> None:
        """There is no more to say."""


class Stopwatch:
    """Seconds by stage; a stage lasts until the next one begins."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._stage, self._begin = progress, "", 0.0

    def __call__(self, text: str) -> None:
        """The stage `2/4 distill_soft` or `export to openvino` begins; an empty text only ends the last one."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._begin, 3)
        self._stage, self._begin = re.sub(r"^\d+/\d+ | to \w+$", "", text), now
        if text:
            self._progress.stage(text)
