"""What the passes that round weights share: which weights, what the layers that share one read, and what is said.

How a weight is rounded is each pass's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from featherweight.encodings import Affine, Masked, grouped, spread
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


def round_weights(step: Pass, model: nn.Module, rounded: Callable[[Tensor], Affine]) -> nn.Module:
    """`model` with every weight that `step` chooses stored as `rounded` has it, without regard to data."""
    for group in chosen(step, model, KINDS):
        store(group, rounded(weight_of(group)))
    return model


def chosen(step: Pass, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Group]:
    """The layers of `kinds` that `step` is to round, those that share a weight together.

    Those whose rows hold one weight each are left, and said to be, as is all that is not of `kinds`.
    """
    layers = select(model, step.where, kinds)
    refuse_quantized(layers, step.name())
    leave_others(model, step.where, layers, step.name())
    return [group for group in groups_by_weight(model, layers) if not _too_thin(group)]


def _too_thin(group: Group) -> bool:
    thin = weight_of(group)[0].numel() < 2
    for name in group if thin else ():
        left(name, "its rows hold one weight each: a scale would weigh more than it saves")
    return thin


def weight_of(group: Group) -> Tensor:
    """The weight that the layers of a group share, dense."""
    return dense_of(next(iter(group.values())))


def store(group: Group, encoding: Affine, how: str = "") -> None:
    """Has all layers of a group compute their weight from `encoding`, and says so."""
    for name, layer in group.items():
        encode(layer, encoding)
        done(name, f"{encoding.describe()}, {how}" if how else encoding.describe())


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
