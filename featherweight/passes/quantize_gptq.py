"""GPTQ: rounds weights one input after the other, and lets those that follow make up for the error.

    q_i = round(w_i),   w_j ← w_j − (w_i − q_i) / U_ii · U_ij  for all j > i,   UᵀU = (H + λI)⁻¹,  H = XᵀX / n

where X are the layer's inputs on calibration data. Single weights end up further from the original than nearest
rounding leaves them, and the layer's outputs closer. Columns are worked on in blocks of 128, after each of which all
that follow are corrected at once. Scales are fixed beforehand, from the original weights; the scales of blocks that
the authors' code takes from weights already corrected are left out, for they forbid another order of columns.
Convolutions are linear layers that read patches, each group of channels by itself. An embedding reads no numbers, so
its rows, and weights that it shares, are rounded to the nearest, as are layers that the calibration data never calls.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1; order of columns and layers: the
authors' code (act-order, true-sequential).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from featherweight.encodings import Affine, Masked, affine_scale, fitting_block, grid, grouped, spread
from featherweight.gram import CONVOLUTIONS, Gram, grams, reading_order
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import (
    dense_of,
    done,
    encode,
    encoding_of,
    groups_by_weight,
    leave_others,
    left,
    refuse_quantized,
    select,
)
from featherweight.workload import Workload

WEIGHTED = (*CONVOLUTIONS, nn.Linear)
LAZY = 128  # columns after which all that follow are corrected at once

Group = dict[str, nn.Module]  # layers that share one weight


def inverse_factor(hessian: Float[Tensor, "groups in in"], damping: float) -> Float[Tensor, "groups in in"]:
    """The upper triangular U with UᵀU = (H + λI)⁻¹, where λ is `damping` times the mean of H's diagonal.

    In doubles. Inputs that were always zero have rows and columns of zeros but for λ: their errors are nobody's loss.

    >>> inverse_factor(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), damping=0.5).diagonal(dim1=1, dim2=2)
    tensor([[0.4472, 1.0000]], dtype=torch.float64)
    """
    mean = hessian.double().diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    damped = hessian.double() + added.view(-1, 1, 1) * torch.eye(hessian.shape[1], dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


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
    left_over = weight.double().transpose(1, 2).gather(1, places)
    steps = steps.double().transpose(1, 2).gather(1, places)
    zero = None if kept is None else ~kept.transpose(1, 2).gather(1, places)
    turned = hessian.gather(1, down.expand_as(hessian)).gather(2, order.unsqueeze(1).expand_as(hessian))
    factor = inverse_factor(turned, damping)
    rounded = torch.empty_like(left_over)
    for start in range(0, weight.shape[2], LAZY):
        stop = min(start + LAZY, weight.shape[2])
        errors = torch.empty_like(left_over[:, start:stop])
        for i in range(start, stop):
            step = steps[:, i]
            value = (left_over[:, i] / step).round_().clamp_(*grid(bits)).mul_(step)
            rounded[:, i] = value if zero is None else value.masked_fill_(zero[:, i], 0.0)
            errors[:, i - start] = (left_over[:, i] - rounded[:, i]) / factor[:, i, i].unsqueeze(1)
            ahead = factor[:, i, i + 1 : stop].unsqueeze(2)
            left_over[:, i + 1 : stop] -= ahead * errors[:, i - start].unsqueeze(1)
        left_over[:, stop:] -= factor[:, start:stop, stop:].transpose(1, 2) @ errors
    return torch.empty_like(rounded).scatter_(1, places, rounded).transpose(1, 2).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(Pass):
    """Rounds the weights of convolutions and linear layers so that their outputs stay; embeddings to the nearest.

    Args:
        bits: of each weight. Up to 4 are stored two to a byte, from 5 on one.
        block: how many consecutive weights of a row share a scale; 0 for one scale per output channel. Where it
            does not divide a row, the largest smaller size that does is taken.
        order: whether the inputs of the largest mean square are rounded first.
        sequential: whether each layer sees inputs from the network as rounded so far, which takes a run of the network
            up to that layer for each; else all are seen in one run of the original. What it gained or lost at 2 to 4
            bits, in networks of 3 to 12 layers, was mostly within chance (LOG.md).
        damping: share of the mean square of the inputs that is added to the square of each.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    block: Annotated[int, Choice(0, 32, 64, 128)] = 0
    order: bool = True
    sequential: bool = True
    damping: Annotated[float, Range(1e-4, 1.0)] = 0.01

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, (*WEIGHTED, nn.Embedding))
        refuse_quantized(layers, self.name())
        groups = groups_by_weight(model, layers)
        fed = {name: group for group in groups if _reads_numbers(group) for name in group}
        watched = {name: layers[name] for name in fed}
        together, calls = reading_order(model, watched, workload.example) if fed else ([], {})
        stages = together if self.sequential else [[name for names in together for name in names]]
        finished: set[int] = set()
        for names in stages:
            stage = list({id(fed[name]): fed[name] for name in names if id(fed[name]) not in finished}.values())
            if not stage:
                continue
            finished |= {id(group) for group in stage}
            members = {name: layer for group in stage for name, layer in group.items()}
            seen = grams(model, members, workload, {name: calls[name] for name in members if name in calls})
            for group in stage:
                self._encode(group, seen)
        for group in groups:
            if id(group) not in finished:
                self._encode(group, {})
        leave_others(model, self.where, layers, self.name())
        return model

    def _encode(self, group: Group, seen: Mapping[str, Gram]) -> None:
        """Rounds and encodes the weight of a group, by what its layers read where anything is known of it."""
        weight, first = dense_of(next(iter(group.values()))), encoding_of(next(iter(group.values())))
        if weight[0].numel() < 2:
            for name in group:
                left(name, "its rows hold one weight each: a scale would weigh more than it saves")
            return
        block = fitting_block(weight[0].numel(), self.block) if self.block else 0
        scale = affine_scale(weight, self.bits, 0, block, search=True)
        read = [seen[name] for name in group if name in seen]
        if read:
            kept = first.mask if isinstance(first, Masked) else None
            hessian = sum(gram.mean() * gram.count for gram in read) / sum(gram.count for gram in read)
            weight = self._rounded(weight, scale, block, torch.as_tensor(hessian), kept)
        encoding = Affine(weight, scale, bits=self.bits, axis=0, block=block)
        how = "errors fed on" if read else f"rounded to the nearest: {_why_nearest(group)}"
        for name, layer in group.items():
            encode(layer, encoding)
            done(name, f"{encoding.describe()}, {how}")

    def _rounded(self, weight: Tensor, scale: Tensor, block: int, hessian: Tensor, kept: Tensor | None) -> Tensor:
        """`gptq` of a weight as its layer holds it."""
        steps = spread(scale, tuple(weight.shape), 0, block).expand_as(grouped(weight, block))
        sides = (len(hessian), -1, hessian.shape[1])
        return gptq(
            weight.reshape(sides),
            steps.reshape(sides),
            hessian,
            self.bits,
            self.damping,
            falling(hessian) if self.order else None,
            None if kept is None else kept.reshape(sides),
        ).reshape(weight.shape)


def _reads_numbers(group: Group) -> bool:
    """Whether none of the layers that share a weight looks rows up in it."""
    return not any(isinstance(layer, nn.Embedding) for layer in group.values())


def _why_nearest(group: Group) -> str:
    if _reads_numbers(group):
        return "the network never calls it"
    return "its rows are looked up" if len(group) == 1 else "its rows are looked up by a layer that shares them"
