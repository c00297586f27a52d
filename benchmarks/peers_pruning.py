"""prune_channels beside torch-pruning: same networks, same number of parameters, same repair, one run.

    python benchmarks/peers_pruning.py [image image_mobile text] [--only 'torch-pruning*'] [--steps 150]
        [--threads 2] [--rounds 7] [--json out/peers_pruning.json] [--markdown FILE]

torch-pruning (Fang et al. 2023) comes with the extra `bench`. It is asked in four ways: importance by magnitude and by
Taylor expansion, ranked layer by layer and over the whole network; `ignored_layers` is the classifier. Its Taylor
importance needs labels, which it gets: those of as many training examples as we take calibration examples, without
labels. In transformers it removes whole heads, as we do, and is run with and without the hidden width.

Each contender is asked for the strength that leaves it nearest to the wanted share of parameters, all with widths in
multiples of 8. All are then taught by the original for the same steps. Scores are those of the exported OpenVINO
artifact on the search split, before teaching and after, with the upper bound of the paired drop; the ratio is eager
fp32 over that artifact, timed in turn. Layers are convolutions, linear layers and embeddings whose weight shrank.
Seconds are those of one pruning, importance included, save the gradients of torch-pruning, which are taken once. Rows
that are in the JSON file already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers_ptq import EXAMPLES, as_predict, eager, size_of, timed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featherweight import targets
from featherweight.measure import drop_bounds
from featherweight.passes import build
from featherweight.recipe import seeded
from featherweight.targets import Runner
from featherweight.timing import ratio
from featherweight.workload import Workload, call, load, outputs, scores, tensors

LEFT = {"image": (0.25,), "image_mobile": (0.5,), "text": (0.75,)}  # shares of the parameters that stay
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
OURS = (
    {"importance": "taylor", "allocation": "global"},
    {"importance": "taylor", "allocation": "uniform"},
    {"importance": "joint", "allocation": "global"},
    {"importance": "magnitude", "allocation": "global"},
    {"importance": "batchnorm", "allocation": "global"},
    {"importance": "random", "allocation": "global"},
)
MULTIPLE = 8
TRIALS = 7  # strengths that are tried, at most, to meet the number of parameters
TOLERANCE = 0.01  # by which it may be missed, relative to it

Prune = Callable[[float], nn.Module]  # a strength to a pruned copy


@dataclass(frozen=True)
class Row:
    """One contender at one size; shares are of the original's."""

    workload: str
    wanted: float
    contender: str
    parameters_share: float = 0.0
    macs_share: float = 0.0
    layers_cut: int = 0
    layers: int = 0
    score_before: float = 0.0
    score: float = 0.0
    drop: float = 0.0
    drop_upper: float = 0.0
    bytes: int = 0
    ratio: float = 0.0
    ratio_low: float = 0.0
    ratio_high: float = 0.0
    seconds: float = 0.0
    refused: str = ""


# ------------------------------------------------------------------------------------------------ contenders


def ours(workload: Workload, settings: Mapping[str, str], share: float) -> nn.Module:
    step = build("prune_channels", {"share": share, "multiple": MULTIPLE, **settings}, "prune_channels")
    with seeded(0):
        return step.apply(copy.deepcopy(workload.model), workload)


def label_gradients(workload: Workload) -> list[Tensor]:
    """The gradient of the cross-entropy with the labels of as many examples as there are for calibration."""
    model = copy.deepcopy(workload.model)
    missing = sum(len(tensors(batch)[0]) for batch in workload.calibration)
    with seeded(0):
        for batch, labels in workload.train or ():
            x = call(model, batch)
            nn.functional.cross_entropy(outputs(x)[0], labels, reduction="sum").backward()
            missing -= len(labels)
            if missing <= 0:
                break
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def torch_pruning(
    workload: Workload, importance: str, ranked: str, hidden: bool, gradients: Callable[[], list[Tensor]], share: float
) -> nn.Module:
    import torch_pruning as library

    model = copy.deepcopy(workload.model)
    kinds = {
        "magnitude": library.importance.GroupMagnitudeImportance,
        "taylor": library.importance.GroupTaylorImportance,
    }
    if importance == "taylor":
        for parameter, gradient in zip(model.parameters(), gradients(), strict=True):
            parameter.grad = gradient.clone()
    heads = {
        projection: attention.num_attention_heads
        for attention in attentions(model)
        for projection in (attention.query, attention.key, attention.value)
    }
    stream = [] if hidden else [m for n, m in model.named_modules() if n.endswith(("output.dense", "embeddings"))]
    library.pruner.BasePruner(
        model,
        workload.example,
        importance=kinds[importance](),
        global_pruning=ranked == "global",
        pruning_ratio=share,
        head_pruning_ratio=share,
        ignored_layers=[classifier(model), *stream],
        round_to=MULTIPLE,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    model.zero_grad()
    return model.eval()


def attentions(model: nn.Module) -> list[Any]:
    """The modules that project to queries, keys and values."""
    return [m for m in model.modules() if type(m).__name__ == "BertSelfAttention"]


def classifier(model: nn.Module) -> nn.Module:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def contenders(workload: Workload) -> Iterator[tuple[str, Prune]]:
    for settings in OURS:
        yield f"featherweight, {', '.join(settings.values())}", partial(ours, workload, settings)
    known: list[list[Tensor]] = []

    def gradients() -> list[Tensor]:
        known[:] = known or [label_gradients(workload)]
        return known[0]

    for hidden in (False, True) if attentions(workload.model) else (True,):
        for importance in ("taylor", "magnitude"):
            for ranked in ("global", "uniform"):
                name = f"torch-pruning, {importance}, {ranked}"
                name += ", hidden width too" if hidden and attentions(workload.model) else ""
                yield name, partial(torch_pruning, workload, importance, ranked, hidden, gradients)


# ------------------------------------------------------------------------------------------------ measuring


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, workload: Workload) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model, workload.example)
    return counter.get_total_flops()


def layers_cut(before: nn.Module, after: nn.Module) -> tuple[int, int]:
    """How many of its layers have a smaller weight now, and how many there are."""
    layers = {name: m.weight.shape for name, m in before.named_modules() if isinstance(m, LAYERS)}
    return sum(after.get_submodule(name).weight.shape != shape for name, shape in layers.items()), len(layers)


def sized(prune: Prune, before: int, wanted: float) -> tuple[nn.Module, float]:
    """What comes nearest to the wanted share of `before` parameters, by halving, and the seconds one pruning took."""
    low, high = 0.0, 0.9
    best: tuple[float, nn.Module, float] | None = None
    failed: Exception | None = None
    for _ in range(TRIALS):
        strength = (low + high) / 2
        start = time.perf_counter()
        try:
            model = prune(strength)
        except Exception as error:  # more than it can take
            failed, high = error, strength
            continue
        share = parameters(model) / before
        off = abs(share / wanted - 1)
        if best is None or off < best[0]:
            best = off, model, time.perf_counter() - start
        if off < TOLERANCE:
            break
        low, high = (strength, high) if share > wanted else (low, strength)
    if best is None:
        raise RuntimeError(f"no strength worked; the last one said: {failed}") from failed
    return best[1], best[2]


def ship(model: nn.Module, workload: Workload, folder: Path, threads: int) -> Runner:
    folder.mkdir()
    targets.find("openvino").export(model, workload, folder)
    return targets.find("openvino").load(folder, threads)


def run(
    name: str,
    workload: Workload,
    wanted: float,
    said: str,
    prune: Prune,
    before: list[float],
    options: argparse.Namespace,
) -> Row:
    try:
        model, seconds = sized(prune, parameters(workload.model), wanted)
        with tempfile.TemporaryDirectory() as scratch:
            untaught = ship(model, workload, Path(scratch) / "untaught", options.threads)
            score_before = scores(workload.score, as_predict(untaught)).mean().item()
            norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
            teach = build("distill_soft", {"steps": options.steps, "lr": 0.005 if norms else 0.001}, "distill_soft")
            with seeded(0):
                model = teach.apply(model, workload)
            runner = ship(model, workload, Path(scratch) / "taught", options.threads)
            after = scores(workload.score, as_predict(runner)).tolist()
            inputs = [tensor[:1].numpy() for tensor in tensors(workload.example)]
            times = timed([eager(workload.model), runner], inputs, options.rounds)
            bytes_ = size_of(Path(scratch) / "taught")
    except Exception as error:  # a peer that cannot do a network is a result, not a crash of the comparison
        return Row(name, wanted, said, refused=f"{type(error).__name__}: {str(error)[:300]}")
    speed = ratio(times[0], times[1])
    return Row(
        name,
        wanted,
        said,
        parameters(model) / parameters(workload.model),
        macs(model, workload) / macs(workload.model, workload),
        *layers_cut(workload.model, model),
        score_before,
        sum(after) / len(after),
        (sum(before) - sum(after)) / len(after),
        drop_bounds(before, after)[1],
        bytes_,
        speed.median,
        speed.low,
        speed.high,
        seconds,
    )


# ------------------------------------------------------------------------------------------------ the table


def markdown(rows: list[Mapping[str, Any]]) -> str:
    lines = [
        "| workload | parameters | contender | arithmetic | layers cut | score untaught | score | drop at most | MB "
        "| ratio | seconds |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        start = f"| {row['workload']} | {row['parameters_share'] or row['wanted']:.3f} | {row['contender']} | "
        if row["refused"]:
            lines.append(f"{start}refused: {row['refused']} |" + " |" * 7)
            continue
        lines.append(
            f"{start}{row['macs_share']:.3f} | {row['layers_cut']} of {row['layers']} | {row['score_before']:.4f} "
            f"| {row['score']:.4f} | {row['drop_upper']:+.4f} | {row['bytes'] / 1e6:.2f} "
            f"| {row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(LEFT), help="of examples/")
    parser.add_argument("--only", default="*", help="contenders whose name matches")
    parser.add_argument("--steps", type=int, default=150, help="of teaching")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--json", type=Path, default=Path("out/peers_pruning.json"))
    parser.add_argument("--markdown", type=Path, help="where to write the table; printed anyway")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.json.read_text()) if options.json.exists() else []
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for name in options.workloads:
        workload = load(str(EXAMPLES / f"{name}.py"))
        with tempfile.TemporaryDirectory() as scratch:
            original = ship(workload.model, workload, Path(scratch) / "original", options.threads)
            before = scores(workload.score, as_predict(original)).tolist()
        for wanted in LEFT[name]:
            for said, prune in contenders(workload):
                if not fnmatch(said, options.only) or any(
                    (row["workload"], row["wanted"], row["contender"]) == (name, wanted, said) for row in rows
                ):
                    continue
                rows.append(asdict(run(name, workload, wanted, said, prune, before, options)))
                options.json.write_text(json.dumps(rows, indent=1))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(markdown(rows))
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
