"""Checkpoints: the state of a training on disk, so that one whose process is killed goes on and does not begin anew.

A file holds what is trained and what the optimiser remembers of it, the statistics of batch norms, the losses so far
and the states of the random generators: tensors as safetensors, the rest as JSON in the same file's header. It is
data, read without running any of it, and at every moment whole on disk. It is named by the network at the start of the
training and by how it is trained, so that a network which comes out otherwise before is trained from the beginning.

Where checkpoints lie, whoever runs the passes says with `kept_in`; nothing is kept elsewhere. Batches that were learnt
from are read once more and passed over: data whose order comes from the global generators, or always is the same, goes
on as if nothing had been. Processes that train together have one each, of the same step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.errors import ArtifactError
from featherweight.workload import raw

EVERY = 30.0  # seconds

_folder: ContextVar[Path | None] = ContextVar("checkpoints", default=None)


@contextlib.contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Trainings inside the block have their checkpoints in `folder`, which vanishes when the block ends well."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class State:
    """Of a training, as a checkpoint holds it."""

    losses: list[float]
    tensors: Mapping[str, Tensor]
    chance: Mapping[str, Any]


class Checkpoint:
    """Of one training.

    Args:
        model: as it is at the start.
        about: how it is trained, in words and numbers.
        tensors: all that training changes, in whose memory a state is put back.
        optimizer: that changes them.
    """

    def __init__(
        self, model: nn.Module, about: Sequence[object], tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        folder = _folder.get()
        self._path = None if folder is None else folder / f"{_digest(model, about)}.safetensors"
        self._tensors, self._optimizer = tensors, optimizer
        self._kept = time.monotonic()

    def due(self, finished: bool) -> bool:
        """Whether it is time to `keep` the state: at the end of a long training too, for a later step may be killed."""
        if self._path is None:
            return False
        return time.monotonic() - self._kept >= EVERY or (finished and self._path.exists())

    def keep(self, losses: Sequence[float]) -> None:
        """Writes the state.

        Raises:
            ArtifactError: it cannot be written.
        """
        assert self._path is not None
        stored = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in self._named()}
        notes = {"state": json.dumps({"losses": list(losses), "chance": _chance()}, allow_nan=False)}
        fresh = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(stored, fresh, notes)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"The checkpoint {self._path} cannot be written: {error}. Make room, or choose another folder, and "
                "resume."
            ) from error
        self._kept = time.monotonic()

    def load(self) -> State | None:
        """The state that was kept last; None where there is none that can be read."""
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                notes = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return State([float(value) for value in notes["losses"]], tensors, notes["chance"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def restore(self, state: State) -> None:
        """Puts all back as it was, chance included."""
        for p in _optimised(self._optimizer):
            self._optimizer.state[p] = {}
        for name, stored in state.tensors.items():
            kind, index, what = name.split(".")
            if kind == "tensor":
                self._tensors[int(index)].data.copy_(stored)
            else:
                p = _optimised(self._optimizer)[int(index)]
                value = torch.empty_like(p) if stored.shape == p.shape else torch.empty_like(stored, device=p.device)
                self._optimizer.state[p][what] = value.copy_(stored)
        _set_chance(state.chance)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for index, tensor in enumerate(self._tensors):
            yield f"tensor.{index}.value", tensor
        for index, p in enumerate(_optimised(self._optimizer)):
            for what, value in self._optimizer.state[p].items():
                yield f"optimizer.{index}.{what}", value


def _optimised(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _digest(model: nn.Module, about: Sequence[object]) -> str:
    digest = hashlib.sha256(repr(about).encode())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(raw(value).data)
    return digest.hexdigest()[:16]


def _chance() -> dict[str, Any]:
    """The states of the generators that `recipe.seeded` seeds."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - passes may draw from it
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }


def _set_chance(chance: Mapping[str, Any]) -> None:
    version, numbers, gauss = chance["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = chance["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(chance["torch"], dtype=torch.uint8))
