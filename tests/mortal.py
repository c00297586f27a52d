"""The gratings; but a process that learns from them dies once, by SIGKILL, where the file that MORTAL names exists."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import gratings
from torch import Tensor

from featherweight import Workload

FATAL = 3  # the batch that kills


class Batches:
    def __init__(self, batches: list[tuple[Tensor, ...]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for number, batch in enumerate(self.batches):
            flag = Path(os.environ["MORTAL"])
            if number == FATAL and flag.exists():
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def workload() -> Workload:
    found = gratings.workload()
    return dataclasses.replace(found, train=Batches(list(found.train)))
