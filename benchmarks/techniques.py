"""Every pass at several strengths on real networks: what it costs in score, and what it saves in bytes and time.

    python benchmarks/techniques.py [image text speech] [--passes prune_random,quantize_gptq] [--threads 2]
        [--folder out/techniques] [--markdown docs/techniques.md] [--untimed]

Each row is one recipe of the pass alone; passes that teach follow a pruning that they are to repair, which stands in a
row of its own, and passes that prepare for another are followed by it. Batch norms are folded first where weights are
changed. A recipe is run once, exported to every target, scored as the artifact of the first target that can hold it,
and timed on all of them, in turn with the eager original; the ratio is eager fp32 over the artifact. A pass that is not
in STRENGTHS runs with its defaults, so a new one needs nothing here. Rows end up in a JSON file one by one, and what is
there already is not run again.

With --untimed nothing is timed and the exported files stay in the folder, so that the long part may run beside other
work; a later call on a quiet machine times them and removes them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peers_ptq import EXAMPLES, as_predict, eager, timed
from torch import Tensor, nn

from featherweight import passes, targets
from featherweight.artifact import check_floats
from featherweight.errors import FeatherweightError
from featherweight.measure import drop_bounds
from featherweight.passes import Pass, build
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import encodings
from featherweight.timing import ratio
from featherweight.workload import Workload, load, predictor, scores, tensors

WORKLOADS = ("image", "text", "speech")
SHARES = [{"share": 0.2}, {"share": 0.5}]
BITS = [{"bits": 4}, {"bits": 3}]
STRENGTHS: dict[str, list[dict[str, Any]]] = {
    "prune_random": SHARES,
    "prune_magnitude": [*SHARES, {"share": 0.5, "scope": "global"}],
    "prune_wanda": SHARES,
    "prune_sparsegpt": [*SHARES, {"share": 0.5, "pattern": "2:4"}],
    "prune_heads": [{"share": 0.1}, {"share": 0.25}],
    "drop_layers": [{"share": 0.17}, {"share": 0.34}],
    "merge_positions": [{"share": 0.5}, {"share": 1.0}, {"share": 0.5, "size": 4}],
    "truncate_inputs": [{"share": 0.25}, {"share": 0.5}],
    "factorize_svd": [{"share": 0.7}, {"share": 0.5}, {"share": 0.5, "whiten": False}],
    "factorize_tucker": [{"share": 0.7}, {"share": 0.5}],
    "quantize_static": [{"range": "mse"}, {"range": "minmax"}],
    "quantize_weights": [
        {"bits": 8},
        {"bits": 4},
        *({"bits": bits, "block": 64} for bits in (4, 3)),
        {"bits": 4, "block": 64, "offset": True},
    ],
    "quantize_gptq": [{"bits": 4, "block": 64}, {"bits": 3, "block": 64}],
    "quantize_hqq": BITS,
    "quantize_awq": BITS,
    "quantize_autoround": [{"bits": 4, "block": 64}, {"bits": 3, "block": 64}],
    "quantize_fixed": [{"bits": 8}, {"bits": 6}],
    "cluster_kmeans": BITS,
    "compand_weights": [{"bits": 8}, {"bits": 4}],
    "scale_weights": [{"narrow": "float16"}, {"narrow": "float8"}],
}
STEPS = {"image": (60, 240), "text": (25, 100), "speech": (10, 40)}  # of passes that teach
FOLLOWED = {"equalize_layers": "quantize_fixed", "smooth_activations": "quantize_static"}  # of use for others alone
CHANNELS = {"image": 0.2, "text": 0.2, "speech": 0.1}  # shares of prune_channels that leave something to compare
IMPORTANCES = ("random", "magnitude", "taylor", "joint")
TEACHING = ("distill_",)
DRAWS = 3  # of what is drawn at random: the score is the mean, bytes and ratios are those of the last
FIRST_FOLDED = ("quantize_", "cluster_", "compand_", "scale_", "prune_", "factorize_", *FOLLOWED)


INTRODUCTION = """# Techniques, each alone

<!-- Written by benchmarks/techniques.py. -->

What each pass does by itself to the networks of `examples/`, without a search. `drop at most` is the upper end of the
95 % interval of the drop of the score, `MB` the smallest file of the targets, `packed MB` what the weights would take
with codes at their own width and zeros in a bitmap, `×` how many times faster than the eager fp32 original (batch 1, 2
threads; – where it was not timed or cannot run), `seconds` those that the pass took, which are rough: the long part may
run beside other work. Rows of one table may have been timed on different days, between which that ratio of one and the
same file moved by a third; so compare the columns of a row, and rows only where they differ by more. Batch norms are
folded first where weights are changed. What is drawn at random is drawn three times, and has the mean of three scores.
The rows of speech are older than the readings in which its phrases are scored now, and than half of what it is taught
on: they are scored on the recordings alone (the original 0.9253, in six readings 0.9070).
"""


@dataclass(frozen=True)
class Row:
    """One recipe on one network. `ratios` by target: eager fp32 over the artifact, the median over rounds.

    `packed` is what the weights would take with codes at their own width, and zeros in a bitmap where that is smaller.
    """

    workload: str
    steps: str
    score: float = 0.0
    drop: float = 0.0
    drop_low: float | None = None
    drop_upper: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)
    packed: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    refused: str = ""


def recipes(workload: Workload, name: str, wanted: list[str]) -> Iterator[tuple[str, tuple[Pass, ...]]]:
    """What each row is called, and its steps; the original first."""
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in workload.model.modules())
    fold = (build("fold_batchnorm", {}, "fold"),) if has_norms else ()
    share = CHANNELS[name]
    halved = [{"share": part, "importance": kind} for kind in IMPORTANCES for part in (share / 2, share)]
    strengths = {**STRENGTHS, "prune_channels": halved}
    yield "the original", ()
    for kind in wanted:
        if kind.startswith(TEACHING):
            before = build("prune_channels", {"share": share, "importance": "taylor"}, "repaired")
            for steps in STEPS[name]:
                settings = {"steps": steps, "lr": 0.005 if has_norms else 0.001, "epochs": 1.0}
                yield f"prune_channels share {share} + {kind} steps {steps}", (before, build(kind, settings, kind))
            continue
        first = fold if kind.startswith(FIRST_FOLDED) and kind != "prune_channels" else ()
        after = [FOLLOWED[kind]] if kind in FOLLOWED else []
        for settings in strengths.get(kind, [{}]):
            steps = (*first, build(kind, settings, kind), *(build(name, {}, name) for name in after))
            yield " + ".join([said(kind, settings), *after]), steps


def said(kind: str, settings: Mapping[str, Any]) -> str:
    return f"{kind} {', '.join(f'{k} {v}' for k, v in settings.items())}".strip()


def compressed(row: Row, workload: Workload, steps: tuple[Pass, ...], before: list[float], folder: Path) -> Row:
    """The row with its score and bytes, or its refusal; the files of each target are left in `folder`."""
    start = time.perf_counter()
    found, seconds = [], 0.0
    for seed in range(DRAWS if "random" in row.steps else 1):
        try:
            model, _ = compress_model(Recipe(steps, targets.installed()[0]), workload, seed)
        except FeatherweightError as error:
            return replace(row, refused=str(error), seconds=time.perf_counter() - start)
        seconds = seconds or time.perf_counter() - start
        sizes, refusals = shipped(model, workload, folder)
        if not sizes:
            return replace(row, refused="; ".join(refusals), seconds=seconds)
        scored = "openvino" if "openvino" in sizes else next(iter(sizes))
        predict = as_predict(targets.find(scored).load(folder / scored, torch.get_num_threads()))
        found.append(scores(workload.score, predict))
    after = torch.stack(found).mean(0)
    mean = after.mean().item()
    bounds = dict(zip(("drop_low", "drop_upper"), drop_bounds(before, after.tolist()), strict=True))
    row = replace(row, score=mean, drop=sum(before) / len(before) - mean, bytes=sizes, packed=packed(model))
    return replace(row, **bounds, seconds=seconds, refused="; ".join(refusals))


def shipped(model: nn.Module, workload: Workload, folder: Path) -> tuple[dict[str, int], list[str]]:
    """The bytes of the files for each target, below `folder`, and what the others say that refuse."""
    sizes, refusals = {}, []
    for target in targets.installed():
        shutil.rmtree(folder / target, ignore_errors=True)
        (folder / target).mkdir(parents=True)
        try:
            check_floats(model, targets.find(target))
            targets.find(target).export(model, workload, folder / target)
        except FeatherweightError as error:
            shutil.rmtree(folder / target)
            refusals.append(f"{target}: {error}")
            continue
        sizes[target] = sum(path.stat().st_size for path in (folder / target).rglob("*") if path.is_file())
    return sizes, refusals


def packed(model: nn.Module) -> int:
    """Bytes of all weights: each code at its own width, zeros in a bitmap where that is smaller; tables and scales."""
    encoded = encodings(model).values()
    total = sum(_packed(e.decode(), getattr(e, "bits", e.bits_per_weight)) for e in encoded)
    others = ("scale", "offset", "table", "columns")
    beside = sum(b.nbytes for e in encoded for name, b in e.named_buffers() if name in others)
    return total + beside + sum(p.nbytes for p in model.parameters())


def _packed(dense: Tensor, bits: float) -> int:
    """
    >>> _packed(torch.zeros(80), 8), _packed(torch.ones(80), 8)
    (10, 80)
    """
    count = dense.numel()
    return math.ceil(min(count * bits, count + int((dense != 0).sum()) * bits) / 8)


def clocked(row: Row, workload: Workload, folder: Path, threads: int) -> Row:
    """The row with the ratio of each target's file in `folder`."""
    runners = {target: targets.find(target).load(folder / target, threads) for target in row.bytes}
    inputs = [tensor[:1].numpy() for tensor in tensors(workload.example)]
    times = timed([eager(workload.model), *runners.values()], inputs, rounds=7)
    pairs = zip(runners, times[1:], strict=True)
    return replace(row, ratios={target: ratio(times[0], taken).median for target, taken in pairs})


def markdown(rows: list[Row]) -> str:
    """The table, one for each workload."""
    columns = targets.names()
    parts = [INTRODUCTION]
    for name in dict.fromkeys(row.workload for row in rows):
        parts.append(f"## {name}\n")
        paces = " | ".join(f"× {target}" for target in columns)
        parts.append(f"| steps | score | drop at most | MB | packed MB | {paces} | seconds |")
        parts.append("|---" * (6 + len(columns)) + "|")
        own = sorted((row for row in rows if row.workload == name), key=_place)
        parts.extend(_line(row, columns) for row in own)
        parts.append("")
        refusals = [row for row in own if row.refused]
        parts.extend(f"- {row.steps}: {' '.join(row.refused.split())}" for row in refusals)
        parts.extend([""] if refusals else [])
    return "\n".join(parts).rstrip() + "\n"


def _place(row: Row) -> tuple[bool, bool, str]:
    """The original first, then passes by name, and last what distillation repairs."""
    return row.steps != "the original", any(kind in row.steps for kind in TEACHING), row.steps


def _line(row: Row, columns: Sequence[str]) -> str:
    if not row.bytes:
        return f"| {row.steps} | refused, see below |" + " |" * (4 + len(columns))
    paces = " | ".join(f"{row.ratios[t]:.2f}" if t in row.ratios else "–" for t in columns)
    return (
        f"| {row.steps} | {row.score:.4f} | {row.drop_upper:+.4f} | {min(row.bytes.values()) / 1e6:.2f} "
        f"| {row.packed / 1e6:.2f} | {paces} | {row.seconds:.1f} |"
    )


def written(path: Path) -> list[Row]:
    """Rows of the table that `markdown` wrote, for others to read; `bytes` of each target timed are the smallest's."""
    found, workload, columns = [], "", list[str]()
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            workload = line.removeprefix("## ")
        elif line.startswith("| steps |"):
            columns = [cell.removeprefix("× ") for cell in cells if cell.startswith("× ")]
        elif len(cells) == 6 + len(columns) and cells[1][:1].isdigit():
            steps, score, upper, size, apart, *paces, seconds = cells
            ratios = {name: float(pace) for name, pace in zip(columns, paces, strict=True) if pace != "–"}
            sizes = dict.fromkeys(ratios, round(1e6 * float(size)))
            row = Row(workload, steps, float(score), drop_upper=float(upper), bytes=sizes, ratios=ratios)
            found.append(replace(row, packed=round(1e6 * float(apart)), seconds=float(seconds)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, help="of examples/")
    parser.add_argument("--passes", default=",".join(passes.names()), help="separated by commas; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/techniques"), help="of rows.json and of files to time")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--untimed", action="store_true", help="leave the timing to a later call")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(arguments.folder / "rows.json")
    for name in arguments.workloads:
        workload = load(str(EXAMPLES / f"{name}.py"))
        before = scores(workload.score, predictor(workload.model)).tolist()
        for steps_said, steps in recipes(workload, name, arguments.passes.split(",")):
            folder = arguments.folder / name / re.sub(r"[^\w.+:-]", "_", steps_said)
            row = rows.find(name, steps_said)
            if row is None or (row.bytes and not row.ratios and not folder.is_dir()):
                row = rows.keep(compressed(Row(name, steps_said), workload, steps, before, folder))
            if row.bytes and not row.ratios and not arguments.untimed:
                rows.keep(clocked(row, workload, folder, arguments.threads))
                shutil.rmtree(folder)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows.rows), encoding="utf-8")


class Rows:
    """The rows in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []

    def find(self, workload: str, steps: str) -> Row | None:
        return next((row for row in self.rows if (row.workload, row.steps) == (workload, steps)), None)

    def keep(self, row: Row) -> Row:
        """Adds a row, or puts it in the place of the one of that name."""
        old = self.find(row.workload, row.steps)
        self.rows = [row if r is old else r for r in self.rows] if old else [*self.rows, row]
        self.path.write_text(json.dumps([asdict(r) for r in self.rows], indent=1))
        print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
        return row


if __name__ == "__main__":
    main()
