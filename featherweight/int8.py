"""Layers that compute on bytes with oneDNN's operators, and their place in an exported program.

The torch target puts them where a program rounds a layer's input and decodes its weight. Nothing here knows files.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import featherweight.encodings  # noqa: F401  (registers the operators of the library `featherweight`)

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
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(w_scale, bias, x_scale, x_zero)
        self.places = ([*stride], [*padding], [*dilation], groups)
        packed = torch.ops.onednn.qconv_prepack(codes, w_scale, x_scale, x_zero, *self.places, None)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x).contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise(*self.operands(codes), *self.places, *FLOAT_OUTPUT)


class Int8Linear(Int8Layer):
    """A linear layer with (out, in) int8 codes for weights."""

    def __init__(self, codes: Tensor, w_scale: Tensor, bias: Tensor | None, x_scale: float, x_zero: int) -> None:
        super().__init__(w_scale, bias, x_scale, x_zero)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(codes, None), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(*self.operands(self.codes(x)), *FLOAT_OUTPUT)


def use_int8(program: fx.GraphModule) -> fx.GraphModule:
    """`program` with int8 layers where input and weight are quantized, and other encoded weights decoded once."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.conv2d.default:
            _replace(program, node, Int8Conv2d)
        if node.target is torch.ops.aten.linear.default:
            _replace(program, node, Int8Linear)
    for node in list(program.graph.nodes):
        if node.target is torch.ops.featherweight.dequantize.default and node.users:
            _decode_once(program, node)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _constant(program: fx.GraphModule, node: Any) -> Any:
    """The tensor that a node reads from the program, or None."""
    return (
        operator.attrgetter(str(node.target))(program) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    )


def _replace(program: fx.GraphModule, node: Any, kind: Callable[..., Int8Layer]) -> None:
    rounded, weight, *rest = node.args
    library = torch.ops.featherweight
    if getattr(rounded, "target", None) is not library.fake_quantize.default:
        return
    if getattr(weight, "target", None) is not library.dequantize.default or tuple(weight.args[3:]) != (0, 0, 8):
        return
    x, *quantizer = rounded.args
    x_scale, x_zero = (_constant(program, argument).item() for argument in quantizer)
    codes, w_scale = (_constant(program, argument) for argument in weight.args[:2])
    bias, places = (_constant(program, rest[0]), rest[1:]) if rest else (None, [])
    name = f"int8_{node.name}"
    program.add_submodule(name, kind(codes, w_scale, bias, x_scale, x_zero, *places))
    with program.graph.inserting_before(node):
        node.replace_all_uses_with(program.graph.call_module(name, (x,)))
    program.graph.erase_node(node)


def _decode_once(program: fx.GraphModule, node: Any) -> None:
    codes, scale = (_constant(program, argument) for argument in node.args[:2])
    name = f"decoded_{node.name}"
    program.register_buffer(name, torch.ops.featherweight.dequantize(codes, scale, *node.args[2:]))
    with program.graph.inserting_before(node):
        node.replace_all_uses_with(program.graph.get_attr(name))
