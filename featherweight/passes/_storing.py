"""What the passes that store weights in another form share: which weights, what their layers read, and what is said.

In which form, and by what rule a weight is rounded, is each pass's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from featherweight.encodings import Affine, Masked, affine_scale, fitting_block, grouped, spread
from featherweight.gram import Gram
from featherweight.passes import Pass
from featherweight.surgery import (
    WEIGHTED,
    RecurrentWeight,
    dense_of,
    done,
    encode,
    encoding_of,
    groups_by_weight,
    leave_others,
    left,
    refuse_quantized,
    select,
)

READING = (*WEIGHTED, nn.Embedding)
KINDS = (*READING, RecurrentWeight)

Group = Mapping[str, nn.Module]  # layers that share one weight


def chosen(step: Pass, model: nn.Module, kinds: tuple[type[nn.Module], ...] = KINDS) -> list[dict[str, nn.Module]]:
    """The layers of `kinds` that `step` is to store otherwise, those that share a weight together.

    All else that has weights is left, and said to be.

    Raises:
        LayerError, RecipeError: there are none, or one is stored in few bits already.
    """
    layers = select(model, step.where, kinds)
    refuse_quantized(layers, step.name())
    leave_others(model, step.where, layers, step.name())
    return groups_by_weight(model, layers)


def with_rows(groups: Iterable[Group]) -> list[Group]:
    """Those of whose weights a row can have a scale; others, of one weight a row, are left, and said to be."""
    return [group for group in groups if not _too_thin(group)]


def _too_thin(group: Group) -> bool:
    thin = weight_of(group)[0].numel() < 2
    for name in group if thin else ():
        left(name, "its rows hold one weight each: a scale would weigh more than it saves")
    return thin


def weight_of(group: Group) -> Tensor:
    """The weight that the layers of a group share, dense."""
    return dense_of(next(iter(group.values())))


def is_pruned(group: Group) -> bool:
    """Whether zeros in the weight of a group are to stay zero."""
    return isinstance(encoding_of(next(iter(group.values()))), Masked)


def store(group: Group, encoding: Affine, how: str = "") -> None:
    """Has all layers of a group compute their weight from `encoding`, and says so."""
    for name, layer in group.items():
        encode(layer, encoding)
        done(name, f"{encoding.describe()}, {how}" if how else encoding.describe())


def store_by_reading(
    group: Group,
    gram: Gram | None,
    bits: int,
    block: int,
    rounded: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    how: str,
) -> None:
    """Stores the weight of a group as `rounded` has it (see `by_matrices`); to the nearest where `gram` is None.

    Args:
        gram: of what its layers read; None where nothing is known of it.
        bits: of each weight.
        block: how many of a row share a scale, at most; 0 for one scale per output channel.
        rounded: as `by_matrices` calls it.
        how: it rounds, in words.
    """
    weight = weight_of(group)
    block = fitting_block(weight[0].numel(), block)
    scale = affine_scale(weight, bits, 0, block, search=True)
    if gram is not None:
        weight = by_matrices(group, scale, block, gram, rounded)
    encoding = Affine(weight, scale, bits=bits, axis=0, block=block)
    store(group, encoding, f"rounded to the nearest: {why_unseen(group)}" if gram is None else how)


def why_unseen(group: Group) -> str:
    """Why nothing is known of what a group's weight is multiplied with, once calibration data has none of it."""
    if not looked_up(group):
        return "the network never calls it"
    return "its rows are looked up" if len(group) == 1 else "its rows are looked up by a layer that shares them"


def looked_up(group: Group) -> bool:
    """Whether a layer of the group reads no numbers but looks up rows."""
    return any(isinstance(layer, nn.Embedding) for layer in group.values())


def read_by(group: Group, seen: Mapping[str, Gram]) -> Gram | None:
    """The sums over what all layers of a group read; None where none was called."""
    found: Gram | None = None
    for name in group:
        if name in seen:
            found = seen[name] if found is None else found.joined(seen[name])
    return found


def by_matrices(
    group: Group,
    scale: Tensor,
    block: int,
    gram: Gram,
    rounded: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The weight of a group as `rounded` returns it, which sees it as matrices of what is read together.

    Args:
        scale: of `Affine` for the weight, with axis 0.
        block: of `Affine`.
        gram: of what the weight is multiplied with.
        rounded: called with the weight and the scale of every single weight, (groups, out, in); XᵀX / n, (groups, in,
            in); and which weights are kept, (groups, out, in), None for all.
    """
    weight, encoding = weight_of(group), encoding_of(next(iter(group.values())))
    hessian = gram.mean()
    sides = (len(hessian), -1, hessian.shape[1])
    steps = spread(scale, tuple(weight.shape), 0, block).expand_as(grouped(weight, block)).reshape(sides)
    kept = encoding.mask.reshape(sides) if isinstance(encoding, Masked) else None
    return rounded(weight.reshape(sides), steps, hessian, kept).reshape(weight.shape)
