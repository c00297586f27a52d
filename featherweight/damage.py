"""What a change to a network does to its outputs, for passes that try changes out.

What is changed, and which change is taken, is a pass's affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.errors import LayerError
from featherweight.workload import Batch, Workload, call, like, outputs, tensors

EXAMPLES, FEWEST = 64, 3  # with which networks are compared, at most and at least
VALUES = 1 << 24  # of outputs that are compared, at most
AS_MANY = 4  # times the examples that are compared, at most: those by which changes are made


def damage(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The squared error of `found` over what the means of `wanted` would give, averaged over outputs.

    >>> damage([torch.tensor([2.0, 2.0])], [torch.tensor([1.0, 3.0])])
    1.0
    """
    return sum(map(_relative, found, wanted)) / len(wanted)


def _relative(found: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]) -> float:
    a, b = found.double(), wanted.double()
    spread = (b - b.mean()).square().mean().clamp(min=1e-30)
    return float((a - b).square().mean() / spread)


def floating_outputs(model: nn.Module, batch: Batch, step: str) -> list[Tensor]:
    """The outputs for `batch` that `damage` can compare, on behalf of the pass called `step`."""
    with torch.no_grad():
        found = [value for value in outputs(call(model, batch)) if value.is_floating_point()]
    if not found:
        raise LayerError(
            f"{step} compares outputs, but the network returns whole numbers alone. Return logits from its forward."
        )
    return found


def examples_to_compare(model: nn.Module, workload: Workload, step: str) -> Batch:
    """One batch of the first EXAMPLES of calibration data; of so few as return VALUES, where each returns many.

    Raises:
        LayerError: the network returns nothing that can be compared, on behalf of the pass called `step`.
    """
    one = floating_outputs(model, first_examples(workload.calibration, 1), step)
    values = sum(value[0].numel() for value in one)
    return first_examples(workload.calibration, max(FEWEST, min(EXAMPLES, VALUES // max(values, 1))))


def examples_apart(model: nn.Module, workload: Workload, step: str) -> tuple[Batch, Batch]:
    """One batch to compare, as `examples_to_compare` has it, and another of other examples, by which a change is made.

    What fits some examples does less harm to those than to others. There are at most EXAMPLES of the latter, and
    AS_MANY as are compared; where there are too few examples for two batches, half of them are in each.

    Raises:
        LayerError: the network returns nothing that can be compared, on behalf of the pass called `step`.
    """
    compared = len(tensors(examples_to_compare(model, workload, step))[0])
    chosen = first_examples(workload.calibration, compared + min(EXAMPLES, AS_MANY * compared))
    count = len(tensors(chosen)[0])
    compared = min(compared, max(1, count // 2))
    return _some(chosen, slice(compared)), _some(chosen, slice(min(compared, count - 1), None))


def _some(batch: Batch, which: slice) -> Batch:
    return like(batch, [values[which] for values in tensors(batch)])


def first_examples(batches: Sequence[Batch], count: int) -> Batch:
    """One batch of the first `count` examples."""
    parts = [torch.cat(values)[:count] for values in zip(*map(tensors, batches), strict=True)]
    return like(batches[0], parts)
