from __future__ import annotations

import json

import pytest

from featherweight import machine as machines
from featherweight.machine import machine, physical_cores


def test_machine_is_plain_and_names_nobody() -> None:
    import platform

    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert platform.node() not in found["cpu"] and set(found) == {
        "cpu",
        "architecture",
        "system",
        "cores",
        "features",
        "memory_bytes",
        "load",
    }


def test_cores_respect_affinity_hyperthreads_and_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, str] = {}
    monkeypatch.setattr(machines, "_read", lambda path: files.get(str(path), ""))
    monkeypatch.setattr(machines.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machines.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert physical_cores() == 4
    for cpu in range(4):
        files[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 2},{cpu % 2 + 2}\n"
    assert physical_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert physical_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000\n"
    assert physical_cores() == 1
    files["/sys/fs/cgroup/cpu.max"] = "20000 100000\n"
    assert physical_cores() == 1
