"""What passes share that put thin layers in a row in place of one: how large a rank must be, and the layers themselves.

    Σ_{i ≤ r} σ_i²  ≥  share · Σ_i σ_i²

is the rank r by energy. How the factors are found is a pass's affair.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.surgery import kind_of

MULTIPLE = 8  # of which ranks are one where that still saves weights: runtimes compute in such widths anyway
ROUNDING = 1e-12  # share of the energy that is taken for the rounding errors of single precision

# ------------------------------------------------------------------------------------------------ ranks


def rank_for_energy(values: Float[Tensor, "*groups n"], share: float) -> int:
    """The smallest rank that keeps `share` of the squared singular values, one rank for all groups.

    A share of 1 keeps all that is more than rounding errors.

    >>> values = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squared 9, 4, 1 and 0
    >>> [rank_for_energy(values, share) for share in (0.5, 0.9, 0.95, 1.0)]
    [1, 2, 3, 3]
    """
    energies = values.double().square().reshape(-1, values.shape[-1])
    kept = torch.cumsum(energies.sum(0), dim=0)
    enough = kept >= (share - ROUNDING) * kept[-1]
    return int(enough.int().argmax()) + 1


def step_of(groups: int) -> int:
    """By how much the rank of each of so many groups grows, so that all channels together are a multiple of 8.

    >>> step_of(1), step_of(2), step_of(3), step_of(32)
    (8, 4, 8, 1)
    """
    return MULTIPLE // gcd(MULTIPLE, groups)


def rounded_up(rank: int, step: int, most: int) -> int:
    """`rank` up to a multiple of `step` where that is no more than `most`, else as it is.

    >>> rounded_up(9, 8, most=20), rounded_up(9, 8, most=15)
    (16, 9)
    """
    up = -(-rank // step) * step
    return up if up <= most else rank


# ------------------------------------------------------------------------------------------------ layers


def linear(like: Any, weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with these tensors, trained where `like` is, and with numbers of its type."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _filled(made, like, weight, bias)


def embedding(like: Any, weight: Float[Tensor, "rows width"]) -> nn.Embedding:
    """An embedding with this table, that is trained where `like` is."""
    rows, width = weight.shape
    made = nn.Embedding(rows, width, padding_idx=like.padding_idx, device="meta")
    return _filled(made, like, weight, None)


def convolution(like: Any, weight: Float[Tensor, "out rest *kernel"], bias: Tensor | None = None) -> Any:
    """A convolution in as many groups as `like`, and with its stride, padding and dilation."""
    return _convolution(
        like,
        weight,
        bias,
        stride=like.stride,
        padding=like.padding,
        dilation=like.dilation,
        padding_mode=like.padding_mode,
    )


def pointwise(like: Any, weight: Float[Tensor, "out rest"], bias: Tensor | None = None) -> Any:
    """A convolution of kernel size 1, in as many dimensions and groups as `like`."""
    return _convolution(like, weight.reshape(*weight.shape, *[1] * len(like.kernel_size)), bias)


def _convolution(like: Any, weight: Tensor, bias: Tensor | None, **geometry: Any) -> Any:
    outputs, inputs, *kernel = weight.shape
    made = kind_of(like)(
        inputs * like.groups, outputs, kernel, groups=like.groups, bias=bias is not None, device="meta", **geometry
    )
    return _filled(made, like, weight, bias)


def _filled(made: Any, like: Any, weight: Tensor, bias: Tensor | None) -> Any:
    trained = any(parameter.requires_grad for parameter in like.parameters())
    made.weight = nn.Parameter(weight.to(like.weight.dtype).contiguous(), requires_grad=trained)
    if bias is not None:
        # The very parameter where it is one: another layer may use it too.
        made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=trained)
    return made.train(like.training)


def in_a_row(like: nn.Module, *layers: nn.Module) -> nn.Sequential:
    """The layers one after the other, to stand where `like` stands."""
    return nn.Sequential(*layers).train(like.training)


def weights_in(*layers: nn.Module) -> int:
    """How many weights the layers hold, biases left out.

    >>> weights_in(nn.Linear(4, 2), nn.Linear(2, 3))
    14
    """
    return sum(layer.weight.numel() for layer in layers)  # type: ignore[operator, misc]
