"""Removes whole blocks of a network that repeats alike blocks: what a transformer can spare before width.

    D(S) = ‖f_S(x) − f(x)‖² / ‖f(x) − mean f‖²,   f_S: the network without the blocks S

over calibration data. Blocks go one at a time, each time the one without which D is least, measured anew after every
removal: blocks make up for one another, so two that can be spared singly need not both be. Only the outputs decide,
so nothing has to be known of what a block does. Narrow networks spend their time on many small operators, which get
hardly faster when they become narrower still; fewer blocks are fewer operators.

Source: Fan, Grave, Joulin 2019, arXiv:1909.11556, section 3, for networks without some of their layers; Sajjad, Dalvi,
Durrani, Nakov 2020, arXiv:2004.03844, for dropping them from trained ones; greedy choice by the output's change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from featherweight.damage import damage, examples_to_compare, first_examples, floating_outputs
from featherweight.errors import LayerError
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import Block, blocks, done, left, matches, without
from featherweight.workload import Batch, Workload

# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """Removes the blocks whose absence changes the outputs least; `where` names blocks.

    Args:
        share: of the blocks that can be removed, to the nearest whole number, one at least.
    """

    share: Annotated[float, Range(0.0, 0.9)] = 0.25

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        objections = _objections(model, workload, self.where)
        found = [block for block, why in objections.items() if not why]
        if not found:
            reasons = [f"without {block.name!r} the network {why}" for block, why in objections.items()][:3]
            none = "there is no nn.ModuleList or nn.Sequential of alike blocks among what it chooses"
            raise LayerError(
                f"where={self.where!r} chooses no block of {type(model).__name__} that {self.name()} can remove: "
                f"{'; '.join(reasons) or none}. Leave this step out."
            )
        count = max(1, round(self.share * len(found)))
        gone = least_missed(model, found, count, workload)
        for block, why in objections.items():
            if block in gone:
                done(block.name, "removed")
            elif why:
                left(block.name, f"without it the network {why}")
            elif len(gone) == count:
                left(block.name, "matters too much for the share that was asked for")
        return without(model, gone)


def removable(model: nn.Module, workload: Workload, where: str = "*") -> list[Block]:
    """The blocks that `where` chooses and without each of which the network still runs."""
    return [block for block, why in _objections(model, workload, where).items() if not why]


def _objections(model: nn.Module, workload: Workload, where: str) -> dict[Block, str]:
    """By block that `where` chooses, what the network does without it that it may not do; empty where nothing."""
    batch = first_examples(workload.calibration, 2)  # it either runs or it does not
    wanted = floating_outputs(model, batch, "drop_layers")
    found = {}
    for block in blocks(model):
        if matches(block.name, where):
            lost = _damage_without(model, [block], batch, wanted)
            found[block] = lost if isinstance(lost, str) else ""
    return found


def least_missed(model: nn.Module, among: Sequence[Block], count: int, workload: Workload) -> list[Block]:
    """`count` blocks, chosen one after the other by the damage of all so far; fewer where no more can go together.

    The others are then said to be left, and why.
    """
    batch = examples_to_compare(model, workload, "drop_layers")
    wanted = floating_outputs(model, batch, "drop_layers")
    gone: list[Block] = []
    while len(gone) < count:
        tried = {b: _damage_without(model, [*gone, b], batch, wanted) for b in among if b not in gone}
        possible = {block: lost for block, lost in tried.items() if isinstance(lost, float)}
        if not possible:
            names = ", ".join(repr(block.name) for block in gone)
            for block, why in tried.items():
                left(block.name, f"without it and {names} the network {why}")
            break
        gone.append(min(possible, key=lambda block: possible[block]))
    return gone


def _damage_without(model: nn.Module, gone: Sequence[Block], batch: Batch, wanted: Sequence[Tensor]) -> float | str:
    """The damage of removing the blocks, or what the network then does instead of returning the like."""
    try:
        found = floating_outputs(without(model, gone), batch, "drop_layers")
    except Exception as error:  # whatever the user's forward raises: without the block it does not run
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    before, after = ([tuple(value.shape) for value in values] for values in (wanted, found))
    if before != after:
        return f"returns shapes {after} instead of {before}"
    value = damage(found, wanted)
    return value if value == value else "returns what is no number (NaN)"
