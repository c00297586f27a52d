"""Weights as whole numbers on a uniform grid of a curve: fine steps near zero, where most weights are, coarse far out.

    q = the whole number, −m to m, whose ŵ is nearest to w,   ŵ = s · sign(q) · g(|q| / m),   m = 2^(b−1) − 1

with one s for each output channel and one curve g for each layer, the inverse of f that spreads the weights evenly:

    mu     f(x) = ln(1 + μ · x) / ln(1 + μ)     g(u) = ((1 + μ)^u − 1) / μ
    power  f(x) = x^(1/p)                       g(u) = u^p
    log    f(x) = 1 + log₂(x) / r               g(u) = 2^(−r · (1 − u)), and 0 at 0

Weights are dense near zero and sparse far out, so b bits lose less than on a uniform grid; where they are spread evenly
they lose more. Each curve is tried at a few strengths (μ, p, r), and each channel's s at a few sizes: those with the
least squared error are taken. The curves are not trained (the first source does that), and activations are left alone.
Files become smaller, not faster: the runtimes here decode the weights when they load a file.

Source: companding of weights: Yamamoto 2021, arXiv:2103.07156, section 3; power: Yvinec, Dapogny, Cord, Bailly 2023,
arXiv:2301.09858; logarithm: Miyashita, Lee, Murmann 2016, arXiv:1603.01025; μ-law: Smith 1957, Bell System Technical
Journal 36, pages 653 to 709.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Companded, magnitudes
from featherweight.passes import Pass
from featherweight.passes._storing import Group, chosen, weight_of
from featherweight.settings import Choice
from featherweight.surgery import encode_smaller
from featherweight.workload import Workload

STRENGTHS = {"mu": (2.0, 5.0, 20.0, 100.0), "power": (1.5, 2.0, 3.0), "log": (4.0, 7.0, 12.0)}
SIZES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the scale, as shares of the largest weight: beyond it weights are clipped


def best_scale(
    ordered: Float[Tensor, "rows n"], levels: Float[Tensor, " levels"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The scale of each row with which scale · levels meet its magnitudes best, and the squared error that is left.

    What is nearest to a level is a run of the ordered magnitudes, so the error follows from their running sums.

    Args:
        ordered: magnitudes of the weights, ascending in each row.
        levels: magnitudes that codes stand for, ascending from 0 to 1.

    >>> best_scale(torch.tensor([[0.0, 1.0, 4.0]]), levels=torch.tensor([0.0, 0.25, 1.0]))
    (tensor([4.]), tensor([0.]))
    """
    largest = ordered[:, -1:].clamp(min=torch.finfo(torch.float32).tiny * 256)
    sums, squares = F.pad(ordered.cumsum(1), (1, 0)), ordered.square().sum(1, keepdim=True)
    middle = (levels[1:] + levels[:-1]) / 2
    best, least = largest, torch.full_like(largest, torch.inf)
    for size in SIZES:
        scale = largest * size
        inner = torch.searchsorted(ordered, scale * middle, right=True)
        ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=ordered.shape[1])
        met, count, moment = scale * levels, ends.diff(dim=1), sums.gather(1, ends).diff(dim=1)
        error = squares + (met * (met * count - 2 * moment)).sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.squeeze(1), least.squeeze(1)


@dataclass(frozen=True, kw_only=True)
class CompandWeights(Pass):
    """Stores the weights of convolutions, linear and recurrent layers and embeddings as 8 or 4 bits on a curve.

    Args:
        bits: of each weight.
        curve: "mu", "power" or "log"; "auto" takes the one with the least squared error for each layer.
    """

    bits: Annotated[int, Choice(8, 4)] = 8
    curve: Annotated[str, Choice("auto", "mu", "power", "log")] = "auto"

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        encode_smaller(chosen(self, model), self._encoding, self.name())
        return model

    def _encoding(self, group: Group) -> Companded:
        weight = weight_of(group)
        ordered = weight.double().abs().flatten(1).sort(dim=1).values  # in double, for small differences of large sums
        least, chosen = torch.inf, None
        for curve in STRENGTHS if self.curve == "auto" else (self.curve,):
            for strength in STRENGTHS[curve]:
                scale, error = best_scale(ordered, magnitudes(curve, strength, self.bits).double())
                if chosen is None or float(error.sum()) < least:
                    least, chosen = float(error.sum()), (scale, curve, strength)
        assert chosen is not None
        scale, curve, strength = chosen
        return Companded(weight, scale.to(weight.dtype), curve=curve, strength=strength, bits=self.bits)
