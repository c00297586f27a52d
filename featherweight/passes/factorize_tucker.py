"""Puts three thin convolutions in place of one: to few channels, the kernel among these, and back to all.

    W[o, i, k] ≈ Σ_{p, q} U[o, p] · C[p, q, k] · V[i, q],   U, V orthonormal,   C = W ×₁ Uᵀ ×₂ Vᵀ

(Tucker-2: the channels are factorized, the kernel's positions are not.) U and V begin as the leading singular vectors
of W unfolded along either side; each sweep takes them anew, for the kernel as the other one leaves it (higher-order
orthogonal iteration), which can only lower the error. Where a kernel is redundant on both sides, this holds far fewer
weights than two factors do (`factorize_svd`). A side that keeps all its channels gets no layer of its own, and
convolutions of kernel size 1 are left, for which two factors do the same. Statistics of the inputs are not used.

Source: Kim, Park, Yoo, Choi, Yang, Shin 2016, arXiv:1511.06530, section 3 (ranks are not chosen by variational Bayes,
but by energy or size); De Lathauwer, De Moor, Vandewalle 2000, doi:10.1137/S0895479898346995, for the sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.low_rank import (
    convolution,
    in_a_row,
    pointwise,
    rank_for_energy,
    rounded_up,
    step_of,
    weights_in,
)
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import CONVOLUTIONS, done, leave_others, left, refuse_encoded, replace, replaceable, select
from featherweight.workload import Workload

Ranks = tuple[int, int]  # of the output side and of the input side, in each group

# ------------------------------------------------------------------------------------------------ mathematics


def sides(
    kernel: Float[Tensor, "*groups out in taps"],
) -> tuple[Float[Tensor, "*groups out _in_taps"], Float[Tensor, "*groups in _out_taps"]]:
    """`kernel` unfolded along its outputs, and along its inputs.

    >>> [tuple(side.shape) for side in sides(torch.zeros(2, 3, 9))]
    [(2, 27), (3, 18)]
    """
    return kernel.flatten(-2), kernel.transpose(-3, -2).flatten(-2)


def singular_values(matrix: Float[Tensor, "*groups rows columns"]) -> Float[Tensor, "*groups rows"]:
    """The singular values, largest first, zeros up to the number of rows.

    >>> singular_values(torch.tensor([[0.0], [4.0]]))
    tensor([4., 0.])
    """
    return torch.linalg.eigvalsh(matrix @ matrix.mT).flip(-1).clamp(min=0).sqrt()


def leading(matrix: Float[Tensor, "*groups rows columns"], rank: int) -> Float[Tensor, "*groups rows rank"]:
    """The left singular vectors of the `rank` largest singular values; the unit vectors where these are all.

    >>> leading(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), rank=1).abs()
    tensor([[0.],
            [1.]])
    """
    rows = matrix.shape[-2]
    if rank == rows:
        return torch.eye(rows, dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:-2], rows, rows)
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)[..., :rank]


def tucker2(
    kernel: Float[Tensor, "*groups out in taps"], ranks: Ranks, sweeps: int
) -> tuple[
    Float[Tensor, "*groups out rank_out"],
    Float[Tensor, "*groups rank_out rank_in taps"],
    Float[Tensor, "*groups in rank_in"],
]:
    """U, C and V of the given ranks, after so many sweeps.

    >>> kernel = torch.einsum("o,i,k->oik", torch.ones(4), torch.arange(3.0), torch.tensor([1.0, -1.0]))
    >>> u, core, v = tucker2(kernel, (1, 1), sweeps=0)
    >>> torch.allclose(torch.einsum("op,pqk,iq->oik", u, core, v), kernel, atol=1e-5)
    True
    """
    u, v = map(leading, sides(kernel), ranks)
    for _ in range(sweeps):
        u = leading(sides(torch.einsum("...oik,...iq->...oqk", kernel, v))[0], ranks[0])
        v = leading(sides(torch.einsum("...oik,...op->...pik", kernel, u))[1], ranks[1])
    return u, torch.einsum("...oik,...op,...iq->...pqk", kernel, u, v), v


def factor_weights(out: int, inputs: int, taps: int, ranks: Ranks) -> int:
    """How many weights the factors of one group hold; a side that keeps all its channels needs none.

    >>> factor_weights(4, 4, 9, (2, 2)), factor_weights(4, 4, 9, (2, 4))
    (52, 80)
    """
    sizes = (out, inputs)
    return ranks[0] * ranks[1] * taps + sum(size * rank for size, rank in zip(sizes, ranks, strict=True) if rank < size)


def widths(size: int, step: int) -> list[int]:
    """The multiples of `step` below `size`, and `size`.

    >>> widths(20, 8), widths(3, 8)
    ([8, 16, 20], [3])
    """
    return [*range(step, size, step), size]


def ranks_for_parameters(values: Sequence[Float[Tensor, " _"]], taps: int, share: float, step: int) -> Ranks:
    """The ranks with the least error among those at which the factors hold at most `share` of the weights.

    And fewer than the kernel, whatever the share. The error is taken for what both sides lose, which it never exceeds
    (De Lathauwer et al. 2000, doi:10.1137/S0895479896305696, property 10). Ranks are multiples of `step`, or any
    where none of these fits. (0, 0) where nothing does.

    Args:
        values: the singular values of both sides, output first.
        taps: the positions of the kernel.
        share: of the weights.
        step: of which ranks are multiples; a side that keeps all its channels need not be.

    >>> values = [torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]), torch.tensor([9.0, 0.0, 0.0, 0.0])]
    >>> ranks_for_parameters(values, taps=9, share=0.5, step=1)
    (3, 1)
    """
    out, inputs = (len(side) for side in values)
    kept = [[0.0, *side.double().square().cumsum(0).tolist()] for side in values]
    weights = out * inputs * taps
    most = min(share * weights, weights - 1)
    fitting = [
        (
            kept[0][rank_out] + kept[1][rank_in],
            -factor_weights(out, inputs, taps, (rank_out, rank_in)),
            rank_out,
            rank_in,
        )
        for rank_out in widths(out, step)
        for rank_in in widths(inputs, step)
        if factor_weights(out, inputs, taps, (rank_out, rank_in)) <= most
    ]
    if fitting:
        return max(fitting)[2:]
    return ranks_for_parameters(values, taps, share, step=1) if step > 1 else (0, 0)


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True, kw_only=True)
class FactorizeTucker(Pass):
    """Puts up to three thin convolutions in place of each convolution with a kernel, where that saves weights.

    Args:
        rank_by: what `share` is a share of: the weights that the layer had ("parameters"), or the squared singular
            values of either side ("energy").
        share: that the factors hold at most, or that each side keeps at least. By energy, 1 finds kernels that are of
            low rank already.
        sweeps: how often either side is fitted anew to the other.
    """

    rank_by: Annotated[str, Choice("parameters", "energy")] = "parameters"
    share: Annotated[float, Range(0.01, 1.0)] = 0.5
    sweeps: Annotated[int, Range(0, 20)] = 3

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, CONVOLUTIONS)
        refuse_encoded(layers, self.name(), "factorize")
        leave_others(model, self.where, layers, self.name())
        for name, layer in replaceable(model, layers, CONVOLUTIONS, workload.example).items():
            if (factors := self._factors(name, layer)) is not None:
                replace(model, name, factors)
        return model

    def _factors(self, name: str, layer: Any) -> nn.Sequential | None:
        """What takes the place of `layer`; None, and said to be left, where that would save nothing."""
        kernel = kernels(layer)
        groups, out, inputs, taps = kernel.shape
        if taps == 1:
            left(name, "its kernel has size 1, for which factorize_svd does the same with two layers")
            return None
        ranks = self._ranks(kernel)
        if not 0 < factor_weights(out, inputs, taps, ranks) < out * inputs * taps:
            left(name, self._why_left(ranks, out, inputs))
            return None
        made = _layers(layer, *tucker2(kernel, ranks, self.sweeps))
        each = f" in each of {groups} groups" if groups > 1 else ""
        sizes = f"{ranks[0]} of {out} output and {ranks[1]} of {inputs} input channels{each}"
        done(name, f"{sizes}, {layer.weight.numel():,} -> {weights_in(*made):,} weights")
        return in_a_row(layer, *made)

    def _ranks(self, kernel: Float[Tensor, "groups out in taps"]) -> Ranks:
        groups, out, inputs, taps = kernel.shape
        values = [singular_values(side) for side in sides(kernel)]
        if self.rank_by == "parameters":
            together = [side.square().sum(0).sqrt() for side in values]
            return ranks_for_parameters(together, taps, self.share, step_of(groups))
        exact = (rank_for_energy(values[0], self.share), rank_for_energy(values[1], self.share))
        step = step_of(groups)
        rounded = (rounded_up(exact[0], step, out), rounded_up(exact[1], step, inputs))
        return rounded if factor_weights(out, inputs, taps, rounded) < out * inputs * taps else exact

    def _why_left(self, ranks: Ranks, out: int, inputs: int) -> str:
        if ranks == (0, 0):
            return f"at all ranks its factors hold more than {self.share:g} of its weights"
        return (
            f"{self.share:g} of its energy takes {ranks[0]} of {out} output and {ranks[1]} of {inputs} input channels, "
            "at which its factors hold no fewer weights"
        )


def kernels(layer: Any) -> Float[Tensor, "groups out in taps"]:
    """The weight of a convolution by its groups."""
    weight = layer.weight.detach().double()
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)


def _layers(layer: Any, u: Tensor, core: Tensor, v: Tensor) -> list[Any]:
    """The convolutions that do what U, C and V say, V first."""
    _, out, rank_out = u.shape
    _, inputs, rank_in = v.shape
    bias = layer.bias
    first = [pointwise(layer, v.mT.flatten(0, 1))] if rank_in < inputs else []
    last = [pointwise(layer, u.flatten(0, 1), bias)] if rank_out < out else []
    kernel = core.reshape(-1, rank_in, *layer.kernel_size)
    return [*first, convolution(layer, kernel, None if last else bias), *last]
