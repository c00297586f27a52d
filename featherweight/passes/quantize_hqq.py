"""HQQ: scales for which most weights are hit well and a few may be missed by far; no data is needed.

    min over s of Σ |w − s·q|^p,  p < 1,  by splitting off what is missed, e:

    e ← shrink(w − s·q),   s ← ⟨q, w − e⟩ / ⟨q, q⟩,   q ← clamp(round(w / s), −2^(b−1), 2^(b−1) − 1)
    shrink(x) = sign(x) · max(0, |x| − |x|^(p−1) / β),   β growing

The tails of trained weights are heavy, and a squared error would widen the grid for their sake. Grids are symmetric
here and the scale is what is sought; the authors fix the scale and seek a zero point, which is left out: kernels that
read integers want it whole, or not at all. Of all scales met on the way, from the covering one and from the one with
the least squared error, the one with the least Σ |w − s·q|^p is kept. Closer to most weights is not always closer to
the outputs: on a ResNet-18 the least squared error (`quantize_weights`) lost less at 3 and 4 bits.

Source: splitting: Geman and Yang 1995, doi:10.1109/83.392335; for weights: Badri and Shaji 2023, "Half-quadratic
quantization of large machine learning models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Affine, affine_scale, fitting_block, grid, grouped
from featherweight.passes import Pass
from featherweight.passes._rounding import round_weights
from featherweight.settings import Choice, Range
from featherweight.workload import Workload

ROUNDS = 20
BETA, GROWTH = 10.0, 1.05  # how firmly e is held to w − s·q, errors in steps of the grid; and how that grows


def shrink(x: Float[Tensor, "*shape"], beta: float, norm: float) -> Float[Tensor, "*shape"]:
    """Small values to zero, large ones hardly changed: near the least |e|^norm + beta / 2 · (e − x)².

    >>> shrink(torch.tensor([0.0, 0.1, -4.0]), beta=10.0, norm=0.5)
    tensor([ 0.0000,  0.0000, -3.9500])
    """
    size = x.abs()
    return x.sign() * (size - size.pow(norm - 1) / beta).clamp(min=0)


def rounded(rows: Float[Tensor, "*rows n"], scale: Float[Tensor, "*rows 1"], bits: int) -> Float[Tensor, "*rows n"]:
    """The codes of `rows` on the grid of `bits` bits."""
    return (rows / scale).round().clamp(*grid(bits))


def norm_error(
    rows: Float[Tensor, "*rows n"], scale: Float[Tensor, "*rows 1"], bits: int, norm: float
) -> Float[Tensor, "*rows 1"]:
    """Σ |w − s·q|^norm of each row.

    >>> norm_error(torch.tensor([[1.0, 2.25]]), torch.tensor([[1.0]]), bits=4, norm=0.5)
    tensor([[0.5000]])
    """
    return (rows - scale * rounded(rows, scale, bits)).abs().pow(norm).sum(-1, keepdim=True)


def half_quadratic_scale(
    rows: Float[Tensor, "*rows n"], start: Float[Tensor, "*rows 1"], bits: int, norm: float
) -> Float[Tensor, "*rows 1"]:
    """The scale of each row with the least `norm_error` of those that alternation from `start` meets, `start` too.

    Args:
        rows: all that shares a scale along the last dimension.
        bits: of the grid.
        norm: the power of errors, 1 or less.
    """
    scale = best = start
    least = norm_error(rows, start, bits, norm)
    beta = BETA
    for _ in range(ROUNDS):
        codes = rounded(rows, scale, bits)
        missed = start * shrink((rows - scale * codes) / start, beta, norm)
        fitted = (codes * (rows - missed)).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1)
        scale = torch.where(fitted > 0, fitted, scale)
        error = norm_error(rows, scale, bits, norm)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        beta *= GROWTH
    return best


@dataclass(frozen=True, kw_only=True)
class QuantizeHqq(Pass):
    """Stores convolutions, linear and recurrent layers and embeddings in few bits, on scales that forgive outliers.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, the largest smaller size that does is taken.
        norm: the power of errors that is made least; the smaller, the less outliers count.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    block: Annotated[int, Choice(0, 32, 64, 128)] = 64
    norm: Annotated[float, Range(0.2, 1.0)] = 0.7

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        return round_weights(self, model, self._encoding)

    def _encoding(self, weight: Tensor) -> Affine:
        block = fitting_block(weight[0].numel(), self.block)
        rows = grouped(weight, block) if block else weight.flatten(1)
        starts = [affine_scale(weight, self.bits, 0, block, search).unsqueeze(-1) for search in (False, True)]
        first, second = (half_quadratic_scale(rows, start, self.bits, self.norm) for start in starts)
        errors = [norm_error(rows, scale, self.bits, self.norm) for scale in (first, second)]
        scale = torch.where(errors[0] < errors[1], first, second).squeeze(-1)
        return Affine(weight, scale, bits=self.bits, axis=0, block=block)
