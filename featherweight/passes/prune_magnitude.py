"""Zeroes the smallest weights. They stay zero through later distillation.

    ŵ = w · [ |w| > t ],  t such that a given share of the weights is at or below it

The zeros alone make no dense file smaller and no runtime here faster: they are worth something where they are
entropy-coded or stored sparsely, and as a start for other techniques. Embeddings are left alone, whose small rows are
rare words rather than unimportant ones.

Source: Han, Pool, Tran, Dally 2015, arXiv:1506.02626, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from featherweight.encodings import Masked
from featherweight.errors import RecipeError
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import dense_of, done, encode, encoding_of, groups_by_weight, leave_others, left, select
from featherweight.workload import Workload

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def largest(weight: Float[Tensor, "*shape"], share: float) -> Bool[Tensor, "*shape"]:
    """True for all weights but the `share` of smallest magnitude, rounded down to whole weights.

    >>> largest(torch.tensor([[0.1, -3.0], [2.0, -0.2]]), share=0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    doomed = weight.abs().flatten().topk(int(share * weight.numel()), largest=False, sorted=False).indices
    kept[doomed] = False
    return kept.view(weight.shape)


def largest_of_all(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """`largest` with all weights in one competition; one mask for each tensor.

    >>> [kept.tolist() for kept in largest_of_all([torch.tensor([1.0, 2.0]), torch.tensor([9.0, 8.0])], share=0.5)]
    [[False, False], [True, True]]
    """
    kept = largest(torch.cat([weight.flatten() for weight in weights]), share)
    parts = kept.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


@dataclass(frozen=True, kw_only=True)
class PruneMagnitude(Pass):
    """Zeroes a share of the weights of convolutions and linear layers, the smallest first.

    Args:
        share: of the weights that become zero. Weights that are zero already count.
        scope: whether each layer gives its share ("layer"), or all layers compete and give what they can
            spare ("global").
    """

    share: Annotated[float, Range(0.0, 0.99)] = 0.5
    scope: Annotated[str, Choice("layer", "global")] = "layer"

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, KINDS)
        groups = groups_by_weight(model, layers)
        weights = [_weight(*next(iter(group.items()))) for group in groups]
        if self.scope == "global":
            masks = largest_of_all(weights, self.share)
        else:
            masks = [largest(weight, self.share) for weight in weights]
        for group, weight, mask in zip(groups, weights, masks, strict=True):
            encoding, spared = Masked(weight, mask), bool(mask.all())
            for name, layer in group.items():
                if spared:
                    left(name, "its weights are all larger than those that go")
                    continue
                encode(layer, encoding)
                done(name, encoding.describe())
        leave_others(model, self.where, layers, self.name())
        return model


def _weight(name: str, layer: nn.Module) -> Tensor:
    encoding = encoding_of(layer)
    if encoding is not None and not isinstance(encoding, Masked):
        raise RecipeError(
            f"prune_magnitude would zero weights of {name!r}, which an earlier step stored as {encoding.describe()}. "
            "Put prune_magnitude before that step."
        )
    return dense_of(layer)
