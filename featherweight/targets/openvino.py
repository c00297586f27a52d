"""OpenVINO: Intel's runtime, on CPUs. Writes `model.xml` (the graph) and `model.bin` (the weights).

What this runtime wants, measured (see LOG.md): quantized inputs and weights are enough for int8 kernels, but a
rounding that only some readers of a tensor see runs by itself, so additions between quantized layers are rounded too
(`onnx_pairs`); fixed shapes run faster than free ones, so a network is compiled once for each of the first few shapes
it meets. Floats run as fp32 unless `compute_bfloat16` was among the steps, which the file then says: bf16, which the
runtime would choose by itself on some processors, changes results, and makes some networks slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import ExportError
from featherweight.machine import physical_cores
from featherweight.onnx_pairs import complete, constant, is_decoded, readers
from featherweight.targets import Arrays, Kernel, Runner, Target

if TYPE_CHECKING:
    from torch import nn

    from featherweight.workload import Workload

NOTHING_RUN = ("undef", "unknown")  # implementations of what became part of another operator, and of inputs and views
NO_BIAS = 1e-20  # zeros would be optimised away
FLOATS = ["featherweight", "floats"]  # where the graph says in what it computes floats, if not in fp32
SHAPES_COMPILED = 4  # one static network each; what comes after runs on one network with free shapes


class OpenVINO(Target):
    """Intel's runtime for CPUs; the fastest here for 8-bit convolutions and linear layers."""

    requires = ("openvino", "onnx", "onnxscript")
    extra = "openvino"
    float_precisions = ("float32", "bfloat16")
    width_multiple = 64  # tiles of AMX are 64 bytes wide; not compared on processors without it
    tolerance = 0.05  # it rounds the tensors between quantized layers too, and the inputs of layers with coded weights

    def export(self, model: nn.Module, workload: Workload, folder: Path) -> None:
        import onnx_ir

        from featherweight.onnx_graph import to_onnx
        from featherweight.surgery import floats_of

        ov = _openvino()
        graph = to_onnx(model, workload)
        keep_in_floats(graph.graph)
        complete(graph, workload, _in_floats, every_output=False)
        give_biases(graph.graph)
        proto = onnx_ir.to_proto(graph)
        try:
            network = _core().read_model(proto.SerializeToString())
        except Exception as error:
            raise ExportError(
                f"openvino cannot read {type(model).__name__}: {' '.join(str(error).split())[:300]} "
                "Replace the operator that it names, or choose another target."
            ) from error
        for port, value in zip(network.inputs, proto.graph.input, strict=True):
            port.get_tensor().set_names({value.name})
        name_transposed(network)
        if floats_of(model) == "bfloat16":
            network.set_rt_info("bf16", FLOATS)
            give_masks_rows(network)
        ov.save_model(network, folder / "model.xml", compress_to_fp16=False)

    def load(self, folder: Path, threads: int) -> Runner:
        return _runner(_core().read_model(folder / "model.xml"), threads)

    def profile(self, folder: Path, inputs: Arrays, threads: int, runs: int = 3) -> list[Kernel]:
        network = _core().read_model(folder / "model.xml")
        compiled = _compiled(network, tuple(array.shape for array in inputs), threads, PERF_COUNT=True)
        request = compiled.create_infer_request()
        for _ in range(runs):
            request.infer(list(inputs))
        return [  # the runtime's times are means over all runs
            Kernel(info.node_name, info.node_type, _arithmetic(info.exec_type), info.real_time.total_seconds() * 1e3)
            for info in request.get_profiling_info()
            # what takes less than a microsecond is said not to have run: what did not run has no implementation either
            if info.status == info.Status.EXECUTED or info.exec_type.partition("_")[0] not in NOTHING_RUN
        ]


def name_transposed(network: Any) -> None:
    """Transposed convolutions are named after their layer, where the name went to the sum with their bias."""
    for node in network.get_ops():
        readers = list(node.output(0).get_target_inputs()) if "ConvolutionBackpropData" in node.get_type_name() else []
        if len(readers) == 1 and (reader := readers[0].get_node()).get_type_name() == "Add":
            node.set_friendly_name(f"{reader.get_friendly_name()}/WithoutBiases")


def keep_in_floats(graph: Any) -> None:
    """Convolutions that oneDNN computes wrongly in int8 read their input unrounded, and so run in floats."""
    from featherweight.int8 import miscomputed

    for node in graph:
        if _in_int8(node) and miscomputed(node.inputs[1].shape.numpy()):
            node.replace_input_with(0, node.inputs[0].producer().inputs[0].producer().inputs[0])


def give_biases(graph: Any) -> None:
    """Layers in int8 that have no bias, or zeros, get one that is next to nothing.

    OpenVINO 2026.4 scales the output of such a layer wrongly where a rounding and another operator read it, or where a
    mean is taken before it is rounded.
    """
    for node in list(graph):
        result = node.outputs[0]
        if _in_int8(node) and len(node.inputs) == 2 and len(readers(result)) > 1:
            node.resize_inputs(3)
            node.replace_input_with(2, _next_to_nothing(graph, node.inputs[1].shape[0]))
        elif _in_int8(node, "MatMul") and not all(map(_adds_bias, readers(result))):
            _add_behind(graph, node, _next_to_nothing(graph, result.shape[-1]))


def _in_int8(node: Any, kind: str = "Conv") -> bool:
    if node.op_type != kind:
        return False
    x, weight = node.inputs[:2]
    turned = weight.producer() is not None and weight.producer().op_type == "Transpose"
    return is_decoded(x) and is_decoded(weight.producer().inputs[0] if turned else weight)


def _adds_bias(node: Any) -> bool:
    """Whether a node adds a constant that is not zero, and so stays."""
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return node.op_type == "Add" and any(bool(value.numpy().any()) for value in constants)


def _next_to_nothing(graph: Any, channels: int) -> Any:
    return constant(graph, f"no_bias.{channels}", np.full(channels, NO_BIAS, np.float32))


def _add_behind(graph: Any, node: Any, bias: Any) -> None:
    """All readers of what `node` returns see `bias` added to it."""
    import onnx_ir

    uses = [(usage.node, usage.idx) for usage in node.outputs[0].uses()]
    total = onnx_ir.node("Add", [node.outputs[0], bias])
    total.outputs[0].dtype, total.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
    graph.insert_after(node, total)
    for reader, index in uses:
        reader.replace_input_with(index, total.outputs[0])


def give_masks_rows(network: Any) -> None:
    """A mask that has one row for all queries gets as many as there are.

    OpenVINO 2026.4 takes such a row for a bias of the product of queries and keys, and in bfloat16 what attention then
    computes is wrong altogether. A Broadcast in its place would be optimised away.
    """
    for node in network.get_ordered_ops():
        if node.get_type_name() == "MatMul" and all(_rank(port.get_source_output()) > 2 for port in node.inputs()):
            for reader in _sums_and_scalings(node):
                parts = [port.get_source_output() for port in reader.inputs()]
                of_one_row = [part for part in parts if _rank(part) < 2 or part.get_partial_shape()[-2] == 1]
                if reader.get_type_name() == "Add" and len(of_one_row) == 1:
                    index = parts.index(of_one_row[0])
                    reader.input(index).replace_source_output(_repeated(parts[index], parts[1 - index]))


def _rank(value: Any) -> int:
    """The number of dimensions; 0 where that is not fixed."""
    rank = value.get_partial_shape().rank
    return rank.get_length() if rank.is_static else 0


def _sums_and_scalings(node: Any) -> Iterator[Any]:
    """What is added to `node` or multiplies it, one after the other, as long as that alone reads it."""
    while len(readers := list(node.output(0).get_target_inputs())) == 1:
        node = readers[0].get_node()
        if node.get_type_name() not in ("Add", "Multiply", "Divide"):
            return
        yield node


def _repeated(mask: Any, logits: Any) -> Any:
    """`mask` with as many rows as `logits` has."""
    from openvino import opset13 as ops

    sizes = ops.shape_of(logits, output_type="i64")
    rows = ops.gather(sizes, ops.constant(np.array([-2])), ops.constant(0))
    before, behind = (ops.constant(np.ones(count, np.int64)) for count in (max(_rank(mask) - 2, 0), 1))
    times = [before, rows, behind]
    return ops.tile(mask, ops.concat(times, 0)).output(0)


def _openvino() -> Any:
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    import openvino

    return openvino


@cache
def _core() -> Any:
    """One for the whole process. A core that goes takes with it the memory that it registered for signal handlers.

    That happens on processors with AMX where a handler stack was registered before, as faulthandler does (pytest and
    notebooks switch it on); the next signal, Ctrl-C say, then ends the process with a segmentation fault.
    """
    return _openvino().Core()


def _in_floats(file: bytes) -> Runner:
    """An ONNX file that computes what it says: int8 kernels hand out values from inside a network scaled otherwise."""
    return _runner(_core().read_model(file), threads=0, LP_TRANSFORMS_MODE="OFF")


def _runner(network: Any, threads: int, **more: Any) -> Runner:
    runners: dict[tuple[tuple[int, ...], ...], Runner] = {}

    def run(inputs: Arrays) -> list[np.ndarray]:
        shapes = tuple(array.shape for array in inputs)
        if shapes not in runners:
            key = shapes if len(runners) < SHAPES_COMPILED else ()
            if key not in runners:
                compiled = _compiled(network, key, threads, **more)
                fixed = all(port.get_partial_shape().is_static for port in (*compiled.inputs, *compiled.outputs))
                runners[key] = (_static if fixed else _dynamic)(compiled)
            shapes = key
        return runners[shapes](inputs)

    return run


def _static(compiled: Any) -> Runner:
    """Inputs are copied to where the network reads them, and outputs written where the caller gets them.

    Handing over arrays with `infer`, and copying what it returns, takes 20 microseconds more, and as long as the
    copying takes: where outputs are large, as from a vocabulary, that is 4 % of a small network's time (LOG.md).
    """
    ov = _openvino()
    request = compiled.create_infer_request()
    places = [request.get_input_tensor(i).data for i in range(len(compiled.inputs))]
    made = [(tuple(port.get_shape()), port.get_element_type().to_dtype()) for port in compiled.outputs]

    def run(inputs: Arrays) -> list[np.ndarray]:
        for place, array in zip(places, inputs, strict=True):
            np.copyto(place, array)
        outputs = [np.empty(shape, dtype) for shape, dtype in made]
        for index, array in enumerate(outputs):
            request.set_output_tensor(index, ov.Tensor(array, shared_memory=True))
        request.start_async()
        request.wait()
        return outputs

    return run


def _dynamic(compiled: Any) -> Runner:
    request = compiled.create_infer_request()

    def run(inputs: Arrays) -> list[np.ndarray]:
        request.infer(list(inputs))
        return [np.array(request.get_output_tensor(i).data) for i in range(len(compiled.outputs))]

    return run


def _compiled(network: Any, shapes: tuple[tuple[int, ...], ...], threads: int, **more: Any) -> Any:
    """`network` compiled for these input shapes, or for free ones where there are none."""
    ov = _openvino()
    hint = "bf16" if network.has_rt_info(FLOATS) else "f32"  # nothing but these, whatever the file says
    if _joins_rows(network):
        more["SNIPPETS_MODE"] = "DISABLE"
    if shapes:
        network = network.clone()
        network.reshape(dict(zip(network.inputs, [ov.PartialShape(list(shape)) for shape in shapes], strict=True)))
    return _core().compile_model(
        network,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": threads >= physical_cores(),  # else all that run side by side share the first cores
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            **more,
        },
    )


def _joins_rows(network: Any) -> bool:
    """Whether two matrices computed from the input are added, say, as in a residual network on rows of features.

    OpenVINO 2026.4 merges narrow linear layers round such sums (`snippets`), and ends the process with a segmentation
    fault where there are two: x + mlp(x) twice on (n, 16) is enough. Attention, which gains by snippets, has no such.
    """
    return any(
        node.get_type_name() in ("Add", "Subtract", "Multiply", "Divide")
        and len(node.get_output_partial_shape(0)) == 2
        and node.get_output_partial_shape(0).is_dynamic  # those of a fixed size are weights that are decoded
        and all(value.get_source_output().get_node().get_type_name() != "Constant" for value in node.inputs())
        for node in network.get_ops()
        if node.get_output_size() and node.get_output_partial_shape(0).rank.is_static
    )


def _arithmetic(primitive: str) -> str:
    """The precision in which a primitive computes, from its name: `brgconv_avx512_I8`, `jit_avx512_f32`, ….

    >>> _arithmetic("brgconv_avx512_I8"), _arithmetic("unknown_f32")
    ('int8', 'fp32')
    """
    ending = primitive.lower().rpartition("_")[2]
    return {"i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4", "bf16": "bf16", "f16": "fp16"}.get(ending, "fp32")
