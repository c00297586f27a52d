"""From a compressed torch module to an ONNX graph, for the targets that read one.

Encoded weights become `DequantizeLinear` on integer initializers (those of 2 to 4 bits in ONNX's own INT4 and UINT4,
those of 5 to 8 in INT8 and UINT8), look-ups in a table, or arithmetic that undoes a curve or a scale, and stay so in
the file; quantized inputs become `QuantizeLinear` / `DequantizeLinear` pairs. What a runtime wants beyond the standard
is the affair of its target; nothing here runs a graph. onnx, onnxscript and onnx_ir are imported where used.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featherweight.encodings import PACKED_BITS, Affine, Codebook, Companded, Scaled, unpack4, unpack_unsigned4
from featherweight.errors import ExportError
from featherweight.surgery import encodings, trace
from featherweight.workload import Workload, input_names

if TYPE_CHECKING:
    import onnx_ir

PRODUCTS = ("MatMul", "Gemm", "Conv")  # operators of layers
OPSET = 21  # the first with INT4 and blocked DequantizeLinear
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the modules that an operator lies in, and its own name


def to_onnx(model: nn.Module, workload: Workload) -> onnx_ir.Model:
    """`model` as an ONNX model with a free batch dimension, inputs named as `workload`'s and outputs `output0`, ….

    Raises:
        ExportError: the network cannot be traced, or an operator has no ONNX form.
    """
    program = trace(model, workload.example)
    _copy_what_is_turned(program.graph)
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
    _store_packed(graph_model, model)
    _name_ends(graph_model, workload)
    _simplify(graph_model, kept={value.name for _, value in _coded(graph_model, model)})
    _name_by_layer(graph_model, model)
    _forget_origin(graph_model)
    return graph_model


def _copy_what_is_turned(graph: torch.fx.Graph) -> None:
    """Copies between turning a tensor and viewing it, which become nothing in ONNX.

    The exporter takes operators such as attention apart, and their parts may lay a tensor out so that a view which was
    possible, without a copy, no longer is.
    """
    library = torch.ops.aten
    turning = (library.transpose.int, library.permute.default)
    viewing = (library.view.default, library.reshape.default, library.contiguous.default)
    for node in list(graph.nodes):
        turned = node.args[0] if node.target in viewing else None
        if isinstance(turned, torch.fx.Node) and turned.target in turning:
            with graph.inserting_before(node):
                copied = graph.call_function(
                    library.clone.default, (turned,), {"memory_format": torch.contiguous_format}
                )
            copied.meta["val"] = turned.meta["val"].clone(memory_format=torch.contiguous_format)
            node.replace_input_with(turned, copied)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the operators of the library `featherweight` are written in ONNX."""
    import onnx_ir
    from onnxscript import opset21

    op: Any = opset21
    single = onnx_ir.DataType.FLOAT

    def dequantize(codes, scale, shape, axis: int, block: int, bits: int):  # type: ignore[no-untyped-def]
        if block:
            rows = op.DequantizeLinear(codes, scale, axis=1, block_size=block)
            return rows if len(shape) == 2 else op.Reshape(rows, op.Constant(value_ints=list(shape)))
        return op.DequantizeLinear(codes, scale, axis=max(axis, 0))

    def fake_quantize(x, scale, zero_point):  # type: ignore[no-untyped-def]
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def dynamic_quantize(x):  # type: ignore[no-untyped-def]
        codes, scale, zero_point = op.DynamicQuantizeLinear(x)
        return op.DequantizeLinear(codes, scale, zero_point)

    # Casts, not DequantizeLinear: ONNX Runtime would decode that anew for every input, where the rest runs once.
    def look_up(codes, table, scale, shape, entries: int, bits: int):  # type: ignore[no-untyped-def]
        places, tables = op.Cast(codes, to=onnx_ir.DataType.INT32), table.shape[0] // entries
        if scale is not None:
            table = op.Reshape(op.Mul(op.Reshape(op.Cast(table, to=single), [tables, entries]), scale), [-1])
        if tables == 1:
            return op.Cast(op.Gather(table, places), to=single)
        starts = op.Constant(value=onnx_ir.tensor(entries * np.arange(tables, dtype=np.int32).reshape(-1, 1)))
        found = op.Gather(table, op.Add(op.Reshape(places, [tables, -1]), starts))
        return op.Reshape(op.Cast(found, to=single), shape)

    def expand(codes, scale, shape, curve: str, strength: float, bits: int):  # type: ignore[no-untyped-def]
        signed = op.Cast(codes, to=single)
        size = op.Mul(op.Abs(signed), 1 / (2 ** (bits - 1) - 1))
        if curve == "mu":
            grown = op.Mul(op.Sub(op.Exp(op.Mul(size, math.log1p(strength))), 1.0), 1 / strength)
        elif curve == "power":
            grown = op.Pow(size, strength)
        else:
            grown = op.Exp(op.Mul(op.Sub(size, 1.0), strength * math.log(2)))
        return op.Mul(op.Mul(op.Sign(signed), grown), scale)

    def unscale(values, scale):  # type: ignore[no-untyped-def]
        return op.Mul(op.Cast(values, to=single), scale)

    library = torch.ops.featherweight
    return {
        library.look_up.default: look_up,
        library.expand.default: expand,
        library.unscale.default: unscale,
        library.dequantize.default: dequantize,
        library.fake_quantize.default: fake_quantize,
        library.dynamic_quantize.default: dynamic_quantize,
    }


def _store_encoded(graph_model: onnx_ir.Model, model: nn.Module) -> None:
    """Gives the initializers of packed and blocked codes the type and shape that ONNX's operator reads."""
    import onnx_ir

    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    for encoding in encodings(model).values():
        if not isinstance(encoding, Affine):
            continue
        packed = encoding.bits <= PACKED_BITS
        if not packed and not encoding.block:
            continue
        value = graph_model.graph.initializers.get(f"{names[id(encoding)]}.codes")
        if value is None:
            continue
        count = torch.Size(encoding.shape).numel()
        codes = unpack4(encoding.codes, count) if packed else encoding.codes
        shape = (encoding.shape[0], -1) if encoding.block else encoding.shape
        array = codes.reshape(shape).numpy()
        if packed:
            import ml_dtypes

            array = array.astype(ml_dtypes.int4)
        value.const_value = onnx_ir.tensor(array, name=value.name)
        value.dtype, value.shape = value.const_value.dtype, onnx_ir.Shape(array.shape)


def _store_packed(graph_model: onnx_ir.Model, model: nn.Module) -> None:
    """Gives the initializers of codes that lie two to a byte ONNX's own 4-bit types, and their shape."""
    import ml_dtypes
    import onnx_ir

    for encoding, value in _coded(graph_model, model):
        if isinstance(encoding, Scaled) or encoding.bits != 4:
            continue
        count = torch.Size(encoding.shape).numel()
        if isinstance(encoding, Codebook):
            array = unpack_unsigned4(encoding.codes, count).numpy().astype(ml_dtypes.uint4)
        else:
            array = unpack4(encoding.codes, count).numpy().astype(ml_dtypes.int4)
        value.const_value = onnx_ir.tensor(array.reshape(encoding.shape), name=value.name)
        value.dtype, value.shape = value.const_value.dtype, onnx_ir.Shape(encoding.shape)


def _coded(graph_model: onnx_ir.Model, model: nn.Module) -> Iterator[tuple[Codebook | Companded | Scaled, Any]]:
    """Encodings that ONNX has no operator for, each with the initializer of its codes or narrow values."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (Codebook, Companded, Scaled)):
            stored = f"{name}.{'values' if isinstance(module, Scaled) else 'codes'}"
            if (value := graph_model.graph.initializers.get(stored)) is not None:
                yield module, value


def _name_ends(graph_model: onnx_ir.Model, workload: Workload) -> None:
    """Inputs as the workload calls them, outputs by number."""
    names = input_names(workload.start, workload.example)
    for value, name in zip(graph_model.graph.inputs, names, strict=True):
        value.name = name
    for index, value in enumerate(graph_model.graph.outputs):
        value.name = f"output{index}"


def _simplify(graph_model: onnx_ir.Model, kept: Collection[str]) -> None:
    """Constants folded, identical nodes and initializers merged, the unused removed.

    What is decoded from the initializers `kept` is not folded, nor are dequantized weights: the file would grow.
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule

    def should_fold(node: onnx_ir.Node) -> bool | None:
        return False if any(value is not None and value.name in kept for value in node.inputs) else None

    with _quiet():
        optimizer.optimize_ir(graph_model, should_fold=should_fold)
        RewritePass([_rounding_before_padding(), _attention_without_guard()])(graph_model)
        RewritePass([fuse_pad_into_conv_rule])(graph_model)
        _compute_what_no_input_reaches(graph_model)
        common.DeduplicateInitializersPass(size_limit=1 << 40)(graph_model)
        common.CommonSubexpressionEliminationPass()(graph_model)
        common.RemoveUnusedNodesPass()(graph_model)


def _compute_what_no_input_reaches(graph_model: onnx_ir.Model) -> None:
    """Products of constants become constants, such as factors of a table of positions that are always the same.

    Weights that are only decoded are no product, and stay as they are stored. OpenVINO (2026.4) cannot compute such a
    product beforehand where weights have 4 bits, and refuses the file.
    """
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    graph = graph_model.graph
    fixed: set[onnx_ir.Value] = set(graph.initializers.values())
    products: set[onnx_ir.Value] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if any(attribute.type == onnx_ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            continue  # it may read more than its inputs
        if all(value in fixed for value in given) and (given or node.op_type == "Constant"):
            fixed.update(node.outputs)
            if node.op_type in PRODUCTS or not products.isdisjoint(given):
                products.update(node.outputs)
    made = [value for node in graph for value in node.outputs if value in products]
    ends = [value for value in made if any(not products.issuperset(use.node.outputs) for use in value.uses())]
    if not ends:
        return
    part = onnx_ir.convenience.extract(graph, [], ends)
    alone = onnx_ir.Model(part, ir_version=graph_model.ir_version)
    for value, found in zip(ends, ReferenceEvaluator(onnx_ir.to_proto(alone)).run(None, {}), strict=True):
        tensor = onnx_ir.tensor(found, name=f"{value.name}/computed")
        kind = onnx_ir.TensorType(tensor.dtype)
        constant = onnx_ir.Value(name=tensor.name, shape=onnx_ir.Shape(found.shape), type=kind, const_value=tensor)
        graph.register_initializer(constant)
        onnx_ir.convenience.replace_all_uses_with(value, constant)


def _rounding_before_padding() -> Any:
    """The rule that rounds before zeros are added, not after: zero is on every grid, and a convolution can add them."""
    from onnxscript.rewriter import MatchResult, pattern

    free = {"_allow_other_attributes": True}

    def after(op, x, pads, zero, scale, zero_point):  # type: ignore[no-untyped-def]
        padded = op.Pad(x, pads, zero, mode="constant", **free)
        return op.DequantizeLinear(op.QuantizeLinear(padded, scale, zero_point, **free), scale, zero_point, **free)

    def before(op, x, pads, zero, scale, zero_point):  # type: ignore[no-untyped-def]
        rounded = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)
        rounded.dtype, rounded.shape = x.dtype, x.shape  # without them no convolution takes the zeros
        return op.Pad(rounded, pads, zero, mode="constant")

    def zeros(context, zero, **_):  # type: ignore[no-untyped-def]
        found = MatchResult()
        return found if zero.const_value is not None and zero.const_value.numpy() == 0 else found.fail("not zeros")

    return pattern.RewriteRule(after, before, zeros)


def _attention_without_guard() -> Any:
    """The rule that no weights of attention are compared with NaN where a mask of yes and no lets none come about.

    The exporter masks with the lowest number, not with −∞, and guards against rows that are masked whole all the same;
    OpenVINO 2026.4 computes attention in one kernel only without the guard.
    """
    from onnxscript.rewriter import MatchResult, pattern

    free = {"_allow_other_attributes": True}

    def guarded(op, scores, bias, instead):  # type: ignore[no-untyped-def]
        weights = op.Softmax(op.Add(scores, bias), _outputs=["weights"], **free)
        return op.Where(op.IsNaN(weights), instead, weights)

    def bare(op, scores, bias, weights, **_):  # type: ignore[no-untyped-def]
        return op.Softmax(op.Add(scores, bias), axis=weights.producer().attributes["axis"].as_int())

    def finite(context, bias, **_):  # type: ignore[no-untyped-def]
        mask = bias.producer()
        values = [] if mask is None or mask.op_type != "Where" else [value.const_value for value in mask.inputs[1:]]
        known = bool(values) and all(value is not None and np.isfinite(value.numpy()).all() for value in values)
        return MatchResult() if known else MatchResult().fail("the mask may hold −∞")

    return pattern.RewriteRule(guarded, bare, finite)


def _name_by_layer(graph_model: onnx_ir.Model, model: nn.Module) -> None:
    """Operators, and what they return, are named after their layer, so that a runtime's profile tells where time goes.

    Both, for a runtime names what it makes of several operators after either.
    """
    ends, layers = {*graph_model.graph.inputs, *graph_model.graph.outputs}, {name for name, _ in model.named_modules()}
    for node in graph_model.graph:
        # the exporter's own note of a moment ago, as text of a list; literals only, so that nothing in it is run
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        layer = scopes[-2] if len(scopes) > 1 else ""
        if layer and layer in layers and node.name:
            node.name = f"{layer}/{node.name}"
            for value in node.outputs:
                if value.name and value not in ends:
                    value.name = f"{layer}/{value.name}"


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
