"""Weights in a narrow format, each tensor or channel scaled into its range first.

    v = cast(c · w),   ŵ = v / c,   c the power of two that brings the largest |w| into the upper half of the range

(for int8, c = 127 / max |w|, and the cast rounds). A power of two moves the exponent alone, so nothing is lost but what
the cast rounds off. Without it, weights below the smallest number of the format vanish, and those beyond the largest
are clipped: float16 holds 6·10⁻⁸ to 65504, float8 (4 bits of exponent, 3 of fraction) 0.002 to 448. bfloat16 has the
range of single precision, and c is 1.

The scales are fixed: they are not searched for, and activations are left alone. Files become smaller; the runtimes here
compute in single precision all the same.

Source: scaling into the range of float16: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2 (of gradients);
float8 and its scales: Micikevicius et al. 2022, arXiv:2209.05433, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Scaled, largest_of
from featherweight.passes import Pass
from featherweight.passes._storing import Group, chosen, weight_of
from featherweight.settings import Choice
from featherweight.surgery import encode_smaller
from featherweight.workload import Workload


def narrow_scale(largest: Float[Tensor, "*scales"], narrow: str) -> Float[Tensor, "*scales"]:
    """What weights up to `largest` are divided by, 1 / c, to lie well in the range of a format.

    Args:
        largest: magnitude of the weights that share a scale.
        narrow: "float16", "bfloat16", "float8" or "int8".

    >>> [narrow_scale(torch.tensor([0.001]), narrow).item() for narrow in ("bfloat16", "float8")]
    [1.0, 3.814697265625e-06]
    >>> narrow_scale(torch.tensor([254.0]), "int8")
    tensor([2.])
    """
    if narrow == "bfloat16":
        return torch.ones_like(largest)
    share = largest.clamp(min=torch.finfo(largest.dtype).tiny * 2**20) / largest_of(narrow)
    return share if narrow == "int8" else torch.ldexp(torch.ones_like(share), torch.frexp(share).exponent)


@dataclass(frozen=True, kw_only=True)
class ScaleWeights(Pass):
    """Stores the weights of convolutions, linear and recurrent layers and embeddings in a narrow format, with scales.

    Args:
        narrow: the format. "float8" is E4M3: 4 bits of exponent, 3 of fraction.
        scope: what shares a scale: all weights of a layer ("tensor") or those of an output channel ("channel").
    """

    narrow: Annotated[str, Choice("float16", "bfloat16", "float8", "int8")] = "float16"
    scope: Annotated[str, Choice("tensor", "channel")] = "channel"

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        encode_smaller(chosen(self, model), self._encoding, self.name())
        return model

    def _encoding(self, group: Group) -> Scaled:
        weight = weight_of(group)
        largest = weight.abs().amax() if self.scope == "tensor" else weight.abs().flatten(1).amax(1)
        return Scaled(weight, narrow_scale(largest, self.narrow), narrow=self.narrow)
