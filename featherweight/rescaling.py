"""Scales of channels, moved from a layer into those that read it: other weights, the same function.

    W₂ f(W₁ x + b) = W₂ S · f(S⁻¹ W₁ x + S⁻¹ b),   S diagonal and positive

wherever f(S x) = S f(x) for every channel: nothing, ReLU, pooling, a product with something else. `seams` finds such
places in a network, `move` moves the scales there. Which scales are best is a pass's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from featherweight.channel_rules import arguments, operator_name, sizes
from featherweight.encodings import Masked
from featherweight.errors import RecipeError
from featherweight.surgery import encode, encoding_of, layer_of, trace
from featherweight.workload import Batch

QUIETEST = 1e-4  # share of the mean magnitude below which no channel counts as quieter

# ------------------------------------------------------------------------------------------------ scales


def stretches(magnitude: Float[Tensor, " channels"], power: float) -> Float[Tensor, " channels"]:
    """The factor of each channel, `magnitude` to a power, with the largest as far above 1 as the smallest below.

    >>> stretches(torch.tensor([1.0, 16.0]), power=0.5)
    tensor([0.5000, 2.0000])
    """
    mean = magnitude.mean().clamp(min=torch.finfo(magnitude.dtype).tiny * 256)
    factors = (magnitude / mean).clamp(min=QUIETEST).pow(power)
    return factors / (factors.max() * factors.min()).sqrt()


def largest_of_rows(weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, " out"]:
    """The largest magnitude with which each output channel is computed."""
    return weight.abs().flatten(1).amax(1)


def largest_of_columns(weight: Float[Tensor, "out in *kernel"], groups: int, times: int) -> Float[Tensor, " channels"]:
    """The largest magnitude with which each channel is read.

    Args:
        weight: of a convolution, or of a linear layer.
        groups: of the convolution; 1 for a linear layer.
        times: how many inputs of the layer in a row belong to one channel.

    >>> largest_of_columns(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), groups=1, times=2)
    tensor([3., 2.])
    """
    rows = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return rows.amax((1, 3)).reshape(-1, times).amax(1)


def scaled_columns(
    weight: Float[Tensor, "out in *kernel"], factors: Float[Tensor, " channels"], groups: int, times: int
) -> Float[Tensor, "out in *kernel"]:
    """`weight` with all that reads a channel times its factor; see `largest_of_columns`.

    >>> scaled_columns(torch.ones(2, 1, 1), torch.tensor([2.0, 3.0]), groups=2, times=1).flatten()
    tensor([2., 3.])
    """
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return (rows * factors.repeat_interleave(times).view(groups, 1, -1, 1)).reshape(weight.shape)


# ------------------------------------------------------------------------------------------------ seams


@dataclass
class Seam:
    """A layer and those that read its channels.

    Args:
        maker: the name of the layer that computes the channels.
        tensors: its tensors that have an entry for each channel along dimension 0: "weight", "bias".
        readers: the layers that read them, each with the number of its inputs that belong to one channel.
        why_not: why scales cannot move here; empty where they can.
    """

    maker: str
    tensors: tuple[str, ...]
    readers: dict[str, int] = field(default_factory=dict)
    why_not: str = ""


def seams(model: nn.Module, example: Batch) -> list[Seam]:
    """Every layer that computes channels, in the order of the network, and what reads them.

    These are convolutions, linear layers, and norms, also such as are written out as a product with a weight.

    Raises:
        ExportError: the network cannot be traced.
    """
    program = trace(model, example)
    signature = program.graph_signature
    origin = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    shared = _shared(model)
    stored = {
        node: origin[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in origin and len(node.users) == 1 and origin[node.name] not in shared
    }
    found = []
    for node in program.graph.nodes:
        if (made := _made(node, stored)) is not None:
            tensors, dim = made
            seam = Seam(layer_of(tensors[0]), tuple(_tensor(name) for name in tensors))
            seam.why_not = _follow(node, dim, program.graph.nodes, stored, seam.readers)
            found.append(seam)
    return found


def _shared(model: nn.Module) -> set[str]:
    """The names of tensors that go by several."""
    names: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _tensor(name: str) -> str:
    """`weight` for `blocks.0.conv.weight`, and for the values that stand for it where some of them are zero."""
    return name.removeprefix(f"{layer_of(name)}.").removeprefix("parametrizations.").partition(".")[0]


def _made(node: fx.Node, stored: Mapping[fx.Node, str]) -> tuple[list[str], int] | None:
    """The tensors whose entries make the channels of what `node` computes, and the dimension of these; None: nothing.

    Channels can be scaled only where all these tensors are stored and serve nothing else.
    """
    if node.op != "call_function":
        return None
    kind, given = operator_name(node).removeprefix("aten."), arguments(node)
    if kind == "mul":
        vectors = [x for x in (given["self"], given["other"]) if x in stored and x.meta["val"].dim() == 1]
        own = [stored[x] for x in vectors if x.meta["val"].shape[0] == node.meta["val"].shape[-1]]
        return (own[:1], -1) if own else None
    if kind not in ("conv1d", "conv2d", "conv3d", "linear", "layer_norm", "rms_norm", "batch_norm"):
        return None
    parts = [given[name] for name in ("weight", "bias") if given.get(name) is not None]
    if not parts or any(part not in stored for part in parts):
        return None
    if kind in ("layer_norm", "rms_norm") and parts[0].meta["val"].dim() != 1:
        return None
    batched = not kind.startswith("conv") or node.meta["val"].dim() == parts[0].meta["val"].dim()
    last = kind in ("linear", "layer_norm", "rms_norm")
    return [stored[part] for part in parts], -1 if last else 1 if batched else 0


def _follow(
    maker: fx.Node, dim: int, nodes: Iterable[fx.Node], stored: Mapping[fx.Node, str], readers: dict[str, int]
) -> str:
    """Adds to `readers` all layers that read what `maker` computes; why its channels cannot be scaled, or "".

    Args:
        dim: of the channels in what `maker` computes.
    """
    rank = maker.meta["val"].dim()
    reached = {maker: (dim % rank, 1)}  # nodes that scale as the channels do: where these are, and how many in a row
    why = ""
    for node in nodes:
        carried = [x for x in node.all_input_nodes if x in reached]
        if not carried or operator_name(node).removeprefix("aten.") in ("sym_size", "_assert_tensor_metadata"):
            continue
        if (reader := _reader(node, reached, stored)) is not None:
            readers[reader[0]] = reader[1]
        elif (place := _carried_on(node, carried, reached)) is not None:
            reached[node] = place
        else:
            why = why or _reason(node)
    return why or ("" if readers else "nothing reads its channels")


Place = tuple[int, int]


def _reader(node: fx.Node, reached: Mapping[fx.Node, Place], stored: Mapping[fx.Node, str]) -> tuple[str, int] | None:
    """The layer for which `node` stands, and how many of its inputs belong to a channel, where it reads channels."""
    kind = operator_name(node).removeprefix("aten.")
    if kind not in ("conv1d", "conv2d", "conv3d", "linear"):
        return None
    given = arguments(node)
    x, weight = given["input"], given["weight"]
    if x not in reached or weight not in stored:
        return None
    (dim, times), shape = reached[x], weight.meta["val"].shape
    at = x.meta["val"].dim() - (1 if kind == "linear" else len(shape) - 1)
    return (layer_of(stored[weight]), times) if dim == at and (times == 1 or kind == "linear") else None


SAME_PLACE = (
    "relu",
    "leaky_relu",
    "prelu",
    "dropout",
    "feature_dropout",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "to",
)
POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")


def _carried_on(node: fx.Node, carried: list[fx.Node], reached: Mapping[fx.Node, Place]) -> Place | None:
    """Where the channels are in what `node` computes, if that scales as they do; else None."""
    kind, given, source = operator_name(node).removeprefix("aten."), arguments(node), carried[0]
    if len(carried) > 1 or node.args.count(source) > 1 or not isinstance(node.meta.get("val"), Tensor):
        return None
    (dim, times), rank = reached[source], source.meta["val"].dim()
    first = node.args[0] if node.args else None
    if kind in ("mul", "div"):
        grown = sizes(node.meta["val"]) != sizes(source.meta["val"])
        return None if grown or (kind == "div" and first is not source) else (dim, times)
    if first is not source:
        return None
    if kind in SAME_PLACE:
        return dim, times
    if kind[:-2] in POOLS:
        return (dim, times) if dim < rank - int(kind[-2]) else None
    if kind == "mean" and given.get("dim"):
        gone = {d % rank for d in given["dim"]}
        return None if dim in gone else (dim if given["keepdim"] else dim - sum(d < dim for d in gone), times)
    if kind == "transpose":
        a, b = given["dim0"] % rank, given["dim1"] % rank
        return {a: b, b: a}.get(dim, dim), times
    if kind == "permute":
        return [d % rank for d in given["dims"]].index(dim), times
    if kind in ("view", "reshape", "flatten", "unsqueeze", "squeeze"):
        return _reshaped(sizes(source.meta["val"]), sizes(node.meta["val"]), dim, times)
    return None


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], dim: int, times: int) -> Place | None:
    """Where the channels of dimension `dim` are after a reshape that leaves them whole, or None.

    >>> _reshaped((2, 8, 3, 3), (2, 72), dim=1, times=1), _reshaped((2, 7, 16), (14, 16), dim=2, times=1)
    ((1, 9), (1, 1))
    """
    for place, size in enumerate(after):
        if prod(after[:place]) == prod(before[:dim]):
            if size == before[dim]:
                return place, times
            if place == len(after) - 1 and size == prod(before[dim:]):
                return place, times * prod(before[dim + 1 :])
    return None


def _reason(node: fx.Node) -> str:
    """Why the scales of channels do not pass `node`."""
    kind = operator_name(node).removeprefix("aten.")
    if node.op == "output":
        return "its output is an output of the network"
    if kind == "batch_norm":
        return "a batch norm follows it: put fold_batchnorm before this step"
    if kind.startswith(("conv", "linear")):
        return (
            "a layer reads it whose weight is shared, computed or called twice, or whose inputs are no channels of it"
        )
    return f"its output goes through {kind}, which scales of channels do not pass"


# ------------------------------------------------------------------------------------------------ moving


def move(model: nn.Module, seam: Seam, factors: Float[Tensor, " channels"]) -> None:
    """Divides what computes each channel of `seam` by its factor, and multiplies with it all that reads the channel."""
    maker = model.get_submodule(seam.maker)
    for tensor in seam.tensors:
        value = _value(maker, tensor)
        _put(maker, tensor, value.double() / factors.double().view(-1, *[1] * (value.dim() - 1)))
    for name, times in seam.readers.items():
        reader = model.get_submodule(name)
        _put(reader, "weight", scaled_columns(weight_of(reader).double(), factors.double(), _groups(reader), times))


def read_with(model: nn.Module, seam: Seam) -> Float[Tensor, " channels"]:
    """The largest magnitude with which any of its readers reads each channel of `seam`."""
    readers = [(model.get_submodule(name), times) for name, times in seam.readers.items()]
    found = [largest_of_columns(weight_of(reader), _groups(reader), times) for reader, times in readers]
    return torch.stack(found).amax(0)


def weight_of(layer: nn.Module) -> Tensor:
    """Its weight, detached."""
    return _value(layer, "weight")


def refuse_rounded(layers: Mapping[str, nn.Module], step: str) -> None:
    """Raises a RecipeError where the weights of one of `layers` are stored as codes already."""
    for name, layer in layers.items():
        encoding = encoding_of(layer)
        if encoding is not None and not isinstance(encoding, Masked):
            raise RecipeError(
                f"{step} would rescale the weights of {name!r}, which an earlier step stored as {encoding.describe()}. "
                f"Steps that move scales, such as {step}, come before those that round weights, such as "
                "quantize_static: swap them in the recipe."
            )


def _groups(layer: Any) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _value(layer: nn.Module, tensor: str) -> Tensor:
    return getattr(layer, tensor).detach()


def _put(layer: nn.Module, tensor: str, value: Tensor) -> None:
    """`value` in place of `layer.<tensor>`; zeros that an earlier step made stay so."""
    old, encoding = _value(layer, tensor), encoding_of(layer, tensor)
    if isinstance(encoding, Masked):
        encode(layer, Masked(value.to(old.dtype), encoding.mask), tensor)
    else:
        getattr(layer, tensor).data = value.to(old.dtype)
