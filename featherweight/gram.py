"""What layers read, as rows of a matrix X, and their Gram matrix XᵀX / n: what rounding a weight does to outputs.

A linear layer says X·Wᵀ, so that a change E of its weight moves the outputs by the mean square of X·Eᵀ, which is
trace(E · XᵀX / n · Eᵀ): the inputs themselves need not be kept. A convolution is a linear layer that reads patches,
one of each group of its channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.abreast import abreast
from featherweight.errors import WorkloadError
from featherweight.hooks import (
    watch_inputs,
)
from featherweight.int8 import edges
from featherweight.surgery import (
    CONVOLUTIONS,
)
from featherweight.workload import Workload

SAMPLE = 1 << 14  # rows kept of what a layer reads, over all batches: patches overlap and say much the same
HELD = 1 << 26  # numbers in the Gram matrices that are held at a time


def patches(
    x: Float[Tensor, "n channels *size"], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Float[Tensor, "n ..."]:
    """A view of all that a convolution without padding reads: (n, *places, channels, *kernel).

    >>> patches(torch.arange(4.0).view(1, 1, 4), kernel=(2,), stride=(1,), dilation=(2,)).squeeze()
    tensor([[0., 2.],
            [1., 3.]])
    """
    for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    return x.movedim(1, 1 + len(kernel))


def sampled(x: Float[Tensor, "*shape"], leading: int, most: int, rng: torch.Generator) -> Float[Tensor, "rows ..."]:
    """At most `most` of the entries of `x` along its first `leading` dimensions, at random and without repeats."""
    sizes = x.shape[:leading]
    if prod(sizes) <= most:
        return x.reshape(-1, *x.shape[leading:])
    chosen = torch.randperm(prod(sizes), generator=rng)[:most].to(x.device)
    return x[torch.unravel_index(chosen, sizes)]


def rows_read(layer: nn.Module, x: Tensor, most: int, rng: torch.Generator) -> Float[Tensor, "groups rows in"]:
    """At most `most` of the vectors that the rows of `layer.weight.flatten(1)` are multiplied with, when it reads `x`.

    Args:
        layer: a linear layer (one group) or a convolution.
    """
    if isinstance(layer, nn.Linear):
        return sampled(x.reshape(-1, x.shape[-1]), 1, most, rng).unsqueeze(0)
    assert isinstance(layer, CONVOLUTIONS)
    places = len(layer.kernel_size)
    x = x if x.dim() == places + 2 else x.unsqueeze(0)
    border, both = edges(layer.padding, layer.kernel_size, layer.dilation)
    pads = border or [size for size in reversed(both) for _ in range(2)]
    if any(pads):
        x = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    seen = sampled(patches(x, layer.kernel_size, layer.stride, layer.dilation), 1 + places, most, rng)
    return seen.reshape(len(seen), layer.groups, -1).transpose(0, 1)


@dataclass
class Gram:
    """Sums over the rows that one weight was multiplied with."""

    most: int  # rows of each call
    products: Tensor | float = 0.0  # (groups, in, in)
    magnitudes: Tensor | float = 0.0  # (groups, in)
    count: int = 0
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, layer: nn.Module, x: Tensor) -> None:
        """Takes in what `layer` reads when it is called with `x`."""
        rows = rows_read(layer, x, self.most, self.rng).float()
        self.products = self.products + rows.transpose(1, 2) @ rows
        self.magnitudes = self.magnitudes + rows.abs().sum(1)
        self.count += rows.shape[1]

    def joined(self, other: Gram) -> Gram:
        """The sums over the rows of both."""
        return Gram(
            self.most,
            self.products + other.products,
            self.magnitudes + other.magnitudes,
            self.count + other.count,
        )

    def mean(self) -> Tensor:
        """XᵀX / n, (groups, in, in)."""
        return torch.as_tensor(self.products) / self.count

    def magnitude(self) -> Tensor:
        """The mean magnitude of each input, (groups, in)."""
        return torch.as_tensor(self.magnitudes) / self.count


def grams(model: nn.Module, layers: Mapping[str, nn.Module], workload: Workload) -> dict[str, Gram]:
    """The sums for each of `layers` over the calibration batches; layers that are never called have none.

    Raises:
        WorkloadError: a layer read values that are NaN or infinite.
    """
    most = rows_of_each(workload)
    found: dict[str, Gram] = {}

    def observe(name: str, x: Tensor) -> None:
        found.setdefault(name, Gram(most)).add(layers[name], x)

    watch_inputs(model, layers, workload.calibration, observe)
    for name, gram in found.items():
        refuse_nan(name, gram.products)
    return found


def numbers_read(layer: Any) -> int:
    """In the Gram matrices of what a convolution or linear layer reads."""
    return (1 if isinstance(layer, nn.Linear) else layer.groups) * layer.weight[0].numel() ** 2


def parts(
    layers: Mapping[str, nn.Module], numbers: Callable[[Any], int] = numbers_read
) -> Iterator[dict[str, nn.Module]]:
    """`layers` in parts for which matrices of so many `numbers` fit into memory together: by default, Gram matrices."""
    part: dict[str, nn.Module] = {}
    held = 0
    for name, layer in layers.items():
        size = numbers(layer)
        if part and held + size > HELD:
            yield part
            part, held = {}, 0
        part[name] = layer
        held += size
    if part:
        yield part


def grams_in_turn(
    model: nn.Module, groups: Sequence[Mapping[str, nn.Module]], workload: Workload
) -> Iterator[tuple[Mapping[str, nn.Module], Gram]]:
    """Each group of layers that share a weight, in the order of calls, with the sums over what all of them read.

    What is done to a group before the next is asked for, later layers see. One run of the network for each batch
    does for all of them; a weight that is used several times in it comes with the last use, the others have passed.
    Groups that are never called do not come.

    Raises:
        WorkloadError: a layer read values that are NaN or infinite.
    """
    group_of = {name: group for group in groups for name in group}
    layers = {name: layer for group in groups for name, layer in group.items()}
    uses: Counter[int] = Counter()
    watch_inputs(model, layers, [workload.example], lambda name, _: uses.update([id(group_of[name])]))
    found: dict[int, Gram] = {}
    finished: set[int] = set()
    now, now_read = Gram(0), [object()]
    for name, inputs in abreast(model, layers, workload.calibration):
        key = id(group_of[name])
        if key in finished:
            continue
        read = [type(layers[name]) is nn.Linear, *map(_identity, inputs)]
        if not read[0] or read != now_read:  # query, key and value read the same
            now, now_read = Gram(rows_of_each(workload)), read
            for x in inputs:
                now.add(layers[name], x)
        found[key] = found[key].joined(now) if key in found else now
        uses[key] -= 1
        if uses[key] <= 0:
            refuse_nan(name, found[key].products)
            yield group_of[name], found.pop(key)
            finished.add(key)
            if len(finished) == len(groups):
                return
    for group in groups:
        if id(group) in found:
            yield group, found[id(group)]


def _identity(x: Tensor) -> tuple[object, ...]:
    """Of a tensor, while it is held: memory that is freed is taken by others."""
    return x.data_ptr(), x.shape, x.stride(), x._version


def rows_of_each(workload: Workload) -> int:
    """How many rows are kept of what a layer reads in one batch."""
    return max(1, SAMPLE // len(workload.calibration))


def refuse_nan(name: str, sums: Tensor | float) -> None:
    """Raises a WorkloadError where sums over what the layer `name` read are not numbers."""
    if not torch.as_tensor(sums).isfinite().all():
        raise WorkloadError(
            f"{name!r} read NaN or infinite values on the calibration data, by which no error can be weighed. "
            f"Look for such values in the batches, or leave the layer out with where: '!{name}'."
        )
