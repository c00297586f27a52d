"""The job that torchrun started, and this process in it: what the processes of `distributed` send one another.

Processes talk through gloo, and through NCCL where tensors lie on GPUs, which was not run: two GPUs were not at hand.
What they compute is not known here. How those are found that train together is `processes`' affair.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from featherweight.errors import ProcessError, SettingError, TargetError

PATIENCE = timedelta(minutes=5)  # for what another process should send


@dataclass(frozen=True)
class Job:
    """This process among those that torchrun started.

    Args:
        rank: of this one, from 0.
        count: of all.
        device: that this one computes on, `cpu` or `cuda:1`, say.
    """

    rank: int
    count: int
    device: str

    def send(self, arrays: Sequence[np.ndarray], to: int) -> None:
        """Sends arrays to the process `to`, which must `receive` as many of the same sizes."""
        for array in arrays:
            if array.size:
                dist.send(_bytes(np.ascontiguousarray(array)), to)

    def receive(self, places: Sequence[np.ndarray], source: int) -> None:
        """Fills contiguous arrays with what the process `source` sends."""
        for place in places:
            if place.size:
                dist.recv(_bytes(place), source)

    def share(self, places: Sequence[np.ndarray]) -> None:
        """Contiguous arrays of process 0 become those of all."""
        for place in places:
            if place.size:
                dist.broadcast(_bytes(place), 0)

    def share_pairs(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pairs of whole numbers that process 0 names; what others give does not count."""
        size = np.array([len(pairs)], np.int64)
        self.share([size])
        values = np.array(pairs, np.int64).reshape(-1, 2) if self.rank == 0 else np.empty((int(size[0]), 2), np.int64)
        self.share([values])
        return [(int(begin), int(end)) for begin, end in values]


def _bytes(array: np.ndarray) -> torch.Tensor:
    """The memory of an array, whatever numbers it holds."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


@contextlib.contextmanager
def joined(device: str) -> Iterator[Job]:
    """The job, while it lasts.

    Raises:
        ProcessError: the others cannot be reached.
        SettingError: this process is part of none.
        TargetError: the device is not there.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise SettingError(
            "A split is among the processes of a job, and this is a single one. Start it with: torchrun "
            "--nproc-per-node 2 -m featherweight predict …, on each host."
        )
    backend, device = _place(device)
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {_short(error)} Look whether all were started, "
            "and whether a firewall keeps them apart."
        ) from error
    try:
        yield Job(dist.get_rank(), dist.get_world_size(), device)
    except RuntimeError as error:  # of gloo and NCCL, which have no class of their own for it
        raise ProcessError(
            f"Process {dist.get_rank()} of {dist.get_world_size()} could not go on: {_short(error)} Most likely "
            "another was lost: what it said is above, or in the log of its host. Start the job again, and it goes on."
        ) from error
    finally:
        dist.destroy_process_group()


def _place(device: str) -> tuple[str, str]:
    """The backend through which processes talk, and the device of this one."""
    if device == "cpu":
        return "gloo", device
    if device != "cuda":
        raise TargetError(f"Processes on {device} cannot be split from here, only such on cpu or cuda.")
    from featherweight.devices import count

    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= count(device):
        raise TargetError(f"Process {number} of this host has no GPU of its own: there are {count(device)}.")
    torch.cuda.set_device(number)
    return "cpu:gloo,cuda:nccl", f"cuda:{number}"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
