"""Every pass at several strengths on real networks: what it costs in score, and what it saves in bytes and time.

    python benchmarks/techniques.py [image text speech] [--passes prune_random,quantize_gptq] [--threads 2]
        [--json out/techniques.json] [--markdown docs/techniques.md]

Each row is one recipe of the pass alone; passes that teach follow a pruning that they are to repair, which stands in a
row of its own. Batch norms are folded first where weights are rounded. A recipe is run once, exported to every target,
scored as the artifact of the first target that can hold it, and timed on all of them, in turn with the eager original;
the ratio is eager fp32 over the artifact. A pass that is not in STRENGTHS runs with its defaults, so a new one needs
nothing here. Rows end up in the JSON file one by one, and those that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers_ptq import EXAMPLES, as_predict, eager, timed
from torch import nn

from featherweight import passes, targets
from featherweight.errors import FeatherweightError
from featherweight.measure import drop_bounds
from featherweight.passes import Pass, build
from featherweight.recipe import Recipe, compress_model
from featherweight.timing import ratio
from featherweight.workload import Workload, load, predictor, scores, tensors

WORKLOADS = ("image", "text", "speech")
SHARES = [{"share": 0.2}, {"share": 0.5}, {"share": 0.8}]
LAYER_SHARES = [{"share": 0.1}, {"share": 0.2}, {"share": 0.4}]
BITS = [{"bits": 8}, {"bits": 4}, {"bits": 3}]
STRENGTHS: dict[str, list[dict[str, Any]]] = {
    "prune_random": SHARES,
    "prune_magnitude": SHARES,
    "prune_wanda": SHARES,
    "prune_sparsegpt": SHARES,
    "prune_channels": LAYER_SHARES,
    "quantize_weights": [{"bits": 8}, {"bits": 4}, {"bits": 4, "block": 32}],
    "quantize_gptq": BITS,
    "quantize_hqq": BITS,
    "cluster_kmeans": BITS,
    "compand_weights": [{"bits": 8}, {"bits": 4}],
}
STEPS = {"image": 250, "text": 100, "speech": 40}  # of passes that teach
REPAIRED = ("prune_channels", {"share": 0.2})
TEACHING = ("distill_", "learn_")
ROUNDING = ("quantize_", "cluster_", "compand_", "scale_", "prune_", "factorize_")


@dataclass(frozen=True)
class Row:
    """One recipe on one network. `ratios` by target: eager fp32 over the artifact, the median over rounds."""

    workload: str
    steps: str
    score: float
    drop: float
    drop_low: float | None
    drop_upper: float
    bytes: dict[str, int]
    ratios: dict[str, float]
    seconds: float
    refused: str = ""


def recipes(workload: Workload, name: str, wanted: list[str]) -> Iterator[tuple[Pass, ...]]:
    """The steps of every row, the original first."""
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in workload.model.modules())
    fold = (build("fold_batchnorm", {}, "fold"),) if has_norms else ()
    yield ()
    for kind in wanted:
        for settings in STRENGTHS.get(kind, [{}]):
            if kind.startswith(TEACHING):
                before = build(*REPAIRED, "repaired")
                yield (
                    before,
                    build(kind, {"steps": STEPS[name], "lr": 0.005 if has_norms else 0.003, **settings}, kind),
                )
            else:
                first = fold if kind.startswith(ROUNDING) and kind != "prune_channels" else ()
                yield (*first, build(kind, settings, kind))


def run(name: str, workload: Workload, steps: tuple[Pass, ...], before: list[float], threads: int) -> Row:
    """One row, or its refusal."""
    said = " + ".join(_said(step) for step in steps) or "the original"
    start = time.perf_counter()
    try:
        model, _ = compress_model(Recipe(steps, targets.installed()[0]), workload)
    except FeatherweightError as error:
        return Row(name, said, 0.0, 0.0, None, 0.0, {}, {}, time.perf_counter() - start, str(error))
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        runners, sizes, refusals = {}, {}, []
        for target in targets.installed():
            folder = Path(scratch) / target
            folder.mkdir()
            try:
                targets.find(target).export(model, workload, folder)
            except FeatherweightError as error:
                refusals.append(f"{target}: {error}")
                continue
            sizes[target] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            runners[target] = targets.find(target).load(folder, threads)
        predict = as_predict(runners["openvino"] if "openvino" in runners else next(iter(runners.values())))
        after = scores(workload.score, predict).tolist()
        inputs = [tensor[:1].numpy() for tensor in tensors(workload.example)]
        times = timed([eager(workload.model), *runners.values()], inputs, rounds=7)
    ratios = {target: ratio(times[0], taken).median for target, taken in zip(runners, times[1:], strict=True)}
    drop = sum(before) / len(before) - sum(after) / len(after)
    bounds = drop_bounds(before, after)
    return Row(name, said, sum(after) / len(after), drop, *bounds, sizes, ratios, seconds, "; ".join(refusals))


def _said(step: Pass) -> str:
    told = {k: v for k, v in step.settings().items() if v != getattr(type(step)(), k)}
    return step.name() + (f" {', '.join(f'{k} {v}' for k, v in told.items())}" if told else "")


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """The table, one for each workload."""
    parts = ["# Techniques, each alone", "<!-- Written by benchmarks/techniques.py. -->"]
    columns = targets.names()
    for name in dict.fromkeys(row["workload"] for row in rows):
        parts.append(f"## {name}\n")
        parts.append("| steps | score | drop at most | MB | " + " | ".join(f"× {t}" for t in columns) + " | seconds |")
        parts.append("|---" * (5 + len(columns)) + "|")
        for row in rows:
            if row["workload"] != name:
                continue
            if not row["bytes"]:
                parts.append(f"| {row['steps']} | refused: {row['refused']} |" + " |" * (3 + len(columns)))
                continue
            paces = " | ".join(f"{row['ratios'][t]:.2f}" if t in row["ratios"] else "–" for t in columns)
            megabytes = min(row["bytes"].values()) / 1e6
            parts.append(
                f"| {row['steps']} | {row['score']:.4f} | {row['drop_upper']:+.4f} | {megabytes:.2f} | {paces} "
                f"| {row['seconds']:.1f} |"
            )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, help="of examples/")
    parser.add_argument("--passes", default=",".join(passes.names()), help="separated by commas; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("out/techniques.json"))
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.workloads:
        workload = load(str(EXAMPLES / f"{name}.py"))
        before = scores(workload.score, predictor(workload.model)).tolist()
        for steps in recipes(workload, name, arguments.passes.split(",")):
            said = " + ".join(_said(step) for step in steps) or "the original"
            if any((row["workload"], row["steps"]) == (name, said) for row in rows):
                continue
            rows.append(asdict(run(name, workload, steps, before, arguments.threads)))
            arguments.json.write_text(json.dumps(rows, indent=1))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
