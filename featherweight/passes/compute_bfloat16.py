"""Computes in bfloat16 what stays in floats: eight bits of exponent, as float32 has, and seven of the mantissa.

Half of the bytes are moved, and processors with AMX or AVX-512 BF16 multiply twice as many numbers at once, or more.
Layers whose inputs and weights are rounded to 8 bits stay so: what changes is attention, norms, activations and sums.
Sums over a whole network lose what is small beside what is large, so each file is compared with the network, and what
does not bear it is refused.
Stored weights do not change (`scale_weights` makes those smaller), and neither does the network in torch: a target that
can compute so is told to, and what it then computes is what is judged. What it does on a processor without arithmetic
for bfloat16 is the target's affair; nothing is gained there.

Source: Kalamkar et al. 2019, arXiv:1905.12322, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from featherweight.errors import LayerError
from featherweight.passes import Pass
from featherweight.surgery import WEIGHTED, compute_floats_in, done, select
from featherweight.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ComputeBfloat16(Pass):
    """Has the target compute in bfloat16; `where` has to choose the whole network, for no target tells layers apart."""

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, "*", WEIGHTED)
        if len(select(model, self.where, WEIGHTED)) < len(layers) or not layers:
            raise LayerError(
                f"where={self.where!r} chooses a part of the layers, but {self.name()} is for the whole network, of "
                "one convolutional or linear layer at least. Leave `where` out, or leave this step out."
            )
        compute_floats_in(model, "bfloat16")
        for name in layers:
            done(name, "is computed in bfloat16 where it is computed in floats")
        return model
