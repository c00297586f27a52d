"""The search at several budgets, beside the best single pass of the catalogue and NNCF's accuracy control.

    python benchmarks/search.py [image text speech] [--drops 0.002,0.01,0.03] [--objectives latency,bytes]
        [--techniques docs/techniques.md] [--threads 2] [--folder out/search] [--json out/search.json]
        [--time-limit 30m]

Each search is one `featherweight compress`, as a user would call it. The single pass is the one that
`benchmarks/techniques.py` found with the highest ratio (or the fewest bytes) on any target among those that drop no
more than the budget at the upper end of their interval. Which is fastest, and which just keeps to the budget, differs
by machine, so the first few of its table are made and measured again here, and the best is kept. NNCF's
`quantize_with_accuracy_control` reads the scores of the search split, example by example, so it needs no interval and
may pass where the others must not. All are timed in turn with the eager original in this process. What lies in the
folder already is used again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import techniques
import torch
from peers_ptq import EXAMPLES, TRANSFORMERS, Contender, as_predict, eager, export, size_of, timed

from featherweight import targets
from featherweight.artifact import build, open_artifact
from featherweight.cost_table import relative_error, stored_predictions
from featherweight.measure import drop_bounds
from featherweight.recipe import Recipe
from featherweight.timing import ratio
from featherweight.workload import Workload, load, predictor, scores, tensors

INFEASIBLE = 3
SINGLE = "single pass"
SINGLE_PASSES = 4  # the first in the table, which was measured on one machine, are timed again
TABLE = EXAMPLES.parent / "docs" / "techniques.md"
WORKLOADS = ("image", "text", "speech")


@dataclass(frozen=True)
class Row:
    """One network at one budget: the search, the best single pass, or NNCF; bounds are those of the paired drop.

    `off` is how far the latencies that the search predicted of shapes were from those that it measured, in the mean.
    """

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
    ratio_low: float
    ratio_high: float
    seconds: float
    trials: int = 0
    off: float | None = None
    test_drop: float | None = None
    test_drop_low: float | None = None
    test_drop_upper: float | None = None


@dataclass(frozen=True)
class Made:
    """What one of the three made, and what is known of it; `off` is how far predicted latencies were, in the mean."""

    contender: Contender
    what: str
    trials: int = 0
    off: float | None = None
    test: tuple[float | None, ...] = (None, None, None)
    accepted: bool | None = None  # None where the measured bound decides


def searched(name: str, objective: str, drop: float, chosen: argparse.Namespace) -> Made:
    """What a search finds, or found where its result lies in the folder."""
    folder = chosen.folder / f"{name}-{objective}-{drop:g}"
    seconds = 0.0
    if not (folder / "best").is_dir():
        command = [sys.executable, "-m", "featherweight", "compress", str(EXAMPLES / f"{name}.py"), "--out", folder]
        command += ["--max-drop", str(drop), "--objective", objective, "--threads", str(chosen.threads)]
        command += ["--time-limit", chosen.time_limit, *(["--resume"] if folder.exists() else [])]
        start = time.perf_counter()
        ended = subprocess.run([str(part) for part in command], check=False)
        if ended.returncode not in (0, INFEASIBLE):
            raise SystemExit(f"The search of {name} failed with exit code {ended.returncode}: see above.")
        seconds = time.perf_counter() - start
    result, artifact = json.loads((folder / "result.json").read_text()), open_artifact(folder / "best")
    best, trials = result["best"], len(list((folder / "trials").glob("*.json")))
    test = (best["test_drop"], best["test_drop_low"], best["test_drop_upper"])
    contender = Contender("search", artifact.load(chosen.threads), artifact.bytes, seconds)
    errors = [abs(relative_error(p.predicted_ms, p.measured_ms)) for p in stored_predictions(folder / "costs.json")]
    off = statistics.fmean(errors) if errors else None
    return Made(contender, artifact.recipe, trials, off, test, result["verdict"] == "accepted")


def alone(name: str, objective: str, drop: float, workload: Workload, chosen: argparse.Namespace) -> list[Made]:
    """The catalogue's passes by themselves that should be best, made again; which that is differs by machine."""
    fitting = [
        (pace if objective == "latency" else -row.bytes[target], pace, target, row.steps)
        for row in techniques.written(chosen.techniques)
        if row.workload == name and row.steps != "the original" and row.drop_upper <= drop
        for target, pace in row.ratios.items()
    ]
    if objective == "bytes":  # targets store much the same
        fitting = list({entry[-1]: entry for entry in sorted(fitting)}.values())
    best = sorted(fitting, reverse=True)[:SINGLE_PASSES]
    return [_single(name, target, said, workload, chosen) for *_, target, said in best]


def _single(name: str, target: str, said: str, workload: Workload, chosen: argparse.Namespace) -> Made:
    kinds = [part.split()[0] for part in said.split(" + ")]
    wanted = [kind for kind in kinds if kind.startswith(techniques.TEACHING)] or kinds[:1]
    steps = dict(techniques.recipes(workload, name, wanted))[said]
    folder = chosen.folder / f"{name}-single" / f"{Recipe(steps, target).digest}"
    start = time.perf_counter()
    artifact = open_artifact(folder) if folder.is_dir() else build(Recipe(steps, target), workload, folder)
    seconds = time.perf_counter() - start
    return Made(Contender(SINGLE, artifact.load(chosen.threads), artifact.bytes, seconds), artifact.recipe)


def controlled(name: str, drop: float, workload: Workload, chosen: argparse.Namespace) -> Made | None:
    """NNCF's int8 with as many layers in floats as its accuracy control wants; None where it fails."""
    folder = chosen.folder / f"{name}-nncf-{drop:g}"
    seconds = 0.0
    if not (folder / "int8" / "model.xml").exists():
        try:
            seconds = _control(name, drop, workload, folder)
        except Exception as error:  # a peer that cannot do a network is a result
            print(f"{name}: NNCF failed: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
            return None
    run = targets.find("openvino").load(folder / "int8", chosen.threads)
    return Made(Contender("NNCF", run, size_of(folder / "int8"), seconds), "quantize_with_accuracy_control")


def _control(name: str, drop: float, workload: Workload, folder: Path) -> float:
    import nncf
    import openvino

    has_norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in workload.model.modules())
    fp32 = folder / f"fp32-{time.time_ns()}"
    export(workload, "openvino", fp32, ("fold_batchnorm",) if has_norms else ())
    start = time.perf_counter()
    network = openvino.Core().read_model(fp32 / "model.xml")
    names = [port.get_any_name() for port in network.inputs]
    data = [
        {key: value[i : i + 1].numpy() for key, value in zip(names, tensors(batch), strict=True)}
        for batch in workload.calibration
        for i in range(len(tensors(batch)[0]))
    ]
    examples = len(scores(workload.score, predictor(workload.model)))
    last: list[Any] = [None, []]  # the network that was scored last, and its scores

    def validate(compiled: Any, chosen: Iterable[int]) -> tuple[float, list[float]]:
        """The workload scores all its examples at once; of those NNCF gets the ones that it asks for."""

        def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            return list(compiled(list(arrays)).values())

        if last[0] is not compiled:
            last[:] = compiled, scores(workload.score, as_predict(run)).tolist()
        values = [last[1][index] for index in chosen]
        return statistics.fmean(values), values

    found = nncf.quantize_with_accuracy_control(
        network,
        calibration_dataset=nncf.Dataset(data),
        validation_dataset=nncf.Dataset(list(range(examples))),
        validation_fn=validate,
        max_drop=drop,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(data),
        model_type=nncf.ModelType.TRANSFORMER if name in TRANSFORMERS else None,
        preset=nncf.QuantizationPreset.MIXED,
    )
    (folder / "int8").mkdir(exist_ok=True)
    openvino.save_model(found, folder / "int8" / "model.xml", compress_to_fp16=False)
    return time.perf_counter() - start


def compared(name: str, objective: str, drop: float, chosen: argparse.Namespace) -> list[Row]:
    found = searched(name, objective, drop, chosen)
    workload = load(str(EXAMPLES / f"{name}.py"))
    before = scores(workload.score, predictor(workload.model)).tolist()
    other = controlled(name, drop, workload, chosen)
    field = [found, *alone(name, objective, drop, workload, chosen), *([] if other is None else [other])]
    inputs = [tensor[:1].numpy() for tensor in tensors(workload.example)]
    times = timed([eager(workload.model), *(made.contender.run for made in field)], inputs, rounds=9)
    rows = []
    for made, taken in zip(field, times[1:], strict=True):
        who, after = made.contender, scores(workload.score, as_predict(made.contender.run)).tolist()
        upper, pace = drop_bounds(before, after)[1], ratio(times[0], taken)
        mean, accepted = statistics.fmean(before) - statistics.fmean(after), made.accepted
        about = (name, objective, drop, who.name, made.what, upper <= drop if accepted is None else accepted)
        figures = (mean, upper, who.bytes, pace.median, pace.low, pace.high, who.seconds, made.trials, made.off)
        rows.append(Row(*about, *figures, *made.test))
    singles = [row for row in rows if row.who == SINGLE]
    gain = {id(row): row.ratio if objective == "latency" else -row.bytes for row in singles}
    best = max(singles, key=lambda row: (row.accepted, gain[id(row)]), default=None)
    return [row for row in rows if row.who != SINGLE or row is best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, help="of examples/")
    parser.add_argument("--drops", default="0.002,0.01,0.03")
    parser.add_argument("--objectives", default="latency,bytes")
    parser.add_argument("--techniques", type=Path, default=TABLE, help="what benchmarks/techniques.py wrote")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time-limit", default="30m", help="of each search")
    parser.add_argument("--folder", type=Path, default=Path("out/search"))
    parser.add_argument("--json", type=Path, default=Path("out/search.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in chosen.workloads:
        for objective in chosen.objectives.split(","):
            for drop in map(float, chosen.drops.split(",")):
                rows += compared(name, objective, drop, chosen)
                chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
                for row in rows[-3:]:
                    print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
