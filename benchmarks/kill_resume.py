"""A search that is killed again and again, and resumed each time: does it end as if nothing had happened?

    python benchmarks/kill_resume.py [examples/image.py] [--kills 20] [--max-drop 0.01] [--json out/kill_resume.json]

The search runs once undisturbed, and again in other folders, where `kill -9` meets it at random moments until there
were so many; then it may end. Bytes are made small, for latencies differ from run to run, and with them what is
tried. No trial that was written may be written again, and best recipe, score and every byte of the artifact must be
those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

INFEASIBLE = 3


class Life:
    """One process of the search, from its start to its end."""

    def __init__(self, chosen: argparse.Namespace, folder: Path, resume: bool) -> None:
        command = [sys.executable, "-m", "featherweight", "compress", chosen.workload, "--out", str(folder)]
        command += ["--objective", "bytes", "--max-drop", chosen.max_drop, "--target", chosen.target]
        command += ["--time-limit", "10h", *(["--resume"] if resume else [])]
        self.begin = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def killed_after(self, seconds: float) -> bool:
        """Whether it was killed; not if it ended before."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return True
        self.ended()
        return False

    def ended(self) -> float:
        """Seconds until it ended by itself.

        Raises:
            SystemExit: it failed.
        """
        _, said = self.process.communicate()
        if self.process.returncode not in (0, INFEASIBLE):
            raise SystemExit(f"The search failed with exit code {self.process.returncode}:\n{said[-2000:]}")
        return time.monotonic() - self.begin


def trials(folder: Path) -> dict[str, int]:
    """When each was written."""
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


def outcome(folder: Path) -> dict[str, Any]:
    """What a search ended with."""
    best = json.loads((folder / "result.json").read_text())["best"]
    files = sorted(path for path in (folder / "best").rglob("*") if path.is_file() and path.name != "artifact.json")
    return {
        "recipe": best["recipe"],
        "target": best["target"],
        "score": best["score"],
        "bytes": best["bytes"],
        "files": {str(p.relative_to(folder / "best")): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files},
        "trials": sorted(trials(folder)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", default="examples/image.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--max-drop", default="0.01")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--folder", type=Path, default=Path("out/kill_resume"))
    parser.add_argument("--json", type=Path, default=Path("out/kill_resume.json"))
    chosen = parser.parse_args()
    shutil.rmtree(chosen.folder, ignore_errors=True)
    whole, often = chosen.folder / "whole", chosen.folder / "often"
    seconds = Life(chosen, whole, resume=False).ended()
    print(f"undisturbed: {seconds:.0f} s, {len(trials(whole))} trials", flush=True)
    moments, kills, repeated, differing = random.Random(chosen.seed), [], [], []
    while len(kills) < chosen.kills:  # a search that comes to its end between two kills is followed by another
        often = chosen.folder / f"often{len(kills)}"
        lives = len(kills)
        while len(kills) < chosen.kills:
            before, life = trials(often), moments.uniform(0, seconds / 4)
            killed = Life(chosen, often, resume=often.exists()).killed_after(life)
            repeated += [name for name, written in before.items() if trials(often).get(name) != written]
            if not killed:
                break
            kills.append(round(life, 2))
            print(f"kill {len(kills)} after {life:.1f} s: {len(trials(often))} trials", flush=True)
        before = trials(often)
        Life(chosen, often, resume=often.exists()).ended()
        repeated += [name for name, written in before.items() if trials(often).get(name) != written]
        ends = outcome(whole), outcome(often)
        differing += [name for name in ends[0] if ends[0][name] != ends[1][name]]
        print(f"ended after {len(kills) - lives} kills: {len(trials(often))} trials", flush=True)
    row = {"kills": kills, "repeated": repeated, "differing": differing, "seconds": seconds, "outcome": ends[0]}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(row, indent=1))
    print(f"{len(kills)} kills; trials written twice: {repeated or 'none'}; what differs: {differing or 'nothing'}")
    sys.exit(1 if repeated or differing else 0)


if __name__ == "__main__":
    main()
