"""Targets: where the result runs, one file per runtime. A target only translates; it never compresses.

`export` writes the runtime's own files into a folder, `load` runs them. What is loaded works on NumPy arrays, so
that a process which only runs an artifact need not import torch; `featherweight.artifact` dresses it in tensors.
This module knows how targets are found, and no runtime; it imports nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.machine import physical_cores

if TYPE_CHECKING:
    from torch import nn

    from featherweight.workload import Workload

Arrays = Sequence[np.ndarray]
Runner = Callable[[Arrays], list[np.ndarray]]  # inputs in the manifest's order -> outputs in the network's order


@dataclass(frozen=True)
class Kernel:
    """One operator as the runtime really ran it."""

    name: str
    kind: str
    precision: str  # "int8", "int4", "fp32", "bf16", …: of the arithmetic, as the runtime reports it
    latency_ms: float


class Target(ABC):
    """A runtime. Subclasses say in `requires` which modules it needs, and in `extra` how to install them."""

    requires: tuple[str, ...] = ()
    extra: str = ""
    width_multiple: int = 8  # channel counts that are a multiple of this run well
    float_precisions: tuple[str, ...] = ("float32",)  # in which it can be told to compute what stays in floats
    # How far an exported network may be from the torch module, as the norm of the difference over that of the outputs.
    # Floats agree to 1e-5; where values are rounded to bytes, a last bit decides now and then on which side one falls.
    tolerance: float = 0.01

    @classmethod
    def name(cls) -> str:
        """The name of the file that defines it."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def installed(cls) -> bool:
        """Whether the modules it needs can be found (they are not imported)."""
        return all(importlib.util.find_spec(module) is not None for module in cls.requires)

    @abstractmethod
    def export(self, model: nn.Module, workload: Workload, folder: Path) -> None:
        """Writes `model` into `folder` as the runtime's own files, batch size free.

        Raises:
            ExportError: the runtime cannot hold the network; the message names the layer and what to change.
        """

    @abstractmethod
    def load(self, folder: Path, threads: int) -> Runner:
        """The network in `folder`, ready to run on `threads` threads."""

    def load_on(self, device: str, folder: Path, threads: int) -> Runner:
        """The network in `folder`, ready to run on a device: `cpu`, or `cuda:1`, say.

        Raises:
            TargetError: there is no such device, or the runtime cannot use it.
        """
        if device != "cpu":
            raise self.without(device, "it runs on processors only")
        return self.load(folder, threads)

    def count(self, device: str) -> int:
        """How many devices of a kind this runtime can use here; of the kind `cpu` the processor's cores.

        Raises:
            TargetError: none.
        """
        if device != "cpu":
            raise self.without(device, "it runs on processors only")
        return physical_cores()

    def without(self, device: str, why: str) -> TargetError:
        """What is raised where this runtime cannot use a device."""
        return TargetError(
            f"{self.name()} cannot run on {device}: {why}. Choose another device, or make the artifact for another "
            "target (--target)."
        )

    @abstractmethod
    def profile(self, folder: Path, inputs: Arrays, threads: int, runs: int = 3) -> list[Kernel]:
        """What the runtime itself reports of one run, a usual one of `runs`: every operator, its precision and time.

        Kernels are named after the layers whose operators they compute: the name of the layer in the network, then
        whatever the runtime adds (`blocks.0.conv/node_Conv_3_nchwc`; `blocks_0_conv_conv2d` where dots cannot be).
        """


def usual(runs: Sequence[Sequence[Kernel]]) -> list[Kernel]:
    """The operators of several runs, each with the median of its times; those of one name and kind are one.

    >>> runs = [[Kernel("a", "Conv", "fp32", latency)] for latency in (9.0, 1.0, 2.0)]
    >>> usual(runs)
    [Kernel(name='a', kind='Conv', precision='fp32', latency_ms=2.0)]
    """
    times: dict[tuple[str, str, str], list[float]] = {}
    for number, run in enumerate(runs):
        for kernel in run:
            key = (kernel.name, kernel.kind, kernel.precision)
            times.setdefault(key, [0.0] * len(runs))[number] += kernel.latency_ms
    return [Kernel(*key, float(np.median(values))) for key, values in times.items()]


@cache
def names() -> tuple[str, ...]:
    """The names of all targets, installed or not, from the files in this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


@cache
def find(name: str) -> Target:
    """The target called `name`, whose runtime is installed.

    Raises:
        TargetError: there is no such target, or its runtime is missing; the message names the extra.
    """
    if name not in names():
        raise TargetError(f"There is no target {name!r}. There are: {', '.join(names())}.")
    module: Any = importlib.import_module(f"{__name__}.{name}")
    (kind,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Target) and value.__module__ == module.__name__
    ]
    if not kind.installed():
        raise TargetError(
            f"Target {name!r} needs {', '.join(kind.requires)}, which is not installed. "
            f"Install it with: pip install 'featherweight[{kind.extra}]'."
        )
    return kind()


def installed() -> tuple[str, ...]:
    """The names of the targets whose runtimes are installed."""
    found = []
    for name in names():
        try:
            find(name)
        except TargetError:
            continue
        found.append(name)
    return tuple(found)
