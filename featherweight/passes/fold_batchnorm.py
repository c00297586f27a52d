"""Folds batch norms into the convolution or linear layer before them: the same function, one layer less.

    BN(W x + b) = g · (W x + b − μ) / √(σ² + ε) + β  =  (s W) x + s (b − μ) + β,   s = g / √(σ² + ε)

with one s for each output channel. Runtimes do this by themselves to floats; before quantization it has to be done
here, so that the weights that are rounded are those that run.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2, equation 14; batch norm: Ioffe and Szegedy 2015,
arXiv:1502.03167, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.encodings import Masked
from featherweight.errors import RecipeError
from featherweight.passes import Pass
from featherweight.surgery import done, encode, encoding_of, is_computed, kind_of, left, replace, select, trace
from featherweight.workload import Workload

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)


def scaled_rows(
    weight: Float[Tensor, out * rest], scale: Float[Tensor, " channels"], groups: int = 0
) -> Float[Tensor, out * rest]:
    """`weight` with each output channel times its scale.

    Args:
        weight: (out, in / groups, *kernel) or (out, in); of a transposed convolution (in, out / groups, *kernel).
        scale: one per output channel.
        groups: of a transposed convolution, which has its output channels in dimension 1; 0 for other layers.

    >>> scaled_rows(torch.ones(2, 2), torch.tensor([1.0, 3.0]))
    tensor([[1., 1.],
            [3., 3.]])
    """
    if not groups:
        return weight * scale.view(-1, *[1] * (weight.dim() - 1))
    rows = weight.reshape(groups, -1, scale.numel() // groups, *weight.shape[2:])
    return (rows * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def scale_and_shift(
    mean: Float[Tensor, " channels"],
    variance: Float[Tensor, " channels"],
    gain: Float[Tensor, " channels"] | None,
    offset: Float[Tensor, " channels"] | None,
    epsilon: float,
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """s and t for which a batch norm in eval mode is s · x + t; in double precision, since variances may be tiny.

    >>> s, t = scale_and_shift(torch.tensor([1.0]), torch.tensor([4.0]), None, torch.tensor([2.0]), 0.0)
    >>> s.item(), t.item()
    (0.5, 1.5)
    """
    scale = (variance.double() + epsilon).rsqrt() * (1.0 if gain is None else gain.double())
    return scale, (0.0 if offset is None else offset.double()) - mean.double() * scale


@dataclass(frozen=True, kw_only=True)
class FoldBatchnorm(Pass):
    """Folds every batch norm that follows a convolution or linear layer into it; `where` names batch norms."""

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        norms = select(model, self.where, NORMS)
        before = _layers_before(model, trace(model, workload.example).graph)
        for name, norm in norms.items():
            layer, reason = before.get(name, ("", "the network does not call it"))
            if kind_of(norm) not in NORMS:
                reason = f"is of kind {kind_of(norm).__name__}, which may do more than normalise"
            if reason or norm.running_mean is None:
                left(name, reason or "it has no running statistics: it normalises each batch by itself")
                continue
            fold(layer, model.get_submodule(layer), norm)
            replace(model, name, nn.Identity())
            done(name, f"folded into {layer}")
        return model


def fold(name: str, layer: Any, norm: Any) -> None:
    """Gives `layer`, called `name` in messages, the weights and bias with which it does what `norm` did after it.

    Raises:
        RecipeError: the layer's weights are stored as codes already.
    """
    encoding = encoding_of(layer)
    if encoding is not None and not isinstance(encoding, Masked):
        raise RecipeError(
            f"fold_batchnorm would rescale the weights of {name!r}, which an earlier step stored as "
            f"{encoding.describe()}. Put fold_batchnorm before that step."
        )
    scale, shift = scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    groups = layer.groups if isinstance(layer, TRANSPOSED) else 0
    weight, trainable = layer.weight.detach(), layer.weight.requires_grad
    folded = scaled_rows(weight.double(), scale, groups).to(weight.dtype)
    bias = shift if layer.bias is None else shift + layer.bias.detach().double() * scale
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=trainable or encoding is not None)
    if encoding is not None:
        encode(layer, Masked(folded, encoding.mask))
    else:
        layer.weight = nn.Parameter(folded, requires_grad=trainable)


def _layers_before(model: nn.Module, graph: torch.fx.Graph) -> dict[str, tuple[str, str]]:
    """For every batch norm in `graph`, by name: the layer to fold it into, or "" and the reason why there is none."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    owners = {node: _owner(node) for node in calls}
    times: dict[str, int] = {}
    for node in calls:
        if _computes(node):
            times[owners[node]] = times.get(owners[node], 0) + 1
    found: dict[str, tuple[str, str]] = {}
    for node in calls:
        if "batch_norm" in str(node.target):
            source = node.args[0]
            assert isinstance(source, torch.fx.Node)
            layer = owners.get(source, "")
            reason = _why_not(model, source, layer)
            if not reason and max(times[layer], times[owners[node]]) > 1:
                reason = "it or the layer before it is called more than once"
            found[owners[node]] = ("" if reason else layer, reason)
    return found


def _why_not(model: nn.Module, source: torch.fx.Node, layer: str) -> str:
    """Why a batch norm of `source`, computed in the module `layer`, cannot be folded; "" where it can."""
    if not _computes(source) or not isinstance(model.get_submodule(layer), LAYERS):
        return "what comes before it is no convolution or linear layer"
    if kind_of(model.get_submodule(layer)) not in LAYERS:
        return (
            f"{layer} is of kind {kind_of(model.get_submodule(layer)).__name__}, which may do more than its weight says"
        )
    if any(is_computed(model.get_submodule(layer), tensor) for tensor in ("weight", "bias")):
        return f"the weight of {layer} is computed anew at every run, by weight norm or the like"
    if len(source.users) > 1:
        return f"the output of {layer} is read elsewhere too, before normalisation"
    if "linear" in str(source.target) and source.meta["val"].dim() != 2:
        return f"it normalises dimension 1, not the features of {layer}"
    return ""


def _computes(node: torch.fx.Node) -> bool:
    """Whether it is the one operator for which a convolution, linear layer or batch norm stands."""
    return any(kind in str(node.target) for kind in ("conv", "aten.linear", "batch_norm"))


def _owner(node: torch.fx.Node) -> str:
    """The name of the module whose forward called this operator."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""
