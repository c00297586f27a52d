"""Puts two thin layers in place of one: W ≈ B A with few rows in A, the best that a given rank allows.

    W L = U Σ Vᵀ,   A = Σ_r^½ V_rᵀ L⁻¹,   B = U_r Σ_r^½,   L Lᵀ = E[x xᵀ] + λ

with r the rank. With L = 1 the error of the weights is least; with the Cholesky factor of the second moment of the
layer's input, damped by a hundredth λ of its mean, the error of the outputs on the calibration data is. Where inputs
hang together, as they do, that is another matrix. A linear layer becomes two; a convolution one with its kernel, to r
channels in each group, and one of size 1; an embedding a narrower one and a linear layer. All are ordinary layers, that
later steps train, prune and quantize as any other. Layers that share a weight, as embedding and last layer of language
models do, share the factors: those of the first that is no embedding, and by its inputs.

A layer with few outputs cannot spare rank: at half of its weights ten classes come from four numbers. Leave the last
layer out with `where`, such as `!head`.

Inputs are those of the network as it was, not those that follow layers factorized already. An embedding's are the
numbers of its rows, so its L is diagonal: rows that calibration data reads often are met more closely, and the others,
which count by the damping alone, in the directions that are left. Transposed convolutions are left.

Source: Wang, Zheng, Wan, Zhang 2024, arXiv:2403.07378, section 3, for the whitening (Yuan et al. 2023,
arXiv:2312.05821, scale single features instead); Zhang, Zou, He, Sun 2015, arXiv:1505.06798, section 2, for
convolutions; Eckart and Young 1936, doi:10.1007/BF02288367, for what is best at a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.gram import grams, parts
from featherweight.hooks import watch_inputs
from featherweight.low_rank import (
    convolution,
    embedding,
    in_a_row,
    linear,
    pointwise,
    rank_for_energy,
    rounded_up,
    step_of,
    weights_in,
)
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import (
    WEIGHTED,
    done,
    groups_by_weight,
    leave_others,
    left,
    refuse_encoded,
    replace,
    replaceable,
    select,
)
from featherweight.workload import Workload

KINDS = (*WEIGHTED, nn.Embedding)
Group = Mapping[str, nn.Module]  # layers that share one weight
DAMPING = 0.01  # of the mean of the diagonal: for directions that calibration data never shows

# ------------------------------------------------------------------------------------------------ mathematics


def svd_factors(
    weight: Float[Tensor, "*groups out in"], rank: int
) -> tuple[Float[Tensor, "*groups out rank"], Float[Tensor, "*groups rank in"]]:
    """B and A of the given rank, alike in size, whose product is nearest to `weight` in squared error.

    >>> b, a = svd_factors(torch.tensor([[8.0, 0.0], [0.0, 0.5]]), rank=1)
    >>> (b @ a).round()
    tensor([[8., 0.],
            [0., 0.]])
    """
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    roots = values[..., :rank].sqrt()
    return u[..., :rank] * roots.unsqueeze(-2), vt[..., :rank, :] * roots.unsqueeze(-1)


Root = (
    Float[Tensor, "*groups in in"] | Float[Tensor, " in"]
)  # lower triangular, or the diagonal of one that is diagonal


def whitened(weight: Float[Tensor, "*groups out in"], root: Root) -> Float[Tensor, "*groups out in"]:
    """W L: the weight as inputs see it that hang together as `root` says."""
    return weight * root if root.dim() == 1 else weight @ root


def whitened_factors(
    weight: Float[Tensor, "*groups out in"], root: Root, rank: int
) -> tuple[Float[Tensor, "*groups out rank"], Float[Tensor, "*groups rank in"]]:
    """B and A of the given rank whose product is nearest to `weight` in the squared error of the outputs.

    Args:
        weight: so that y = weight · x.
        root: of the second moment of x.
        rank: of the product.

    >>> b, a = whitened_factors(torch.tensor([[8.0, 0.0], [0.0, 0.5]]), torch.tensor([0.1, 10.0]), rank=1)
    >>> b @ a  # the large weight reads next to nothing
    tensor([[0.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    b, a = svd_factors(whitened(weight, root), rank)
    return b, a / root if root.dim() == 1 else torch.linalg.solve_triangular(root, a, upper=False, left=False)


def damped_root(moment: Root, damping: float) -> Root:
    """The Cholesky factor of `moment` over the mean of its diagonals, plus `damping` on them.

    >>> damped_root(torch.diag(torch.tensor([2.0, 6.0]))[None], damping=0.0).square()
    tensor([[[0.5000, 0.0000],
             [0.0000, 1.5000]]])
    >>> damped_root(torch.tensor([2.0, 6.0]), damping=0.0).square()
    tensor([0.5000, 1.5000])
    """
    level = (moment if moment.dim() == 1 else moment.diagonal(dim1=-2, dim2=-1)).mean()
    scaled = moment / level if level > 0 else torch.zeros_like(moment)
    least = damping if level > 0 else 1.0
    if moment.dim() == 1:
        return (scaled + least).sqrt()
    return torch.linalg.cholesky(scaled + least * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device))


def rank_for_parameters(out: int, inputs: int, share: float) -> int:
    """The largest rank at which both factors of an (out, inputs) matrix hold at most `share` of its weights.

    And fewer than the matrix, whatever the share. 0 where there is no such rank.

    >>> rank_for_parameters(64, 64, 0.5), rank_for_parameters(64, 64, 1.0), rank_for_parameters(1, 9, 1.0)
    (16, 31, 0)
    """
    weights, each = out * inputs, out + inputs
    return min(int(share * weights / each), (weights - 1) // each)


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True, kw_only=True)
class FactorizeSvd(Pass):
    """Puts two thin layers in place of each linear layer, convolution and embedding, where that saves weights.

    Args:
        rank_by: what `share` is a share of: the weights that the layer had ("parameters"), or the squared singular
            values, of the whitened weights where they are ("energy").
        share: that both factors hold at most, or that they keep at least. By energy, 1 finds layers that are of low
            rank already.
        whiten: whether the error of the outputs on calibration data is made small, else that of the weights.
    """

    rank_by: Annotated[str, Choice("parameters", "energy")] = "parameters"
    share: Annotated[float, Range(0.01, 1.0)] = 0.5
    whiten: bool = True

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, KINDS)
        refuse_encoded(layers, self.name(), "factorize")
        leave_others(model, self.where, layers, self.name())
        free = replaceable(model, layers, KINDS, workload.example, tied=True)
        groups = {_leader(group): group for group in groups_by_weight(model, free) if _can_save(group)}
        leaders = {name: group[name] for name, group in groups.items()}
        pairs = {}
        for part in parts(leaders) if self.whiten else [leaders]:
            moments = _moments(model, part, workload) if self.whiten else {}
            for name in part:
                pairs.update(self._pairs(groups[name], name, moments.pop(name, None)))
        for name, pair in pairs.items():
            replace(model, name, pair)
        return model

    def _pairs(self, group: Group, leader: str, moment: Tensor | None) -> dict[str, nn.Sequential]:
        """What takes the place of each layer of a group; nothing, and said to be left, where that saves nothing."""
        weight = matrices(group[leader]).double()
        root = torch.ones_like(weight[0, 0]) if moment is None else damped_root(moment.double(), DAMPING)
        narrow = len({isinstance(layer, nn.Embedding) for layer in group.values()})
        rank = self._rank(whitened(weight, root), narrow)
        groups, out, inputs = weight.shape
        if not 0 < rank <= rank_for_parameters(out, narrow * inputs, 1.0 / narrow):
            for name in group:
                left(name, self._why_left(rank, out, inputs))
            return {}
        b, a = whitened_factors(weight, root, rank)
        made = _sharing({name: _layers(layer, *_seen_by(layer, group[leader], b, a)) for name, layer in group.items()})
        each = f" in each of {groups} groups" if groups > 1 else ""
        shared = " shared" if len(group) > 1 else ""
        for name, pair in made.items():
            before, after = group[name].weight.numel(), weights_in(*pair)  # type: ignore[operator]
            done(name, f"rank {rank} of {min(out, inputs)}{each}, {before:,} -> {after:,}{shared} weights")
        return {name: in_a_row(group[name], *pair) for name, pair in made.items()}

    def _rank(self, weight: Float[Tensor, "groups out in"], narrow: int) -> int:
        """Of factors of which the second is there in so many forms."""
        groups, out, inputs = weight.shape
        if self.rank_by == "parameters":
            rank = rank_for_parameters(out, narrow * inputs, self.share / narrow)
            return rank // step_of(groups) * step_of(groups) or rank
        rank = rank_for_energy(torch.linalg.svdvals(weight), self.share)
        return rounded_up(rank, step_of(groups), rank_for_parameters(out, narrow * inputs, 1.0 / narrow))

    def _why_left(self, rank: int, out: int, inputs: int) -> str:
        if not rank:
            return f"at every rank its factors hold more than {self.share:g} of its weights"
        return (
            f"{self.share:g} of its energy takes rank {rank} of {min(out, inputs)}, at which its factors hold no "
            "fewer weights"
        )


def _moments(model: nn.Module, layers: Mapping[str, nn.Module], workload: Workload) -> dict[str, Tensor]:
    """E[x xᵀ] of what each layer reads; of an embedding the diagonal, which is how often each row is read."""
    tables = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    counts = {name: torch.zeros(layer.num_embeddings) for name, layer in tables.items()}

    def count(name: str, ids: Tensor) -> None:
        counts[name] += torch.bincount(ids.flatten(), minlength=len(counts[name]))

    if tables:
        watch_inputs(model, tables, workload.calibration, count)
    others = {name: layer for name, layer in layers.items() if name not in tables}
    found = grams(model, others, workload) if others else {}
    return {**counts, **{name: gram.mean() for name, gram in found.items()}}


def _leader(group: Group) -> str:
    """The layer of a group whose factors all share: the first that reads vectors."""
    return next((name for name, layer in group.items() if not isinstance(layer, nn.Embedding)), next(iter(group)))


def _can_save(group: Group) -> bool:
    """Whether factors of some rank hold fewer weights than the layers, which are else said to be left."""
    _, out, inputs = matrices(next(iter(group.values()))).shape
    if any(isinstance(layer, nn.Embedding) and layer.max_norm is not None for layer in group.values()):
        why = "it rescales its rows as they are read (max_norm)"
    elif rank_for_parameters(out, inputs, 1.0) == 0:
        why = "at every rank its factors hold no fewer weights than it does"
    else:
        return True
    for name in group:
        left(name, why)
    return False


def matrices(layer: Any) -> Float[Tensor, "groups out in"]:
    """The weight of `layer` as the matrices that it multiplies with; an embedding reads vectors with a single one."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Embedding):
        return weight.T.unsqueeze(0)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return weight.reshape(groups, weight.shape[0] // groups, -1)


Factors = tuple[Float[Tensor, "groups out rank"], Float[Tensor, "groups rank in"]]  # B and A


def _seen_by(layer: Any, leader: Any, b: Tensor, a: Tensor) -> Factors:
    """The leader's factors as `layer` has them: an embedding's matrix is that of a linear layer, transposed."""
    if isinstance(layer, nn.Embedding) and not isinstance(leader, nn.Embedding):
        return a.mT, b.mT
    return b, a


def _sharing(pairs: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """The same pairs, their weights one wherever they are equal."""
    shared: dict[tuple[str, bool], nn.Parameter] = {}
    for first, second in pairs.values():
        looks_up = isinstance(first, nn.Embedding)
        wide, narrow = (first, second) if looks_up else (second, first)
        wide.weight = shared.setdefault(("wide", False), wide.weight)
        narrow.weight = shared.setdefault(("narrow", looks_up), narrow.weight)
    return pairs


def _layers(layer: Any, b: Float[Tensor, "groups out rank"], a: Float[Tensor, "groups rank in"]) -> tuple[Any, Any]:
    """The two layers that multiply with `a` and then `b`."""
    if isinstance(layer, nn.Embedding):
        return embedding(layer, a[0].T), linear(layer, b[0])
    if isinstance(layer, nn.Linear):
        return linear(layer, a[0]), linear(layer, b[0], layer.bias)
    kernel = a.reshape(-1, *layer.weight.shape[1:])
    return convolution(layer, kernel), pointwise(layer, b.flatten(0, 1), layer.bias)
