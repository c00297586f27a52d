"""Removes whole attention heads, those first whose absence changes the outputs least.

    D_h = ‖f_h(x) − f(x)‖² / ‖f(x) − mean f‖²,   f_h: the network with head h silenced

over calibration data, one head at a time. Heads are few, so what is lost without one is measured, where the many
channels that `prune_channels` weighs (heads among them, for what they cost) need an estimate from gradients. Heads of
all attentions compete; each attention keeps one. That heads make up for one another is not looked at.

Source: Michel, Levy, Neubig 2019, arXiv:1905.10650, section 3.2, for the damage of one head, and section 4 for removing
many over the whole network (there by an estimate of it).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import nn

from featherweight.coupling import Group, groups, silence, trial
from featherweight.damage import damage, examples_to_compare, floating_outputs
from featherweight.errors import LayerError
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import done, left, matches
from featherweight.workload import Workload


def least(damages: Sequence[Sequence[float]], count: int) -> list[list[int]]:
    """By attention the heads that go: `count` in all, of least damage, but never all of one attention.

    >>> least([[0.1, 0.2], [0.9, 0.3, 0.8]], count=3)
    [[0], [1, 2]]
    """
    gone: list[list[int]] = [[] for _ in damages]
    for _, attention, head in sorted((d, a, h) for a, values in enumerate(damages) for h, d in enumerate(values)):
        if sum(map(len, gone)) < count and len(gone[attention]) < len(damages[attention]) - 1:
            gone[attention].append(head)
    return [sorted(heads) for heads in gone]


@dataclass(frozen=True, kw_only=True)
class PruneHeads(Pass):
    """Removes the attention heads whose absence changes the outputs least.

    Args:
        share: of the heads that are chosen, to the nearest whole number, one at least.
    """

    share: Annotated[float, Range(0.0, 0.9)] = 0.25

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        chosen = self._chosen(model, workload)
        damages = _damages(model, chosen, workload)
        gone = least(damages, max(1, round(self.share * sum(map(len, chosen)))))
        for group, heads in zip(chosen, gone, strict=True):
            for layer in group.layers:
                if heads:
                    done(layer, f"{len(group)} -> {len(group) - len(heads)} heads")
                else:
                    left(layer, "its heads matter too much for the share that was asked for")
        return trial(model, workload.example, [pair for pair in zip(chosen, gone, strict=True) if pair[1]])

    def _chosen(self, model: nn.Module, workload: Workload) -> list[Group]:
        """The groups of heads that `where` chooses and of which some can go; the others are left, and said to be."""
        chosen, reasons = [], {}
        for group in groups(model, workload.example):
            if group.kind == "heads" and any(matches(layer, self.where) for layer in group.layers):
                why = self._why_not(model, workload, group)
                if why:
                    reasons[group.name] = why
                    for layer in group.layers:
                        left(layer, why)
                else:
                    chosen.append(group)
        if not chosen:
            why = "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:3])
            raise LayerError(
                f"where={self.where!r} chooses no attention of {type(model).__name__} that {self.name()} can remove "
                f"heads of: {why or 'there is none among what it chooses'}. Leave this step out."
            )
        return chosen

    def _why_not(self, model: nn.Module, workload: Workload, group: Group) -> str:
        outside = [layer for layer in group.layers if not matches(layer, self.where)]
        if group.frozen is not None:
            return group.frozen
        if outside:
            return f"hangs together with {outside[0]!r}, which where={self.where!r} leaves out"
        try:
            trial(model, workload.example, [(group, [0])])
        except LayerError as error:
            return str(error)
        return ""


def _damages(model: nn.Module, chosen: Sequence[Group], workload: Workload) -> list[list[float]]:
    """By group and head, what is lost without that head alone."""
    batch = examples_to_compare(model, workload, "prune_heads")
    wanted = floating_outputs(model, batch, "prune_heads")
    found: list[list[float]] = []
    for group in chosen:
        found.append([])
        for head in range(len(group)):
            silenced = copy.deepcopy(model)
            silence(silenced, [(group, [head])])
            found[-1].append(damage(floating_outputs(silenced, batch, "prune_heads"), wanted))
    return found
