"""Zeroes the smallest weights. They stay zero through later distillation.

    ŵ = w · [ |w| > t ],  t such that a given share of the weights is at or below it

of each layer. Where all layers compete, what is compared is

    w² / Σ_{v of the layer, |v| ≥ |w|} v²

for by magnitude alone layers whose weights are all small go whole: half of the weights of a MiniLM gone so leave no
better than chance (LOG.md).

The zeros alone make no dense file smaller and no runtime here faster: they are worth something where they are
entropy-coded or stored sparsely, and as a start for other techniques. Embeddings are left alone, whose small rows are
rare words rather than unimportant ones. A block is as large as its Frobenius norm.

Source: Han, Pool, Tran, Dally 2015, arXiv:1506.02626, section 3; all layers: Lee, Park, Mo, Ahn, Shin 2021,
arXiv:2010.07611, equation 4 (LAMP); 2:4: Mishra et al. 2021, arXiv:2104.08378, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.errors import SettingError
from featherweight.masks import NOTHING_GOES, Pattern, check_share, choose, largest_of_all
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import WEIGHTED, RecurrentWeight, keep_only, leave_others, prunable, select
from featherweight.workload import Workload

KINDS = (*WEIGHTED, RecurrentWeight)


def adaptive_sizes(weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The square of each weight over the sum of those that are no smaller; 0 for zeros. In doubles.

    >>> adaptive_sizes(torch.tensor([1.0, 0.0, -3.0])), adaptive_sizes(torch.tensor([10.0, 0.0, -30.0]))
    (tensor([0.1000, 0.0000, 1.0000], dtype=torch.float64), tensor([0.1000, 0.0000, 1.0000], dtype=torch.float64))
    """
    squares, order = weight.double().square().flatten().sort()
    no_smaller = squares.flip(0).cumsum(0).flip(0)
    shares = squares / no_smaller.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(shares).scatter_(0, order, shares).view(weight.shape)


@dataclass(frozen=True, kw_only=True)
class PruneMagnitude(Pass):
    """Zeroes a share of the weights of convolutions, linear and recurrent layers, the smallest first.

    Args:
        share: of the weights that become zero. Weights that are zero already count. With pattern "blocks" of the whole
            blocks of each layer, rounded down; with "2:4" and "4:8" it is 0.5, and another one is refused.
        scope: whether each layer gives its share ("layer"), or all layers compete and give what they can
            spare ("global", with pattern "free" only).
        pattern: in which zeros lie: anywhere ("free"), 2 of every 4 or 4 of every 8 consecutive weights of a row, or
            32 × 32 blocks of the weight as a matrix (out, in · kernel).
    """

    share: Annotated[float, Range(0.0, 0.99)] = 0.5
    scope: Annotated[str, Choice("layer", "global")] = "layer"
    pattern: Pattern = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name(), self.pattern, self.share)
        if self.scope == "global" and self.pattern != "free":
            raise SettingError(
                f"{self.name()}: scope='global' does not go with pattern={self.pattern!r}, which is laid into each "
                "layer by itself. Set scope to 'layer' or pattern to 'free'."
            )

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, KINDS)
        weights = prunable(model, layers, self.pattern, self.name())
        if self.scope == "global":
            sizes = [adaptive_sizes(weight) for _, weight in weights]
            masks, spared = largest_of_all(sizes, self.share), "its weights are all larger than those that go"
        else:
            masks, spared = [choose(weight.abs(), self.pattern, self.share) for _, weight in weights], NOTHING_GOES
        for (group, weight), kept in zip(weights, masks, strict=True):
            keep_only(group, weight, kept, self.pattern, spared)
        leave_others(model, self.where, layers, self.name())
        return model
