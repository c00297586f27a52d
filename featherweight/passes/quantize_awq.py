"""AWQ: weights that read loud inputs are stretched before they are rounded, and shrunk again after.

    ŵ_ij = Q(w_ij · s_j) / s_j,   s_j = (mean |x_j|)^α

A stretched weight is rounded by steps that are finer for it, so that the inputs which say most of the output are
multiplied with better weights, at the cost of the others. The power α, from 0 (plain rounding) to 1, is the one of
six with the least error of the layer's output on calibration data. The authors fold 1 / s into the operator before
the layer, which not every operator can take; here it is part of the stored weight, one float for each input channel
and a multiplication wherever the runtime decodes the weight. Their search for clipping is left out but for that of
the scales. Grouped convolutions, embeddings and layers that calibration data never calls are rounded as they are.

Source: Lin, Tang, Tang, Yang, Dang, Gan, Han 2023, arXiv:2306.00978, section 3.2, equations 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Affine, affine_scale, fitting_block
from featherweight.gram import Gram, grams
from featherweight.passes import Pass
from featherweight.passes._storing import (
    READING,
    Group,
    chosen,
    looked_up,
    read_by,
    store,
    weight_of,
    why_unseen,
    with_rows,
)
from featherweight.rescaling import stretches
from featherweight.settings import Choice, Range
from featherweight.surgery import CONVOLUTIONS
from featherweight.workload import Workload

POWERS = [0.2 * step for step in range(6)]


def output_error(change: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """The mean square of what a change of the weight does to the outputs, summed over them.

    >>> output_error(torch.tensor([[0.5, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 100.0]]))
    1.0
    """
    return float(torch.sum((change @ gram) * change))


@dataclass(frozen=True, kw_only=True)
class QuantizeAwq(Pass):
    """Stores weights of convolutions, linear layers and embeddings in few bits, finest where inputs are loud.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, another even size that does is taken.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    block: Annotated[int, Choice(0, 32, 64, 128)] = 64

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        groups = with_rows(chosen(self, model, READING))
        stretched = {name: layer for group in groups if not _why_plain(group) for name, layer in group.items()}
        seen = grams(model, stretched, workload) if stretched else {}
        for group in groups:
            gram = read_by(group, seen)
            if gram is None:
                how = f"rounded as it is: {_why_plain(group) or why_unseen(group)}"
                store(group, self._stretched(weight_of(group), None), how)
            else:
                encoding, power = self._best(weight_of(group), gram)
                store(group, encoding, f"inputs to the power {power:.1f}")
        return model

    def _best(self, weight: Tensor, gram: Gram) -> tuple[Affine, float]:
        """A weight with the power that suits what it is multiplied with, and that power."""
        by_channel = gram.magnitude()[0].to(weight.dtype).view(weight.shape[1], -1).mean(1)
        tried = {p: self._stretched(weight, stretches(by_channel, p) if p else None) for p in POWERS}
        products = gram.mean()[0].to(weight.dtype)
        errors = {p: output_error((encoding.decode() - weight).flatten(1), products) for p, encoding in tried.items()}
        best = min(errors, key=lambda p: errors[p])
        return tried[best], best

    def _stretched(self, weight: Tensor, factors: Tensor | None) -> Affine:
        """`weight` rounded after its columns were multiplied by `factors`."""
        block = fitting_block(weight[0].numel(), self.block)
        wide = weight if factors is None else weight * factors.view(1, -1, *[1] * (weight.dim() - 2))
        scale = affine_scale(wide, self.bits, 0, block, search=True)
        columns = None if factors is None else 1 / factors
        return Affine(weight, scale, bits=self.bits, axis=0, block=block, columns=columns)


def _why_plain(group: Group) -> str:
    """Why the columns of a group's weight are not stretched; empty where they are."""
    if looked_up(group):
        return "its rows are looked up"
    if any(isinstance(layer, CONVOLUTIONS) and layer.groups > 1 for layer in group.values()):
        return "its groups read different channels by the same columns"
    return ""
