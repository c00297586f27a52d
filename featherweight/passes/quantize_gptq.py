"""GPTQ: rounds weights one input after the other, and lets those that follow make up for the error.

    q_i = round(w_i + Σ_{j<i} (w_j − q_j) · U_ji),   H + λI = U D Uᵀ,   H = XᵀX / n

where X are the layer's inputs on calibration data, U is upper triangular with ones on its diagonal and D diagonal. The
error of the outputs is Σ_i D_i · (q_i minus what is rounded)², so that each rounding makes its own term as small as the
grid allows. The authors reach the same numbers by correcting all weights that follow after each rounding, with a factor
of the inverse of H + λI, which need not be computed here. Single weights end up further from the original than
nearest rounding leaves them, and the layer's outputs closer. Columns are worked on in blocks of 128, the errors of
those before a block being fed on at once. Scales are fixed beforehand, from the original weights; the scales of blocks
that the authors' code takes from weights already corrected are left out, for they forbid another order of columns.
Convolutions are linear layers that read patches, each group of channels by itself. An embedding reads no numbers, so
its rows, and weights that it shares, are rounded to the nearest, as are layers that the calibration data never calls.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1; order of columns and layers: the
authors' code (act-order, true-sequential); in terms of U: Chee, Cai, Kuleshov, De Sa 2023, arXiv:2307.13304.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from featherweight.encodings import grid
from featherweight.gram import Gram, grams_in_turn
from featherweight.passes import Pass
from featherweight.passes._storing import (
    READING,
    Group,
    chosen,
    looked_up,
    store_by_reading,
    with_rows,
)
from featherweight.settings import Choice, Range
from featherweight.workload import Workload

LAZY = 128  # columns that take the errors of all before them at once


def feedback(hessian: Float[Tensor, "groups in in"], damping: float) -> Float[Tensor, "groups in in"]:
    """The upper triangular U with ones on its diagonal for which H + λI = U D Uᵀ, D diagonal.

    λ is `damping` times the mean of H's diagonal. In doubles. Inputs that were always zero take no error and give none.

    >>> feedback(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]), damping=0.0)
    tensor([[[1., 1.],
             [0., 1.]]], dtype=torch.float64)
    """
    mean = hessian.diagonal(dim1=1, dim2=2).double().mean(1, keepdim=True)
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, damping * mean, 1.0))
    damped = damped.flip(1, 2)  # from the last to the first: root · rootᵀ, root upper
    root = torch.linalg.cholesky(damped, out=damped).flip(1, 2)
    return root.div_(root.diagonal(dim1=1, dim2=2).unsqueeze(1).clone())


def falling(hessian: Float[Tensor, "groups in in"]) -> Int64[Tensor, "groups in"]:
    """The order of the inputs by falling mean square, so that the loudest are rounded while many can make up for it."""
    return hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def gptq(
    weight: Float[Tensor, "groups out in"],
    steps: Float[Tensor, "groups out in"],
    hessian: Float[Tensor, "groups in in"],
    bits: int,
    damping: float,
    order: Int64[Tensor, "groups in"] | None = None,
    kept: Bool[Tensor, "groups out in"] | None = None,
) -> Float[Tensor, "groups out in"]:
    """`weight` on the grid of `steps`, rounded column by column with each error fed into the columns that follow.

    Args:
        steps: the scale of every single weight.
        hessian: XᵀX / n of the inputs of each group.
        bits: of the grid.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        order: of the columns; None for as they stand.
        kept: weights outside become zero, and their errors are fed on too; None for all.

    >>> weight, inputs = torch.tensor([[[0.4, 0.4]]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> gptq(weight, torch.ones(1, 1, 2), (inputs.T @ inputs).unsqueeze(0), bits=4, damping=0.01)
    tensor([[[0., 1.]]])
    """
    order = torch.arange(weight.shape[2]).expand(len(weight), -1) if order is None else order
    down = order.unsqueeze(2)
    places = down.expand(-1, -1, weight.shape[1])  # in what follows a column of the weight is a row
    exact = weight.transpose(1, 2).gather(1, places)
    steps = steps.transpose(1, 2).gather(1, places)
    zero = None if kept is None else ~kept.transpose(1, 2).gather(1, places)
    turned = hessian.gather(1, down.expand_as(hessian)).gather(2, order.unsqueeze(1).expand_as(hessian))
    share = feedback(turned, damping).transpose(1, 2).to(weight.dtype)
    rounded, errors = torch.empty_like(exact), torch.empty_like(exact)
    for start in range(0, weight.shape[2], LAZY):
        stop = min(start + LAZY, weight.shape[2])
        wanted = exact[:, start:stop] + share[:, start:stop, :start] @ errors[:, :start]
        near = share[:, start:stop, start:stop].contiguous()
        for i in range(start, stop):
            at = i - start
            value = torch.baddbmm(wanted[:, at : at + 1], near[:, at : at + 1, :at], errors[:, start:i]).squeeze(1)
            value = value.div_(steps[:, i]).round_().clamp_(*grid(bits)).mul_(steps[:, i])
            rounded[:, i] = value if zero is None else value.masked_fill_(zero[:, i], 0.0)
            errors[:, i] = exact[:, i] - rounded[:, i]
    return torch.empty_like(rounded).scatter_(1, places, rounded).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(Pass):
    """Rounds the weights of convolutions and linear layers so that their outputs stay; embeddings to the nearest.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, another even size that does is taken.
        order: whether the inputs of the largest mean square are rounded first.
        sequential: whether each layer sees inputs from the network as rounded so far, else from the original. What it
            gained or lost at 2 to 4 bits, in networks of 3 to 12 layers, was mostly within chance (LOG.md). Either
            way each batch takes one run of the network, and the activations of all batches are held at a time; without
            sequence, XᵀX of all layers too.
        damping: share of the mean square of the inputs that is added to the square of each.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    block: Annotated[int, Choice(0, 32, 64, 128)] = 0
    order: bool = True
    sequential: bool = True
    damping: Annotated[float, Range(1e-4, 1.0)] = 0.01

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        groups = with_rows(chosen(self, model, READING))
        fed = [group for group in groups if not looked_up(group)]
        rounded: set[str] = set()
        found = grams_in_turn(model, fed, workload) if fed else iter(())
        for group, gram in found if self.sequential else list(found):
            self._store(group, gram)
            rounded |= set(group)
        for group in groups:
            if not rounded.issuperset(group):
                self._store(group, None)
        return model

    def _store(self, group: Group, gram: Gram | None) -> None:
        store_by_reading(group, gram, self.bits, self.block, self._rounded, "errors fed on")

    def _rounded(self, weight: Tensor, steps: Tensor, hessian: Tensor, kept: Tensor | None) -> Tensor:
        order = falling(hessian) if self.order else None
        return gptq(weight, steps, hessian, self.bits, self.damping, order, kept)
