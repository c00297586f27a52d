"""Fixed point: weights as whole multiples of a power of two, one for a whole tensor, as processors without floats want.

    ŵ = 2^(−f) · clamp(round(w · 2^f), −2^(b−1), 2^(b−1) − 1)

A scale that is a power of two is a shift. What does not fit is set to the nearest end (8 bits: −127 and 127) and never
wraps round. Classical choices are factors of 256 and 16, which are f = 8 and f = 4. Else f is chosen for each tensor:
the largest with which nothing is clipped, or that with the least squared error. One scale for rows of very different
size costs precision that scales per channel keep: see `quantize_weights`. Only weights are stored so; arithmetic
stays in floats.

Source: Gupta, Agrawal, Gopalakrishnan, Narayanan 2015, arXiv:1502.02551, section 3 (rounding to the nearest).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Affine, grid
from featherweight.passes import Pass
from featherweight.passes._storing import chosen, store, weight_of
from featherweight.settings import Choice, Range
from featherweight.workload import Workload

CLIPPING = 6  # places beyond the largest without clipping that are tried for the least squared error
FROM, TO = -60, 60  # places after the point, so that 2^f and its inverse are ordinary floats


def fixed_point(weight: Float[Tensor, "*shape"], fraction: int, bits: int) -> Float[Tensor, "*shape"]:
    """`weight` with `fraction` bits after the point, saturated to `bits` bits in all.

    >>> fixed_point(torch.tensor([0.3, -0.1, 9.0, -9.0]), fraction=4, bits=8)
    tensor([ 0.3125, -0.1250,  7.9375, -7.9375])
    """
    return (weight * 2.0**fraction).round().clamp(*grid(bits)) * 2.0**-fraction


def clipped(weight: Float[Tensor, "*shape"], fraction: int, bits: int) -> bool:
    """Whether some weight does not fit.

    >>> clipped(torch.tensor([0.5]), fraction=8, bits=8), clipped(torch.tensor([0.5]), fraction=7, bits=8)
    (True, False)
    """
    low, top = grid(bits)
    codes = (weight * 2.0**fraction).round()
    return bool(codes.max() > top or codes.min() < low)


def largest_fraction(weight: Float[Tensor, "*shape"], bits: int) -> int:
    """The most bits after the point with which no weight is clipped; 0 for a tensor of zeros.

    >>> largest_fraction(torch.tensor([0.9, -0.2]), bits=8), largest_fraction(torch.tensor([300.0]), bits=8)
    (7, -2)
    """
    size = float(weight.abs().max())
    if size == 0:
        return 0
    guess = min(max(math.floor(math.log2(grid(bits)[1] / size)) + 2, FROM), TO)
    return next((f for f in range(guess, FROM, -1) if not clipped(weight, f, bits)), FROM)


def closest_fraction(weight: Float[Tensor, "*shape"], bits: int) -> int:
    """The bits after the point with the least squared error.

    >>> closest_fraction(torch.tensor([0.25] * 1000 + [3.0]), bits=4)
    2
    """
    first = largest_fraction(weight, bits)
    tried = range(first, min(first + CLIPPING, TO) + 1)
    return min(tried, key=lambda f: float((fixed_point(weight, f, bits) - weight).square().sum()))


@dataclass(frozen=True, kw_only=True)
class QuantizeFixed(Pass):
    """Stores weights of convolutions, linear and recurrent layers and embeddings in fixed point, a format a tensor.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        fraction: bits after the point, such as 8 or 4; -1 chooses for each tensor.
        choose: what is chosen where `fraction` is -1: the least squared error, or the most bits without clipping.
    """

    bits: Annotated[int, Range(2, 8)] = 8
    fraction: Annotated[int, Range(-1, 24)] = -1
    choose: Annotated[str, Choice("error", "range")] = "error"

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        for group in chosen(self, model):
            weight = weight_of(group)
            fraction = self._fraction(weight)
            encoding = Affine(weight, torch.tensor(2.0**-fraction, dtype=weight.dtype), bits=self.bits, axis=-1)
            store(group, encoding, f"{fraction} bits after the point")
        return model

    def _fraction(self, weight: Tensor) -> int:
        if self.fraction >= 0:
            return self.fraction
        return (closest_fraction if self.choose == "error" else largest_fraction)(weight, self.bits)
