"""What all tests share."""

from __future__ import annotations

import copy
import functools

import pytest

collect_ignore = ["mortal.py"]  # a workload that imports its neighbour, as workloads may


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once():
    """torch's ONNX exporter parses the source of 500 operators at every export, which takes half of its time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    build = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(**version: int) -> ONNXRegistry:
        registry = copy.copy(build(**version))
        registry.functions = {operator: list(forms) for operator, forms in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
