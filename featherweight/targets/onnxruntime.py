"""ONNX Runtime: Microsoft's runtime, here on CPUs. Writes `model.onnx`.

What this runtime wants, measured (see LOG.md): it runs a convolution or an addition in int8 only where its output
is quantized too. So `complete` adds the QuantizeLinear / DequantizeLinear pairs that the network's own quantizers
do not imply: pairs are moved before operators that commute with rounding (pooling by maximum, reshapes), shared by
all readers of a tensor, and tensors that have none get one with the range seen on the calibration data.
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


def turn_weights(graph: Any) -> None:
    """Transpose(DequantizeLinear(codes)) becomes DequantizeLinear(transposed codes), which a kernel can read."""
    import onnx_ir

    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or source.inputs[0].const_value is None:
            continue
        codes = source.inputs[0].const_value.numpy()
        block = source.attributes.get_int("block_size", 0)
        if codes.ndim != 2 or block:
            continue
        name = f"{source.inputs[0].name}.turned"
        if name not in graph.initializers:
            turned = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.ascontiguousarray(codes.T), name=name))
            turned.dtype, turned.shape = source.inputs[0].dtype, onnx_ir.Shape(codes.T.shape)
            graph.register_initializer(turned)
        axis = 1 - source.attributes.get_int("axis", 1)
        fresh = onnx_ir.node("DequantizeLinear", [graph.initializers[name], source.inputs[1]], {"axis": axis})
        _put(graph, fresh, before=node, like=node.outputs[0])
        node.outputs[0].replace_all_uses_with(fresh.outputs[0])
    _drop_unused(graph)


def complete(network: Any, workload: Workload) -> None:
    """Adds the pairs of QuantizeLinear and DequantizeLinear without which int8 kernels would not run."""
    _move_before_commuting(network.graph)
    _share_pairs(network.graph)
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


def _drop_unused(graph: Any) -> None:
    for node in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _move_before_commuting(graph: Any) -> None:
    """Quantizes the input of a pooling or reshape as its output is quantized, from the last such node to the first."""
    for node in reversed(list(graph)):
        if node.op_type not in COMMUTES or node.inputs[0].const_value is not None:
            continue
        starts = [reader for reader in _readers(node.outputs[0]) if _is_pair_start(reader)]
        source = node.inputs[0].producer()
        if starts and source is not None and source.op_type != "DequantizeLinear":
            end = _pair(graph, node.inputs[0], starts[0].inputs[1], starts[0].inputs[2], before=node)
            node.replace_input_with(0, end)


def _share_pairs(graph: Any) -> None:
    """Where a quantized layer reads a tensor through a pair, an addition that reads it too does so through the same."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for index, value in enumerate(node.inputs):
            starts = [reader for reader in _readers(value) if _is_pair_start(reader)]
            if starts:
                (end,) = _readers(starts[0].outputs[0])[:1]
                _move_before(graph, [starts[0], end], node)
                node.replace_input_with(index, end.outputs[0])


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
        quantized = [v is not None and _quantized(v, seen) for v in node.inputs]
        joins = node.op_type == "Add" and all(quantized)
        if not joins and not (node.op_type == "Conv" and quantized[0] and quantized[1]):
            continue
        value = _after_activation(node.outputs[0])
        seen.add(value.name)
        if not value.is_graph_output() and not any(_is_pair_start(reader) for reader in _readers(value)):
            bare.append(value)
    return bare


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
    import onnx_ir

    scale = np.float32(max((high - low) / 255, 1e-30))
    constants = []
    for ending, array in (("scale", scale), ("zero_point", np.uint8(round(-low / float(scale))))):
        tensor = onnx_ir.tensor(np.array(array))
        constant = onnx_ir.Value(name=f"{value.name}.{ending}", const_value=tensor)
        constant.dtype, constant.shape = tensor.dtype, onnx_ir.Shape(())
        graph.register_initializer(constant)
        constants.append(constant)
    readers = [(usage.node, usage.idx) for usage in value.uses()]
    first = next(node for node in graph if any(node is reader for reader, _ in readers))
    scale_value, zero_value = constants
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
