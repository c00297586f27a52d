"""Removes whole channels, features and attention heads, so that an ordinary, narrower network is left.

What hangs together goes together: `coupling` finds the units. How much a set S of them matters is how far the outputs
move, to first order, when the weights that read its units are set to zero, which is what its removal does:

    I_S = Σ_b ( Σ_{u ∈ S} e_ub )²,  e_ub = Σ_{w reads u} w · ∂L_b/∂w,  L_b = Σ_{i ∈ b} ⟨ε_i, f(x_i)⟩,  ε_i ~ N(0, 1)

for small batches b of the calibration data. There are no labels here, and guessing them helps little: at a trained
network's own answers the gradient of its loss nearly vanishes. The noise ε stands for all directions in which the
outputs could move: the expectation of I_S is Σ_i ‖Δ_S f(x_i)‖², the squared change itself (Hutchinson 1990,
doi:10.1080/03610919008812866, on the Gauss-Newton matrix of the squared error), whatever the outputs mean.

By `taylor` each unit is judged alone. Units that are read with one sign, as after a ReLU, harm together far more than
the sum of what each does alone: by `joint` the units of a group go one after another, each that which adds least to
I_S, for it may make up for what went before. What is left is then far nearer to the original as it stands; after
distillation it was no better on the network where both were compared (LOG.md).

Without data there are the sizes of weights: with what norm u is read, times that with which it is made, for what makes
one weaker and the other stronger by as much changes nothing. Where a batch norm comes after, which undoes the norm of
what makes u, its scale |γ_u| stands for that, in y_u = γ_u · (x_u − μ_u) / σ_u + β_u; it is also an importance by
itself. The control that all others must beat is a number drawn at random. Not here: training with a penalty on Σ |γ|,
which makes scales of what is not needed small.

Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv:1906.10771, equation 8, for e; Luo, Wu, Lin 2017,
arXiv:1707.06342, equation 6 and algorithm 1, for sets of channels, there with the next layer's outputs in place of the
network's; He, Fan, Qian, Tan, Yu 2014, doi:10.1109/ICASSP.2014.6853595, for the norms of what makes and of what reads;
Liu et al. 2017, arXiv:1708.06519, section 3, for the scales of batch norms; Fang et al. 2023, arXiv:2301.12900, for
what hangs together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from featherweight.coupling import Group, Slice, groups, tensor_of, trial
from featherweight.errors import LayerError, WorkloadError
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import done, left, matches
from featherweight.workload import Batch, Workload, call, like, outputs, tensors

Scores = Float[np.ndarray, " _"]

EXAMPLES = 128  # that importance is measured on
ALONE, TOGETHER = 2, 1  # of them share a draw of noise: with few draws units only seem to make up for one another

# ------------------------------------------------------------------------------------------------ mathematics


def per_index(values: Float[Tensor, "*shape"], dim: int) -> Float[np.ndarray, " size"]:
    """The sums of `values` over all dimensions but `dim`.

    >>> per_index(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), dim=1)
    array([4., 6.])
    >>> per_index(torch.tensor([1.0, 2.0]), dim=0)
    array([1., 2.])
    """
    return values.detach().movedim(dim, 0).reshape(values.shape[dim], -1).sum(1).double().cpu().numpy()


def noisy_loss(results: Sequence[Tensor], rng: torch.Generator) -> Float[Tensor, ""]:
    """Σ ⟨ε, output⟩ over all outputs, each over its root mean square so that none drowns the others."""
    total = torch.zeros(())
    for output in results:
        scale = output.detach().float().square().mean().sqrt().clamp(min=1e-12)
        noise = torch.randn(output.shape, generator=rng).to(output)
        total = total + ((output * noise).sum() / scale).to(total)
    return total


class Ranking(NamedTuple):
    """The units of a group in the order in which they go.

    Args:
        order: the first to go first.
        harm: what the first 0, 1, 2, ... of them matter together.
    """

    order: Int[np.ndarray, " units"]
    harm: Float[np.ndarray, " units_and_none"]


def apart(scores: Scores) -> Ranking:
    """Units that matter by themselves: several of them as much as their sum.

    >>> apart(np.array([3.0, 1.0]))
    Ranking(order=array([1, 0]), harm=array([0., 1., 4.]))
    """
    order = np.argsort(scores, kind="stable")
    return Ranking(order, np.concatenate([[0.0], scores[order].cumsum()]))


def alone(effects: Float[np.ndarray, "draws units"]) -> Ranking:
    """Units by what each does, whatever the others do.

    >>> alone(np.array([[1.0, 1.5, -2.0]]))
    Ranking(order=array([0, 1, 2]), harm=array([0.  , 1.  , 3.25, 7.25]))
    """
    return apart(np.square(effects).sum(axis=0))


def together(effects: Float[np.ndarray, "draws units"]) -> Ranking:
    """Units whose effects e add up before they are squared: each next one is that which adds least to I.

    >>> together(np.array([[1.0, 1.5, -2.0]]))
    Ranking(order=array([0, 2, 1]), harm=array([0.  , 1.  , 1.  , 0.25]))
    """
    single = np.square(effects).sum(axis=0)
    gone = np.zeros(len(single), dtype=bool)
    moved = np.zeros(len(effects))
    order, harm = [], [0.0]
    for _ in single:
        unit = int(np.where(gone, np.inf, single + 2 * moved @ effects).argmin())
        gone[unit] = True
        moved += effects[:, unit]
        order.append(unit)
        harm.append(float(moved @ moved))
    return Ranking(np.array(order), np.array(harm))


def edges(units: int, step: int) -> list[int]:
    """How many of `units` can go so that a multiple of `step` stays, none and all left out.

    >>> edges(20, 8), edges(16, 8), edges(6, 8)
    ([0, 4, 12], [0, 8], [0])
    """
    return sorted({0, *range(units % step, units, step)})


def units_at_a_time(multiple: int, units: int, width: int) -> int:
    """How many units of `width` channels go together, so that a multiple of `multiple` channels stays.

    The multiple is halved as long as more than half of the units would go together.

    >>> units_at_a_time(64, 512, 1), units_at_a_time(64, 64, 1), units_at_a_time(16, 10, 8), units_at_a_time(8, 3, 1)
    (64, 32, 2, 1)
    """
    while multiple > 1 and 2 * (multiple // gcd(multiple, width)) > units:
        multiple //= 2
    return multiple // gcd(multiple, width)


def uniform_removals(units: Sequence[int], steps: Sequence[int], share: float) -> list[int]:
    """How many units of each group go: `share` of each, widths rounded up.

    >>> uniform_removals([64, 20, 6], [8, 8, 1], share=0.5)
    [32, 4, 3]
    """
    return [max(n for n in edges(count, step) if n <= share * count) for count, step in zip(units, steps, strict=True)]


def global_removals(
    harms: Sequence[Float[np.ndarray, " _"]], costs: Sequence[float], steps: Sequence[int], share: float
) -> list[int]:
    """How many units of each group go: those that matter least for what they cost, wherever they are.

    What a step adds to the harm can be less than what the one before added; such steps are taken as one.

    Args:
        harms: of each group, as a `Ranking` has it.
        costs: of one unit of each group.
        steps: how many units go at a time.
        share: of the summed cost that goes, to the nearest step.

    >>> one, other = np.array([0.0, 1.0, 3.0, 12.0]), np.array([0.0, 8.0, 16.0])
    >>> global_removals([one, other], costs=[1, 1], steps=[1, 1], share=0.4)
    [2, 0]
    """
    blocks = []  # added harm over cost, group, place, how many units
    for group, (harm, cost, step) in enumerate(zip(harms, costs, steps, strict=True)):
        ends = edges(len(harm) - 1, step)
        if len(ends) > 1:
            sizes = np.diff(ends)
            slopes = isotonic_regression(np.diff(harm[ends]) / sizes, weights=sizes).x / max(cost, 1e-12)
            blocks += [(slopes[place], group, place, int(size)) for place, size in enumerate(sizes)]
    missing = share * sum((len(harm) - 1) * cost for harm, cost in zip(harms, costs, strict=True))
    counts = [0] * len(harms)
    for _, group, _, size in sorted(blocks):
        if missing < size * costs[group] / 2:
            break
        counts[group] += size
        missing -= size * costs[group]
    return counts


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Removes the channels, features and heads that matter least.

    Args:
        share: of the arithmetic that hangs on removable units. Where units are made from units, as in convolutions
            in a row, about (1 - share)² of it is left, and 1 - share where they are not, as in transformers.
        importance: "taylor" (what the outputs lose without a unit, from calibration data), "joint" (without all that
            go: for networks that are not trained afterwards), "magnitude" (the norm of the weights that make a unit
            times that of those that read it), "batchnorm" (the scale of the batch norm on it, of several their mean;
            units without one are left) or "random".
        allocation: "global" (the least important for their cost, anywhere; a group keeps `multiple` channels at
            least) or "uniform" (`share` of each group).
        multiple: of which the widths that stay are one; where it is more than half of a layer's width, half of it, a
            quarter and so on. Heads count as they are.
    """

    share: Annotated[float, Range(0.0, 0.9)] = 0.3
    importance: Annotated[str, Choice("taylor", "joint", "magnitude", "batchnorm", "random")] = "taylor"
    allocation: Annotated[str, Choice("global", "uniform")] = "global"
    multiple: Annotated[int, Range(1, 64)] = 8

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        rankings = self._rankings(model, self._chosen(model, groups(model, workload.example)), workload.calibration)
        while True:
            cuts = self._cuts(rankings)
            try:
                pruned = trial(model, workload.example, cuts)
                break
            except LayerError:
                rankings = _without_refused(model, workload.example, cuts, rankings)
        going = {group: len(units) for group, units in cuts}
        for group in rankings:
            _report(group, going.get(group, 0))
        return pruned

    def _chosen(self, model: nn.Module, found: Sequence[Group]) -> list[Group]:
        """The groups of which something can go; why the others of those that `where` touches cannot is reported."""
        chosen: list[Group] = []
        reasons: dict[str, str] = {}
        frozen = {group: self._frozen(model, group) for group in found}
        for group in found:
            outside = [layer for layer in group.layers if not matches(layer, self.where)]
            if len(outside) == len(group.layers):
                continue
            if why := frozen[group]:
                reasons[group.name] = why
            elif outside:
                reasons[group.name] = f"hangs together with {outside[0]!r}, which where={self.where!r} leaves out"
            elif self.importance == "batchnorm" and not _norms(model, group):
                reasons[group.name] = (
                    "has no batch norm, which importance batchnorm reads: taylor and magnitude need none"
                )
            else:
                chosen.append(group)
        if not chosen:
            self._refuse([group.name for group in found if not frozen[group]], reasons)
        for group in found:
            if group.name in reasons:
                _leave(group, reasons[group.name])
        return chosen

    def _frozen(self, model: nn.Module, group: Group) -> str | None:
        if group.frozen is None and self.importance == "batchnorm" and not _norms(model, group):
            return "has no batch norm, which importance batchnorm reads: taylor and magnitude need none"
        return group.frozen

    def _refuse(self, free: Sequence[str], reasons: Mapping[str, str]) -> None:
        why = "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:5])
        raise LayerError(
            f"where={self.where!r} chooses nothing that {self.name()} can remove channels of. "
            + (f"What it chooses must stay: {why}. " if why else "")
            + (f"Channels can go from: {', '.join(free[:20])}." if free else "Leave this step out.")
        )

    def _rankings(self, model: nn.Module, chosen: Sequence[Group], batches: Sequence[Batch]) -> dict[Group, Ranking]:
        if self.importance == "taylor":
            ranked = map(alone, taylor(model, chosen, batches, ALONE))
        elif self.importance == "joint":
            ranked = map(together, taylor(model, chosen, batches, TOGETHER))
        else:
            ranked = map(apart, WITHOUT_DATA[self.importance](model, chosen))
        return dict(zip(chosen, ranked, strict=True))

    def _step(self, group: Group) -> int:
        return 1 if group.kind == "heads" else units_at_a_time(self.multiple, len(group), group.width)

    def _cuts(self, rankings: Mapping[Group, Ranking]) -> list[tuple[Group, list[int]]]:
        steps = [self._step(group) for group in rankings]
        if self.allocation == "uniform":
            counts = uniform_removals([len(group) for group in rankings], steps, self.share)
        else:
            harms = [ranking.harm for ranking in rankings.values()]
            counts = global_removals(harms, [group.macs for group in rankings], steps, self.share)
        return [
            (group, ranking.order[:count].tolist())
            for (group, ranking), count in zip(rankings.items(), counts, strict=True)
            if count
        ]


def _without_refused(
    model: nn.Module, example: Batch, cuts: Sequence[tuple[Group, list[int]]], rankings: Mapping[Group, Ranking]
) -> dict[Group, Ranking]:
    """`rankings` without the groups that cannot be cut after all, which are reported."""
    kept: list[tuple[Group, list[int]]] = []
    refused = set()
    for group, units in cuts:
        try:
            trial(model, example, [*kept, (group, units)])
            kept.append((group, units))
        except LayerError as error:
            _leave(group, str(error))
            refused.add(group)
    return {group: ranking for group, ranking in rankings.items() if group not in refused}


def _report(group: Group, count: int) -> None:
    width = 1 if group.kind == "heads" else group.width
    before, after = len(group) * width, (len(group) - count) * width
    if count:
        for layer in group.layers:
            done(layer, f"{before} -> {after} {group.kind}")
    else:
        _leave(group, "matters too much for the share that was asked for")


def _leave(group: Group, why: str) -> None:
    for layer in group.layers:
        left(layer, why)


# ------------------------------------------------------------------------------------------------ importance


def magnitude(model: nn.Module, chosen: Sequence[Group]) -> list[Scores]:
    """The L2 norm of the weights that make each unit times that of those that read it, times its cost.

    So the norms alone compete. Of a unit with batch norms their scale is taken for the norm of what makes it.
    """
    found = []
    for group in chosen:
        makers = tuple(s for s in group.slices if s.role == "makes")
        scales = _norms(model, group)
        made = _mean_scale(model, scales) if scales else _size(model, makers)
        found.append(group.macs * made * _size(model, group.inlets))
    return found


def batch_norm_scale(model: nn.Module, chosen: Sequence[Group]) -> list[Scores]:
    """The mean |γ| of the batch norms on each unit, times its cost, so that the scales alone compete."""
    return [group.macs * _mean_scale(model, _norms(model, group)) for group in chosen]


def _size(model: nn.Module, slices: Sequence[Slice]) -> Scores:
    """The L2 norm of each unit's weights in all of `slices`."""
    return np.sqrt(_over_slices(slices, {s: per_index(_of(model, s).square(), s.dim) for s in slices}))


def _mean_scale(model: nn.Module, norms: Sequence[Slice]) -> Scores:
    """The mean |γ| of each unit in the batch norms of which `norms` are slices."""
    summed = _over_slices(norms, {s: per_index(_of(model, s).abs(), 0) for s in norms})
    return summed / sum(s.index.shape[1] for s in norms)


def _norms(model: nn.Module, group: Group) -> list[Slice]:
    """The scales of the batch norms that its channels pass."""
    found = []
    for s in group.slices:
        layer, _, tensor = s.names[0].rpartition(".")
        if tensor == "weight" and isinstance(model.get_submodule(layer), nn.modules.batchnorm._BatchNorm):
            found.append(s)
    return found


def lots(model: nn.Module, chosen: Sequence[Group]) -> list[Scores]:
    """A number for each unit, drawn from torch's global generator, times its cost, so that all are as likely to go."""
    return [group.macs * torch.rand(len(group), dtype=torch.float64).numpy() for group in chosen]


WITHOUT_DATA = {"magnitude": magnitude, "batchnorm": batch_norm_scale, "random": lots}


def taylor(
    model: nn.Module, chosen: Sequence[Group], batches: Sequence[Batch], size: int
) -> list[Float[np.ndarray, "draws _"]]:
    """The effects e of the units of each group on every draw of noise, by first-order Taylor expansion.

    A draw is of `size` examples.
    """
    inlets = [[s for s in group.inlets if isinstance(_of(model, s), nn.Parameter)] for group in chosen]
    read = {s.names[0]: tensor_of(model, s.names[0]) for slices in inlets for s in slices}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    found: list[list[Scores]] = [[] for _ in chosen]
    rng = torch.Generator().manual_seed(0)
    try:
        for parameter in wanted:
            parameter.requires_grad_(any(parameter is weight for weight in read.values()))
        for batch in _small(batches, size):
            with torch.enable_grad():
                results = outputs(call(model, batch))
                loss = noisy_loss([y for y in results if y.is_floating_point()], rng)
                if not loss.requires_grad:
                    raise WorkloadError(_no_gradient(results, read))
                gradients = torch.autograd.grad(loss, list(read.values()), allow_unused=True)
            effects = {
                name: weight.detach() * (torch.zeros_like(weight) if gradient is None else gradient)
                for (name, weight), gradient in zip(read.items(), gradients, strict=True)
            }
            for draws, slices in zip(found, inlets, strict=True):
                draws.append(_over_slices(slices, {s: per_index(effects[s.names[0]], s.dim) for s in slices}))
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    return [np.stack(draws) for draws in found]


def _no_gradient(results: Sequence[Tensor], read: Mapping[str, Tensor]) -> str:
    if not any(output.is_floating_point() for output in results):
        why = f"the model's {len(results)} outputs are whole numbers"
    elif not read:
        why = "no layer's weights read the channels that may go"
    else:
        why = "the model's forward cuts its outputs off from its weights, with detach, no_grad or argmax"
    return (
        "prune_channels with importance taylor or joint needs the gradient of the outputs, but "
        f"{why}. Return logits or other floats from its forward, or set importance: magnitude."
    )


def _over_slices(slices: Sequence[Slice], values: Mapping[Slice, Float[np.ndarray, " size"]]) -> Scores:
    """Per unit, the sum of the values of its indices."""
    return np.sum([values[s][s.index].sum(1) for s in slices], axis=0)


def _of(model: nn.Module, s: Slice) -> Tensor:
    return tensor_of(model, s.names[0])


def _small(batches: Sequence[Batch], size: int) -> Iterator[Batch]:
    """Batches of `size` examples, `EXAMPLES` in all, from the beginning of each of `batches`."""
    left_over, each = EXAMPLES, ceil(EXAMPLES / len(batches))
    for batch in batches:
        values = [value[: min(each, left_over)] for value in tensors(batch)]
        left_over -= len(values[0])
        for parts in zip(*(value.split(size) for value in values), strict=True):
            if len(parts[0]):
                yield like(batch, parts)
