"""What shapes of a network would cost on a target, as its cost table predicts before any of them is trained.

Shares of the channels are removed, whichever channels, and the table says what the layers that are left take; blocks
are alike, so each that goes saves the mean of theirs. A correction fitted to what the whole network was measured to
take makes latencies of the sums. Which shapes are worth trying is the strategy's affair.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from featherweight import passes
from featherweight.artifact import write_text_atomic
from featherweight.candidates import LARGEST_SHARE, Facts, Shape, routes
from featherweight.cost_table import CostTable, Estimate, corrected_ms, corrections
from featherweight.errors import ArtifactError
from featherweight.passes.drop_layers import removable
from featherweight.recipe import Recipe, compress_model
from featherweight.workload import Workload

PARTS = 4  # of LARGEST_SHARE, at each of which the table is asked; between them is interpolated


def predicted(
    workload: Workload, facts: Facts, table: CostTable, precision: str, latency_ms: float
) -> dict[Shape, float]:
    """Milliseconds by shape: of PARTS shares of the channels, each with every number of blocks removed.

    Args:
        facts: of the workload.
        table: of the target.
        precision: of the layers' arithmetic, as the table calls it.
        latency_ms: of the whole network in that precision, as it was measured.

    Raises:
        LayerError: no channel of the network can be removed.
    """
    names = [block.name for block in removable(workload.start, workload)] if facts.blocks > 1 else []
    deepest = max((shape.dropped for way in routes(facts) for shape in way), default=0)
    found: dict[Shape, Estimate] = {}
    for share in (round(LARGEST_SHARE * part / PARTS, 4) for part in range(PARTS + 1)):
        layers = table.by_layer(_narrowed(workload, facts, table.target, share), workload, precision)
        inside = _total(e for name, e in layers.items() if any(name.startswith(f"{block}.") for block in names))
        for dropped in range(deepest + 1):
            part = dropped / max(len(names), 1)
            all_ = _total(layers.values())
            left = all_.layers_ms - part * inside.layers_ms, all_.values - part * inside.values
            found[Shape(share, dropped)] = Estimate(*left, precision)
    corrected = corrections([(found[Shape(0.0)], latency_ms)])
    return {shape: corrected_ms(estimate, corrected) for shape, estimate in found.items()}


def _narrowed(workload: Workload, facts: Facts, target: str, share: float) -> nn.Module:
    """The network without a share of its channels, as the search would remove them."""
    settings = {"share": share, "multiple": facts.multiples.get(target, 8), "importance": "magnitude"}
    steps = (passes.build("prune_channels", settings, "the search"),) if share else ()
    return compress_model(Recipe(steps, target), workload)[0]


def _total(estimates: Iterable[Estimate]) -> Estimate:
    kept = list(estimates)
    return Estimate(sum(e.layers_ms for e in kept), sum(e.values for e in kept), "")


# ------------------------------------------------------------------------------------------------ in a search's folder


def stored(path: Path, key: Mapping[str, Any]) -> dict[Shape, float]:
    """What `store` wrote for the same `key`; nothing where there is nothing or another key.

    Raises:
        ArtifactError: the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != json.loads(json.dumps(key)):
            return {}
        return {Shape(float(share), int(dropped)): float(ms) for share, dropped, ms in content["shapes"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} holds no predictions of this version ({str(error)[:200]}). Delete it.") from error


def store(path: Path, key: Mapping[str, Any], found: Mapping[Shape, float]) -> None:
    """Writes predictions, all at once, so that a search that goes on goes by the same."""
    rows = [[shape.share, shape.dropped, ms] for shape, ms in found.items()]
    write_text_atomic(path, json.dumps({"key": key, "shapes": rows}, indent=1) + "\n")
