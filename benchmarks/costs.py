"""How well the cost table of this machine predicts whole networks: predicted and measured milliseconds side by side.

    python benchmarks/costs.py [image text] [--target onnxruntime,openvino] [--threads 2] [--batch 1]
        [--shares 0.3,0.5] [--anew] [--json out/costs.json]

For each workload and target: the network as it is, in int8, in weights of 4 bits, and with shares of its channels
removed, in floats and in int8. Nothing is trained, for the time does not depend on it. Predictions are shown twice.
"Before" is the sum over the layers. "After" is corrected by what the network as it is took in the same precision: that
one is what the correction was fitted to, so its error is zero by construction where the sum was too small, and it
counts in no summary. All networks of one workload and target are timed in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from featherweight import passes, targets
from featherweight.artifact import build, versions_of
from featherweight.cost_table import CostTable, Estimate, corrected_ms, corrections, cost_table, relative_error
from featherweight.errors import ExportError, LayerError
from featherweight.machine import machine, physical_cores
from featherweight.measure import timing_inputs
from featherweight.passes import Pass
from featherweight.progress import Progress
from featherweight.recipe import Recipe, compress_model
from featherweight.timing import Subject, interleave, latency
from featherweight.workload import Workload, load

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NUMBERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "fp32": [],
    "int8": [("quantize_static", {})],
    "int4": [("quantize_weights", {"bits": 4})],
}


def variants(workload: Workload, target: str, shares: Sequence[float]) -> Iterator[tuple[str, tuple[Pass, ...]]]:
    """Recipes' steps by what they do, those that corrections are fitted to first."""
    norms = any(isinstance(module, NORMS) for module in workload.start.modules())
    fold = [("fold_batchnorm", {})] if norms else []
    multiple = targets.find(target).width_multiple
    for share in (0.0, *shares):
        shape = [("prune_channels", {"share": share, "multiple": multiple})] if share else []
        for precision, numbers in NUMBERS.items():
            if share and precision == "int4":
                continue
            steps = [passes.build(name, settings, "costs.py") for name, settings in (*shape, *fold, *numbers)]
            yield (f"{precision}, {share:.0%} of the channels removed" if share else precision), tuple(steps)


def compared(workload: Workload, table: CostTable, shares: Sequence[float], folder: Path) -> list[dict[str, Any]]:
    """A row for each variant: what the table says of it, and how long it takes."""
    estimates: dict[str, Estimate] = {}
    subjects = []
    for name, steps in variants(workload, table.target, shares):
        recipe = Recipe(steps, table.target)
        try:
            model, _ = compress_model(recipe, workload)
            artifact = build(recipe, workload, folder / recipe.digest)
        except (LayerError, ExportError) as error:
            print(f"    {name}: left out: {error}", flush=True)
            continue
        estimates[name] = table.estimate(model, workload)
        subjects.append(Subject(name, folder=artifact.folder))
    timings = interleave(subjects, timing_inputs(workload, table.batch), threads=table.threads)
    measured = {name: latency(rounds) for name, rounds in timings.rounds.items()}
    known = corrections([(estimates[name], measured[name]) for name in NUMBERS if name in estimates])
    return [
        {
            "variant": name,
            "measured_ms": measured[name],
            "before_ms": estimate.layers_ms,
            "before_error": relative_error(estimate.layers_ms, measured[name]),
            "after_ms": corrected_ms(estimate, known),
            "after_error": relative_error(corrected_ms(estimate, known), measured[name]),
            "fitted": name in NUMBERS,
            "waiting_share": timings.waiting_share[name],
            "samples_ms": timings.rounds[name],
        }
        for name, estimate in estimates.items()
    ]


class Lines(Progress):
    def line(self, text: str) -> None:
        print(f"    {text}", flush=True)


def show(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"    {row['variant']:<36} measured {row['measured_ms']:8.3f}   before {row['before_ms']:8.3f} "
            f"({row['before_error']:+.0%})   after {row['after_ms']:8.3f} ({row['after_error']:+.0%})"
            + ("   fitted to" if row["fitted"] else ""),
            flush=True,
        )


def mean_error(rows: Sequence[dict[str, Any]], when: str) -> float:
    """The mean size of the relative errors, of those that no correction was fitted to."""
    return float(np.mean([abs(row[f"{when}_error"]) for row in rows if not row["fitted"]] or [np.nan]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["image", "text"], help="of examples/, or a workload's file")
    parser.add_argument("--target", default="onnxruntime,openvino")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shares", default="0.3,0.5", help="of the channels that are removed")
    parser.add_argument("--anew", action="store_true", help="measure the tables again")
    parser.add_argument("--json", type=Path, default=Path("out/costs.json"))
    chosen = parser.parse_args()
    shares = [float(share) for share in chosen.shares.split(",") if share]
    found: list[dict[str, Any]] = []
    for name in chosen.workloads:
        workload = load(name if name.endswith(".py") else str(EXAMPLES / f"{name}.py"))
        for target in chosen.target.split(","):
            begin = time.monotonic()
            settings = {"threads": chosen.threads, "batch": chosen.batch, "anew": chosen.anew}
            table = cost_table(workload, target, progress=Lines(), **settings)
            seconds = time.monotonic() - begin
            print(f"{name} on {target}: {len(table.own)} shapes, {table.fresh} entries measured, {seconds:.0f} s")
            with tempfile.TemporaryDirectory(prefix="featherweight-") as scratch:
                rows = compared(workload, table, shares, Path(scratch))
            show(rows)
            print(f"    mean error before {mean_error(rows, 'before'):.0%}, after {mean_error(rows, 'after'):.0%}")
            found.append(
                {
                    "workload": name,
                    "target": target,
                    "threads": chosen.threads,
                    "batch": chosen.batch,
                    "shapes": len(table.own),
                    "entries": len(table.entries),
                    "measured_now": table.fresh,
                    "table_seconds": seconds,
                    "mean_error_before": mean_error(rows, "before"),
                    "mean_error_after": mean_error(rows, "after"),
                    "rows": rows,
                    "versions": versions_of(target),
                }
            )
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            chosen.json.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
