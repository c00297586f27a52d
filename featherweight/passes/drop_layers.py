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

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.errors import LayerError
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import done, left, matches
from featherweight.workload import Batch, Workload, call, like, outputs, tensors

EXAMPLES = 64  # on which damage is measured

# ------------------------------------------------------------------------------------------------ mathematics


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


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True)
class Block:
    """The child called `child` of the container called `container`, by their names in the original network."""

    container: str
    child: str

    @property
    def name(self) -> str:
        return f"{self.container}.{self.child}".lstrip(".")


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """Removes the blocks whose absence changes the outputs least; `where` names blocks.

    Args:
        share: of the blocks that can be removed, to the nearest whole number, one at least.
    """

    share: Annotated[float, Range(0.0, 0.9)] = 0.25

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        found = removable(model, workload, self.where)
        if not found:
            raise LayerError(
                f"where={self.where!r} chooses no block of {type(model).__name__} that {self.name()} can remove: there "
                "is no nn.ModuleList or nn.Sequential of alike blocks that runs without one. Leave this step out."
            )
        gone = least_missed(model, found, max(1, round(self.share * len(found))), workload)
        for block in found:
            if block in gone:
                done(block.name, "removed")
            else:
                left(block.name, "matters too much for the share that was asked for")
        return without(model, gone)


def removable(model: nn.Module, workload: Workload, where: str = "*") -> list[Block]:
    """The blocks that `where` chooses and without each of which the network still runs; the others are reported."""
    batch = _sample(workload.calibration)
    wanted = _floats(model, batch)
    found = []
    for block in blocks(model):
        if not matches(block.name, where):
            continue
        if _damage_without(model, [block], batch, wanted) is None:
            left(block.name, "the network does not run, or returns other shapes, without it")
        else:
            found.append(block)
    return found


def least_missed(model: nn.Module, among: Sequence[Block], count: int, workload: Workload) -> list[Block]:
    """`count` blocks, or as many as can go together, chosen one after the other by the damage of all so far."""
    batch = _sample(workload.calibration)
    wanted = _floats(model, batch)
    gone: list[Block] = []
    while len(gone) < count:
        tried = [(_damage_without(model, [*gone, block], batch, wanted), block) for block in among if block not in gone]
        possible = [(found, block) for found, block in tried if found is not None]
        if not possible:
            break
        gone.append(min(possible, key=lambda item: item[0])[1])
    return gone


def blocks(model: nn.Module) -> Iterator[Block]:
    """The children of every list or sequence that has several of the same kind, themselves made of layers."""
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        children = dict(container.named_children())
        kinds = [type(child) for child in children.values()]
        for child, module in children.items():
            composed = any(True for _ in module.children()) and any(True for _ in module.parameters())
            if composed and kinds.count(type(module)) > 1 and not isinstance(module, (nn.ModuleList, nn.Sequential)):
                yield Block(name, child)


def without(model: nn.Module, gone: Sequence[Block]) -> nn.Module:
    """A copy of `model` in which the blocks are no longer in their containers."""
    copied = copy.deepcopy(model)
    for name in dict.fromkeys(block.container for block in gone):
        container = copied.get_submodule(name)
        doomed = {block.child for block in gone if block.container == name}
        kept = [child for key, child in container.named_children() if key not in doomed]
        for key in list(container._modules):
            del container._modules[key]
        for index, child in enumerate(kept):
            container.add_module(str(index), child)
    return copied


def _damage_without(model: nn.Module, gone: Sequence[Block], batch: Batch, wanted: Sequence[Tensor]) -> float | None:
    """The damage of removing the blocks, or None where the network then fails or returns something else."""
    try:
        found = _floats(without(model, gone), batch)
    except Exception:  # whatever the user's forward raises: without the block it does not run
        return None
    if [value.shape for value in found] != [value.shape for value in wanted]:
        return None
    value = damage(found, wanted)
    return value if value == value else None


def _floats(model: nn.Module, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        found = [value for value in outputs(call(model, batch)) if value.is_floating_point()]
    if not found:
        raise LayerError(
            "drop_layers compares outputs, but the network returns whole numbers alone. Return logits from its forward."
        )
    return found


def _sample(batches: Sequence[Batch]) -> Batch:
    """One batch of the first EXAMPLES examples."""
    parts = [torch.cat(values)[:EXAMPLES] for values in zip(*map(tensors, batches), strict=True)]
    return like(batches[0], parts)
