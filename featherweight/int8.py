"""Layers that compute on bytes with oneDNN's operators, and their place in an exported program.

The torch target puts them where a program rounds a layer's input and decodes its weight. Nothing here knows files.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from featherweight.encodings import PACKED_BITS  # its module registers the operators of the library `featherweight`

FLOAT_OUTPUT: tuple[Any, ...] = (
    1.0,
    0,
    torch.float32,
    "none",
    [],
    "",
)  # scale, zero point, type, and no operator fused behind


class Int8Layer(nn.Module):
    """What both layers hold: the weight's scales, the input's scale and zero point, the bias."""

    def __init__(self, w_scale: Tensor, bias: Tensor | None, x_scale: float, x_zero: int) -> None:
        super().__init__()
        self.x_scale, self.x_zero = x_scale, x_zero
        self.register_buffer("w_scale", w_scale)
        self.register_buffer("w_zero", torch.zeros(len(w_scale), dtype=torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def codes(self, x: Tensor) -> Tensor:
        """`x` as unsigned bytes."""
        return (x / self.x_scale).round_().add_(self.x_zero).clamp_(0, 255).to(torch.uint8)

    def operands(self, codes: Tensor) -> tuple[Any, ...]:
        """The arguments with which oneDNN's operators begin."""
        return (codes, self.x_scale, self.x_zero, self.packed, self.w_scale, self.w_zero, self.bias)


class Int8Conv2d(Int8Layer):
    """A convolution with (out, in / groups, height, width) int8 codes for weights."""

    def __init__(
        self,
        codes: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        x_scale: float,
        x_zero: int,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(w_scale, bias, x_scale, x_zero)
        self.border, padding = edges(padding, codes.shape[2:], dilation)
        self.places = ([*stride], padding, [*dilation], groups)
        packed = torch.ops.onednn.qconv_prepack(codes, w_scale, x_scale, x_zero, *self.places, None)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x)
        if self.border:
            codes = nn.functional.pad(codes, self.border, value=self.x_zero)
        codes = codes.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise(*self.operands(codes), *self.places, *FLOAT_OUTPUT)


class Int8Conv1d(Int8Conv2d):
    """A convolution with (out, in / groups, width) int8 codes for weights: one of a single row."""

    def __init__(
        self,
        codes: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        x_scale: float,
        x_zero: int,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] | str = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> None:
        padding = padding if isinstance(padding, str) else (0, *padding)
        places = ((1, *stride), padding, (1, *dilation), groups)
        super().__init__(codes.unsqueeze(2), w_scale, bias, x_scale, x_zero, *places)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(2)).squeeze(2)


class Int8Linear(Int8Layer):
    """A linear layer with (out, in) int8 codes for weights."""

    def __init__(self, codes: Tensor, w_scale: Tensor, bias: Tensor | None, x_scale: float, x_zero: int) -> None:
        super().__init__(w_scale, bias, x_scale, x_zero)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(codes, None), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(*self.operands(self.codes(x)), *FLOAT_OUTPUT)


def edges(padding: Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[list[int], list[int]]:
    """Zeros to add before a convolution, as `nn.functional.pad` takes them, and those it adds itself on both sides.

    >>> edges("same", (3, 4), (1, 1)), edges("valid", (3, 4), (1, 1)), edges((2, 0), (3, 4), (1, 1))
    (([1, 2, 1, 1], [0, 0]), ([], [0, 0]), ([], [2, 0]))
    >>> edges("same", (3, 5), (2, 1))  # alike on both sides
    ([], [2, 2])
    """
    if not isinstance(padding, str):
        return [], [*padding]
    totals = [step * (size - 1) if padding == "same" else 0 for size, step in zip(kernel, dilation, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return [], [total // 2 for total in totals]
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)], [0] * len(totals)


def miscomputed(weight: Sequence[int]) -> bool:
    """Whether oneDNN gives wrong results for a convolution in int8 whose weight has this shape.

    So it is with matrix units (AMX), in torch 2.13 and OpenVINO 2026.4: the outputs are off by more than their size
    where few channels and a wide kernel fill several whole tiles of 64 bytes.

    >>> miscomputed((32, 16, 8)), miscomputed((32, 16, 7)), miscomputed((32, 8, 8)), miscomputed((32, 32, 8))
    (True, False, False, False)
    """
    if len(weight) < 3:
        return False
    channels, width = weight[1], weight[-1]
    return channels < 32 and channels * width > 64 and channels * width % 64 == 0


def use_int8(program: fx.GraphModule) -> fx.GraphModule:
    """`program` with int8 layers where input and weight are quantized, and other encoded weights decoded once."""
    library = torch.ops.aten
    kinds: dict[Any, Callable[..., Int8Layer]] = {
        library.conv2d.default: Int8Conv2d,
        library.conv2d.padding: Int8Conv2d,
        library.conv1d.default: Int8Conv1d,
        library.conv1d.padding: Int8Conv1d,
        library.linear.default: Int8Linear,
    }
    for node in list(program.graph.nodes):
        if node.target in kinds:
            _replace(program, node, kinds[node.target])
    ours = torch.ops.featherweight
    decoders = {op.default for op in (ours.dequantize, ours.look_up, ours.expand, ours.unscale)}
    for node in list(program.graph.nodes):
        if node.target in decoders and node.users:
            _decode_once(program, node)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def constant(program: fx.GraphModule, node: Any) -> Any:
    """The tensor that a node reads from the program, or None."""
    return (
        operator.attrgetter(str(node.target))(program) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    )


def _replace(program: fx.GraphModule, node: Any, kind: Callable[..., Int8Layer]) -> None:
    rounded, weight, *rest = node.args
    library = torch.ops.featherweight
    if getattr(rounded, "target", None) is not library.fake_quantize.default:
        return
    if getattr(weight, "target", None) is not library.dequantize.default:
        return
    axis, block, bits = weight.args[3:]
    if (axis, block) != (0, 0) or bits <= PACKED_BITS:
        return
    x, *quantizer = rounded.args
    x_scale, x_zero = (constant(program, argument).item() for argument in quantizer)
    codes, w_scale = (constant(program, argument) for argument in weight.args[:2])
    if miscomputed(codes.shape):
        return
    bias, places = (constant(program, rest[0]), rest[1:]) if rest else (None, [])
    name = f"{node.name}_int8"  # the layer comes first, as in all names of a profile
    program.add_submodule(name, kind(codes, w_scale, bias, x_scale, x_zero, *places))
    with program.graph.inserting_before(node):
        layer = program.graph.call_module(name, (x,))
    layer.meta = dict(node.meta)
    node.replace_all_uses_with(layer)
    program.graph.erase_node(node)


def _decode_once(program: fx.GraphModule, node: fx.Node) -> None:
    """Computes what the operator `node` decodes, and as much of what follows as depends on nothing else."""
    known: dict[fx.Node, Tensor | None] = {}
    found = computed(program, node, known)
    assert found is not None
    size = found.numel()
    while len(node.users) == 1:
        (user,) = node.users
        after = computed(program, user, known)
        if after is None or after.numel() > size:  # what takes more memory than the weight is computed at each run
            break
        node, found = user, after
    name = f"decoded_{node.name}"
    program.register_buffer(name, found)
    with program.graph.inserting_before(node):
        node.replace_all_uses_with(program.graph.get_attr(name))


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are computed from weights alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and read and all(before in found for before in read)):
            found.add(node)
    return found


def computed(program: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor | None]) -> Tensor | None:
    """What a node computes where that depends on constants of the program alone; else None. Kept in `known`."""
    if node not in known:
        known[node] = constant(program, node) if node.op == "get_attr" else _computed(program, node, known)
    return known[node]


def _computed(program: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor | None]) -> Tensor | None:
    read = node.all_input_nodes
    if not callable(node.target) or not read or any(computed(program, n, known) is None for n in read):
        return None
    arguments, keywords = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    found = node.target(*arguments, **keywords)
    return found if isinstance(found, Tensor) else None
