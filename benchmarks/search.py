"""The search at several budgets, beside the best single pass of the catalogue and NNCF's accuracy control.

    python benchmarks/search.py [image text speech] [--drops 0.002,0.01,0.03] [--objectives latency,bytes]
        [--techniques out/techniques/rows.json] [--threads 2] [--folder out/search] [--json out/search.json]

Each search is one `featherweight compress`, as a user would call it. Its artifact and NNCF's are then timed in turn
with the eager original in this process. The single pass is the one of `benchmarks/techniques.py`, among those that
drop no more than the budget at the upper end of their interval, with the highest ratio (or the fewest bytes) on any
target; its ratio was taken in another process, and is left out where that file is not given. NNCF's
`quantize_with_accuracy_control` goes by the mean score on the search split, as it has no interval. What a search left
in its folder is used again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_ptq import EXAMPLES, TRANSFORMERS, Contender, as_predict, eager, export, size_of, timed

from featherweight import targets
from featherweight.artifact import open_artifact
from featherweight.measure import drop_bounds
from featherweight.timing import ratio
from featherweight.workload import Workload, load, predictor, scores, tensors

INFEASIBLE = 3
WORKLOADS = ("image", "text", "speech")


@dataclass(frozen=True)
class Row:
    """One network at one budget: the search, the best single pass, or NNCF."""

    workload: str
    objective: str
    budget: float
    who: str
    what: str
    accepted: bool
    drop: float
    drop_upper: float
    bytes: int
    ratio: float
    test_drop: float | None = None
    test_drop_low: float | None = None
    test_drop_upper: float | None = None
    trials: int = 0
    seconds: float = 0.0


def searched(name: str, objective: str, drop: float, folder: Path, threads: int) -> float:
    """Runs the search where its result does not lie there yet; seconds."""
    if (folder / "best").is_dir():
        return 0.0
    command = [sys.executable, "-m", "featherweight", "compress", str(EXAMPLES / f"{name}.py"), "--out", str(folder)]
    command += ["--max-drop", str(drop), "--objective", objective, "--threads", str(threads)]
    start = time.perf_counter()
    ended = subprocess.run([*command, *(["--resume"] if folder.exists() else [])], check=False)
    if ended.returncode not in (0, INFEASIBLE):
        raise SystemExit(f"{' '.join(command)} failed with exit code {ended.returncode}: see above.")
    return time.perf_counter() - start


def controlled(name: str, workload: Workload, drop: float, threads: int, folder: Path) -> Contender:
    """NNCF's int8 with as many layers in floats as its accuracy control wants."""
    import nncf
    import openvino

    has_norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in workload.model.modules())
    exported = export(workload, "openvino", folder / "fp32", ("fold_batchnorm",) if has_norms else ())
    network = openvino.Core().read_model(folder / "fp32" / "model.xml")
    names = [port.get_any_name() for port in network.inputs]
    data = [
        {key: value[i : i + 1].numpy() for key, value in zip(names, tensors(batch), strict=True)}
        for batch in workload.calibration
        for i in range(len(tensors(batch)[0]))
    ]

    def score(compiled: Any, _: Any) -> tuple[float, None]:
        def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
            return list(compiled(arrays).values())

        return scores(workload.score, as_predict(run)).mean().item(), None

    start = time.perf_counter()
    found = nncf.quantize_with_accuracy_control(
        network,
        calibration_dataset=nncf.Dataset(data),
        validation_dataset=nncf.Dataset(data),  # not looked at: the score brings its own data
        validation_fn=score,
        max_drop=drop,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(data),
        model_type=nncf.ModelType.TRANSFORMER if name in TRANSFORMERS else None,
        preset=nncf.QuantizationPreset.MIXED,
    )
    (folder / "int8").mkdir()
    openvino.save_model(found, folder / "int8" / "model.xml", compress_to_fp16=False)
    run = targets.find("openvino").load(folder / "int8", threads)
    return Contender("NNCF", run, size_of(folder / "int8"), exported + time.perf_counter() - start, exported)


def single(rows: list[dict[str, Any]], name: str, objective: str, drop: float) -> Iterator[Row]:
    """The best of the catalogue's passes alone."""
    fitting = [
        (ratio_, size, row)
        for row in rows
        if row["workload"] == name and row["steps"] != "the original" and row["bytes"] and row["drop_upper"] <= drop
        for target, size in row["bytes"].items()
        if (ratio_ := row["ratios"].get(target, 0.0))
    ]
    if fitting:
        faster, smaller = (lambda f: f[0]), (lambda f: -f[1])
        ratio_, size, row = max(fitting, key=faster if objective == "latency" else smaller)
        what = row["steps"]
        yield Row(name, objective, drop, "single pass", what, True, row["drop"], row["drop_upper"], size, ratio_)


def compared(name: str, objective: str, drop: float, chosen: argparse.Namespace) -> Iterator[Row]:
    folder = chosen.folder / f"{name}-{objective}-{drop:g}"
    seconds = searched(name, objective, drop, folder / "ours", chosen.threads)
    result = json.loads((folder / "ours" / "result.json").read_text())
    artifact = open_artifact(folder / "ours" / "best")
    workload = load(str(EXAMPLES / f"{name}.py"))
    before = scores(workload.score, predictor(workload.model)).tolist()
    field = [Contender("search", artifact.load(chosen.threads), artifact.bytes, seconds)]
    if not (folder / "nncf").exists():
        try:
            field.append(controlled(name, workload, drop, chosen.threads, folder / "nncf"))
        except Exception as error:  # a peer that cannot do a network is a result
            print(f"{name}: NNCF failed: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
    inputs = [tensor[:1].numpy() for tensor in tensors(workload.example)]
    times = timed([eager(workload.model), *(c.run for c in field)], inputs, rounds=9)
    for contender, taken in zip(field, times[1:], strict=True):
        after = scores(workload.score, as_predict(contender.run)).tolist()
        upper = drop_bounds(before, after)[1]
        mean, pace = statistics.fmean(before) - statistics.fmean(after), ratio(times[0], taken).median
        about = (name, objective, drop, contender.name)
        if contender.name == "search":
            best, trials = result["best"], len(list((folder / "ours" / "trials").glob("*.json")))
            test = (best["test_drop"], best["test_drop_low"], best["test_drop_upper"])
            accepted = result["verdict"] == "accepted"
            yield Row(*about, best["recipe"], accepted, mean, upper, artifact.bytes, pace, *test, trials, seconds)
        else:
            yield Row(*about, "int8", upper <= drop, mean, upper, contender.bytes, pace, seconds=contender.seconds)
    yield from single(json.loads(chosen.techniques.read_text()) if chosen.techniques else [], name, objective, drop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, help="of examples/")
    parser.add_argument("--drops", default="0.002,0.01,0.03")
    parser.add_argument("--objectives", default="latency,bytes")
    parser.add_argument("--techniques", type=Path, help="rows.json of benchmarks/techniques.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/search"))
    parser.add_argument("--json", type=Path, default=Path("out/search.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in chosen.workloads:
        for objective in chosen.objectives.split(","):
            for drop in map(float, chosen.drops.split(",")):
                for row in compared(name, objective, drop, chosen):
                    rows.append(row)
                    chosen.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
                    print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
