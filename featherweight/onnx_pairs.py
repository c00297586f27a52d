"""Which tensors of an ONNX graph are rounded, so that int8 kernels follow one another without floats between them.

A network's own quantizers round the inputs of its layers. A runtime computes a convolution or an addition in int8
from end to end only where its output is rounded too. `complete` adds what is missing for that: batch norms that nobody
folded become part of the scales and biases before them, pairs of
QuantizeLinear and DequantizeLinear move before operators that commute with rounding (pooling by maximum, reshapes),
additions that run in int8 share those of the layers that read the same tensor, and outputs that have none get one
with the range seen on calibration data. What else a runtime wants is its target's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from featherweight.workload import Workload

COMMUTES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # rounding before is rounding after
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")  # fused into the operator before them when their output is quantized
CALIBRATION_BATCHES = 8

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


def complete(network: Any, workload: Workload, load: Callable[[bytes], Run], every_output: bool) -> None:
    """Adds the pairs without which int8 kernels would not run, or not one behind the other.

    Args:
        network: an `onnx_ir.Model`, changed in place.
        load: how the runtime loads an ONNX file, to see the ranges on calibration data.
        every_output: whether each convolution's output gets a pair, or only those that additions read.
    """
    _fold_norms(network.graph)
    _share_pairs(network.graph)
    _move_before_commuting(network.graph)
    _share_pairs(network.graph)  # those that were moved
    bare = _outputs_without_pair(network.graph)
    if not every_output:
        bare = [value for value in bare if any(reader.op_type == "Add" for reader in readers(value))]
    if bare:
        for value, (low, high) in zip(bare, _ranges(network, bare, workload, load), strict=True):
            _insert_pair(network.graph, value, low, high)


def readers(value: Any) -> list[Any]:
    """The nodes that read a value."""
    return [usage.node for usage in value.uses()]


def is_decoded(value: Any) -> bool:
    """Whether a value comes out of a DequantizeLinear."""
    source = value.producer()
    return source is not None and bool(source.op_type == "DequantizeLinear")


def constant(graph: Any, name: str, array: np.ndarray, dtype: Any = None) -> Any:
    """The initializer `name` of the graph, which holds `array`."""
    import onnx_ir

    if name not in graph.initializers:
        tensor = onnx_ir.tensor(array, dtype=dtype, name=name)
        value = onnx_ir.Value(name=name, const_value=tensor)
        value.dtype, value.shape = tensor.dtype, onnx_ir.Shape(array.shape)
        graph.register_initializer(value)
    return graph.initializers[name]


def _fold_norms(graph: Any) -> None:
    """Convolutions with 8-bit codes take a batch norm behind them into the scales of the codes and into their bias."""
    import onnx_ir

    for node in list(graph):
        if node.op_type != "BatchNormalization" or not _follows_coded_convolution(node):
            continue
        conv = node.inputs[0].producer()
        decoder = conv.inputs[1].producer()
        weight, shift, mean, variance = (value.const_value.numpy() for value in node.inputs[1:])
        factor = weight / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        codes, scale = (value.const_value.numpy() for value in decoder.inputs[:2])
        turned = codes * np.sign(factor).astype(codes.dtype).reshape(-1, *[1] * (codes.ndim - 1))  # scales are positive
        scale = np.where(factor, scale * abs(factor), scale)
        bias = conv.inputs[2].const_value.numpy() if len(conv.inputs) > 2 and conv.inputs[2] is not None else 0.0
        values = {"codes": turned, "scale": scale, "bias": (bias - mean) * factor + shift}
        made = {kind: constant(graph, f"{conv.outputs[0].name}.{kind}", value) for kind, value in values.items()}
        decoded = onnx_ir.node("DequantizeLinear", [made["codes"], made["scale"]], {"axis": 0})
        inputs = [conv.inputs[0], decoded.outputs[0], made["bias"]]
        folded = onnx_ir.Node("", "Conv", inputs, list(conv.attributes.values()), name=conv.name)
        replace(graph, node, [decoded, folded])
    drop_unused(graph)


def _follows_coded_convolution(norm: Any) -> bool:
    """Whether a norm alone reads a convolution whose weight is 8-bit codes with a scale for each output."""
    conv = norm.inputs[0].producer()
    if conv is None or conv.op_type != "Conv" or len(readers(conv.outputs[0])) > 1 or not is_decoded(conv.inputs[1]):
        return False
    decoder = conv.inputs[1].producer()
    biases = [value for value in conv.inputs[2:] if value is not None]
    if any(value.const_value is None for value in (*decoder.inputs, *biases, *norm.inputs[1:])):
        return False
    codes, scale = (value.const_value for value in decoder.inputs[:2])
    by_output = tuple(scale.shape) == (codes.shape[0],) and decoder.attributes.get_int("axis", 1) == 0
    return len(decoder.inputs) == 2 and by_output and codes.dtype.itemsize == 1 and codes.numpy().min() > -128


def replace(graph: Any, node: Any, steps: list[Any]) -> None:
    """Puts the nodes `steps` in the place of `node`; the last one's output is the new one's."""
    from onnx_ir.convenience import replace_nodes_and_values

    replace_nodes_and_values(graph, node, [node], steps, [node.outputs[0]], [steps[-1].outputs[0]])


def drop_unused(graph: Any) -> None:
    """Removes nodes and initializers that nothing reads."""
    for node in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _is_pair_start(node: Any) -> bool:
    """A QuantizeLinear of an activation."""
    return bool(node.op_type == "QuantizeLinear")


def _put(graph: Any, node: Any, before: Any, like: Any) -> None:
    graph.insert_before(before, node)
    node.outputs[0].dtype, node.outputs[0].shape = like.dtype, like.shape


def _move_before_commuting(graph: Any) -> None:
    """Quantizes the input of a pooling or reshape as its output is quantized, from the last such node to the first.

    Only where every reader quantizes the output, and all alike: others would see it rounded, or rounded twice.
    """
    for node in reversed(list(graph)):
        if node.op_type not in COMMUTES or node.inputs[0].const_value is not None:
            continue
        starts = readers(node.outputs[0])
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
            starts = [next(filter(_is_pair_start, readers(value)), None) for value in node.inputs]
            if all(s or _quantized(v, seen) for s, v in zip(starts, node.inputs, strict=True)):
                for index, start in enumerate(starts):
                    if start:
                        _share(graph, start, node, index)
        if _runs_in_int8(node, seen):
            seen.add(_after_activation(node.outputs[0]).name)


def _share(graph: Any, start: Any, reader: Any, index: int) -> None:
    (end,) = readers(start.outputs[0])[:1]
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
        if not value.is_graph_output() and not any(_is_pair_start(reader) for reader in readers(value)):
            bare.append(value)
    return bare


def _runs_in_int8(node: Any, seen: set[str]) -> bool:
    """Whether a node is a convolution or addition of quantized values; `seen` are those that will be quantized."""
    quantized = [value is not None and _quantized(value, seen) for value in node.inputs]
    return (node.op_type == "Add" and all(quantized)) or (node.op_type == "Conv" and quantized[0] and quantized[1])


def _quantized(value: Any, seen: set[str]) -> bool:
    return value.name in seen or is_decoded(value)


def _after_activation(value: Any) -> Any:
    after = readers(value)
    return after[0].outputs[0] if len(after) == 1 and after[0].op_type in ACTIVATIONS else value


def _ranges(
    network: Any, values: list[Any], workload: Workload, load: Callable[[bytes], Run]
) -> Iterator[tuple[float, float]]:
    """The smallest and largest value of each tensor over some calibration batches, from the graph itself."""
    import onnx_ir

    from featherweight.workload import tensors

    outputs = list(network.graph.outputs)
    network.graph.outputs.extend(values)
    try:
        run = load(onnx_ir.to_proto(network).SerializeToString())
    finally:
        del network.graph.outputs[len(outputs) :]
    low, high = np.zeros(len(values)), np.zeros(len(values))  # the grid holds zero in any case
    for batch in workload.calibration[:CALIBRATION_BATCHES]:
        found = run([tensor.numpy() for tensor in tensors(batch)])[len(outputs) :]
        low = np.minimum(low, [array.min() for array in found])
        high = np.maximum(high, [array.max() for array in found])
    return iter(zip(low.tolist(), high.tolist(), strict=True))


def _insert_pair(graph: Any, value: Any, low: float, high: float) -> None:
    """All readers of `value` see it rounded to 256 steps from `low` to `high`."""
    scale = np.float32(max((high - low) / 255, 1e-30))
    scale_value = constant(graph, f"{value.name}.scale", np.array(scale))
    zero_value = constant(graph, f"{value.name}.zero_point", np.array(np.uint8(round(-low / float(scale)))))
    uses = [(usage.node, usage.idx) for usage in value.uses()]
    first = next(node for node in graph if any(node is reader for reader, _ in uses))
    end = _pair(graph, value, scale_value, zero_value, before=first)
    for reader, index in uses:
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
