"""SmoothQuant: channels that are loud among a layer's inputs are made quieter, and the weights that read them larger.

    x̂_j = x_j / s_j,   Ŵ_j = W_j s_j,   s_j = (max |x_j|)^α / (max |W_j|)^(1 − α)

over calibration data and over all that reads channel j. One scale for a whole input wastes its steps on a few loud
channels; after this part of what makes them loud is the weights', which are rounded once and more finely. The division
costs nothing at run time: it goes into the norm or the layer that computes the channels, where ReLU, pooling or a
product with something else stand between at most. So transformers that normalise before they attend are helped and
those that add to what they normalised are not: other layers are left, and said to be.

Factors are taken up to one common factor, which changes no rounding. The scales with which attention's values might be
moved through the heads are left out.

Source: Xiao, Lin, Seznec, Wu, Demouth, Han 2022, arXiv:2211.10438, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.hooks import (
    watch_inputs,
)
from featherweight.passes import Pass
from featherweight.rescaling import Seam, move, read_with, refuse_rounded, seams, stretches
from featherweight.settings import Range
from featherweight.surgery import (
    WEIGHTED,
    done,
    left,
    select,
)
from featherweight.workload import Workload


def smoothing(
    loudest: Float[Tensor, " channels"], read: Float[Tensor, " channels"], power: float
) -> Float[Tensor, " channels"]:
    """The factor by which each channel is divided, up to a common one.

    Args:
        loudest: the largest magnitude of each channel.
        read: the largest magnitude of the weights that read it.
        power: 0 makes all channels be read by weights alike in size, 1 makes the channels alike.

    >>> smoothing(torch.tensor([100.0, 1.0]), torch.tensor([1.0, 1.0]), power=0.5)
    tensor([3.1623, 0.3162])
    """
    return stretches(loudest, power) / stretches(read, 1 - power)


@dataclass(frozen=True, kw_only=True)
class SmoothActivations(Pass):
    """Moves what is loud in the inputs of linear layers and convolutions into their weights; `where` names these.

    Args:
        power: how much is moved: at 0 nothing but what makes weights alike, at 1 all that makes inputs differ.
    """

    power: Annotated[float, Range(0.0, 1.0)] = 0.5

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, WEIGHTED)
        refuse_rounded(layers, self.name())
        found = seams(model, workload.example)
        for name in layers:
            if why := _why_left(name, found, layers):
                left(name, why)
        chosen = [seam for seam in found if seam.readers and not _why_not(seam, layers)]
        loudest = _loudest(model, {name: layers[name] for seam in chosen for name in seam.readers}, workload)
        for seam in chosen:
            inputs = [loudest[name].view(-1, times).amax(1) for name, times in seam.readers.items()]
            factors = smoothing(torch.stack(inputs).amax(0), read_with(model, seam), self.power)
            move(model, seam, factors)
            for name in seam.readers:
                done(name, f"inputs over {float(factors.min()):.3g} to {float(factors.max()):.3g}, by {seam.maker}")
        return model


def _why_left(reader: str, found: Sequence[Seam], layers: Mapping[str, nn.Module]) -> str:
    """Why nothing is moved into `reader`, one of `layers`; empty where something is."""
    seam = next((seam for seam in found if reader in seam.readers), None)
    return _why_not(seam, layers) if seam else "what it reads comes from no layer or norm whose channels can be scaled"


def _why_not(seam: Seam, layers: Mapping[str, nn.Module]) -> str:
    """Why nothing is moved at `seam`; empty where something is."""
    if seam.why_not:
        return f"the channels that it reads, of {seam.maker}, must stay: {seam.why_not}"
    outside = [name for name in seam.readers if name not in layers]
    return f"{outside[0]}, which is left out, reads the same channels" if outside else ""


def _loudest(model: nn.Module, layers: Mapping[str, nn.Module], workload: Workload) -> dict[str, Tensor]:
    """The largest magnitude of each input of the layers over the calibration data."""
    found: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        places = 1 if isinstance(layers[name], nn.Linear) else layers[name].weight.dim() - 1  # type: ignore[operator]
        largest = x.abs().movedim(-places, 0).flatten(1).amax(1)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    watch_inputs(model, layers, workload.calibration, observe)
    return found
