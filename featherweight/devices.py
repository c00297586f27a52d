"""Accelerators for torch programs: how many there are, and a program moved to one.

    cuda    GPUs, by torch's own backend
    tpu     TPUs, by torch_tpu, whose device torch calls `tpu`

Neither was run on hardware yet. What was run in the place of a TPU is XLA on processors, through torchax
(`benchmarks/xla.py`). Where training runs is `processes`' affair.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from featherweight.errors import TargetError

PACKAGES = {"cuda": "", "tpu": "torch_tpu"}  # what has to be imported before torch knows a kind of device


def count(kind: str) -> int:
    """How many devices of a kind there are.

    Raises:
        TargetError: none, or the kind is unknown; the message is the reason.
    """
    if kind not in PACKAGES:
        raise TargetError(f"there are no such devices, only cpu, {', '.join(PACKAGES)}")
    if package := PACKAGES[kind]:
        if importlib.util.find_spec(package) is None:
            raise TargetError(f"{package} is not installed (pip install {package})")
        importlib.import_module(package)
    module: Any = getattr(torch, kind, None)
    found = module.device_count() if module is not None and module.is_available() else 0
    if not found:
        raise TargetError("there is none here, or its driver does not fit this build of torch")
    return int(found)


def moved(program: Any, device: str) -> Any:
    """A program's module whose weights, constants and new tensors lie on `device`."""
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(program, device).module()
