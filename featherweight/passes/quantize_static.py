"""8-bit weights and 8-bit activations with ranges fixed beforehand: the form that int8 kernels run.

    ŵ = s_c · clamp(round(w / s_c), −127, 127)            one s_c for each output channel
    x̂ = s · (clamp(round(x / s) + z, 0, 255) − z)         one s and z for each layer's input

The range of an input is measured on calibration data: its smallest and largest value, percentiles of it, or the
clipping with the least squared error. Rounding weights shifts a layer's mean output by (ŵ − w) · E[x]; bias
correction takes that back.

Source: Jacob et al. 2018, arXiv:1712.05877, equation 1; least squared error: Banner et al. 2019, arXiv:1810.05723,
section 3; bias correction: Nagel et al. 2019, arXiv:1906.04721, equation 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Affine, InputQuantizer, affine_scale
from featherweight.hooks import (
    watch_inputs,
)
from featherweight.passes import Pass
from featherweight.settings import Choice
from featherweight.surgery import (
    WEIGHTED,
    dense_of,
    done,
    encode,
    groups_by_weight,
    leave_others,
    quantize_input,
    refuse_quantized,
    select,
)
from featherweight.workload import Workload

SAMPLE = 1 << 14  # values kept of each input, over all batches: enough for a range, small enough for any memory
TAIL = 1e-4  # share of the values that the percentile range leaves out at each end
STEPS = 45  # clippings tried by the least-squared-error range


def squared_error(values: Float[Tensor, " n"], low: float, high: float) -> float:
    """Mean squared error of `values` rounded to 256 steps from `low` to `high`."""
    scale = max((high - low) / 255, 1e-30)
    zero = round(-low / scale)
    rounded = (torch.clamp(torch.round(values / scale) + zero, 0, 255) - zero) * scale
    return float(((rounded - values) ** 2).mean())


def least_error_range(values: Float[Tensor, " n"], low: float, high: float) -> tuple[float, float]:
    """The range, shrunk from `low`..`high` towards zero, whose rounding error on `values` is least.

    >>> values = torch.cat([torch.linspace(-1, 1, 4000), torch.tensor([40.0])])
    >>> low, high = least_error_range(values, -1.0, 40.0)
    >>> squared_error(values, low, high) <= squared_error(values, -1.0, 40.0)
    True
    """
    shares = [1 - 0.02 * step for step in range(STEPS)]
    share = min(shares, key=lambda s: squared_error(values, low * s, high * s))
    return low * share, high * share


def bias_shift(
    error: Float[Tensor, "out in *kernel"], mean: Float[Tensor, " channels"], groups: int
) -> Float[Tensor, " out"]:
    """What rounding did to a layer's mean output: (ŵ − w) · E[x], summed over kernel positions.

    Args:
        error: ŵ − w, as the layer holds its weight (`in` is channels / groups).
        mean: of each input channel over examples and positions.
        groups: of a convolution; 1 for a linear layer.
    """
    per_channel = error.flatten(2).sum(-1) if error.dim() > 2 else error
    grouped = per_channel.reshape(groups, -1, per_channel.shape[1])
    return torch.einsum("goi,gi->go", grouped, mean.reshape(groups, -1)).flatten()


@dataclass
class InputStatistics:
    """What is remembered of one layer's input over the calibration batches."""

    low: float = float("inf")
    high: float = float("-inf")
    sample: list[Tensor] = field(default_factory=list)
    total: Tensor | None = None  # (channels,) sums
    count: int = 0
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, x: Tensor, channel_dim: int, keep: int) -> None:
        """Takes in one batch; `keep` of its values join the sample."""
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        flat = x.flatten()
        # At random: even steps through memory would meet the same few channels and pixels again and again.
        chosen = torch.randint(flat.numel(), (min(keep, flat.numel()),), generator=self.rng)
        self.sample.append(flat[chosen])
        sums = x.movedim(channel_dim, 0).flatten(1).sum(1)
        self.total = sums if self.total is None else self.total + sums
        self.count += flat.numel() // sums.numel()

    def range(self, method: str) -> tuple[float, float]:
        """`low` and `high` by one of the three methods, zero inside."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if method == "minmax":
            return low, high
        values = torch.cat(self.sample)
        if method == "percentile":
            ordered = values.sort().values
            cut = int(len(ordered) * TAIL)
            return min(float(ordered[cut]), 0.0), max(float(ordered[-1 - cut]), 0.0)
        return least_error_range(values, low, high)

    def mean(self) -> Tensor:
        """(channels,) means."""
        assert self.total is not None
        return self.total / self.count


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Pass):
    """Convolutions and linear layers in 8 bits, weights and inputs both; embeddings in 8-bit weights.

    Args:
        range: how the range of an input is chosen from the calibration data.
        bias_correction: whether biases take back the shift that rounding gives to mean outputs.
    """

    range: Annotated[str, Choice("minmax", "percentile", "mse")] = "mse"
    bias_correction: bool = False

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, (*WEIGHTED, nn.Embedding))
        refuse_quantized(layers, self.name())
        weighted = {name: layer for name, layer in layers.items() if isinstance(layer, WEIGHTED)}
        statistics = _watch(model, weighted, workload)
        for group in groups_by_weight(model, layers):
            weight = dense_of(next(iter(group.values())))
            encoding = Affine(weight, affine_scale(weight, 8, 0), bits=8, axis=0)
            for name, layer in group.items():
                encode(layer, encoding)
                if name not in statistics:
                    done(name, encoding.describe())
                    continue
                low, high = statistics[name].range(self.range)
                quantize_input(layer, InputQuantizer(low, high))
                if self.bias_correction:
                    _correct_bias(layer, encoding.decode() - weight, statistics[name].mean())
                done(name, f"{encoding.describe()}, inputs uint8 in {low:.4g}…{high:.4g}")
        leave_others(model, self.where, layers, self.name())
        return model


def _watch(model: nn.Module, layers: Mapping[str, nn.Module], workload: Workload) -> dict[str, InputStatistics]:
    """Statistics of every layer's input; layers that are never called have none."""
    keep = max(1, SAMPLE // len(workload.calibration))
    found: dict[str, InputStatistics] = {}

    def observe(name: str, x: Tensor) -> None:
        channel_dim = -1 if isinstance(layers[name], nn.Linear) else 1
        found.setdefault(name, InputStatistics()).add(x, channel_dim, keep)

    watch_inputs(model, layers, workload.calibration, observe)
    return found


def _correct_bias(layer: nn.Module, error: Tensor, mean: Tensor) -> None:
    shift = bias_shift(error, mean, getattr(layer, "groups", 1))
    if layer.bias is None:
        layer.bias = nn.Parameter(-shift)
    else:
        layer.bias.data -= shift  # type: ignore[operator]
