"""Weights as whole numbers of 2 to 8 bits; arithmetic stays in floats.

    ŵ = s · clamp(round((w − m) / s), −2^(b−1), 2^(b−1) − 1) + m

with m = 0 unless offsets are asked for, and one s and m for each output channel or each block of consecutive weights
of a row. Smaller files, and faster where reading weights takes the time. Up to 4 bits two codes are stored to a byte,
from 5 on one: 3 bits make no file smaller than 4 do, nor 5 to 7 than 8, until something compresses the codes.
Activations are left alone: see `quantize_static` and `quantize_dynamic`.

Source: Jacob et al. 2018, arXiv:1712.05877, equation 1; blocks: Dettmers et al. 2022, arXiv:2110.02861, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch import Tensor, nn

from featherweight.encodings import (
    Affine,
    affine_scale,
    closest_grid,
    fitting_block,
    grouped,
    in_parts,
    spanning_grid,
)
from featherweight.passes import Pass
from featherweight.passes._storing import chosen, is_pruned, store, weight_of, with_rows
from featherweight.settings import Choice, Range
from featherweight.workload import Workload


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Stores the weights of convolutions, linear and recurrent layers and embeddings as whole numbers of 2 to 8 bits.

    Args:
        bits: of each weight.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, another even size that does is taken.
        search: whether scales minimise the squared error (else they cover the largest weight).
        offset: whether each scale has a value beside it that code 0 stands for, which takes as much room: of use where
            a scale has few weights, which do not lie alike round zero. Weights that were pruned to zeros have none.
    """

    bits: Annotated[int, Range(2, 8)] = 8
    block: Annotated[int, Choice(0, 32, 64, 128)] = 0
    search: bool = True
    offset: bool = False

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        for group in with_rows(chosen(self, model)):
            store(group, self._encoding(weight_of(group), self.offset and not is_pruned(group)))
        return model

    def _encoding(self, weight: Tensor, with_offset: bool) -> Affine:
        block = fitting_block(weight[0].numel(), self.block)
        if with_offset:
            form = partial(closest_grid if self.search else spanning_grid, bits=self.bits)
            found = in_parts(grouped(weight, block) if block else weight.flatten(1), form)
            return Affine(weight, found[..., 0], bits=self.bits, axis=0, block=block, offset=found[..., 1])
        scale = affine_scale(weight, self.bits, 0, block, self.search)
        return Affine(weight, scale, bits=self.bits, axis=0, block=block)
