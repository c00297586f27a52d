"""What each ATen operator says about channels: which of them it ties together, and which it pins down.

Every index along every dimension of every parameter and buffer is a node. A tensor in the network carries, for
each of its dimensions, its *labels*: one node per index, or `FIXED` where nothing can be removed (the batch,
pixels, positions, what the user feeds in). A rule reads the labels of an operator's inputs, unites those that
must be removed together, freezes those whose removal would change what the operator computes, and returns the
labels of its outputs. `rule` files it under the operator's name; an operator without one freezes all it touches.

What is done with the result is `coupling`'s affair. Related: the layer-level dependency graph of Fang et al. 2023
(DepGraph, arXiv:2301.12900); here the ties are between single indices, which makes concatenation, splitting,
flattening and shuffling plain bookkeeping.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import fx

Nodes = Int[np.ndarray, " _"]
Labels = tuple[Nodes, ...]
FIXED = -1


def fixed(size: int) -> Nodes:
    """The labels of a dimension from which nothing can be removed."""
    return np.full(size, FIXED, dtype=np.int64)


def sizes(value: Any) -> tuple[int, ...]:
    """The shape of a traced tensor, with the sizes of the example where they are free, and 1 where it gives none."""
    return tuple(size if isinstance(size, int) else int(size.node.hint or 1) for size in value.shape)


@dataclass
class Ties:
    """All that the rules have found out: arrays of nodes, in the order of the graph.

    Args:
        count: of nodes.
        united: pairs of arrays whose elements are to be removed together, one by one.
        frozen: arrays that must stay, and why.
        makes: nodes that stand for what a layer computes: its output channels.
        reads: nodes that stand for what a layer contracts: its input channels.
        heads: nodes along which attention runs in parallel.
        macs: (count,) multiply-adds per example that one index of a weight takes part in.
    """

    count: int
    united: list[tuple[Nodes, Nodes]] = field(default_factory=list)
    frozen: list[tuple[Nodes, str]] = field(default_factory=list)
    makes: list[Nodes] = field(default_factory=list)
    reads: list[Nodes] = field(default_factory=list)
    heads: list[Nodes] = field(default_factory=list)
    macs: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.macs = np.zeros(self.count)

    def freeze(self, labels: Nodes, why: str) -> None:
        """`labels` must stay."""
        if (free := labels[labels >= 0]).size:
            self.frozen.append((free, why))

    def unite(self, a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"], why: str) -> Int[np.ndarray, " n"]:
        """`a[i]` goes with `b[i]`; where one of the two is fixed, the other must stay, for the reason `why`."""
        both = (a >= 0) & (b >= 0)
        if both.any():
            self.united.append((a[both], b[both]))
        self.freeze(np.where(b < 0, a, FIXED), why)
        self.freeze(np.where(a < 0, b, FIXED), why)
        return np.where(a >= 0, a, b)

    def unite_rows(self, rows: Int[np.ndarray, "rows columns"], why: str) -> Int[np.ndarray, " rows"]:
        """All nodes of a row go together; returns one label a row."""
        label = rows[:, 0]
        for column in rows.T[1:]:
            self.unite(label, column, why)
        return np.where((rows >= 0).all(axis=1), label, FIXED)


@dataclass(frozen=True)
class Call:
    """One operator call in the graph, with its arguments under the names of the operator's schema."""

    node: fx.Node
    ties: Ties
    known: dict[fx.Node, Any]  # labels, or lists of them, of all nodes so far
    stored: set[fx.Node]  # nodes computed from parameters and buffers alone
    arguments: dict[str, Any]
    batch: int

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def labels(self, name: str) -> Labels:
        """The labels of the tensor that was given for `name`."""
        return self.known[self[name]]

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """The dimension that was given for `name`, counted from the front of the tensor `of`."""
        return self[name] % len(self.labels(of))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) result."""
        value = self.node.meta["val"]
        return sizes(value[0] if isinstance(value, (tuple, list)) else value)

    @property
    def name(self) -> str:
        return operator_name(self.node)

    @property
    def where(self) -> str:
        """The operator and the module it was called in, for messages."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        name = self.name.removeprefix("aten.")
        return f"{name} in {stack[-1][0]!r}" if stack and stack[-1][0] else name

    def freeze(self, labels: Iterable[Nodes], why: str = "") -> None:
        """`labels` must stay; without a reason, because this operator's result depends on how many there are."""
        for nodes in labels:
            self.ties.freeze(nodes, why or f"feeds {self.where}, whose result depends on how many there are")

    def unite(self, a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self.ties.unite(a, b, f"meets a fixed width at {self.where}")

    def unite_rows(self, rows: Int[np.ndarray, "rows columns"]) -> Int[np.ndarray, " rows"]:
        return self.ties.unite_rows(rows, f"meets a fixed width at {self.where}")

    def broadcast(self, tensors: Iterable[Labels], shape: Sequence[int]) -> Labels:
        """The labels of a result of `shape` that each of `tensors` is broadcast to."""
        out: list[Nodes | None] = [None] * len(shape)
        for labels in tensors:
            for dim, nodes in enumerate(labels, start=len(shape) - len(labels)):
                if len(nodes) == shape[dim] > 1:
                    known = out[dim]
                    out[dim] = nodes if known is None else self.unite(known, nodes)
        return tuple(fixed(size) if nodes is None else nodes for nodes, size in zip(out, shape, strict=True))

    def layer(self, weight: str, makes: Nodes, reads: Nodes) -> None:
        """`weight` makes the channels `makes` of the result from the channels `reads`; nothing if it is computed."""
        self.contracts(self[weight], makes, reads, prod(self.shape) / len(makes))

    def contracts(self, weight: fx.Node, makes: Nodes, reads: Nodes, times: float) -> None:
        """`weight` makes `makes` from `reads`, so many times in a batch; nothing if it is computed."""
        if weight not in self.stored:
            return
        self.ties.makes.append(makes[makes >= 0])
        self.ties.reads.append(reads[reads >= 0])
        macs = times / self.batch * prod(sizes(weight.meta["val"]))
        for nodes in (makes, reads):
            np.add.at(self.ties.macs, nodes[nodes >= 0], macs / len(nodes))

    def side_by_side(self, dims: Sequence[Nodes], macs: float) -> None:
        """Along `dims` run products of activations, as attention heads do, with `macs` multiply-adds in all."""
        for nodes in dims:
            free = nodes[nodes >= 0]
            self.ties.heads.append(free)
            np.add.at(self.ties.macs, free, macs / self.batch / len(nodes))


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Files a function under the names of the ATen operators it knows."""

    def file(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return file


def operator_name(node: fx.Node) -> str:
    """`aten.conv2d` for the operator `aten::conv2d.padding`; in-place variants lose their underscore."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return "getitem" if node.target is operator.getitem else str(node.target)
    name = node.target._schema.name.replace("::", ".")
    return name.rstrip("_") if not name.endswith("__") else name


def arguments(node: fx.Node) -> dict[str, Any]:
    """What the operator was called with, by name, defaults too."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    schema = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def follow(graph: fx.Graph, stored: dict[fx.Node, Labels], ties: Ties, batch: int) -> None:
    """Applies the rules along `graph`.

    Args:
        graph: of ATen operators, as `torch.export` gives it.
        stored: the labels of the parameters and buffers, by their placeholders.
        ties: filled in here.
        batch: the batch size of the example.
    """
    known: dict[fx.Node, Any] = dict(stored)
    constant = set(stored)
    for node in graph.nodes:
        if node.op == "output":
            for result in node.all_input_nodes:
                for nodes in _flat(known[result]):
                    ties.freeze(nodes, "is an output of the network")
        elif node.op != "call_function":
            known.setdefault(node, _all_fixed(node))
        else:
            inputs = node.all_input_nodes
            if inputs and constant.issuperset(inputs):
                constant.add(node)
            call = Call(node, ties, known, constant, arguments(node), batch)
            known[node] = _checked(call, _rule_of(node))


def _checked(call: Call, function: Rule) -> Any:
    """What the rule says; an overload of the operator that it was not written for counts as unknown."""
    try:
        labels = function(call)
    except LookupError:
        return _unknown(call)
    fits = [len(nodes) for nodes in _flat(labels)] == [len(nodes) for nodes in _flat(_all_fixed(call.node))]
    return labels if fits else _unknown(call)


def _rule_of(node: fx.Node) -> Rule:
    if not _touched(node):
        return lambda call: _all_fixed(call.node)
    name = operator_name(node).removeprefix("aten.")
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return RULES.get(name, _pointwise if pointwise else _unknown)


def _touched(node: fx.Node) -> bool:
    return any(isinstance(input.meta.get("val"), (torch.Tensor, tuple, list)) for input in node.all_input_nodes)


def _all_fixed(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return tuple(fixed(size) for size in sizes(value))
    if isinstance(value, (tuple, list)):
        return [tuple(fixed(size) for size in sizes(part)) for part in value if isinstance(part, torch.Tensor)]
    return ()


def _flat(labels: Any) -> list[Nodes]:
    """All label arrays of a tensor, or of a list of tensors."""
    return [nodes for part in labels for nodes in (_flat(part) if isinstance(part, tuple) else [part])]


# ------------------------------------------------------------------------------------------------ the default


def _unknown(call: Call) -> Any:
    for node in call.node.all_input_nodes:
        labels = _flat(call.known[node])
        call.freeze(labels, f"goes through {call.where}, an operator that is not known here")
        if node in call.stored and labels:
            call.ties.makes.append(labels[0][labels[0] >= 0])
    return _all_fixed(call.node)


@rule("sym_size", "_assert_tensor_metadata", "new_zeros", "new_ones", "new_full", "new_empty")
def _shape_only(call: Call) -> Any:
    return _all_fixed(call.node)


# ------------------------------------------------------------------------------------------------ element by element


@rule("dropout", "feature_dropout", "alpha_dropout", "to", "contiguous", "detach", "alias", "type_as", "expand")
@rule("hardswish", "log_sigmoid", "where", "masked_fill", "rsub", "__and__", "__or__", "lift_fresh_copy")
@rule("zeros_like", "ones_like", "expand_as", "clone")
def _pointwise(call: Call) -> Labels:
    return call.broadcast((call.known[node] for node in call.node.all_input_nodes), call.shape)


@rule("prelu")
def _prelu(call: Call) -> Labels:
    x, (weight,) = call.labels("self"), call.labels("weight")
    if len(weight) > 1:
        call.unite(x[1], weight)
    return x


@rule("batch_norm", "instance_norm")
def _channelwise_norm(call: Call) -> Labels:
    x = call.labels("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            call.unite(x[1], call.labels(name)[0])
    return x


# ------------------------------------------------------------------------------------------------ contractions


@rule("conv1d", "conv2d", "conv3d")
def _convolution(call: Call) -> Labels:
    x, weight, groups = call.labels("input"), call.labels("weight"), call["groups"]
    at = len(x) - len(weight) + 1  # 1 with a batch, 0 without
    makes, reads = weight[0], weight[1]
    if groups == 1:
        call.unite(x[at], reads)
    elif len(reads) == 1:  # depthwise: each input channel has filters of its own
        call.unite(np.repeat(x[at], len(makes) // groups), makes)
        call.unite_rows(makes.reshape(groups, -1))
    else:  # groups stay equally wide: one channel leaves each of them
        call.unite(x[at], np.tile(reads, groups))
        call.unite_rows(makes.reshape(groups, -1).T)
    if call["bias"] is not None:
        call.unite(makes, call.labels("bias")[0])
    call.layer("weight", makes, reads)
    call.freeze(x[at + 1 :])
    return (*x[:at], makes, *map(fixed, call.shape[at + 1 :]))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed_convolution(call: Call) -> Labels:
    x, weight = call.labels("input"), call.labels("weight")
    if call["groups"] != 1:
        return _unknown(call)
    at = len(x) - len(weight) + 1
    call.unite(x[at], weight[0])
    if call["bias"] is not None:
        call.unite(weight[1], call.labels("bias")[0])
    call.layer("weight", weight[1], weight[0])
    call.freeze(x[at + 1 :])
    return (*x[:at], weight[1], *map(fixed, call.shape[at + 1 :]))


@rule("linear")
def _linear(call: Call) -> Labels:
    x, (makes, reads) = call.labels("input"), call.labels("weight")
    call.unite(x[-1], reads)
    if call["bias"] is not None:
        call.unite(makes, call.labels("bias")[0])
    call.layer("weight", makes, reads)
    return (*x[:-1], makes)


def _product(call: Call, left: str, right: str) -> Labels:
    """(..., m, k) @ (..., k, n); a missing m or n is a vector's."""
    a, b = call.labels(left), call.labels(right)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    call.unite(a[-1], b[-2] if len(b) > 1 else b[0])
    if columns:
        call.layer(right, columns[0], b[-2])
    if rows:
        call.layer(left, rows[0], a[-1])
    shape = call.shape
    batches = call.broadcast((a[:-2], b[:-2]), shape[: len(shape) - len(rows) - len(columns)])
    call.side_by_side(batches, prod(shape) * len(a[-1]))
    return (*batches, *rows, *columns)


@rule("matmul", "bmm")
def _matmul(call: Call) -> Labels:
    return _product(call, "self", "other" if "other" in call.arguments else "mat2")


@rule("mm")
def _mm(call: Call) -> Labels:
    return _product(call, "self", "mat2")


@rule("addmm", "baddbmm")
def _addmm(call: Call) -> Labels:
    left, right = ("mat1", "mat2") if "mat1" in call.arguments else ("batch1", "batch2")
    return call.broadcast((_product(call, left, right), call.labels("self")), call.shape)


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Labels:
    q, k, v = (call.labels(name) for name in ("query", "key", "value"))
    if call["enable_gqa"]:
        return _unknown(call)
    mask = () if call["attn_mask"] is None else call.labels("attn_mask")
    call.unite(q[-1], k[-1])
    if call["scale"] is None:
        call.freeze(q[-1:], f"sets the scale of {call.where}")
    call.freeze((k[-2], v[-2], *mask[-2:]))
    batches = call.broadcast((q[:-2], k[:-2], v[:-2], mask[:-2]), call.shape[:-2])
    call.side_by_side(batches, prod(call.shape[:-1]) * len(k[-2]) * (len(q[-1]) + len(v[-1])))
    return (*batches, q[-2], v[-1])


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(call: Call) -> Any:
    """A hidden unit has a row for each gate, reads itself, and is of the same number in all layers and directions."""
    directions, layers, biases = 2 if call["bidirectional"] else 1, call["num_layers"], call["has_biases"]
    each = 4 if biases else 2
    if "input" not in call.arguments or len(call["params"]) != each * layers * directions:
        return _unknown(call)  # packed sequences, projections
    params = [call.known[node] for node in call["params"]]
    x, unit = call.labels("input"), params[1][1]
    for place in range(0, len(params), each):
        rows_in, rows_hidden = params[place], params[place + 1]
        below = x[-1] if place < each * directions else np.tile(unit, directions)
        call.unite(below, rows_in[1])
        call.unite(unit, rows_hidden[1])
        for labels in (rows_in[0], rows_hidden[0], *(bias for (bias,) in params[place + 2 : place + each])):
            call.unite(np.tile(unit, len(labels) // len(unit)), labels)
        for weight, (makes, reads) in zip(call["params"][place:], (rows_in, rows_hidden), strict=False):
            call.contracts(weight, makes, reads, prod(call.shape[:-1]))
    states = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
    for state in states:
        if (call.known[state][-1] >= 0).any():  # else zeros, as wide as the layer says
            call.unite(unit, call.known[state][-1])
    call.freeze(x[:-1])
    last = (*map(fixed, sizes(call.node.meta["val"][1])[:-1]), unit)
    return [(*map(fixed, call.shape[:-1]), np.tile(unit, directions)), *[last] * len(states)]


@rule("embedding")
def _embedding(call: Call) -> Labels:
    rows, makes = call.labels("weight")
    call.freeze((rows,), f"is looked up by {call.where}")
    call.ties.makes.append(makes[makes >= 0])
    return (*call.labels("indices"), makes)


# ------------------------------------------------------------------------------------------------ along a dimension


@rule("layer_norm", "rms_norm")
def _layer_norm(call: Call) -> Labels:
    x = call.labels("input")
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            call.broadcast((x, call.labels(name)), call.shape)
    call.freeze(x[-len(call["normalized_shape"]) :])
    return x


@rule("group_norm")
def _group_norm(call: Call) -> Labels:
    x = call.labels("input")
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.unite(x[1], call.labels(name)[0])
    call.freeze(x[1:2])
    return x


@rule("softmax", "log_softmax", "cumsum", "cumprod", "flip", "roll")
def _along(call: Call) -> Labels:
    x = call.labels("self")
    for dim in _dims(call, "dims" if "dims" in call.arguments else "dim"):
        call.freeze((x[dim],))
    return x


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "argmax", "argmin")
@rule("linalg_vector_norm", "norm", "logsumexp", "any", "all", "prod")
def _reduction(call: Call) -> Any:
    x = call.labels("self")
    dims = _dims(call, "dim") or range(len(x))
    call.freeze(x[dim] for dim in dims)
    kept = [fixed(1) if dim in dims else nodes for dim, nodes in enumerate(x)]
    out = tuple(kept if call.arguments.get("keepdim") else [n for dim, n in enumerate(kept) if dim not in dims])
    return [out, out] if isinstance(call.node.meta["val"], (tuple, list)) else out


def _dims(call: Call, name: str) -> list[int]:
    given = call.arguments.get(name)
    dims = [] if given is None else [given] if isinstance(given, int) else given
    return [dim % len(call.labels("self")) for dim in dims]


def _over_pixels(call: Call) -> Any:
    """Pooling and resizing: the last one, two or three dimensions, as the name says, change; the others pass."""
    x = call.known[call.node.all_input_nodes[0]]
    at = len(x) - next(int(letter) for letter in call.name if letter.isdigit())
    call.freeze(x[at:])
    out = (*x[:at], *map(fixed, call.shape[at:]))
    return [out, out] if isinstance(call.node.meta["val"], (tuple, list)) else out


for _kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest"):
    rule(*(f"{_kind}{count}d" for count in (1, 2, 3)))(_over_pixels)
rule("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")(_over_pixels)


@rule("pad", "constant_pad_nd")
def _pad(call: Call) -> Labels:
    x = list(call.labels("self"))
    for count, (before, after) in enumerate(zip(call["pad"][::2], call["pad"][1::2], strict=True), start=1):
        if before or after:
            if call.arguments.get("mode", "constant") != "constant" or min(before, after) < 0:
                call.freeze((x[-count],))
            x[-count] = np.concatenate([fixed(max(before, 0)), x[-count], fixed(max(after, 0))])
            x[-count] = x[-count] if len(x[-count]) == call.shape[-count] else fixed(call.shape[-count])
    return tuple(x)


# ------------------------------------------------------------------------------------------------ joining, parting


@rule("cat", "concat")
def _cat(call: Call) -> Labels:
    parts = [call.known[node] for node in call["tensors"]]
    dim = call["dim"] % len(parts[0])
    others = call.broadcast(((*part[:dim], fixed(1), *part[dim + 1 :]) for part in parts), _with(call.shape, dim, 1))
    return _with(others, dim, np.concatenate([part[dim] for part in parts]))


@rule("stack")
def _stack(call: Call) -> Labels:
    dim = call["dim"] % len(call.shape)
    parts = [call.known[node] for node in call["tensors"]]
    return call.broadcast(((*part[:dim], fixed(1), *part[dim:]) for part in parts), call.shape)


def _with(values: Sequence[Any], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def _split(call: Call) -> list[Labels]:
    """Equal parts stay equal: the same position leaves each of them. Unequal ones are cut at fixed places."""
    x, dim = call.labels("self"), call.dim()
    widths = [sizes(part)[dim] for part in call.node.meta["val"]]
    if len(set(widths)) == 1:
        call.unite_rows(x[dim].reshape(len(widths), -1).T)
    else:
        call.freeze((x[dim],), f"is split at fixed places by {call.where}")
    ends = np.cumsum(widths)
    return [_with(x, dim, x[dim][end - width : end]) for end, width in zip(ends, widths, strict=True)]


@rule("unbind")
def _unbind(call: Call) -> list[Labels]:
    x, dim = call.labels("self"), call.dim()
    call.freeze((x[dim],), f"is taken apart by {call.where}")
    return [(*x[:dim], *x[dim + 1 :])] * len(x[dim])


@rule("select")
def _select(call: Call) -> Labels:
    return _unbind(call)[0]


@rule("slice", "narrow")
def _slice(call: Call) -> Labels:
    x, dim = call.labels("self"), call.dim()
    if call.shape[dim] == len(x[dim]):
        return x
    call.freeze((x[dim],), f"is cut at fixed places by {call.where}")
    return _with(x, dim, fixed(call.shape[dim]))


@rule("index")
def _index(call: Call) -> Labels:
    x = call.labels("self")
    used = [dim for dim, index in enumerate(call["indices"]) if index is not None]
    if len(used) != 1:
        return _unknown(call)
    (dim,) = used
    call.freeze((x[dim],))
    return (*x[:dim], *call.known[call["indices"][dim]], *x[dim + 1 :])


@rule("getitem")
def _getitem(call: Call) -> Labels:
    return call.known[call["0"]][call["1"]]


@rule("glu")
def _glu(call: Call) -> Labels:
    x, dim = call.labels("self"), call.dim()
    return _with(x, dim, call.unite_rows(x[dim].reshape(2, -1).T))


# ------------------------------------------------------------------------------------------------ rearranging


@rule("permute")
def _permute(call: Call) -> Labels:
    x = call.labels("self")
    return tuple(x[dim] for dim in call["dims"])


@rule("transpose", "swapaxes")
def _transpose(call: Call) -> Labels:
    x = list(call.labels("self"))
    a, b = (call.arguments[name] for name in (("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")))
    x[a], x[b] = x[b], x[a]
    return tuple(x)


@rule("t", "numpy_T")
def _reverse(call: Call) -> Labels:
    return call.labels("self")[::-1]


@rule("channel_shuffle")
def _channel_shuffle(call: Call) -> Labels:
    x = call.labels("self")
    label = call.unite_rows(x[1].reshape(call["groups"], -1).T)
    return _with(x, 1, np.repeat(label, call["groups"]))


@rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Labels:
    x = call.labels("self")
    return (x[0], call.unite_rows(x[1].reshape(-1, call["upscale_factor"] ** 2)), *map(fixed, call.shape[2:]))


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(call: Call) -> Labels:
    """Dimensions are merged and split in the smallest runs whose sizes agree."""
    x, shape = call.labels("self"), call.shape
    before = tuple(len(nodes) for nodes in x)
    if prod(before) != prod(shape) or 0 in shape:
        return _unknown(call)
    out = [fixed(size) for size in shape]
    for merged, parted in _runs(before, shape):
        flat = _merge(call, [x[dim] for dim in merged])
        if len(parted) == 1:
            out[parted[0]] = flat
        else:
            free = _free_dim(call, parted)
            grid = flat.reshape([shape[dim] for dim in parted])
            rows = np.moveaxis(grid, parted.index(free), 0).reshape(shape[free], -1)
            out[free] = call.unite_rows(rows)
    return tuple(out)


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions with equal products, those of size 1 left out.

    >>> _runs((2, 64, 7, 7), (2, 3136))
    [([0], [0]), ([1, 2, 3], [1])]
    >>> _runs((2, 5, 64), (2, 5, 4, 1, 16))
    [([0], [0]), ([1], [1]), ([2], [2, 4])]
    """
    left, right = ([dim for dim, size in enumerate(shape) if size != 1] for shape in (before, after))
    found = []
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        while (gap := prod(before[i] for i in a) - prod(after[j] for j in b)) != 0:
            (a if gap < 0 else b).append((left if gap < 0 else right).pop(0))
        found.append((a, b))
    return found


def _merge(call: Call, parts: list[Nodes]) -> Nodes:
    """The labels of the merged dimension; at most one of those that are merged can stay free."""
    if len(parts) == 1:
        return parts[0]
    free = [index for index, nodes in enumerate(parts) if (nodes >= 0).any()]
    shape = [len(nodes) for nodes in parts]
    if len(free) != 1:
        call.freeze(parts, f"is merged with other channels by {call.where}")
        return fixed(prod(shape))
    column = parts[free[0]].reshape([-1 if index == free[0] else 1 for index in range(len(parts))])
    return np.broadcast_to(column, shape).reshape(-1)


def _free_dim(call: Call, parted: list[int]) -> int:
    """Which of the dimensions that one was split into may shrink: the one the code wrote as -1, else the last."""
    written = call.arguments.get("size", call.arguments.get("shape", call.arguments.get("sizes", [])))
    offset = call.dim() if "sizes" in call.arguments else 0
    open_dims = [dim for dim in parted if dim >= offset and list(written)[dim - offset : dim - offset + 1] == [-1]]
    return open_dims[0] if open_dims else parted[-1]
