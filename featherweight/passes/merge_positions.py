"""Computes blocks of a sequence network for groups of neighbouring positions: y = x + U(f(P x) − P x).

P takes the mean of each group, f is the block, and U hands what it added to all positions of a group. So every position
keeps what it knew, only the change is shared, and a block does half of its work for pairs, in attention a quarter.
Attention masks are merged with the positions: a group is attended to as often as its members were (the logarithm of the
sum of their exponentials). Which blocks are treated is decided as in `drop_layers`: one at a time, each time the one by
which the outputs change least. Blocks whose positions do not hear later ones are left, for in a group the first would
hear the others; so are those that read no sequences.

Source: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman 2022, arXiv:2210.09461, for merged tokens that count as often as
they stand for (equation 1); Bolya, Hoffman 2023, arXiv:2303.17604, for merging before and unmerging after each block.
Groups are of neighbours here, not of those that are most alike: which these are is not known before the network runs,
and looking for them takes longer than small networks do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from featherweight.damage import damage, first_examples, floating_outputs
from featherweight.errors import LayerError
from featherweight.hooks import Arguments, watch_calls
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import blocks, derive, done, left, matches
from featherweight.workload import Batch, Workload, call

EXAMPLES = 64  # on which damage is measured
CLEARLY = 0.8  # times the damage of all in groups: where the first stays alone, as one that stands for the whole must
ROWS = 3  # of a batch with which it is tried whether a block can be computed so
FEWEST = 2  # positions in a group

# ------------------------------------------------------------------------------------------- functions on tensors


@dataclass(frozen=True)
class Groups:
    """`size` positions that are next to each other; the first `alone`, and what is left over, stay by themselves.

    >>> groups, x = Groups(2, alone=1), torch.tensor([[[1.0], [3], [5], [7]]])
    >>> groups.merged(x, 1).flatten(), groups.spread(groups.merged(x, 1), 4).flatten()
    (tensor([1., 4., 7.]), tensor([1., 4., 4., 7.]))
    """

    size: int
    alone: int = 0

    def end(self, length: int) -> int:
        """Where the last group ends."""
        return self.alone + (length - self.alone) // self.size * self.size

    def merged(self, x: Shaped[Tensor, ...], dim: int, how: str = "mean") -> Shaped[Tensor, ...]:
        """Groups along `dim` in place of its positions.

        `how` they are merged: "mean", "logsumexp" (additive masks), "any" (masks of yes and no) or "amax" (of whole
        numbers).
        """
        length, end = x.shape[dim], self.end(x.shape[dim])
        groups = x.narrow(dim, self.alone, end - self.alone).unflatten(dim, (-1, self.size))
        ways: dict[str, Callable[[int], Tensor]] = {
            "mean": groups.mean,
            "logsumexp": groups.logsumexp,
            "any": groups.any,
            "amax": groups.amax,
        }
        return torch.cat([x.narrow(dim, 0, self.alone), ways[how](dim + 1), x.narrow(dim, end, length - end)], dim)

    def spread(self, x: Float[Tensor, "n groups features"], length: int) -> Float[Tensor, "n length features"]:
        """What `merged` made of `length` positions, again for each of them."""
        count = (length - self.alone) // self.size
        inside = x[:, self.alone : self.alone + count].unsqueeze(2).expand(-1, -1, self.size, -1).flatten(1, 2)
        return torch.cat([x[:, : self.alone], inside, x[:, self.alone + count :]], 1)

    def merged_beside(self, value: Any, length: int) -> Any:
        """What a block reads beside its sequence, with groups wherever there were positions.

        Where the last dimension counts positions it is a mask or what is added to attention's logits; where another
        does, vectors or numbers of positions.
        """
        if not isinstance(value, Tensor) or length not in value.shape[1:]:
            return value
        is_mask = value.shape[-1] == length
        if value.dtype == torch.bool:
            how = "any"
        elif value.is_floating_point():
            how = "logsumexp" if is_mask else "mean"
        else:
            how = "amax"
        for dim in range(1, value.dim()):
            if value.shape[dim] == length:
                value = self.merged(value, dim, how)
        return value


# ------------------------------------------------------------------------------------------------ the pass


class Merging(nn.Module):
    """Put before a block's own class: computes the block for groups of positions."""

    position_groups: Groups

    def forward(self, *args: Any, **named: Any) -> Any:
        x = next(iter((*args, *named.values())))
        merged = self.position_groups.merged(x, 1)

        def shortened(value: Any) -> Any:
            return merged if value is x else self.position_groups.merged_beside(value, x.shape[1])

        result = super().forward(*tree_map(shortened, args), **tree_map(shortened, named))
        first, *others = result if isinstance(result, tuple) else (result,)
        y = x + self.position_groups.spread(first - merged, x.shape[1])
        return (y, *others) if isinstance(result, tuple) else y


@dataclass(frozen=True, kw_only=True)
class MergePositions(Pass):
    """Computes the blocks that bear it best for groups of positions; `where` names blocks.

    Args:
        share: of the blocks that can be computed so, to the nearest whole number, one at least.
        size: of a group.
    """

    share: Annotated[float, Range(0.0, 1.0)] = 0.5
    size: Annotated[int, Range(FEWEST, 16)] = 2

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        objections = _objections(model, workload, self.where, self.size)
        found = [name for name, why in objections.items() if not why]
        if not found:
            reasons = [f"{name!r} {why}" for name, why in objections.items()][:3]
            none = "there is no nn.ModuleList or nn.Sequential of alike blocks among what it chooses"
            raise LayerError(
                f"where={self.where!r} chooses no block of {type(model).__name__} that {self.name()} can treat: "
                f"{'; '.join(reasons) or none}. Leave this step out."
            )
        count = max(1, round(self.share * len(found)))
        chosen, groups = least_missed(model, found, count, self.size, workload)
        for name, why in objections.items():
            if name in chosen:
                first = ", the first by itself" if groups.alone else ""
                done(name, f"is computed for groups of {self.size} positions{first}")
            else:
                left(name, why or "matters too much for the share that was asked for")
        for name in chosen:
            _merge(model.get_submodule(name), groups)
        return model


def mergeable(model: nn.Module, workload: Workload) -> list[str]:
    """The names of the blocks that can be computed for groups of positions."""
    return [name for name, why in _objections(model, workload, "*", FEWEST).items() if not why]


def least_missed(
    model: nn.Module, among: Sequence[str], count: int, size: int, workload: Workload
) -> tuple[list[str], Groups]:
    """`count` blocks, chosen one after the other by the damage of all so far, and whether the first stays alone."""
    batch = first_examples(workload.calibration, EXAMPLES)
    wanted = floating_outputs(model, batch, "merge_positions")
    all_, first_alone = Groups(size), Groups(size, alone=1)
    singly = {way: {name: _damage(model, [name], way, batch, wanted) for name in among} for way in (all_, first_alone)}
    total = {way: sum(lost.values()) for way, lost in singly.items()}
    groups = first_alone if total[first_alone] < CLEARLY * total[all_] else all_
    chosen: list[str] = []
    while len(chosen) < count:
        others = [name for name in among if name not in chosen]
        lost = {name: _damage(model, [*chosen, name], groups, batch, wanted) for name in others if chosen}
        lost = lost or singly[groups]
        chosen.append(min(lost, key=lambda name: lost[name]))
    return chosen, groups


def _damage(model: nn.Module, names: Sequence[str], groups: Groups, batch: Batch, wanted: Sequence[Tensor]) -> float:
    with _merging(model, names, groups):
        lost = damage(floating_outputs(model, batch, "merge_positions"), wanted)
    return lost if lost == lost else math.inf


def _objections(model: nn.Module, workload: Workload, where: str, size: int) -> dict[str, str]:
    """By block that `where` chooses, why it cannot be computed for groups; empty where it can."""
    batch = first_examples(workload.calibration, ROWS)
    wanted = floating_outputs(model, batch, "merge_positions")
    names = [block.name for block in blocks(model) if matches(block.name, where)]
    with watch_calls(model, names) as calls, torch.no_grad():
        call(model, batch)
    return {name: _objection(model, name, calls.get(name), size, batch, wanted) for name in names}


def _objection(
    model: nn.Module, name: str, called: Arguments | None, size: int, batch: Batch, wanted: Sequence[Tensor]
) -> str:
    block = model.get_submodule(name)
    if isinstance(block, Merging):
        return "is computed for groups already"
    if called is None:
        return "is not called"
    args, named = called
    x = next(iter((*args, *named.values())), None)
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        return "reads no sequence of vectors (n, length, features)"
    if x.shape[1] == ROWS != x.shape[0]:
        return "has the examples of a batch in the second dimension, not in the first"
    if x.shape[1] <= size:
        return f"reads {x.shape[1]} positions, too few to make groups of"
    try:
        if not _hears_others(block, x, args, named):
            return "has a first position that does not hear the others, as in decoders, where none may hear later ones"
        with _merging(model, [name], Groups(size)):
            found = floating_outputs(model, batch, "merge_positions")
    except Exception as error:  # whatever the user's forward raises, called by itself or with groups
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    before, after = ([tuple(value.shape) for value in values] for values in (wanted, found))
    return "" if before == after else f"makes the network return shapes {after} instead of {before}"


def _hears_others(block: nn.Module, x: Tensor, args: Any, named: Any) -> bool:
    """Whether what a block returns for the first position hangs on what the others say."""
    other = torch.cat([x[:, :1], -x[:, 1:]], 1)

    def first_position(x_or_other: Tensor) -> Tensor:
        arguments = tree_map(lambda value: x_or_other if value is x else value, (args, named))
        result = block(*arguments[0], **arguments[1])
        return (result[0] if isinstance(result, tuple) else result)[:, 0]

    with torch.no_grad():
        return not torch.allclose(first_position(x), first_position(other), rtol=1e-4, atol=1e-6)


def _merge(block: nn.Module, groups: Groups) -> None:
    derive(block, Merging)
    block.position_groups = groups  # type: ignore[assignment]


@contextlib.contextmanager
def _merging(model: nn.Module, names: Sequence[str], groups: Groups) -> Iterator[None]:
    """Inside the block, the named ones are computed for groups."""
    found = [model.get_submodule(name) for name in names]
    classes = [type(block) for block in found]
    try:
        for block in found:
            _merge(block, groups)
        yield
    finally:
        for block, kind in zip(found, classes, strict=True):
            block.__class__ = kind
            del block.position_groups
