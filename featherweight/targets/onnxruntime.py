"""ONNX Runtime: Microsoft's runtime, here on CPUs. Writes `model.onnx`.

What this runtime wants, measured (see LOG.md): it runs a convolution or an addition in int8 only where its output
is quantized too. So `complete` adds the QuantizeLinear / DequantizeLinear pairs that the network's own quantizers
do not imply: pairs are moved before operators that commute with rounding (pooling by maximum, reshapes), shared by
the additions that run in int8, and outputs that have none get one with the range seen on the calibration data.
It never decodes a weight ahead of time, so an encoded table is read row by row in bytes; and it has no int8 kernel
for a Gemm with a float output, but one for MatMul.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import ExportError
from featherweight.targets import Arrays, Kernel, Runner, Target

if TYPE_CHECKING:
    from torch import nn

    from featherweight.workload import Workload

COMMUTES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # rounding before is rounding after
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")  # fused into the operator before them when their output is quantized
CALIBRATION_BATCHES = 8
INT8_KERNELS = ("QLinear", "Integer", "QGemm", "QAttention", "QuantizeMatMul", "MatMulNBits")


class ONNXRuntime(Target):
    """Microsoft's runtime for CPUs; reads the most portable file."""

    requires = ("onnxruntime", "onnx", "onnxscript")
    extra = "onnxruntime"
    width_multiple = 16
    tolerance = 0.05  # it rounds the tensors between quantized layers too

    def export(self, model: nn.Module, workload: Workload, folder: Path) -> None:
        import onnx_ir

        from featherweight.onnx_graph import to_onnx

        network = to_onnx(model, workload)
        read_rows_as_codes(network.graph)
        gemms_to_matmuls(network.graph)
        turn_weights(network.graph)
        complete(network, workload)
        onnx_ir.save(network, folder / "model.onnx")
        try:
            _session(folder / "model.onnx", threads=1)
        except Exception as error:
            raise ExportError(
                f"onnxruntime cannot run {type(model).__name__}: {' '.join(str(error).split())[:300]} "
                "Replace the operator that it names, or choose another target."
            ) from error

    def load(self, folder: Path, threads: int) -> Runner:
        session = _session(folder / "model.onnx", threads)
        names = [value.name for value in session.get_inputs()]

        def run(inputs: Arrays) -> list[np.ndarray]:
            return session.run(None, dict(zip(names, inputs, strict=True)))

        return run

    def profile(self, folder: Path, inputs: Arrays, threads: int) -> list[Kernel]:
        with tempfile.TemporaryDirectory() as scratch:
            session = _session(folder / "model.onnx", threads, profile=str(Path(scratch) / "run"))
            names = [value.name for value in session.get_inputs()]
            for _ in range(3):
                session.run(None, dict(zip(names, inputs, strict=True)))
            events = json.loads(Path(session.end_profiling()).read_text())
        return [
            _kernel(event) for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        ]


def _session(source: Path | bytes, threads: int, profile: str = "") -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    model = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _kernel(event: dict[str, Any]) -> Kernel:
    kind = event["args"]["op_name"]
    precision = "int8" if any(mark in kind for mark in INT8_KERNELS) else "fp32"
    return Kernel(event["name"].removesuffix("_kernel_time"), kind, precision, event["dur"] / 1e3)


# -------------------------------------------------------------------------------- what this runtime wants


def read_rows_as_codes(graph: Any) -> None:
    """Gather(DequantizeLinear(codes)) becomes Gather(codes) times Gather(scales): only the rows read are decoded."""
    import onnx_ir

    for node in list(graph):
        table = node.inputs[0].producer() if node.op_type == "Gather" else None
        if table is None or node.attributes.get_int("axis", 0) != 0 or not _has_scaled_rows(table):
            continue
        (codes, scales), rows = table.inputs[:2], node.inputs[1]
        last = _constant(graph, "last_axis", np.array([-1]))
        gathered = [onnx_ir.node("Gather", [value, rows], {"axis": 0}) for value in (codes, scales)]
        as_float = onnx_ir.node("Cast", gathered[0].outputs, {"to": scales.dtype})
        columns = onnx_ir.node("Unsqueeze", [gathered[1].outputs[0], last])
        product = onnx_ir.node("Mul", [as_float.outputs[0], columns.outputs[0]])
        _replace(graph, node, [*gathered, as_float, columns, product])
    _drop_unused(graph)


def gemms_to_matmuls(graph: Any) -> None:
    """Gemm of a quantized input and an 8-bit weight becomes a MatMul, which has an int8 kernel, and its bias.

    The bias is subtracted with its sign turned: the runtime would make a Gemm again of a MatMul and an Add.
    """
    import onnx_ir

    for node in list(graph):
        if node.op_type != "Gemm" or not _is_int8_gemm(node):
            continue
        x, weight, *rest = node.inputs
        steps = []
        if node.attributes.get_int("transB", 0):
            steps.append(onnx_ir.node("Transpose", [weight], {"perm": [1, 0]}))
            weight = steps[0].outputs[0]
        steps.append(onnx_ir.node("MatMul", [x, weight]))
        if rest and rest[0] is not None:
            bias = _constant(graph, f"{rest[0].name}.negated", -rest[0].const_value.numpy())
            steps.append(onnx_ir.node("Sub", [steps[-1].outputs[0], bias]))
        _replace(graph, node, steps)


def turn_weights(graph: Any) -> None:
    """Transpose(DequantizeLinear(codes)) becomes DequantizeLinear(transposed codes), which a kernel can read.

    Codes that something else reads too, as an embedding tied to the output layer does, stay in the file once: the
    runtime transposes them when it loads the file, at the price of a second copy in memory only.
    """
    import onnx_ir

    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or source.inputs[0].const_value is None:
            continue
        value = source.inputs[0]
        codes = value.const_value.numpy()
        if codes.ndim != 2 or source.attributes.get_int("block_size", 0):
            continue
        steps = []
        if _only_transposed(value):
            turned = _constant(graph, f"{value.name}.turned", np.ascontiguousarray(codes.T), value.dtype)
        else:
            steps.append(onnx_ir.node("Transpose", [value], {"perm": [1, 0]}))
            turned = steps[0].outputs[0]
        axis = 1 - source.attributes.get_int("axis", 1)
        steps.append(onnx_ir.node("DequantizeLinear", [turned, source.inputs[1]], {"axis": axis}))
        _replace(graph, node, steps)
    _drop_unused(graph)


def _has_scaled_rows(node: Any) -> bool:
    """Whether a node decodes a constant matrix of bytes with one scale for each row."""
    if node.op_type != "DequantizeLinear" or any(value is not None for value in node.inputs[2:]):
        return False
    codes, scales = (value.const_value for value in node.inputs[:2])
    if codes is None or scales is None or node.attributes.get_int("block_size", 0):
        return False
    by_row = node.attributes.get_int("axis", 1) == 0 and tuple(scales.shape) == tuple(codes.shape)[:1]
    return by_row and len(codes.shape) == 2 and codes.dtype.itemsize == 1


def _is_int8_gemm(node: Any) -> bool:
    x, weight, *rest = node.inputs
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or node.attributes.get_int("transA", 0) or any(b is not None and b.const_value is None for b in rest):
        return False
    decoded = weight.producer()
    return _quantized(x, set()) and decoded is not None and _has_scaled_rows(decoded)


def _only_transposed(codes: Any) -> bool:
    """Whether all that becomes of some codes is decoded and transposed."""
    decoders = _readers(codes)
    return all(
        decoder.op_type == "DequantizeLinear"
        and all(reader.op_type == "Transpose" for reader in _readers(decoder.outputs[0]))
        for decoder in decoders
    )


def complete(network: Any, workload: Workload) -> None:
    """Adds the pairs of QuantizeLinear and DequantizeLinear without which int8 kernels would not run."""
    _share_pairs(network.graph)
    _move_before_commuting(network.graph)
    _share_pairs(network.graph)  # those that were moved
    bare = _outputs_without_pair(network.graph)
    if bare:
        for value, (low, high) in zip(bare, _ranges(network, bare, workload), strict=True):
            _insert_pair(network.graph, value, low, high)


def _is_pair_start(node: Any) -> bool:
    """A QuantizeLinear of an activation."""
    return bool(node.op_type == "QuantizeLinear")


def _readers(value: Any) -> list[Any]:
    return [usage.node for usage in value.uses()]


def _put(graph: Any, node: Any, before: Any, like: Any) -> None:
    graph.insert_before(before, node)
    node.outputs[0].dtype, node.outputs[0].shape = like.dtype, like.shape


def _constant(graph: Any, name: str, array: np.ndarray, dtype: Any = None) -> Any:
    """The initializer `name` of the graph, which holds `array`."""
    import onnx_ir

    if name not in graph.initializers:
        tensor = onnx_ir.tensor(array, dtype=dtype, name=name)
        value = onnx_ir.Value(name=name, const_value=tensor)
        value.dtype, value.shape = tensor.dtype, onnx_ir.Shape(array.shape)
        graph.register_initializer(value)
    return graph.initializers[name]


def _replace(graph: Any, node: Any, steps: list[Any]) -> None:
    """Puts the nodes `steps` in the place of `node`; the last one's output is the new one's."""
    from onnx_ir.convenience import replace_nodes_and_values

    replace_nodes_and_values(graph, node, [node], steps, [node.outputs[0]], [steps[-1].outputs[0]])


def _drop_unused(graph: Any) -> None:
    for node in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _move_before_commuting(graph: Any) -> None:
    """Quantizes the input of a pooling or reshape as its output is quantized, from the last such node to the first.

    Only where every reader quantizes the output, and all alike: others would see it rounded, or rounded twice.
    """
    for node in reversed(list(graph)):
        if node.op_type not in COMMUTES or node.inputs[0].const_value is not None:
            continue
        starts = _readers(node.outputs[0])
        if node.outputs[0].is_graph_output() or not starts or not all(_is_pair_start(reader) for reader in starts):
            continue
        alike = len({tuple(value.name for value in start.inputs[1:3]) for start in starts}) == 1
        source = node.inputs[0].producer()
        if alike and source is not None and source.op_type != "DequantizeLinear":
            end = _pair(graph, node.inputs[0], starts[0].inputs[1], starts[0].inputs[2], before=node)
            node.replace_input_with(0, end)


def _share_pairs(graph: Any) -> None:
    """Where quantized layers read a tensor through a pair, an addition that reads it too does so through the same.

    Only where the addition then runs in int8, because all that it adds is quantized: others would lose precision.
    """
    seen: set[str] = set()
    for node in list(graph):
        if node.op_type == "Add":
            starts = [next(filter(_is_pair_start, _readers(value)), None) for value in node.inputs]
            if all(s or _quantized(v, seen) for s, v in zip(starts, node.inputs, strict=True)):
                for index, start in enumerate(starts):
                    if start:
                        _share(graph, start, node, index)
        if _runs_in_int8(node, seen):
            seen.add(_after_activation(node.outputs[0]).name)


def _share(graph: Any, start: Any, reader: Any, index: int) -> None:
    (end,) = _readers(start.outputs[0])[:1]
    _move_before(graph, [start, end], reader)
    reader.replace_input_with(index, end.outputs[0])


def _move_before(graph: Any, nodes: list[Any], reader: Any) -> None:
    """Keeps the order of the graph topological: `nodes` stand before `reader`."""
    order = {id(node): place for place, node in enumerate(graph)}
    for node in nodes:
        if order[id(node)] > order[id(reader)]:
            graph.remove(node)
            graph.insert_before(reader, node)


def _outputs_without_pair(graph: Any) -> list[Any]:
    """Outputs of quantized convolutions, and of additions of such, that nobody quantizes yet."""
    bare: list[Any] = []
    seen: set[str] = set()
    for node in graph:
        if not _runs_in_int8(node, seen):
            continue
        value = _after_activation(node.outputs[0])
        seen.add(value.name)
        if not value.is_graph_output() and not any(_is_pair_start(reader) for reader in _readers(value)):
            bare.append(value)
    return bare


def _runs_in_int8(node: Any, seen: set[str]) -> bool:
    """Whether a node is a convolution or addition of quantized values; `seen` are those that will be quantized."""
    quantized = [value is not None and _quantized(value, seen) for value in node.inputs]
    return (node.op_type == "Add" and all(quantized)) or (node.op_type == "Conv" and quantized[0] and quantized[1])


def _quantized(value: Any, seen: set[str]) -> bool:
    source = value.producer()
    return value.name in seen or (source is not None and source.op_type == "DequantizeLinear")


def _after_activation(value: Any) -> Any:
    readers = _readers(value)
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type in ACTIVATIONS else value


def _ranges(network: Any, values: list[Any], workload: Workload) -> Iterator[tuple[float, float]]:
    """The smallest and largest value of each tensor over some calibration batches, from the graph itself."""
    import onnx_ir

    from featherweight.workload import tensors

    outputs = list(network.graph.outputs)
    network.graph.outputs.extend(values)
    try:
        session = _session(onnx_ir.to_proto(network).SerializeToString(), threads=0)
    finally:
        del network.graph.outputs[len(outputs) :]
    names = [value.name for value in session.get_inputs()]
    low, high = np.zeros(len(values)), np.zeros(len(values))  # the grid holds zero in any case
    for batch in workload.calibration[:CALIBRATION_BATCHES]:
        arrays = [tensor.numpy() for tensor in tensors(batch)]
        found = session.run([value.name for value in values], dict(zip(names, arrays, strict=True)))
        low = np.minimum(low, [array.min() for array in found])
        high = np.maximum(high, [array.max() for array in found])
    return iter(zip(low.tolist(), high.tolist(), strict=True))


def _insert_pair(graph: Any, value: Any, low: float, high: float) -> None:
    """All readers of `value` see it rounded to 256 steps from `low` to `high`."""
    scale = np.float32(max((high - low) / 255, 1e-30))
    scale_value = _constant(graph, f"{value.name}.scale", np.array(scale))
    zero_value = _constant(graph, f"{value.name}.zero_point", np.array(np.uint8(round(-low / float(scale)))))
    readers = [(usage.node, usage.idx) for usage in value.uses()]
    first = next(node for node in graph if any(node is reader for reader, _ in readers))
    end = _pair(graph, value, scale_value, zero_value, before=first)
    for reader, index in readers:
        reader.replace_input_with(index, end)


def _pair(graph: Any, value: Any, scale: Any, zero_point: Any, before: Any) -> Any:
    """The output of a new pair on `value`, standing before `before`."""
    import onnx_ir

    start = onnx_ir.node("QuantizeLinear", [value, scale, zero_point])
    graph.insert_before(before, start)
    start.outputs[0].dtype, start.outputs[0].shape = zero_point.dtype, value.shape
    end = onnx_ir.node("DequantizeLinear", [start.outputs[0], scale, zero_point])
    _put(graph, end, before=before, like=value)
    return end.outputs[0]
