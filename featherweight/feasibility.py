"""What can be said of a search before it has cost much: whether its budget is within reach, and what memory it takes.

A bound that nothing can meet is named early, with the reason; the search goes on all the same, for its frontier and its
nearest point are worth having. These are bounds on what any candidate could do, not predictions of what one will: what
is not named here may be out of reach nevertheless. Whether a trial keeps to the budget is `trials`' affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from featherweight.candidates import LARGEST_SHARE
from featherweight.facts import batch_size
from featherweight.measure import Baseline, Measurement, drop_bounds
from featherweight.timing import peak_rss_bytes
from featherweight.trials import Budget
from featherweight.workload import Batch, Workload, call, tensors

LEFT = (1 - LARGEST_SHARE) ** 2  # of weights and arithmetic, where layers narrow on both sides
LEAST_BITS = 4  # of a weight, as runtimes store it
FASTER = 8  # times, int8 than the fastest floats: more than was ever seen
OF_A_WEIGHT = 5  # times its bytes, when it is trained: teacher, student, gradient, two moments


def out_of_reach(budget: Budget, original: Baseline, plain: Sequence[Measurement]) -> Iterator[str]:
    """A sentence for each bound that no candidate can meet, unless it is better than the original.

    Args:
        budget: with all bounds.
        original: with its scores example by example.
        plain: the network as it is, on every target that can hold it; at least one.
    """
    before, allowed = original.scores, budget.allowed(original.measurement.score)
    right_or_wrong = len(set(before)) <= 2  # where scores have more values, smaller losses could show less
    if right_or_wrong and len(before) > 1 and (least := drop_bounds(before, before)[1]) > allowed:
        yield (
            f"max_drop={budget.max_drop}: with {len(before)} examples a drop below {least:.4g} cannot be shown, even "
            "where none is seen, so only a network that returns the same, or scores higher, will do. Score more "
            "examples, or allow more."
        )
    weights = original.measurement.original_parameters
    if budget.max_bytes is not None and budget.max_bytes < (size := weights * LEAST_BITS / 8 * LEFT):
        yield (
            f"max_bytes={budget.max_bytes}: {weights:,} weights take {size:,.0f} bytes even in {LEAST_BITS} bits and "
            f"with {LARGEST_SHARE:.0%} of the channels gone. Allow more, or start from a smaller network."
        )
    fastest = min(found.latency_ms for found in plain)
    if budget.max_latency_ms is not None and budget.max_latency_ms < (soonest := fastest * LEFT / FASTER):
        yield (
            f"max_latency_ms={budget.max_latency_ms}: the network as it is takes {fastest:.3g} ms here, and the most "
            f"that pruning and int8 can make of it is about {soonest:.2g}. Allow more, or start from a smaller network."
        )
    empty = min((m.peak_rss_bytes - m.bytes for m in plain if m.peak_rss_bytes), default=0)  # what is no weight
    if budget.max_ram is not None and budget.max_ram < empty // 2:
        yield (
            f"max_ram={budget.max_ram}: a process that runs the network as it is holds {empty:,} bytes beside the "
            "weights, most of them libraries. Allow more, or choose another target."
        )


def predicted_ram(workload: Workload) -> int:
    """About the bytes that this process will hold at most while it compresses the workload's network.

    What it holds already, weights as often as training keeps them, and what a training batch leaves for the way back.
    Not counted are what a pass needs beside training, and memory that was freed and not given back (LOG.md).
    """
    first = workload.calibration[0] if workload.train is None else next(iter(workload.train), None)
    rows = batch_size(first)
    weights = sum(parameter.nbytes for parameter in workload.start.parameters())
    return (peak_rss_bytes() or 0) + OF_A_WEIGHT * weights + saved_bytes(workload.start, workload.calibration[0], rows)


def saved_bytes(model: nn.Module, batch: Batch, rows: int) -> int:
    """What the forward of a batch of `rows` keeps for the backward, weights aside.

    Measured on the first rows of `batch` and scaled; the model is not changed.

    >>> saved_bytes(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (torch.zeros(2, 4),), rows=10)
    480
    """
    inputs = tensors(batch)
    weights = {name: p.detach().requires_grad_(p.is_floating_point()) for name, p in model.named_parameters()}
    known = {value.untyped_storage().data_ptr() for value in (*weights.values(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in known:
            kept[place] = value.untyped_storage().nbytes()
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        held = call(lambda *args, **named: torch.func.functional_call(model, weights, args, named), batch)
    del held  # until here, so that no storage is given to another tensor
    return round(sum(kept.values()) * rows / len(inputs[0]))
