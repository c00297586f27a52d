"""Weights that share a few values: each becomes the nearest of 2^b that k-means finds, and is stored as its number.

    ŵ = t[q],   q = argmin_k |w − t_k|,   t such that Σ_i a_i · (w_i − t[q_i])² is small

The values lie where the weights are, so b bits lose less than on a uniform grid. a_i is the mean square of the input
that w_i is multiplied with: for inputs that are not correlated, the sum is then the squared error of the output, and
weights that read loud inputs are met more closely than others. With a_i = 1 it is the squared error of the weights.
The search starts from values drawn with chances a_i · (distance to the nearest value drawn so far)², and goes on with
Lloyd's iterations. Zeros that an earlier step made stay zero: one of the values is zero then.

Files become smaller, not faster: the runtimes here decode the weights when they load a file. 1 to 4 bits take half a
byte each in the file; fewer values than 16 are for entropy coding. Later distillation leaves the values as they are and
moves weights from one to another; the values themselves are not trained (section 3.3 of the source).

Source: Han, Mao, Dally 2016, arXiv:1510.00149, section 3; the start: Arthur and Vassilvitskii 2007,
doi:10.5555/1283383.1283494; weights that count by what they do: Choi, El-Khamy, Lee 2017, arXiv:1612.01543.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Codebook, Masked
from featherweight.hooks import (
    watch_inputs,
)
from featherweight.passes import Pass
from featherweight.passes._storing import Group, chosen, weight_of
from featherweight.settings import Choice, Range
from featherweight.surgery import WEIGHTED, encode_smaller, encoding_of
from featherweight.workload import Workload

SAMPLE = 64  # values of a row for each that the start draws from among them: more change it little and take long
ROUNDS = 100  # of Lloyd's iterations at most; what 256 values gain after that is below a percent
QUIETEST = 1e-3  # share of the mean input energy that every input counts with, silent ones too
BLOCK = 1024  # weights that are many enough for values of their own
HALF_LOSES = 1e-3  # share of the largest value that half precision may move another by


def start(
    values: Float[Tensor, "rows n"], weights: Float[Tensor, "rows n"], count: int, generator: torch.Generator
) -> Float[Tensor, "rows count"]:
    """`count` of each row's values, ascending, drawn far from one another: the start of k-means++.

    Args:
        values: to be clustered; rows for themselves.
        weights: how much each counts; 0 for those never to be drawn while others are left.
        count: how many; where a row has fewer different ones, some are drawn more than once.
        generator: of chance.

    >>> start(torch.tensor([[0.0, 0.0, 5.0, 9.0]]), torch.ones(1, 4), 3, torch.Generator())
    tensor([[0., 5., 9.]])
    """
    found: list[Tensor] = []
    distance = torch.ones_like(values)
    for _ in range(count):
        chance = weights * distance
        chance = torch.where(chance.sum(1, keepdim=True) > 0, chance, torch.ones_like(chance))
        found.append(values.gather(1, torch.multinomial(chance, 1, generator=generator)))
        squared = (values - found[-1]).square()
        distance = torch.minimum(distance, squared) if len(found) > 1 else squared
    return torch.cat(found, dim=1).sort(dim=1).values


def settle(
    values: Float[Tensor, "rows n"], weights: Float[Tensor, "rows n"], centres: Float[Tensor, "rows count"]
) -> Float[Tensor, "rows count"]:
    """`centres` after Lloyd's iterations: each moves to the weighted mean of the values nearest to it, over and over.

    In one dimension what is nearest to a centre is a run of the ordered values, so sums over it are differences of
    running sums, and an iteration takes no longer for more values.

    Args:
        values: ascending in each row.
        weights: of the values.
        centres: ascending in each row.

    >>> settle(torch.tensor([[0.0, 1.0, 8.0, 9.0]]), torch.tensor([[1.0, 3.0, 1.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[0.7500, 8.5000]])
    """
    mass, moment = (F.pad(x.cumsum(1), (1, 0)) for x in (weights, weights * values))
    for _ in range(ROUNDS):
        middle = (centres[:, 1:] + centres[:, :-1]) / 2
        inner = torch.searchsorted(values, middle, right=True)
        ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=values.shape[1])
        size = mass.gather(1, ends).diff(dim=1)
        moved = torch.where(size > 0, moment.gather(1, ends).diff(dim=1) / size, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def kmeans(
    values: Float[Tensor, "rows n"], weights: Float[Tensor, "rows n"], count: int
) -> Float[Tensor, "rows count"]:
    """For each row, `count` values in ascending order such that Σ weight · (value − nearest of them)² is small.

    >>> kmeans(torch.tensor([[-2.0, -2.0, 1.0, 3.0]]), torch.ones(1, 4), 2)
    tensor([[-2.,  2.]])
    """
    size = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ordered, order = (values / size).double().sort(dim=1)
    counted = weights.double().gather(1, order)
    generator = torch.Generator().manual_seed(0)
    n = ordered.shape[1]
    sample = SAMPLE * count
    seen = torch.randint(n, (sample,), generator=generator) if n > sample else torch.arange(n)
    centres = start(ordered[:, seen], counted[:, seen], count, generator)
    return settle(ordered, counted, centres).to(values.dtype) * size


def importance(energy: Float[Tensor, " channels"], shape: tuple[int, ...], groups: int) -> Float[Tensor, ...]:
    """How much each weight of a layer counts: the energy of the input channel that it reads.

    Args:
        energy: mean square of each input channel.
        shape: of the weight, (out, channels / groups, *kernel).
        groups: of a convolution; 1 for a linear layer.

    >>> importance(torch.tensor([1.0, 2.0, 3.0, 4.0]), (2, 2), groups=2)
    tensor([[1., 2.],
            [3., 4.]])
    """
    rows = energy.view(groups, 1, -1).expand(groups, shape[0] // groups, -1).reshape(shape[0], -1)
    return rows.view(*rows.shape, *[1] * (len(shape) - 2)).expand(shape)


@dataclass(frozen=True, kw_only=True)
class ClusterKmeans(Pass):
    """Stores the weights of convolutions, linear and recurrent layers and embeddings as numbers of shared values.

    Args:
        bits: of each number; a layer has 2^bits different weights at most.
        scope: what shares its values: all weights of a layer ("tensor"), those of so many output channels in a row
            ("channel"), or so many weights of a channel in a row ("block").
        size: how many; 0 for one channel, or for a block of 1024. Where it does not divide the channels, or the weights
            of one, the largest smaller size that does is taken.
        weighted: whether weights count by the energy of the input that they read, as seen on the calibration data;
            those of embeddings, which read none, and of recurrent layers count alike.
        table: the format of the values; of int8, each table has its own scale. Where half precision is too narrow for
            them, they stay in single.
    """

    bits: Annotated[int, Range(1, 8)] = 4
    scope: Annotated[str, Choice("tensor", "channel", "block")] = "tensor"
    size: Annotated[int, Range(0, 65536)] = 0
    weighted: bool = True
    table: Annotated[str, Choice("float32", "float16", "int8")] = "float32"

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        groups = chosen(self, model)
        layers = {name: layer for group in groups for name, layer in group.items()}
        heard = {name: layer for name, layer in layers.items() if isinstance(layer, WEIGHTED)}
        energies = _energies(model, heard, workload) if self.weighted and heard else {}

        def codebook(group: Group) -> Codebook:
            pruned = isinstance(encoding_of(next(iter(group.values()))), Masked)
            weight = weight_of(group)
            table = self._table(weight, _counts(weight, group, energies), pruned)
            return Codebook(weight, *stored_as(self.table, table))

        encode_smaller(groups, codebook, self.name())
        return model

    def _table(self, weight: Tensor, counts: Tensor, pruned: bool) -> Float[Tensor, "tables values"]:
        tables = self._tables(weight)
        values, counts = weight.float().reshape(tables, -1), counts.float().reshape(tables, -1)
        if pruned:
            found = kmeans(values, counts * (values != 0), 2**self.bits - 1)
            found = F.pad(found, (1, 0))
        else:
            found = kmeans(values, counts, 2**self.bits)
        return found.unique().unsqueeze(0) if tables == 1 else found

    def _tables(self, weight: Tensor) -> int:
        """How many tables a weight gets."""
        if self.scope == "tensor":
            return 1
        if self.scope == "channel":
            return weight.shape[0] // divisor(weight.shape[0], self.size or 1)
        return weight.numel() // divisor(weight[0].numel(), self.size or BLOCK)


def divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is no larger than `most`.

    >>> divisor(12, 5), divisor(7, 3), divisor(4, 100)
    (4, 1, 4)
    """
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


def stored_as(kind: str, values: Float[Tensor, "tables values"]) -> tuple[Tensor, Tensor | None]:
    """The values in the format `kind`, and the scales of those in int8.

    >>> stored_as("int8", torch.tensor([[-0.5, 0.0, 1.27]]))
    (tensor([[-50,   0, 127]], dtype=torch.int8), tensor([[0.0100]]))
    """
    largest = values.abs().amax(1, keepdim=True)
    if kind == "int8":
        scale = largest.clamp(min=torch.finfo(values.dtype).tiny) / 127
        return (values / scale).round().to(torch.int8), scale
    half = values.half()
    fits = (half.float() - values).abs().max() <= HALF_LOSES * largest.max()
    return (half if kind == "float16" and fits else values), None


def _energies(model: nn.Module, layers: Mapping[str, nn.Module], workload: Workload) -> dict[str, Tensor]:
    """Mean square of every input channel of each layer; layers that are never called have none."""
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def observe(name: str, x: Tensor) -> None:
        squares = x.movedim(-1 if isinstance(layers[name], nn.Linear) else 1, 0).flatten(1).float().square()
        sums[name] = sums.get(name, 0) + squares.sum(1)
        seen[name] = seen.get(name, 0) + squares.shape[1]

    watch_inputs(model, layers, workload.calibration, observe)
    return {name: total / seen[name] for name, total in sums.items()}


def _counts(weight: Tensor, group: Mapping[str, nn.Module], energies: Mapping[str, Tensor]) -> Tensor:
    """How much each weight counts, for all of the layers that share it together."""
    total = torch.zeros_like(weight)
    for name, layer in group.items():
        if name in energies:
            total = total + importance(energies[name], tuple(weight.shape), getattr(layer, "groups", 1))
    loud = float(total.mean())
    return total + QUIETEST * loud if loud > 0 else torch.ones_like(weight)
