"""Zeroes weights at random: the control that every other pruning must beat.

    ŵ = w · m,  m drawn without looking at w or at data, with a given share of zeros

What another pruning is worth is what it gains over this one at the same share and in the same pattern. The draw comes
from the recipe's seed. Embeddings are left alone, as by the others.

Source: Blalock, Gonzalez Ortiz, Frankle, Guttag 2020, arXiv:2003.03033, whose ShrinkBench has it among its baselines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.masks import NOTHING_GOES, Pattern, check_share, choose
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import WEIGHTED, RecurrentWeight, keep_only, leave_others, prunable, select
from featherweight.workload import Workload

KINDS = (*WEIGHTED, RecurrentWeight)


def lots(weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A number for each weight, drawn from torch's global generator: 0 for zeros, else more than 0 and at most 1.

    >>> lots(torch.tensor([0.0, -5.0])) > 0
    tensor([False,  True])
    """
    drawn = 1 - torch.rand(weight.shape)
    return drawn.to(weight.device) * (weight != 0)


@dataclass(frozen=True, kw_only=True)
class PruneRandom(Pass):
    """Zeroes a share of the weights of convolutions, linear and recurrent layers, at random.

    Args:
        share: of each layer's weights that becomes zero. Weights that are zero already count. With pattern "blocks" of
            its whole blocks, rounded down; with "2:4" and "4:8" it is 0.5, and another one is refused.
        pattern: in which zeros lie: anywhere ("free"), 2 of every 4 or 4 of every 8 consecutive weights of a row, or
            32 × 32 blocks of the weight as a matrix (out, in · kernel).
    """

    share: Annotated[float, Range(0.0, 0.99)] = 0.5
    pattern: Pattern = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name(), self.pattern, self.share)

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, KINDS)
        for group, weight in prunable(model, layers, self.pattern, self.name()):
            keep_only(group, weight, choose(lots(weight), self.pattern, self.share), self.pattern, NOTHING_GOES)
        leave_others(model, self.where, layers, self.name())
        return model
