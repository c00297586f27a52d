"""AutoRound: learns for each weight whether to round up or down, so that the layer's outputs stay.

    ŵ = s · clamp(round(w̃ / s + v), −2^(b−1), 2^(b−1) − 1),   |v| ≤ ½

    v ← v − η_t · sign(m),   m ← β m + (1 − β) ∂L/∂v

with L the squared error of the outputs on calibration data, η_t falling to zero on a line, and gradients that pass
through the rounding as if it were none. Of all that it meets on the way each output channel keeps what leaves it the
least error, nearest rounding included. The authors draw L from batches of inputs X. Here it is exact, by their Gram
matrix alone, and falls apart into blocks B of 16 weights of a row:

    L = tr(E H Eᵀ) = Σ_B ‖(ŵ_B − w̃_B) R_BB‖²,   E = ŵ − w,   H = XᵀX / n + λ = R Rᵀ,   R upper triangular

    w̃_B = w_B − Σ_{C before B} E_C R_CB R_BB⁻¹

Each block is learned by itself, once those before it are, and makes up for their errors, as single weights do in
`quantize_gptq`. Learned all together, as the authors do, weights of correlated inputs end up much further off, and take
many times as long (LOG.md). The momentum m is an addition. The authors' blocks of layers with one common loss, and
their search for clippings other than by least squares, are left out.

Source: Cheng, Zhang, Shen, Cai, He, Lv, Liu 2023, arXiv:2309.05516, section 3, equation 3 and algorithm 1; the choice
between up and down, layer by layer: Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, arXiv:2004.10568, section 3;
errors passed on: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from featherweight.encodings import grid
from featherweight.gram import Gram, grams, parts
from featherweight.passes import Pass
from featherweight.passes._storing import (
    READING,
    Group,
    chosen,
    looked_up,
    read_by,
    store_by_reading,
    with_rows,
)
from featherweight.settings import Choice, Range
from featherweight.workload import Workload

TOGETHER = 16  # weights of a row that are learned at once: with more the descent is stuck earlier
MOMENTUM = 0.8
DAMPING = 0.01  # of the mean of the diagonal of the Gram matrix: for what calibration data shows by chance

# ------------------------------------------------------------------------------------------------ mathematics


def descended(
    weight: Float[Tensor, "groups out in"],
    scales: Float[Tensor, "groups out in"],
    hessian: Float[Tensor, "groups in in"],
    bits: int,
    steps: int,
    kept: Bool[Tensor, "groups out in"] | None = None,
) -> Float[Tensor, "groups out in"]:
    """`weight` on the grid of `scales`, each rounded up or down so that tr(E H Eᵀ) is small in every row.

    Args:
        weight: as matrices, one for each group.
        scales: of every single weight.
        hessian: of the inputs of each group.
        bits: of the grid.
        steps: of the descent; 0 rounds to the nearest.
        kept: weights outside become zero; None for all.

    >>> weight, inputs = torch.tensor([[[0.3, 0.48]]]), torch.tensor([[1.0, 1.0], [2.0, 2.1]])
    >>> descended(weight, torch.ones(1, 1, 2), (inputs.T @ inputs).unsqueeze(0), bits=4, steps=20).sum()
    tensor(1.)
    """
    wanted, shift, momentum = weight / scales, torch.zeros_like(weight), torch.zeros_like(weight)
    best, least = weight, torch.full_like(weight[..., :1], torch.inf)
    for left_over in range(steps, -1, -1):
        found = (wanted + shift).round_().clamp_(*grid(bits)).mul_(scales)
        found = found if kept is None else found * kept
        error = found - weight
        gradient = error @ hessian
        loss = (gradient * error).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, found, best), torch.minimum(loss, least)
        momentum.lerp_(gradient, 1 - MOMENTUM)
        shift.sub_(momentum.sign(), alpha=left_over / max(steps, 1) ** 2).clamp_(-0.5, 0.5)
    return best


def learned_rounding(
    weight: Float[Tensor, "groups out in"],
    scales: Float[Tensor, "groups out in"],
    hessian: Float[Tensor, "groups in in"],
    bits: int,
    steps: int,
    kept: Bool[Tensor, "groups out in"] | None = None,
) -> Float[Tensor, "groups out in"]:
    """The same, block after block, the loudest inputs first, each making up for the errors of those before it.

    >>> weight, inputs = torch.tensor([[[0.3, 0.48]]]), torch.tensor([[1.0, 1.0], [2.0, 2.1]])
    >>> learned_rounding(weight, torch.ones(1, 1, 2), (inputs.T @ inputs).unsqueeze(0), bits=4, steps=20).sum()
    tensor(1.)
    """
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    places = order.unsqueeze(1).expand_as(weight)
    weight, scales = weight.gather(2, places), scales.gather(2, places)
    kept = None if kept is None else kept.gather(2, places)
    root = triangular_root(hessian, order).to(weight.dtype)
    rounded, errors = torch.empty_like(weight), torch.empty_like(weight)
    for first in range(0, weight.shape[2], TOGETHER):
        here = slice(first, first + TOGETHER)
        own = root[:, here, here]
        owed = errors[..., :first] @ root[:, :first, here]
        wanted = weight[..., here] - torch.linalg.solve_triangular(own, owed, upper=True, left=False)
        mask = None if kept is None else kept[..., here]
        rounded[..., here] = descended(wanted, scales[..., here], own @ own.mT, bits, steps, mask)
        errors[..., here] = rounded[..., here] - weight[..., here]
    return torch.empty_like(rounded).scatter_(2, places, rounded)


def triangular_root(
    hessian: Float[Tensor, "groups in in"], order: Int64[Tensor, "groups in"]
) -> Float[Tensor, "groups in in"]:
    """R, upper triangular, with R Rᵀ = `hessian` damped and in another `order`; in doubles.

    >>> triangular_root(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 1]])).square()
    tensor([[[4.0200, 0.0000],
             [0.0000, 0.0200]]], dtype=torch.float64)
    """
    turned = hessian.double().gather(1, order.unsqueeze(2).expand_as(hessian))
    turned = turned.gather(2, order.unsqueeze(1).expand_as(hessian))
    mean = turned.diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    turned.diagonal(dim1=1, dim2=2).add_(added.unsqueeze(1))
    return torch.linalg.cholesky(turned.flip(1, 2)).flip(1, 2)  # from the last column to the first


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True, kw_only=True)
class QuantizeAutoround(Pass):
    """Learns how the weights of convolutions and linear layers are rounded; embeddings go to the nearest.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, another even size that does is taken.
        steps: of the descent in every block; none feeds errors on from nearest rounding.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    block: Annotated[int, Choice(0, 32, 64, 128)] = 0
    steps: Annotated[int, Range(0, 2000)] = 100

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        groups = with_rows(chosen(self, model, READING))
        fed = {next(iter(group)): group for group in groups if not looked_up(group)}
        for part in parts({name: group[name] for name, group in fed.items()}):
            seen = grams(model, {name: layer for first in part for name, layer in fed[first].items()}, workload)
            for first in part:
                self._store(fed[first], read_by(fed[first], seen))
        for group in groups:
            if looked_up(group):
                self._store(group, None)
        return model

    def _store(self, group: Group, gram: Gram | None) -> None:
        store_by_reading(group, gram, self.bits, self.block, self._rounded, "rounding learned")

    def _rounded(self, weight: Tensor, scales: Tensor, hessian: Tensor, kept: Tensor | None) -> Tensor:
        return learned_rounding(weight, scales, hessian.to(weight.dtype), self.bits, self.steps, kept)
