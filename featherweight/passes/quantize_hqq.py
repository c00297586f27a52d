"""HQQ: grids that span all weights, shifted so that most are hit well and a few may be missed; no data is needed.

    min over m of Σ |w − s·q − m|^p,  p < 1,  by splitting off what is missed, e, in steps of the grid:

    s = (max w − min w) / (2^b − 1),  q = clamp(round((w − m) / s), −2^(b−1), 2^(b−1) − 1),
    e ← shrink((w − s·q − m) / s),  m ← mean(w − s·q − s·e),  shrink(x) = sign(x) · max(0, |x| − |x|^(p−1) / β)

a few times over. The authors let β grow, which gained nothing here, and put the errors of weights in their own units,
which are so small that shrink leaves nothing of them, and m is the mean of all that is missed. In steps of the grid,
weights that lie nearly halfway between two codes pull less at m. A decoder of text lost less so; to keep, of all m met
on the way, that with the least Σ |e|^p lost more (LOG.md).

Weights that were pruned need a code for zero: they have no offset, and the scale with the least squared error.

Source: splitting: Geman and Yang 1995, doi:10.1109/83.392335; for weights: Badri and Shaji 2023, "Half-quadratic
quantization of large machine learning models".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import (
    Affine,
    affine_scale,
    fitting_block,
    grouped,
    in_parts,
    on_grid,
    spanning_grid,
)
from featherweight.passes import Pass
from featherweight.passes._storing import chosen, is_pruned, store, weight_of, with_rows
from featherweight.settings import Choice, Range
from featherweight.workload import Workload

ROUNDS = 10
BETA = 4.0  # with a norm of 0.7 errors of a third of a step begin to be split off


def shrink(x: Float[Tensor, "*shape"], beta: float, norm: float) -> Float[Tensor, "*shape"]:
    """Small values to zero, large ones hardly changed: near the least |e|^norm + beta / 2 · (e − x)².

    >>> import torch
    >>> shrink(torch.tensor([0.0, 0.1, -4.0]), beta=10.0, norm=0.5)
    tensor([ 0.0000,  0.0000, -3.9500])
    """
    size = x.abs()
    power = size.log().mul_(norm - 1).exp_()  # in a quarter of the time that torch's own takes
    return size.sub_(power, alpha=1 / beta).clamp_(min=0).mul_(x.sign())


def half_quadratic(rows: Float[Tensor, "rows n"], bits: int, norm: float) -> Float[Tensor, "rows 2"]:
    """Scale and offset of each row.

    Args:
        rows: all that shares a scale along the last dimension.
        bits: of the grid.
        norm: the power of errors, 1 or less.
    """
    found = spanning_grid(rows, bits)
    scale, offset = found[:, :1], found[:, 1:]
    for _ in range(ROUNDS):
        missed = rows - on_grid(rows, found, bits)
        offset += missed.sub_(scale * shrink(missed / scale, BETA, norm)).mean(1, keepdim=True)
    return found


@dataclass(frozen=True, kw_only=True)
class QuantizeHqq(Pass):
    """Stores convolutions, linear and recurrent layers and embeddings in few bits, with offsets that forgive outliers.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        block: how many consecutive weights of a row share a scale and an offset; 0 for one of each per output channel.
            Where it does not divide a row, another even size that does is taken.
        norm: the power of errors that is made least; the smaller, the less outliers count.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    block: Annotated[int, Choice(0, 32, 64, 128)] = 64
    norm: Annotated[float, Range(0.2, 1.0)] = 0.7

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        for group in with_rows(chosen(self, model)):
            store(group, self._encoding(weight_of(group), is_pruned(group)))
        return model

    def _encoding(self, weight: Tensor, pruned: bool) -> Affine:
        block = fitting_block(weight[0].numel(), self.block)
        if pruned:
            scale = affine_scale(weight, self.bits, 0, block, search=True)
            return Affine(weight, scale, bits=self.bits, axis=0, block=block)
        rows = grouped(weight, block) if block else weight.flatten(1)
        found = in_parts(rows, partial(half_quadratic, bits=self.bits, norm=self.norm))
        return Affine(weight, found[..., 0], bits=self.bits, axis=0, block=block, offset=found[..., 1])
