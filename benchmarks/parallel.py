"""Parallel execution, measured: how much replicas gain, and whether cost and memory grow as they should.

    python benchmarks/parallel.py [throughput|scaling|ray|all] [examples/image.py] [--rounds 5] [--json FILE]

The network is compressed by int8 alone, for it is the runtime's speed that counts. Inputs are the 20,000 training
images of the example, as arrays in a file. `throughput` runs in turn, some rounds each, medians with all rounds beside
them: `predict` with one replica on one core; as it chooses by itself; the runtime in this process on all cores, at the
best of a few batches; and OpenVINO's own `benchmark_app -hint throughput` on the same file. The first shards, for which
runtimes compile the network, are left out everywhere, as that tool does. `scaling` runs `predict` on 1, 4 and 16 times
as many rows, with the memory that it and its replicas held at most. `ray` runs about a minute's worth of rows on local
replicas and on as many of a local cluster, in turn, then once more on Ray with a replica killed half way; whole runs,
loading included, but on a cluster that is there already.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from featherweight import Recipe, build, load, open_artifact
from featherweight.artifact import Artifact
from featherweight.candidates import build_step
from featherweight.cluster import predict_ray
from featherweight.machine import physical_cores
from featherweight.parallel import BATCHES, Setting, inputs_of, predict_file, run, settled
from featherweight.pools import connected
from featherweight.workload import tensors

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCALES = (1, 4, 16)
APP_SECONDS = 10
JOB_SECONDS = 60  # that the job for Ray takes here


def network(spec: str, target: str, folder: Path) -> Artifact:
    """The workload's network in int8, made once."""
    place = folder / f"{Path(spec).stem}-{target}"
    if place.is_dir():
        return open_artifact(place)
    workload = load(spec)
    has_norms = any("BatchNorm" in type(module).__name__ for module in workload.model.modules())
    steps = [*([build_step("fold_batchnorm")] if has_norms else []), build_step("quantize_static")]
    return build(Recipe(tuple(steps), target), workload, place)


def examples(spec: str) -> np.ndarray:
    """All rows of the workload's training data."""
    train = load(spec).train
    assert train is not None
    return np.concatenate([tensors(batch[0])[0].numpy() for batch in train])


class InMemory:
    """Rows that are read in order."""

    def __init__(self, rows: np.ndarray) -> None:
        self.array, self.rows, self.at = rows, len(rows), 0

    def read(self, places: Sequence[np.ndarray]) -> None:
        places[0][...] = self.array[self.at : self.at + len(places[0])]
        self.at += len(places[0])

    def skip(self, rows: int) -> None:
        self.at += rows


def replicas(artifact: Artifact, rows: np.ndarray, setting: Setting) -> float:
    """Rows a second, from the end of every replica's first shards, for which the network is compiled, to the last."""
    times: list[tuple[int, float]] = []
    run(
        artifact,
        InMemory(rows),
        [(0, len(rows))],
        setting,
        sink=lambda at, outputs: None,
        told=lambda done, all_: times.append((done, time.perf_counter())),
    )
    first, begin = next(pair for pair in times if pair[0] >= 2 * setting.replicas * setting.batch)
    return (len(rows) - first) / (times[-1][1] - begin)


def in_process(artifact: Artifact, rows: np.ndarray, threads: int, batch: int) -> float:
    """Rows a second of the runtime itself."""
    predict = artifact.load(threads)
    predict([rows[:batch]])
    begin = time.perf_counter()
    for at in range(0, len(rows) // batch * batch, batch):
        predict([rows[at : at + batch]])
    return len(rows) // batch * batch / (time.perf_counter() - begin)


def benchmark_app(artifact: Artifact, batch: int) -> float:
    """What OpenVINO's own tool says, on the same file: inputs of its own making, outputs that nobody reads."""
    (spec,) = inputs_of(artifact)
    shape = f"[{','.join(map(str, (batch, *spec.shape)))}]"
    tool = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(artifact.folder / "model.xml"), "-d", "CPU"]
    tool += ["-hint", "throughput", "-t", str(APP_SECONDS), "-shape", shape]
    said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Throughput:\s*([\d.]+) FPS", said)
    assert found, said[-2000:]
    return float(found[1])


def _ways(artifact: Artifact, rows: np.ndarray) -> dict[str, Callable[[], float]]:
    """What is compared: one core, what `auto` chooses, then those that it is to be as fast as."""
    all_cores = physical_cores()
    auto = settled(artifact, lambda: InMemory(rows), "auto", None, None, "cpu", "throughput")
    batches = {batch: in_process(artifact, rows[:2000], all_cores, batch) for batch in BATCHES}
    best = max(batches, key=lambda batch: batches[batch])
    ways: dict[str, Callable[[], float]] = {
        f"one replica, one core, batch {auto.batch}": lambda: replicas(artifact, rows, Setting(1, 1, auto.batch)),
        f"auto: {auto}": lambda: replicas(artifact, rows, auto),
        f"the runtime, {all_cores} threads, batch {best}": lambda: in_process(artifact, rows, all_cores, best),
    }
    if artifact.target == "openvino":
        for batch in dict.fromkeys((1, auto.batch)):
            ways[f"benchmark_app, batch {batch}"] = functools.partial(benchmark_app, artifact, batch)
    return ways


def throughput(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    rows, table = examples(chosen.workload), []
    for target in ("openvino", "onnxruntime"):
        ways = _ways(network(chosen.workload, target, chosen.folder), rows)
        paces: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(chosen.rounds):
            for way, measure in ways.items():
                paces[way].append(measure())
        one, own, *others = [statistics.median(values) for values in paces.values()]
        for way, values in paces.items():
            table.append({"target": target, "way": way, "rows_per_s": statistics.median(values), "rounds": values})
            print(f"{target:12} {way:45} {statistics.median(values):10.0f} rows/s  {[round(v) for v in values]}")
        print(
            f"{target:12} auto is {own / one:.2f} times one core, {own / max(others):.2f} times the best of the others"
        )
    return table


def scaling(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    artifact, rows, table = network(chosen.workload, "openvino", chosen.folder), examples(chosen.workload), []
    for scale in SCALES:
        source, out = chosen.folder / f"in-{scale}.npy", chosen.folder / f"out-{scale}.npy"
        _repeat(rows, scale, source)
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "featherweight", "predict", artifact.folder, source, "--out", out]
        command += ["--replicas", str(physical_cores()), "--batch", "16"]
        begin, kb = time.perf_counter(), _peak([str(part) for part in command])
        seconds = time.perf_counter() - begin
        table.append({"rows": scale * len(rows), "seconds": seconds, "peak_kb": kb})
        print(
            f"{scale * len(rows):8,} rows: {seconds:6.1f} s, {1e6 * seconds / scale / len(rows):6.1f} µs a row, {kb} kB"
        )
        source.unlink()
    return table


def ray(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    artifact, rows = network(chosen.workload, "openvino", chosen.folder), examples(chosen.workload)
    cores, batch, source = physical_cores(), 16, chosen.folder / "in-ray.npy"
    pace = replicas(artifact, rows, Setting(cores, 1, batch))
    _repeat(rows, max(1, round(JOB_SECONDS * pace / len(rows))), source)
    out = {name: chosen.folder / f"out-{name}.npy" for name in ("local", "ray", "killed")}
    settings: dict[str, Any] = {"replicas": cores, "threads": 1, "batch": batch}
    times: dict[str, list[float]] = {"local": [], "ray": []}
    begin = time.perf_counter()
    with connected(""):
        started = time.perf_counter() - begin
        for _ in range(chosen.rounds):
            for name, predict in (("local", predict_file), ("ray", predict_ray)):
                out[name].unlink(missing_ok=True)
                times[name].append(_seconds(functools.partial(predict, artifact, source, out[name], **settings)))
        out["killed"].unlink(missing_ok=True)
        killed = _seconds(lambda: predict_ray(artifact, source, out["killed"], told=_Killing(), **settings))
    wanted = np.load(out["local"], mmap_mode="r")
    alike = {name: np.array_equal(wanted, np.load(out[name], mmap_mode="r")) for name in ("ray", "killed")}
    local, far = (statistics.median(times[name]) for name in ("local", "ray"))
    print(f"{len(wanted):,} rows, {cores} replicas: local {local:.1f} s, Ray {far:.1f} s ({far / local - 1:+.1%}),")
    print(
        f"a worker killed {killed:.1f} s; bit for bit the same: {alike}; starting a cluster takes {started:.1f} s more"
    )
    source.unlink()
    return [{"rows": len(wanted), "seconds": times, "killed_s": killed, "started_s": started, "alike": alike}]


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class _Killing:
    """Kills a replica on Ray when half of the rows are there."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, done: int, rows: int) -> None:
        if done < rows / 2 or self._done:
            return
        self._done = True
        for process in psutil.process_iter(["cmdline"]):
            if "_Replica" in " ".join(process.info["cmdline"] or []):
                process.kill()
                return
        raise SystemExit("no replica was found that could be killed")


def _repeat(rows: np.ndarray, times: int, path: Path) -> None:
    """As many times the rows in a file, written without holding them."""
    whole = np.lib.format.open_memmap(path, "w+", rows.dtype, (times * len(rows), *rows.shape[1:]))
    for number in range(times):
        whole[number * len(rows) : (number + 1) * len(rows)] = rows
    whole.flush()


def _peak(command: Sequence[str]) -> int:
    """The most that the process and its replicas held, in kB, each for itself: what they share is counted by each.

    `ru_maxrss` will not do: Linux passes on to a program what the process held that started it.
    """
    started, peaks, seen = psutil.Popen(command), dict[int, int](), Counter[int]()
    while started.poll() is None:
        for process in (started, *_children(started)):
            with contextlib.suppress(OSError, psutil.Error):
                said = Path(f"/proc/{process.pid}/status").read_text()
                if found := re.search(r"VmHWM:\s*(\d+) kB", said):
                    peaks[process.pid] = int(found[1])
                    seen[process.pid] += 1
        time.sleep(0.2)
    if started.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return sum(peak for pid, peak in peaks.items() if seen[pid] > 4)  # others were on their way to be a program


def _children(process: psutil.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*TABLES, "all"), nargs="?", default="all")
    parser.add_argument("workload", nargs="?", default=str(EXAMPLES / "image.py"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("out/parallel"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for what in TABLES if chosen.what == "all" else (chosen.what,):
        place = chosen.json or Path(f"out/parallel-{what}.json")
        place.write_text(json.dumps(TABLES[what](chosen), indent=1))


TABLES = {"throughput": throughput, "scaling": scaling, "ray": ray}


if __name__ == "__main__":
    main()
