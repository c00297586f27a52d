"""The machine: its processor, cores and memory, as far as the system tells. Nothing is measured here."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

INT8_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory and the load, as far as the system tells; no names of hosts or people."""
    about = _read(Path("/proc/cpuinfo"))
    name = re.search(r"^model name\s*:\s*(.+)$", about, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", about, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    wanted = ("avx2", "avx512f", "avx512_bf16", *INT8_FEATURES, "amx_bf16", "asimddp", "i8mm")
    return {
        "cpu": name.group(1).strip() if name else platform.processor() or "unknown",
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": physical_cores(),
        "features": [flag for flag in wanted if flag in flags.group(1).split()] if flags else None,
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "load": round(os.getloadavg()[0], 2) if os.name == "posix" else None,
    }


def physical_cores() -> int:
    """How many processor cores this process may use: not hyperthreads, and no more than a container's quota."""
    quota = re.match(r"(\d+) (\d+)", _read(Path("/sys/fs/cgroup/cpu.max")))
    most = len(cores())
    return min(most, max(1, int(quota.group(1)) // int(quota.group(2)))) if quota else most


def cores() -> list[list[int]]:
    """The processor cores that this process may use, each with the numbers of its hyperthreads."""
    if platform.system() != "Linux":
        return [[number] for number in range(os.cpu_count() or 1)]
    found: dict[str, list[int]] = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = _read(Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"))
        found.setdefault(siblings or str(number), []).append(number)
    return list(found.values())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
