"""HQQ: grids on which most weights are hit well and a few may be missed by far; no data is needed.

    min over s and m of Σ |w − s·q − m|^p,  p < 1,  by splitting off what is missed, e:

    e ← shrink(w − s·q − m),   s, m ← those with the least Σ (w − e − s·q − m)²,
    q ← clamp(round((w − m) / s), −2^(b−1), 2^(b−1) − 1)
    shrink(x) = sign(x) · max(0, |x| − |x|^(p−1) / β),   β growing

From the better of two grids, the one that spans all weights and the symmetric one with the least squared error. Of all
met on the way each row keeps that with the least Σ |w − s·q − m|^p. The authors fix s where the grid spans all
weights, and seek their zero point −m / s alone; where tails are heavy and rows long that misses most weights by more
than a grid without offsets. Without offsets, as some kernels want it and as weights need that were pruned, m is 0.

Closer to most weights is not always closer to the outputs: grids of the least squared error (`quantize_weights`) lost
less on a ResNet-18 without offsets, and on a decoder of text with them (LOG.md).

Source: splitting: Geman and Yang 1995, doi:10.1109/83.392335; for weights: Badri and Shaji 2023, "Half-quadratic
quantization of large machine learning models".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import (
    Affine,
    closest_scale,
    fitting_block,
    grid,
    grouped,
    in_parts,
    line,
    on_grid,
    spanning_grid,
)
from featherweight.passes import Pass
from featherweight.passes._storing import chosen, is_pruned, store, weight_of, with_rows
from featherweight.settings import Choice, Range
from featherweight.workload import Workload

ROUNDS = 21
GAIN = 1e-3  # below which it is not worth another round
BETA, GROWTH = 10.0, 1.05  # how firmly e is held to w − s·q, errors in steps of the grid; and how that grows


def power(size: Float[Tensor, "*shape"], exponent: float) -> Float[Tensor, "*shape"]:
    """`size` to a power, in a quarter of the time that torch takes."""
    return size.log().mul_(exponent).exp_()


def shrink(x: Float[Tensor, "*shape"], beta: float, norm: float) -> Float[Tensor, "*shape"]:
    """Small values to zero, large ones hardly changed: near the least |e|^norm + beta / 2 · (e − x)².

    >>> shrink(torch.tensor([0.0, 0.1, -4.0]), beta=10.0, norm=0.5)
    tensor([ 0.0000,  0.0000, -3.9500])
    """
    size = x.abs()
    return size.sub_(power(size, norm - 1), alpha=1 / beta).clamp_(min=0).mul_(x.sign())


def rounded(rows: Float[Tensor, "*rows n"], scale: Float[Tensor, "*rows 1"], bits: int) -> Float[Tensor, "*rows n"]:
    """The codes of `rows` on the grid of `bits` bits."""
    return (rows / scale).round_().clamp_(*grid(bits))


def norm_error(missed: Float[Tensor, "*rows n"], norm: float) -> Float[Tensor, "*rows 1"]:
    """Σ |e|^norm of each row.

    >>> norm_error(torch.tensor([[0.0, -0.25]]), norm=0.5)
    tensor([[0.5000]])
    """
    return power(missed.abs(), norm).sum(-1, keepdim=True)


def half_quadratic(
    rows: Float[Tensor, "rows n"],
    scale: Float[Tensor, "rows 1"],
    offset: Float[Tensor, "rows 1"] | None,
    bits: int,
    norm: float,
) -> Float[Tensor, "rows 2"]:
    """Of the grids of each row that alternation meets the one with the least error: its scale and offset.

    It ends where all rows together gain next to nothing. The error is Σ |w − s·q − m|^norm.

    Args:
        rows: all that shares a scale along the last dimension.
        scale: where it begins.
        offset: where it begins; None for 0 throughout.
        bits: of the grid.
        norm: the power of errors, 1 or less.
    """
    unit, fixed = scale, offset is None
    offset = torch.zeros_like(scale) if offset is None else offset
    best, least = torch.cat([scale, offset], 1), torch.full_like(scale, torch.inf)
    before, beta = math.inf, BETA
    for _ in range(ROUNDS):
        apart = rows if fixed else rows - offset
        codes = rounded(apart, scale, bits)
        missed = (apart - scale * codes).div_(unit)
        error = norm_error(missed, norm) * unit.pow(norm)
        best = torch.where(error < least, torch.cat([scale, offset], 1), best)
        least = torch.minimum(error, least)
        now = float(error.sum())
        if now > before * (1 - GAIN):
            break
        kept = rows - unit * shrink(missed, beta, norm)
        fitted, offset = line(codes, kept, through_zero=fixed)
        scale = torch.where(fitted > 0, fitted, scale)
        beta, before = beta * GROWTH, now
    return best


@dataclass(frozen=True, kw_only=True)
class QuantizeHqq(Pass):
    """Stores convolutions, linear and recurrent layers and embeddings in few bits, on scales that forgive outliers.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, the largest smaller size that does is taken.
        norm: the power of errors that is made least; the smaller, the less outliers count.
        offset: whether each scale has a value beside it that code 0 stands for, which takes as much room. Weights that
            were pruned to zeros have none.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    block: Annotated[int, Choice(0, 32, 64, 128)] = 64
    norm: Annotated[float, Range(0.2, 1.0)] = 0.7
    offset: bool = True

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        for group in with_rows(chosen(self, model)):
            store(group, self._encoding(weight_of(group), self.offset and not is_pruned(group)))
        return model

    def _encoding(self, weight: Tensor, with_offset: bool) -> Affine:
        block = fitting_block(weight[0].numel(), self.block)
        rows = grouped(weight, block) if block else weight.flatten(1)
        found = in_parts(rows, self._grids_with_offset if with_offset else self._grids)
        offset = found[..., 1] if with_offset else None
        return Affine(weight, found[..., 0], bits=self.bits, axis=0, block=block, offset=offset)

    def _grids(self, rows: Tensor) -> Tensor:
        return half_quadratic(rows, closest_scale(rows, self.bits), None, self.bits, self.norm)

    def _grids_with_offset(self, rows: Tensor) -> Tensor:
        spanning, symmetric = spanning_grid(rows, self.bits), closest_scale(rows, self.bits)
        starts = (spanning, torch.cat([symmetric, torch.zeros_like(symmetric)], 1))
        errors = [norm_error(rows - on_grid(rows, start, self.bits), self.norm) for start in starts]
        start = torch.where(errors[0] < errors[1], *starts)
        return half_quadratic(rows, start[:, :1], start[:, 1:], self.bits, self.norm)
