"""From a compressed torch module to an ONNX graph, for the targets that read one.

Encoded weights become `DequantizeLinear` on integer initializers (4-bit ones in ONNX's own INT4), quantized inputs
become `QuantizeLinear` / `DequantizeLinear` pairs. What a runtime wants beyond the standard is the affair of its
target; nothing here runs a graph. onnx, onnxscript and onnx_ir are imported where used.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featherweight.encodings import Affine, unpack4
from featherweight.errors import ExportError
from featherweight.surgery import encodings, trace
from featherweight.workload import Workload, input_names

if TYPE_CHECKING:
    import onnx_ir

OPSET = 21  # the first with INT4 and blocked DequantizeLinear


def to_onnx(model: nn.Module, workload: Workload) -> onnx_ir.Model:
    """`model` as an ONNX model with a free batch dimension, inputs named as `workload`'s and outputs `output0`, ….

    Raises:
        ExportError: the network cannot be traced, or an operator has no ONNX form.
    """
    program = trace(model, workload.example)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=_translations(),
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} has an operator without an ONNX form: {_reason(error)} "
                "Replace the operator in the network, or use the torch target."
            ) from error
    assert exported is not None
    graph_model = exported.model
    _store_encoded(graph_model, model)
    _name_ends(graph_model, workload)
    _simplify(graph_model)
    _forget_origin(graph_model)
    return graph_model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the operators of the library `featherweight` are written in ONNX."""
    from onnxscript import opset21 as op

    def dequantize(codes, scale, shape, axis: int, block: int, bits: int):  # type: ignore[no-untyped-def]
        if block:
            rows = op.DequantizeLinear(codes, scale, axis=1, block_size=block)
            return rows if len(shape) == 2 else op.Reshape(rows, op.Constant(value_ints=list(shape)))  # type: ignore[arg-type]
        return op.DequantizeLinear(codes, scale, axis=max(axis, 0))

    def fake_quantize(x, scale, zero_point):  # type: ignore[no-untyped-def]
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def dynamic_quantize(x):  # type: ignore[no-untyped-def]
        codes, scale, zero_point = op.DynamicQuantizeLinear(x)
        return op.DequantizeLinear(codes, scale, zero_point)

    library = torch.ops.featherweight
    return {
        library.dequantize.default: dequantize,
        library.fake_quantize.default: fake_quantize,
        library.dynamic_quantize.default: dynamic_quantize,
    }


def _store_encoded(graph_model: onnx_ir.Model, model: nn.Module) -> None:
    """Gives the initializers of packed and blocked codes the type and shape that ONNX's operator reads."""
    import onnx_ir

    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    for encoding in encodings(model).values():
        if not isinstance(encoding, Affine) or (encoding.bits == 8 and not encoding.block):
            continue
        value = graph_model.graph.initializers.get(f"{names[id(encoding)]}.codes")
        if value is None:
            continue
        count = torch.Size(encoding.shape).numel()
        codes = unpack4(encoding.codes, count) if encoding.bits == 4 else encoding.codes
        shape = (encoding.shape[0], -1) if encoding.block else encoding.shape
        array = codes.reshape(shape).numpy()
        if encoding.bits == 4:
            import ml_dtypes

            array = array.astype(ml_dtypes.int4)
        value.const_value = onnx_ir.tensor(array, name=value.name)
        value.dtype, value.shape = value.const_value.dtype, onnx_ir.Shape(array.shape)


def _name_ends(graph_model: onnx_ir.Model, workload: Workload) -> None:
    """Inputs as the workload calls them, outputs by number."""
    names = input_names(workload.model, workload.example)
    for value, name in zip(graph_model.graph.inputs, names, strict=True):
        value.name = name
    for index, value in enumerate(graph_model.graph.outputs):
        value.name = f"output{index}"


def _simplify(graph_model: onnx_ir.Model) -> None:
    """Constants folded (dequantized weights are not), identical nodes and initializers merged, the unused removed."""
    import onnx_ir.passes.common as common
    from onnxscript import optimizer
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule

    with _quiet():
        optimizer.optimize(graph_model)
        RewritePass([_rounding_before_padding()])(graph_model)
        RewritePass([fuse_pad_into_conv_rule])(graph_model)
        common.DeduplicateInitializersPass(size_limit=1 << 40)(graph_model)
        common.CommonSubexpressionEliminationPass()(graph_model)
        common.RemoveUnusedNodesPass()(graph_model)


def _rounding_before_padding() -> Any:
    """The rule that rounds before zeros are added, not after: zero is on every grid, and a convolution can add them."""
    from onnxscript.rewriter import MatchResult, pattern

    free = {"_allow_other_attributes": True}

    def after(op, x, pads, zero, scale, zero_point):  # type: ignore[no-untyped-def]
        padded = op.Pad(x, pads, zero, mode="constant", **free)
        return op.DequantizeLinear(op.QuantizeLinear(padded, scale, zero_point, **free), scale, zero_point, **free)

    def before(op, x, pads, zero, scale, zero_point):  # type: ignore[no-untyped-def]
        rounded = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)
        return op.Pad(rounded, pads, zero, mode="constant")

    def zeros(context, zero, **_):  # type: ignore[no-untyped-def]
        found = MatchResult()
        return found if zero.const_value is not None and zero.const_value.numpy() == 0 else found.fail("not zeros")

    return pattern.RewriteRule(after, before, zeros)


def _forget_origin(graph_model: onnx_ir.Model) -> None:
    """Removes the exporter's notes: they tell the paths of the machine and would outweigh a small network."""
    graph_model.metadata_props.clear()
    graph_model.graph.metadata_props.clear()
    for node in graph_model.graph:
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
    for value in (*graph_model.graph.inputs, *graph_model.graph.outputs):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints steps and warns of its own internals; neither helps a user."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
