"""Computes blocks of a sequence network for groups of neighbouring positions: y = x + U(f(P x) − P x).

P takes the mean of each group, f is the block, and U hands what it added to all positions of a group. So every position
keeps what it knew, only the change is shared, and a block does half of its work for pairs, in attention a quarter.
Attention masks are merged with the positions: a group is attended to as often as its members were (the logarithm of the
sum of their exponentials). Which blocks are treated is decided one at a time, each time the one by which the outputs
change least for what is saved: from single positions to pairs, and where groups may be larger, on to fours and more, so
that some blocks get larger groups than others. Blocks whose positions do not hear later ones are left, for in a group
the first would hear the others; so are those that read no sequences.

So is what another part of a network hands over, as an encoder does to a decoder: the outermost module that reads it
beside its own input reads groups, and whatever attends to it inside does with so many fewer.

Blocks that follow each other share one merging and one spreading, for P U is the identity: of x + U(f(Px) − Px) the
next block reads P x + (f(Px) − Px) = f(Px), as it was computed.

Source: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman 2022, arXiv:2210.09461, for merged tokens that count as often as
they stand for (equation 1); Bolya, Hoffman 2023, arXiv:2303.17604, for merging before and unmerging after each block.
Groups are of neighbours here, not of those that are most alike: which these are is not known before the network runs,
and looking for them takes longer than small networks do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from featherweight.damage import damage, examples_to_compare, first_examples, floating_outputs
from featherweight.errors import LayerError
from featherweight.hooks import Arguments, watch_calls
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import blocks, derive, done, left, matches
from featherweight.workload import Batch, Workload, call

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
        if how == "mean" and (self.alone or end < length):
            members = self.members(length).to(x.device)
            return x.index_select(dim, members.flatten()).unflatten(dim, (-1, self.size)).mean(dim + 1)
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
        if not self.alone and self.end(length) == length:
            return x.unsqueeze(2).expand(-1, -1, self.size, -1).flatten(1, 2)
        members = self.members(length)
        group_of = torch.arange(len(members)).unsqueeze(1).expand(members.shape)
        index = torch.zeros(length, dtype=torch.int64).scatter(0, members.flatten(), group_of.flatten())
        return x.index_select(1, index.to(x.device))

    def members(self, length: int) -> Int64[Tensor, "groups size"]:
        """The positions of each group; one that stays by itself counts as often as there are in a group.

        So that nothing is joined: OpenVINO 2026.4 cannot compile what is joined from parts and then read in int8.
        """
        end = self.end(length)
        inside = torch.arange(self.alone, end).unflatten(0, (-1, self.size))
        first, last = (
            torch.arange(*ends).unsqueeze(1).expand(-1, self.size) for ends in ((self.alone,), (end, length))
        )
        return torch.cat([first, inside, last])

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


@dataclass(frozen=True)
class Trail:
    """How a sequence came about: `start` plus what blocks made of `before`, its groups, which is `now`."""

    groups: Groups
    start: Float[Tensor, "n length features"]
    before: Float[Tensor, "n groups features"]
    now: Float[Tensor, "n groups features"]
    version: int | None  # of the tensor that was returned, which grows where something is written to it


def _version(x: Tensor) -> int | None:
    """None of tensors that do not count it, those of inference mode."""
    return None if x.is_inference() else x._version


PASS = "merge_positions"  # in messages
TRAIL = "_trail_of_positions"  # an attribute of the tensor that a merged block returns


class Merging(nn.Module):
    """Put before a block's own class: computes the block for groups of positions."""

    position_groups: Groups

    def forward(self, *args: Any, **named: Any) -> Any:
        x: Any = next(iter((*args, *named.values())))
        groups = self.position_groups
        trail = getattr(x, TRAIL, None)
        if trail is None or trail.groups != groups or trail.version is None or trail.version != _version(x):
            merged = groups.merged(x, 1)
            trail = Trail(groups, x, merged, merged, _version(x))

        def shortened(value: Any) -> Any:
            return trail.now if value is x else groups.merged_beside(value, x.shape[1])

        result: Any = super().forward(*tree_map(shortened, args), **tree_map(shortened, named))
        first, others = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
        y = trail.start + groups.spread(first - trail.before, x.shape[1])
        setattr(y, TRAIL, replace(trail, now=first, version=_version(y)))
        return (y, *others) if isinstance(result, tuple) else y


class Reading(nn.Module):
    """Put before a module's own class: merges the positions of what it reads beside its own input."""

    position_groups: Groups

    def forward(self, *args: Any, **named: Any) -> Any:
        first: Any = next(iter((*args, *named.values())))
        length = memory_length(args, named)

        def shortened(value: Any) -> Any:
            return value if value is first else self.position_groups.merged_beside(value, length)

        return super().forward(*tree_map(shortened, args), **tree_map(shortened, named))


def memory_length(args: Any, named: Any) -> int:
    """The positions of the first sequence (n, length, features) beside the first argument; 0 where there is none."""
    values = [*args, *named.values()]
    first = values[0] if values else None
    sequences = [v for v in values if isinstance(v, Tensor) and v.dim() == 3 and v is not first]
    own = first.shape[1] if isinstance(first, Tensor) and first.dim() > 1 else None
    return next((v.shape[1] for v in sequences if v.is_floating_point() and v.shape[1] != own), 0)


@dataclass(frozen=True, kw_only=True)
class MergePositions(Pass):
    """Computes the blocks that bear it best for groups of positions; `where` names blocks, and readers of sequences.

    Args:
        share: of all the doublings of groups that can be had, to the nearest whole number, one at least; of the blocks
            and readers that can be treated so, where groups are pairs.
        size: of a group, at most; in between are powers of two.
    """

    share: Annotated[float, Range(0.0, 1.0)] = 0.5
    size: Annotated[int, Range(FEWEST, 16)] = 2

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        ways, objections = _candidates(model, workload, self.where, self.size)
        if not ways:
            reasons = [f"{name!r} {why}" for name, why in objections.items()][:3]
            none = "there is no nn.ModuleList or nn.Sequential of alike blocks among what it chooses"
            raise LayerError(
                f"where={self.where!r} chooses no block of {type(model).__name__} that {self.name()} can treat: "
                f"{'; '.join(reasons) or none}. Leave this step out."
            )
        groups = least_missed(model, ways, self.share, self.size, workload)
        for name, way in ways.items():
            if name in groups:
                does = "is computed for" if way is Merging else "reads"
                first = ", the first by itself" if groups[name].alone else ""
                done(name, f"{does} groups of {groups[name].size} positions{first}")
                _merge(model.get_submodule(name), way, groups[name])
            else:
                left(name, "matters too much for the share that was asked for")
        for name, why in objections.items():
            left(name, why)
        return model


def mergeable(model: nn.Module, workload: Workload, size: int = FEWEST) -> list[str]:
    """The blocks that can be computed for groups of `size` positions, and readers that can read such, by name."""
    return list(_candidates(model, workload, "*", size)[0])


Ways = Mapping[str, type[nn.Module]]  # by name what is put before a module's class: Merging or Reading


def sizes_up_to(size: int) -> list[int]:
    """Of groups, each twice the one before, but for the last.

    >>> sizes_up_to(2), sizes_up_to(6)
    ([2], [2, 4, 6])
    """
    return [2**power for power in range(1, size.bit_length()) if 2**power < size] + [size]


def least_missed(model: nn.Module, among: Ways, share: float, size: int, workload: Workload) -> dict[str, Groups]:
    """The groups that modules get: doubled one after the other, by the damage of all so far over what is saved.

    Whether the first position stays alone is the same for all of them.
    """
    batch = examples_to_compare(model, workload, PASS)
    wanted = floating_outputs(model, batch, PASS)
    sizes = sizes_up_to(size)

    def lost_by(groups: Mapping[str, Groups]) -> float:
        with _merging(model, among, groups):
            lost = damage(floating_outputs(model, batch, PASS), wanted)
        return lost if lost == lost else math.inf

    singly = {alone: {name: lost_by({name: Groups(sizes[0], alone)}) for name in among} for alone in (0, 1)}
    total = {alone: sum(lost.values()) for alone, lost in singly.items()}
    alone = 1 if total[1] < CLEARLY * total[0] else 0
    doublings = max(1, round(share * len(among) * len(sizes)))
    if doublings == len(among) * len(sizes):
        return {name: Groups(size, alone) for name in among}
    chosen: dict[str, Groups] = {}
    lost_so_far = 0.0
    for _ in range(doublings):
        found: dict[str, tuple[float, float, Groups]] = {}
        for name in among:
            now = chosen[name].size if name in chosen else 1
            if now < size:
                larger = Groups(next(s for s in sizes if s > now), alone)
                lost = lost_by({**chosen, name: larger}) if chosen else singly[alone][name]
                found[name] = ((lost - lost_so_far) / (1 / now - 1 / larger.size), lost, larger)
        best = min(found, key=lambda name: found[name][0])
        _, lost_so_far, chosen[best] = found[best]
    return chosen


def _candidates(model: nn.Module, workload: Workload, where: str, size: int) -> tuple[Ways, dict[str, str]]:
    """What of that which `where` chooses can be treated, and how; and why the others cannot."""
    batch = first_examples(workload.calibration, ROWS)
    wanted = [tuple(value.shape) for value in floating_outputs(model, batch, PASS)]
    with watch_calls(model, [name for name, _ in model.named_modules() if name]) as calls, torch.no_grad():
        call(model, batch)
    ways: dict[str, type[nn.Module]] = {block.name: Merging for block in blocks(model)}
    ways |= dict.fromkeys(_readers(calls), Reading)
    objections = {}
    for name, way in ways.items():
        if matches(name, where):
            objections[name] = _objection(model, name, way, calls.get(name), size) or _misfit(
                model, name, way, size, batch, wanted
            )
    return {name: ways[name] for name, why in objections.items() if not why}, {n: w for n, w in objections.items() if w}


def _readers(calls: Mapping[str, Arguments]) -> list[str]:
    """The outermost modules that read a sequence beside their own input."""
    found = [name for name, (args, named) in calls.items() if memory_length(args, named)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _objection(model: nn.Module, name: str, way: type[nn.Module], called: Arguments | None, size: int) -> str:
    """Why what a module reads speaks against treating it; empty where nothing does."""
    module = model.get_submodule(name)
    if isinstance(module, (Merging, Reading)):
        return "is computed for groups already"
    if called is None:
        return "is not called"
    args, named = called
    x: Any = next(iter((*args, *named.values())), None)
    if way is Reading:
        length = memory_length(args, named)
    elif not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        return "reads no sequence of vectors (n, length, features)"
    elif x.shape[1] == ROWS != x.shape[0]:
        return "has the examples of a batch in the second dimension, not in the first"
    else:
        length = x.shape[1]
    if length <= size:
        return f"reads {length} positions, too few to make groups of"
    try:
        if way is Reading or _hears_others(module, x, args, named):
            return ""
    except Exception as error:  # whatever the user's forward raises, called by itself
        return _raised(error)
    return "has a first position that does not hear the others, as in decoders, where none may hear later ones"


def _misfit(
    model: nn.Module, name: str, way: type[nn.Module], size: int, batch: Batch, wanted: Sequence[tuple[int, ...]]
) -> str:
    """What goes wrong where a module is treated; empty where nothing does."""
    try:
        with _merging(model, {name: way}, {name: Groups(size)}):
            found = [tuple(value.shape) for value in floating_outputs(model, batch, PASS)]
    except Exception as error:  # whatever the user's forward raises with groups
        return _raised(error)
    return "" if found == wanted else f"makes the network return shapes {found} instead of {wanted}"


def _raised(error: Exception) -> str:
    return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _hears_others(block: nn.Module, x: Tensor, args: Any, named: Any) -> bool:
    """Whether what a block returns for the first position hangs on what the others say."""
    other = torch.cat([x[:, :1], -x[:, 1:]], 1)

    def first_position(x_or_other: Tensor) -> Tensor:
        arguments = tree_map(lambda value: x_or_other if value is x else value, (args, named))
        result = block(*arguments[0], **arguments[1])
        return (result[0] if isinstance(result, tuple) else result)[:, 0]

    with torch.no_grad():
        return not torch.allclose(first_position(x), first_position(other), rtol=1e-4, atol=1e-6)


def _merge(module: nn.Module, way: type[nn.Module], groups: Groups) -> None:
    derive(module, way)
    module.position_groups = groups  # type: ignore[assignment]


@contextlib.contextmanager
def _merging(model: nn.Module, ways: Ways, groups: Mapping[str, Groups]) -> Iterator[None]:
    """Inside the block, the modules that `groups` names are treated."""
    found = {name: model.get_submodule(name) for name in groups}
    classes = {name: type(module) for name, module in found.items()}
    try:
        for name, module in found.items():
            _merge(module, ways[name], groups[name])
        yield
    finally:
        for name, module in found.items():
            module.__class__ = classes[name]
            del module.position_groups
