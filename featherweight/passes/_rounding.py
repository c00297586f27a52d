"""What the passes share that round weights without regard to data: which weights, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from featherweight.encodings import Affine
from featherweight.passes import Pass
from featherweight.surgery import (
    RecurrentWeight,
    dense_of,
    done,
    encode,
    groups_by_weight,
    leave_others,
    left,
    refuse_quantized,
    select,
)

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, RecurrentWeight)


def round_weights(step: Pass, model: nn.Module, encoding_of: Callable[[Tensor], Affine]) -> nn.Module:
    """`model` with every weight that `step` chooses stored as `encoding_of` rounds it."""
    layers = select(model, step.where, KINDS)
    refuse_quantized(layers, step.name())
    for group in groups_by_weight(model, layers):
        weight = dense_of(next(iter(group.values())))
        encoding = None if weight[0].numel() < 2 else encoding_of(weight)
        for name, layer in group.items():
            if encoding is None:
                left(name, "its rows hold one weight each: a scale would weigh more than it saves")
                continue
            encode(layer, encoding)
            done(name, encoding.describe())
    leave_others(model, step.where, layers, step.name())
    return model
