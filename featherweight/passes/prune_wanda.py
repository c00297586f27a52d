"""Wanda: zeroes the weights that matter least to a layer's outputs, not the smallest ones.

    S_ij = |w_ij| · ‖x_j‖₂,   and in each row i the share with the smallest S goes

x_j is input feature j over all calibration data, so that a small weight on a loud feature outlives a large one on a
quiet feature. Rows compete only within themselves: an output is spoilt by what it loses of its own inputs, however
large they are beside another's. In a convolution a feature is an input channel, over all examples and positions. The
weights that stay are as they were. Only layers are looked at, one by one: where the outputs of each are nearer, those
of the network need not be. Inputs are those of the network as it comes into this step: what is zeroed in one layer
does not change what is measured in the next. Embeddings are left alone.

Source: Sun, Liu, Bair, Kolter 2023, arXiv:2306.11695, equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.hooks import (
    watch_inputs,
)
from featherweight.masks import NOTHING_GOES, Pattern, check_share, choose
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import (
    NEVER_CALLED,
    WEIGHTED,
    keep_only,
    leave_others,
    left,
    prunable,
    select,
)
from featherweight.workload import Workload


def importance(
    weight: Float[Tensor, "out in *kernel"], norms: Float[Tensor, " channels"]
) -> Float[Tensor, "out in *kernel"]:
    """The magnitude of each weight times the norm of the channel that it reads.

    Args:
        weight: as the layer holds it: `in` is channels / groups, and output channels lie group by group.
        norms: of each input channel of the layer.

    >>> importance(torch.tensor([[1.0, -3.0]]), norms=torch.tensor([9.0, 1.0]))
    tensor([[9., 3.]])
    >>> importance(torch.tensor([[1.0], [1.0], [1.0], [1.0]]), norms=torch.tensor([9.0, 1.0])).flatten()
    tensor([9., 9., 1., 1.])
    """
    by_group = norms.view(-1, weight.shape[1])
    read = by_group.repeat_interleave(weight.shape[0] // len(by_group), dim=0)
    return weight.abs() * read.to(weight.dtype).view(*weight.shape[:2], *[1] * (weight.dim() - 2))


def squares(x: Float[Tensor, "*_"], channel_dim: int) -> Float[Tensor, " channels"]:
    """The sum of squares of each channel.

    >>> squares(torch.tensor([[1.0, 2.0], [2.0, 0.0], [2.0, 0.0]]), channel_dim=-1)
    tensor([9., 4.], dtype=torch.float64)
    """
    by_channel = x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)
    return torch.linalg.vector_norm(by_channel.float(), dim=1).double().square()


@dataclass(frozen=True, kw_only=True)
class PruneWanda(Pass):
    """Zeroes a share of each row of convolutions and linear layers by magnitude times the norm of what it reads.

    Args:
        share: of each row that becomes zero, rounded down to whole weights. Weights that are zero already count. With
            pattern "blocks" of the layer's whole blocks, rounded down; with "2:4" and "4:8" it is 0.5, and another one
            is refused.
        pattern: in which zeros lie: anywhere in a row ("free"), 2 of every 4 or 4 of every 8 consecutive weights of a
            row, or 32 × 32 blocks of the weight as a matrix (out, in · kernel).
    """

    share: Annotated[float, Range(0.0, 0.99)] = 0.5
    pattern: Pattern = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name(), self.pattern, self.share)

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, WEIGHTED)
        weights = prunable(model, layers, self.pattern, self.name())
        loudness = _watch(model, weights, workload)
        for group, weight in weights:
            known = [loudness[name] for name in group if name in loudness]
            if not known:
                for name in group:
                    left(name, NEVER_CALLED)
                continue
            scores = importance(weight, sum(known[1:], known[0]).sqrt())
            kept = choose(scores, self.pattern, self.share, by_row=True)
            keep_only(group, weight, kept, self.pattern, NOTHING_GOES)
        leave_others(model, self.where, layers, self.name())
        return model


def _watch(
    model: nn.Module, weights: Sequence[tuple[dict[str, nn.Module], Tensor]], workload: Workload
) -> dict[str, Tensor]:
    """The sum of squares of every input channel of every layer that is called."""
    layers = {name: layer for group, _ in weights for name, layer in group.items()}
    # (…, in) for a linear layer, (…, channels, *positions) for a convolution, with or without a batch
    channel_dims = {name: 1 - weight.dim() for group, weight in weights for name in group}
    found: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        seen = squares(x, channel_dims[name])
        found[name] = found[name] + seen if name in found else seen

    watch_inputs(model, layers, workload.calibration, observe)
    return found
