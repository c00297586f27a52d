"""Cross-layer equalisation: channels are scaled so that all of them are computed and read by weights alike in size.

    s_i = √(r_i / t_i),   Ŵ₁ = S⁻¹ W₁,   b̂₁ = S⁻¹ b₁,   Ŵ₂ = W₂ S

where r_i is the largest magnitude in row i of the weight W₁ that computes channel i, and t_i that in the columns of all
weights W₂ that read it. The function stays, since a ReLU, pooling and the like between both let positive scales
through; afterwards r_i = t_i. Pairs are taken in turn until no factor moves. A grid that all weights of a tensor share
then fits every channel. Where every output channel has a scale of its own, little is left to gain, and what a layer
reads may come to differ more from channel to channel than before.

Batch norms must be folded first. Two layers with a ReLU6, a GELU or an addition between them, or layers that share
weights, are left. The authors' absorption of high biases, which their ranges of activations need, is left out, as are
chains across additions. Channels that nothing computes or nothing reads keep their scale.

Source: Nagel, van Baalen, Blankevoort, Welling 2019, arXiv:1906.04721, section 4.1, equations 7 to 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.passes import Pass
from featherweight.rescaling import largest_of_rows, move, read_with, refuse_rounded, seams, weight_of
from featherweight.surgery import WEIGHTED, done, left, select
from featherweight.workload import Workload

SWEEPS = 50  # through all pairs, at most
STILL = 1.001  # a factor nearer to 1 than this moves no weight that matters


def equalizing(made: Float[Tensor, " channels"], read: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
    """The factor of each channel that makes both ranges the same: rows are divided by it, columns multiplied.

    >>> equalizing(torch.tensor([8.0, 1.0, 0.0]), torch.tensor([2.0, 4.0, 1.0]))
    tensor([2.0000, 0.5000, 1.0000])
    """
    return torch.where((made > 0) & (read > 0), (made / read).sqrt(), torch.ones_like(made))


@dataclass(frozen=True, kw_only=True)
class EqualizeLayers(Pass):
    """Makes the channels between consecutive layers alike in range; `where` names the layers that compute them."""

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, WEIGHTED)
        refuse_rounded(layers, self.name())
        found = {seam.maker: seam for seam in seams(model, workload.example) if seam.maker in layers}
        for name in layers:
            if name not in found:
                left(name, "its weight is shared or computed, or the network does not call it just once")
            elif found[name].why_not:
                left(name, found[name].why_not)
        pairs = [seam for seam in found.values() if not seam.why_not]
        totals = {seam.maker: torch.ones(1) for seam in pairs}
        for _ in range(SWEEPS):
            farthest = 1.0
            for seam in pairs:
                factors = equalizing(largest_of_rows(weight_of(layers[seam.maker])), read_with(model, seam))
                move(model, seam, factors)
                totals[seam.maker] = totals[seam.maker] * factors
                farthest = max(farthest, float(factors.max()), 1 / float(factors.min()))
            if farthest < STILL:
                break
        for name, total in totals.items():
            readers = ", ".join(found[name].readers)
            done(name, f"channels over {float(total.min()):.3g} to {float(total.max()):.3g}, for {readers}")
        return model
