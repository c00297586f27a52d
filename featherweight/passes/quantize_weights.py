"""Weights as whole numbers of 2 to 8 bits; arithmetic stays in floats.

    ŵ = s · clamp(round(w / s), −2^(b−1), 2^(b−1) − 1)

with one s for each output channel or each block of consecutive weights of a row. Smaller files, and faster where
reading weights takes the time. Up to 4 bits two codes are stored to a byte, from 5 on one: 3 bits make no file smaller
than 4 do, nor 5 to 7 than 8, until something compresses the codes. Activations are left alone: see `quantize_static`
and `quantize_dynamic`.

Source: Jacob et al. 2018, arXiv:1712.05877, equation 1; blocks: Dettmers et al. 2022, arXiv:2110.02861, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from featherweight.encodings import Affine, affine_scale, fitting_block
from featherweight.passes import Pass
from featherweight.passes._rounding import round_weights
from featherweight.settings import Choice, Range
from featherweight.workload import Workload


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Stores the weights of convolutions, linear and recurrent layers and embeddings as whole numbers of 2 to 8 bits.

    Args:
        bits: of each weight.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, the largest smaller size that does is taken.
        search: whether scales minimise the squared error (else they cover the largest weight).
    """

    bits: Annotated[int, Range(2, 8)] = 8
    block: Annotated[int, Choice(0, 32, 64, 128)] = 0
    search: bool = True

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        return round_weights(self, model, self._encoding)

    def _encoding(self, weight: Tensor) -> Affine:
        block = fitting_block(weight[0].numel(), self.block)
        scale = affine_scale(weight, self.bits, 0, block, self.search)
        return Affine(weight, scale, bits=self.bits, axis=0, block=block)
