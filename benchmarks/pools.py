"""One search by one Ray worker, by two, and by two of which one is killed: same trials, same result, how much sooner?

    python benchmarks/pools.py [examples/image.py] [--max-drop 0.01] [--objective bytes] [--json out/pools.json]

Three searches in fresh folders, each with a Ray cluster of its own on this machine. Bytes are made small, for latencies
differ from run to run, and with them what is tried. In the last search `kill -9` meets a worker that is at work, at
half of the time that two workers took. Trials, their order, scores and bytes, and every byte of the best artifact must
be those of the first search. Of the time, the part in which the pool is at work is compared, at the table of damages
and at trials; and all that is not timing, with what the search does itself, such as facts and the last build.

It needs two processor cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from featherweight import Budget, compress, load
from featherweight.progress import Progress
from featherweight.search import POOL
from featherweight.trials import read_trials

TIMING = ("baseline", "measure", "final measurement")  # stages in which networks are timed, scores among them
IN_POOL = ("damage", POOL)  # stages in which its workers are busy
BUILDING = "ray::featherweight"  # what Ray calls a process that is at work for us


class Lines(Progress):
    def line(self, text: str) -> None:
        print(f"    {' '.join(text.split())[:150]}", flush=True)


class Killer(threading.Thread):
    """Kills one process that is building, so many seconds after the first was seen."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds, self.killed, self.over = seconds, "", threading.Event()

    def run(self) -> None:
        begin = 0.0
        while not self.over.wait(1.0):
            building = [path for path in Path("/proc").glob("[0-9]*") if _title(path).startswith(BUILDING)]
            begin = begin or (time.monotonic() if building else 0.0)
            if building and time.monotonic() - begin >= self.seconds:
                os.kill(int(building[0].name), signal.SIGKILL)
                self.killed = f"{time.monotonic() - begin:.1f} s after the first build began"
                return


def _title(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def search(chosen: argparse.Namespace, name: str, workers: int, kill_after: float | None = None) -> dict[str, Any]:
    """What one search ended with, and where its time went."""
    folder = chosen.folder / name
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=workers, object_store_memory=512 << 20, **quiet)
    killer = Killer(kill_after or 0.0)
    if kill_after is not None:
        killer.start()
    begin = time.monotonic()
    try:
        budget = Budget(chosen.max_drop, objective=chosen.objective)
        given = {"targets": tuple(chosen.target.split(",")), "pool": "ray", "seed": chosen.seed, "progress": Lines()}
        result = compress(load(chosen.workload), budget, folder, **given)
    finally:
        killer.over.set()
        ray.shutdown()
    if result.interrupted:
        raise KeyboardInterrupt
    seconds = {**result.seconds, "all": round(time.monotonic() - begin, 1)}
    told = {"workers": workers, "killed": killer.killed, "seconds": seconds, **outcome(folder)}
    return {**told, "pool_s": _sum(seconds, IN_POOL), "untimed_s": seconds["all"] - _sum(seconds, TIMING)}


def _sum(seconds: dict[str, float], stages: Sequence[str]) -> float:
    return sum(seconds.get(stage, 0.0) for stage in stages)


def outcome(folder: Path) -> dict[str, Any]:
    """All that may not differ."""
    found = [(trial.recipe.digest, trial.measurement, trial.error) for _, trial in read_trials(folder)]
    files = sorted(path for path in (folder / "best").iterdir() if path.is_file())
    return {
        "trials": [[digest, m and [m.score, m.drop_upper, m.bytes, m.fidelity], error] for digest, m, error in found],
        "best": (folder / "recipe.yaml").read_text(),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", default="examples/image.py")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--objective", default="bytes")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("out/pools"))
    parser.add_argument("--json", type=Path, default=Path("out/pools.json"))
    chosen = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    shutil.rmtree(chosen.folder, ignore_errors=True)

    rows: dict[str, dict[str, Any]] = {}
    for name, workers in (("one", 1), ("two", 2), ("two, one killed", 2)):
        print(f"{name}:", flush=True)
        half = rows["two"]["pool_s"] / 2 if "killed" in name else None
        rows[name] = search(chosen, name.replace(", ", "_").replace(" ", "_"), workers, half)
    first = rows["one"]
    for row in rows.values():
        row["differing"] = [key for key in ("trials", "best", "files") if row[key] != first[key]]
        row["share"] = round(row["pool_s"] / first["pool_s"], 3)
        row["untimed_share"] = round(row["untimed_s"] / first["untimed_s"], 3)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(rows, indent=1))

    print("workers          trials  pool s  share  not timing s  share  all s  differs from the first")
    for name, row in rows.items():
        pool = f"{row['pool_s']:7.1f} {row['share']:6.3f} {row['untimed_s']:13.1f} {row['untimed_share']:6.3f}"
        print(f"{name:16} {len(row['trials']):6} {pool} {row['seconds']['all']:6.1f}", end="")
        print(f"  {', '.join(row['differing']) or 'in nothing'}")
    print(f"killed: {rows['two, one killed']['killed'] or 'nobody, the search was over before'}")
    failed = any(row["differing"] for row in rows.values()) or not rows["two, one killed"]["killed"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
