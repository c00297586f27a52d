"""Puts two thin layers in place of one: W ≈ B A with few rows in A, the best that a given rank allows.

    W M Wᵀ = U Σ² Uᵀ,   A = Σ_r^-½ U_rᵀ W,   B = U_r Σ_r^½,   M = E[x xᵀ] + λ

with r the rank. With M = 1 the error of the weights is least; with the second moment of the layer's input, damped by a
hundredth λ of its mean, the error of the outputs on the calibration data is. Where inputs hang together, as they do,
that is another matrix. The sources whiten: they take the singular value decomposition of W L, with L Lᵀ = M, and divide
by L again. That gives the same factors, but M is large where W M Wᵀ, which is what outputs have in common, is small.
Where there are more outputs than inputs, R of W = Q R takes the place of W, and Q is multiplied with B in the end. A
linear layer becomes two; a convolution one with its kernel, to r channels in each group, and one of size 1; an
embedding a narrower one and a linear layer. All are ordinary layers, that later steps train, prune and quantize as any
other. Layers that share a weight, as embedding and last layer of language models do, share the factors: those of the
first that is no embedding, and by its inputs.

A layer with few outputs cannot spare rank: at half of its weights ten classes come from four numbers. Leave the last
layer out with `where`, such as `!head`.

Inputs are those of the network as it was, not those that follow layers factorized already. An embedding's are the
numbers of its rows, so its M is diagonal: rows that calibration data reads often are met more closely, and the others,
which count by the damping alone, in the directions that are left. Transposed convolutions are left.

Source: Wang, Zheng, Wan, Zhang 2024, arXiv:2403.07378, section 3, for the whitening (Yuan et al. 2023,
arXiv:2312.05821, scale single features instead); Zhang, Zou, He, Sun 2015, arXiv:1505.06798, section 2, for
convolutions; Eckart and Young 1936, doi:10.1007/BF02288367, for what is best at a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.gram import parts, refuse_nan, rows_of_each, rows_read
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
SMALLEST = 1e-14  # of the energy in a direction, over the largest: what is below is rounding errors

# ------------------------------------------------------------------------------------------------ mathematics


Matrices = Float[Tensor, "*groups out in"]
Basis = Float[Tensor, "*groups out least"] | None  # Q of W = Q R; None where it is one
Factors = tuple[Float[Tensor, "*groups out rank"], Float[Tensor, "*groups rank in"]]  # B and A


def reduced(weight: Matrices) -> tuple[Basis, Float[Tensor, "*groups least in"]]:
    """Q and R of W = Q R, where R has no more rows than W has inputs; None and W where W has no more either.

    >>> basis, rows = reduced(torch.tensor([[3.0], [4.0]]))
    >>> (basis @ rows).round(), rows.abs()
    (tensor([[3.],
            [4.]]), tensor([[5.]]))
    """
    return torch.linalg.qr(weight) if weight.shape[-2] > weight.shape[-1] else (None, weight)


def energies(
    spread: Float[Tensor, "*groups least least"],
) -> tuple[Float[Tensor, "*groups least"], Float[Tensor, "*groups least least"]]:
    """Σ², the largest first, and U of R M Rᵀ = U Σ² Uᵀ.

    >>> energies(torch.diag(torch.tensor([0.64, 25.0])))[0]
    tensor([25.0000,  0.6400])
    """
    values, vectors = torch.linalg.eigh(spread)
    return values.flip(-1).clamp(min=0.0), vectors.flip(-1)


def factors(
    basis: Basis, rows: Float[Tensor, "*groups least in"], spread: Float[Tensor, "*groups least least"], rank: int
) -> Factors:
    """B and A of the given rank, alike in size, whose product is nearest to W in the squared error of W x.

    Args:
        basis: Q of W = Q R, as `reduced` has it.
        rows: R.
        spread: R M Rᵀ, with M the second moment of x; where that is one, the squared error of the weight itself counts.
        rank: of the product.

    >>> weight = torch.tensor([[8.0, 0.0], [0.0, 0.5]])
    >>> b, a = factors(None, weight, weight @ torch.diag(torch.tensor([0.01, 100.0])) @ weight.T, rank=1)
    >>> b @ a  # the large weight reads next to nothing
    tensor([[0.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    values, directions = energies(spread)
    roots = values[..., :rank].clamp(min=SMALLEST * max(float(values.max()), SMALLEST)) ** 0.25
    kept = directions[..., :rank]
    b, a = kept * roots.unsqueeze(-2), (kept.mT @ rows) / roots.unsqueeze(-1)
    return b if basis is None else basis @ b, a


@dataclass
class Seen:
    """What a weight makes of what it reads, and how large that is.

    Args:
        basis: Q of the weight, (groups, out, least).
        rows: R of it, (groups, least, in).
        products: R X Xᵀ Rᵀ, (groups, least, least), with X the vectors that were read.
        squares: of the numbers in X, added up.
    """

    basis: Basis
    rows: Tensor
    products: Tensor | float = 0.0
    squares: float = 0.0

    def add(self, read: Float[Tensor, "groups n in"]) -> None:
        """Takes in some of the vectors."""
        made = (read @ self.rows.to(read.dtype).mT).double()
        self.products = self.products + made.mT @ made
        self.squares += float(read.square().sum(dtype=torch.float64))

    def add_counts(self, counts: Float[Tensor, " in"]) -> None:
        """Takes in how often each row of a table was read, which is a vector of one 1."""
        self.products = self.products + (self.rows * counts) @ self.rows.mT
        self.squares += float(counts.sum())

    def spread(self, damping: float) -> Float[Tensor, "groups least least"]:
        """R M Rᵀ with M the second moment over the mean of its diagonal, plus `damping` on it; M = 1 if that is 0.

        >>> seen = Seen(None, torch.eye(2)[None])
        >>> seen.add_counts(torch.tensor([2.0, 6.0]))
        >>> seen.spread(damping=0.25)
        tensor([[[0.7500, 0.0000],
                 [0.0000, 1.7500]]])
        """
        plain = self.rows @ self.rows.mT
        if not self.squares:
            return plain
        return torch.as_tensor(self.products) * (len(self.rows) * self.rows.shape[-1] / self.squares) + damping * plain


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
        for part in parts(leaders, _numbers):
            for name, seen in _seen(model, part, workload if self.whiten else None).items():
                pairs.update(self._pairs(groups[name], name, seen))
        for name, pair in pairs.items():
            replace(model, name, pair)
        return model

    def _pairs(self, group: Group, leader: str, seen: Seen) -> dict[str, nn.Sequential]:
        """What takes the place of each layer of a group; nothing, and said to be left, where that saves nothing."""
        spread = seen.spread(DAMPING)
        narrow = len({isinstance(layer, nn.Embedding) for layer in group.values()})
        groups, out, inputs = matrices(group[leader]).shape
        rank = self._rank((groups, out, inputs), spread, narrow)
        if not 0 < rank <= rank_for_parameters(out, narrow * inputs, 1.0 / narrow):
            for name in group:
                left(name, self._why_left(rank, out, inputs))
            return {}
        b, a = factors(seen.basis, seen.rows, spread, rank)
        made = _sharing({name: _layers(layer, *_seen_by(layer, group[leader], b, a)) for name, layer in group.items()})
        each = f" in each of {groups} groups" if groups > 1 else ""
        shared = " shared" if len(group) > 1 else ""
        for name, pair in made.items():
            before, after = group[name].weight.numel(), weights_in(*pair)  # type: ignore[operator]
            done(name, f"rank {rank} of {min(out, inputs)}{each}, {before:,} -> {after:,}{shared} weights")
        return {name: in_a_row(group[name], *pair) for name, pair in made.items()}

    def _rank(self, shape: Sequence[int], spread: Float[Tensor, "groups least least"], narrow: int) -> int:
        """Of factors of which the second is there in so many forms."""
        groups, out, inputs = shape
        if self.rank_by == "parameters":
            rank = rank_for_parameters(out, narrow * inputs, self.share / narrow)
            return rank // step_of(groups) * step_of(groups) or rank
        rank = rank_for_energy(energies(spread)[0].sqrt(), self.share)
        return rounded_up(rank, step_of(groups), rank_for_parameters(out, narrow * inputs, 1.0 / narrow))

    def _why_left(self, rank: int, out: int, inputs: int) -> str:
        if not rank:
            return f"at every rank its factors hold more than {self.share:g} of its weights"
        return (
            f"{self.share:g} of its energy takes rank {rank} of {min(out, inputs)}, at which its factors hold no "
            "fewer weights"
        )


def _seen(model: nn.Module, layers: Mapping[str, nn.Module], workload: Workload | None) -> dict[str, Seen]:
    """What each layer makes of what it reads on the calibration data; nothing without a workload.

    Raises:
        WorkloadError: a layer read values that are NaN or infinite.
    """
    found = {name: Seen(*reduced(matrices(layer).double())) for name, layer in layers.items()}
    if workload is None:
        return found
    most = rows_of_each(workload)
    rngs = {name: torch.Generator().manual_seed(0) for name in layers}

    def observe(name: str, x: Tensor) -> None:
        layer, seen = layers[name], found[name]
        if isinstance(layer, nn.Embedding):
            seen.add_counts(torch.bincount(x.flatten(), minlength=layer.num_embeddings).double())
        else:
            seen.add(rows_read(layer, x, most, rngs[name]).float())

    watch_inputs(model, layers, workload.calibration, observe)
    for name, seen in found.items():
        refuse_nan(name, seen.squares)
    return found


def _numbers(layer: nn.Module) -> int:
    """In single precision, about, of what is held of a layer: its rows and products, in double."""
    groups, out, inputs = matrices(layer).shape
    return 2 * groups * min(out, inputs) * (min(out, inputs) + inputs)


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


def matrices(layer: Any) -> Matrices:
    """The weight of `layer` as the matrices that it multiplies with; an embedding reads vectors with a single one."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Embedding):
        return weight.T.unsqueeze(0)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return weight.reshape(groups, weight.shape[0] // groups, -1)


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
