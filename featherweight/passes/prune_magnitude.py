"""Zeroes the smallest weights. They stay zero through later distillation.

    ŵ = w · [ |w| > t ],  t such that a given share of the weights is at or below it

The zeros alone make no dense file smaller and no runtime here faster: they are worth something where they are
entropy-coded or stored sparsely, and as a start for other techniques. Embeddings are left alone, whose small rows are
rare words rather than unimportant ones. A block is as large as its Frobenius norm.

Source: Han, Pool, Tran, Dally 2015, arXiv:1506.02626, section 3; 2:4: Mishra et al. 2021, arXiv:2104.08378, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import nn

from featherweight.errors import SettingError
from featherweight.masks import NOTHING_GOES, Pattern, check_share, choose, largest_of_all
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import RecurrentWeight, keep_only, leave_others, prunable, select
from featherweight.workload import Workload

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, RecurrentWeight)


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
        sizes = [weight.abs() for _, weight in weights]
        if self.scope == "global":
            masks, spared = largest_of_all(sizes, self.share), "its weights are all larger than those that go"
        else:
            masks, spared = [choose(size, self.pattern, self.share) for size in sizes], NOTHING_GOES
        for (group, weight), kept in zip(weights, masks, strict=True):
            keep_only(group, weight, kept, self.pattern, spared)
        leave_others(model, self.where, layers, self.name())
        return model
