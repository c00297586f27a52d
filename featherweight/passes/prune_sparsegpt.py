"""SparseGPT: zeroes weights and lets those that stay make up for them, so that a layer's outputs move least.

With the Hessian H = XᵀX + λI of a layer's squared output error, X its inputs (rows of calibration data), columns j of
the weight are gone through from left to right. With H⁻¹ = UᵀU, U upper triangular:

    S_ij = |w_ij| / U_jj,   and the share with the smallest S goes,
    w_i,k ← w_i,k − (w_ij / U_jj) · U_jk   for all k > j, where w_ij goes,

which is the best that the columns still to come can do for what was lost (Optimal Brain Surgeon). Which weights go is
chosen for 128 columns at a time (for 4 or 8 where the pattern is N:M), with what the columns before them have changed.
λ is a share of the mean of the diagonal of XᵀX. A convolution's inputs are the windows that its kernel sees, and every
group of channels has a Hessian of its own.

Weights that stay change, and become worse copies of the original's: only the outputs are nearer. Where calibration
data is little, they are near on that data only. Inputs are those of the network as it comes into this step, so that
layers do not make up for what earlier ones lost; biases stay as they are. Embeddings are left alone.

Source: Frantar, Alistarh 2023, arXiv:2301.00774, algorithm 1; N:M: section 3 there. The blocks of 32 × 32 are ours,
chosen once for the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from featherweight.gram import grams
from featherweight.masks import KEPT_OF, NOTHING_GOES, Pattern, check_share, choose
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import NEVER_CALLED, WEIGHTED, keep_only, leave_others, left, prunable, select
from featherweight.workload import Workload

COLUMNS = 128  # that change at every step; what lies beyond them changes once for all of them
WIDEST = 12288  # columns of a weight whose Hessian is still held: 600 MB in single precision

# ------------------------------------------------------------------------------------------------ mathematics


def inverse_factor(hessian: Float[Tensor, "groups in in"], damping: float) -> Float[Tensor, "groups in in"]:
    """U, upper triangular, with (H + λI)⁻¹ = UᵀU and λ = damping times the mean of H's diagonal.

    Groups whose inputs are all but zero are damped as if they had a millionth of the mean of all.

    >>> inverse_factor(torch.tensor([[[4.0, 0.0], [0.0, 4.0]]]), damping=0.0)
    tensor([[[0.5000, 0.0000],
             [0.0000, 0.5000]]])
    """
    size = hessian.shape[-1]
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    floor = 1e-6 * float(mean.mean()) or 1.0
    damped = hessian + damping * mean.clamp(min=floor).view(-1, 1, 1) * torch.eye(size).to(hessian)
    # Cholesky from the last column to the first: H = R Rᵀ with R upper triangular, and so U = R⁻¹.
    upper = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    return torch.linalg.solve_triangular(upper, torch.eye(size).to(hessian).expand_as(upper), upper=True)


def sparsegpt(
    weight: Float[Tensor, "groups rows in"],
    factor: Float[Tensor, "groups in in"],
    keep: Callable[[Float[Tensor, "out columns"]], Bool[Tensor, "out columns"]],
    span: int,
) -> tuple[Float[Tensor, "groups rows in"], Bool[Tensor, "groups rows in"]]:
    """The weight with what it loses made up for, and which of it is kept: elsewhere the weight is to be zero.

    Args:
        weight: each group's rows. What is zero counts as lost already, and stays so.
        factor: of each group, as `inverse_factor` gives it.
        keep: says which weights are kept, given their importance, with the rows of all groups one below the other.
        span: columns that `keep` is given at a time; all, or a divisor of 128.

    Where two inputs are always equal, one weight can do the work of both:

    >>> factor = inverse_factor(torch.ones(1, 2, 2), damping=1e-4)
    >>> found, kept = sparsegpt(torch.tensor([[[1.0, 2.0]]]), factor, lambda importance: importance > 1, span=2)
    >>> (found * kept).round(decimals=2)
    tensor([[[0., 3.]]])
    """
    found, alive = weight.clone(), weight != 0
    kept = torch.ones_like(alive)
    width = weight.shape[2]
    for first in range(0, width, COLUMNS):
        last = min(first + COLUMNS, width)
        errors = torch.zeros_like(found[:, :, first:last])
        for j in range(first, last):
            if j % span == 0:
                shown = slice(j, min(j + span, width))
                diagonal = factor.diagonal(dim1=1, dim2=2)[:, None, shown]
                importance = (found[:, :, shown].abs() / diagonal * alive[:, :, shown]).flatten(0, 1)
                kept[:, :, shown] = keep(importance).view(kept[:, :, shown].shape) & alive[:, :, shown]
            error = found[:, :, j] / factor[:, None, j, j] * ~kept[:, :, j]
            found[:, :, j:last] -= error[:, :, None] * factor[:, None, j, j:last]
            errors[:, :, j - first] = error
        found[:, :, last:] -= errors @ factor[:, first:last, last:]
    return found, kept


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True, kw_only=True)
class PruneSparsegpt(Pass):
    """Zeroes a share of the weights of convolutions and linear layers, and corrects those that stay.

    Args:
        share: of each layer's weights that becomes zero, rounded down to whole weights in every 128 columns. Weights
            that are zero already count. With pattern "blocks" of its whole blocks, rounded down; with "2:4" and "4:8"
            it is 0.5, and another one is refused.
        pattern: in which zeros lie: anywhere ("free"), 2 of every 4 or 4 of every 8 consecutive weights of a row, or
            32 × 32 blocks of the weight as a matrix (out, in · kernel).
        damping: what is added to the Hessian's diagonal, as a share of its mean; the more, the less the weights that
            stay move.
    """

    share: Annotated[float, Range(0.0, 0.99)] = 0.5
    pattern: Pattern = "free"
    damping: Annotated[float, Range(1e-4, 1.0)] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name(), self.pattern, self.share)

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, WEIGHTED)
        weights = _narrow(prunable(model, layers, self.pattern, self.name()))
        found = grams(model, {name: layer for group, _ in weights for name, layer in group.items()}, workload)
        for group, weight in weights:
            known = [torch.as_tensor(found.pop(name).products) for name in group if name in found]
            if not known:
                for name in group:
                    left(name, NEVER_CALLED)
                continue
            corrected, kept = self._pruned(weight, sum(known[1:], known[0]))
            keep_only(group, corrected, kept, self.pattern, NOTHING_GOES)
        leave_others(model, self.where, layers, self.name())
        return model

    def _pruned(self, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """The corrected weight and its mask."""
        matrix = weight.flatten(1).double()
        width = matrix.shape[1]
        spans = {"free": COLUMNS, "blocks": width} | {name: of for name, (_, of) in KEPT_OF.items()}
        found, kept = sparsegpt(
            matrix.view(len(hessian), -1, width),
            inverse_factor(hessian.double(), self.damping),
            lambda importance: choose(importance, self.pattern, self.share),
            spans[self.pattern],
        )
        return found.view(weight.shape).to(weight.dtype), kept.view(weight.shape)


def _narrow(weights: Sequence[tuple[dict[str, nn.Module], Tensor]]) -> list[tuple[dict[str, nn.Module], Tensor]]:
    """`weights` without those whose Hessian would be too large; they are said to be left."""
    found = []
    for group, weight in weights:
        width = weight[0].numel()
        if width <= WIDEST:
            found.append((group, weight))
            continue
        for name in group:
            left(name, f"its rows hold {width} weights, whose Hessian would take {4 * width**2 / 1e9:.1f} GB")
    return found
