"""What all tests share."""

from __future__ import annotations

import copy
import functools
import os

import pytest
import torch

collect_ignore = ["mortal.py"]  # a workload that imports its neighbour, as workloads may


def pytest_configure():
    """Several processes of tests (pytest-xdist) share the cores, each with as many threads as are its own."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // count))


@pytest.fixture(scope="session", autouse=True)
def _tables_of_costs_are_the_tests_own(tmp_path_factory):
    """Not the user's, and measured once for all tests of a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
