"""Removes whole channels, features and attention heads, so that what is left is an ordinary, narrower network.

What hangs together goes together (`coupling`). How much a unit u matters is the change of the loss that first-order
Taylor expansion predicts when the weights that read it are set to zero, squared and summed over calibration batches:

    I_u = Σ_batches (Σ_{w ∈ u} w · ∂L/∂w)²

There are no labels, and with the most likely class in their place the gradient nearly vanishes where the network is
sure. So labels are drawn from the network's own predictions, which makes I an estimate of the Fisher information
(Theis et al. 2018, arXiv:1801.05787); outputs that are no logits are multiplied by noise instead.

Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv:1906.10771, equation 8; coupling as in Fang et al. 2023,
arXiv:2301.12900; magnitude: Li et al. 2017, arXiv:1608.08710.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.coupling import Cuts, Group, cut, groups, trial
from featherweight.errors import LayerError
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import done, left, matches
from featherweight.workload import Batch, Workload, call, outputs

Scores = Float[np.ndarray, " units"]


def per_index(values: Tensor, dim: int) -> Float[np.ndarray, " size"]:
    """The sums of `values` over all dimensions but `dim`."""
    return values.detach().movedim(dim, 0).flatten(1).sum(1).double().numpy()


def sampled_loss(logits: Tensor, rng: torch.Generator) -> Tensor:
    """Cross-entropy against labels drawn from the predictions; noise times the outputs where they are no logits.

    Args:
        logits: (n, …, classes) or, when there is but one number per example, anything.
    """
    if logits.dim() < 2 or logits.shape[-1] < 2:
        return (logits * torch.randn(logits.shape, generator=rng)).sum()
    rows = logits.flatten(0, -2)
    labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=rng)[:, 0]
    return nn.functional.cross_entropy(rows, labels, reduction="sum")


def removals(
    scores: Sequence[Scores], costs: Sequence[float], widths: Sequence[int], share: float, multiple: int, uniform: bool
) -> list[int]:
    """How many units of each group go: those that matter least for what they cost, in steps that keep widths round.

    Args:
        scores: of the units of each group.
        costs: of one unit of each group, in any unit of arithmetic.
        widths: channels in one unit of each group.
        share: of the whole cost, 0 to 1.
        multiple: what the channels that stay in a group are a multiple of, where its units allow it.
        uniform: the same share of every group, in place of the least important anywhere.

    >>> removals([np.array([1.0, 2.0, 9.0, 9.0]), np.array([8.0, 8.0])], [1.0, 1.0], [1, 1], 0.34, 1, False)
    [2, 0]
    """
    blocks: list[tuple[float, int, int]] = []  # (importance for the cost, group, units): taken from the front
    for group, (values, cost, width) in enumerate(zip(scores, costs, widths, strict=True)):
        ordered, step = np.sort(values), max(1, multiple // width)
        start = len(values) % step
        edges = ([0] if start else []) + list(range(start, len(values), step))
        for position, (low, high) in enumerate(pairwise(edges)):
            rank = position / max(1, len(edges)) if uniform else float(ordered[low:high].mean()) / max(cost, 1e-12)
            blocks.append((rank, group, high - low))
    allowed = share * sum(len(values) * cost for values, cost in zip(scores, costs, strict=True))
    counts, spent = [0] * len(scores), 0.0
    for _, group, size in sorted(blocks):
        if spent + size * costs[group] <= allowed * (1 + 1e-9):
            counts[group] += size
            spent += size * costs[group]
    return counts


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Removes the channels, features and heads that matter least, wherever they are.

    Args:
        share: of the arithmetic of all units that may go; what is left of the network's arithmetic is less than
            1 - share, for a unit that goes takes rows of one layer and columns of the next.
        importance: "taylor" (on calibration data) or "magnitude" (of the weights that compute a unit).
        allocation: "global" (the least important for their cost, anywhere) or "uniform" (the same share everywhere).
        multiple: widths that stay are a multiple of it; heads are never split.
    """

    share: Annotated[float, Range(0.0, 0.9)] = 0.3
    importance: Annotated[str, Choice("taylor", "magnitude")] = "taylor"
    allocation: Annotated[str, Choice("global", "uniform")] = "global"
    multiple: Annotated[int, Range(1, 64)] = 8

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        free = self._free(groups(model, workload.example))
        scores = taylor(model, free, workload.calibration) if self.importance == "taylor" else magnitude(model, free)
        counts = removals(
            scores,
            [g.macs for g in free],
            [g.width for g in free],
            self.share,
            self.multiple,
            self.allocation == "uniform",
        )
        chosen = [
            (group, np.argsort(values, kind="stable")[:count].tolist())
            for group, values, count in zip(free, scores, counts, strict=True)
            if count
        ]
        for group, units in _safe(model, workload.example, chosen):
            width = len(group) * group.width
            kind = group.kind if group.kind != "heads" else "features in whole heads"
            done(group.name, f"{width} to {width - len(units) * group.width} {kind}")
        return model

    def _free(self, found: Sequence[Group]) -> list[Group]:
        """The groups that `where` chooses and that can be cut; the others are reported."""
        chosen = [group for group in found if all(matches(layer, self.where) for layer in group.layers)]
        free = [group for group in chosen if group.frozen is None and len(group) > 1]
        for group in chosen:
            if group.frozen is not None:
                left(group.name, group.frozen)
        if not free:
            names = ", ".join(group.name for group in found[:20])
            reasons = "; ".join(f"{group.name}: {group.frozen}" for group in chosen[:5])
            raise LayerError(
                f"where={self.where!r} leaves {self.name()} nothing to cut. "
                + (f"What it chooses must stay: {reasons}. " if reasons else f"There are: {names or 'no groups'}. ")
                + "Choose other layers, or leave the step out."
            )
        return free


def _safe(model: nn.Module, example: Batch, cuts: Cuts) -> list[tuple[Group, Sequence[int]]]:
    """Cuts `model` by all of `cuts` that leave the rest of it as it was, and returns those; the others are reported."""
    try:
        trial(model, example, cuts)
        kept = list(cuts)
    except LayerError:
        kept = []
        for group, units in cuts:
            try:
                trial(model, example, [(group, units)])
                kept.append((group, units))
            except LayerError as error:
                left(group.name, str(error))
    cut(model, kept)
    return kept


def _unit_sums(group: Group, sums: dict[str, list[np.ndarray]], role: str) -> Scores:
    """Per unit, the sums of the tensors that make or read it; `sums` holds them by tensor and dimension."""
    slices = group.inlets if role == "reads" else [s for s in group.slices if s.role == role]
    return np.sum([sums[s.names[0]][s.dim][s.index].sum(1) for s in slices], axis=0)


def taylor(model: nn.Module, found: Sequence[Group], batches: Sequence[Batch]) -> list[Scores]:
    """The importance of every unit of every group by first-order Taylor expansion, summed over `batches`."""
    rng = torch.Generator().manual_seed(0)
    parameters = {s.names[0]: model.get_parameter(s.names[0]) for g in found for s in g.inlets}
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    total = [np.zeros(len(group)) for group in found]
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                results = [output for output in outputs(call(model, batch)) if output.is_floating_point()]
                loss = torch.stack([sampled_loss(output, rng) for output in results]).sum()
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            sums = {
                name: [per_index((0 if g is None else g) * p.detach(), dim) for dim in range(p.dim())]
                for (name, p), g in zip(parameters.items(), gradients, strict=True)
            }
            for index, group in enumerate(found):
                total[index] += _unit_sums(group, sums, "reads") ** 2
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
    return total


def magnitude(model: nn.Module, found: Sequence[Group]) -> list[Scores]:
    """The squared L2 norm of the weights that compute each unit, over the mean of its group."""
    scores = []
    for group in found:
        made = {s.names[0] for s in group.slices if s.role == "makes"}
        tensors = {name: model.get_parameter(name).detach() for name in made}
        sums = {name: [per_index(t**2, dim) for dim in range(t.dim())] for name, t in tensors.items()}
        values = _unit_sums(group, sums, "makes")
        # Over the cost too, so that the division by the cost in `removals` leaves the relative norm.
        scores.append(values / max(values.mean(), 1e-30) * group.macs)
    return scores
