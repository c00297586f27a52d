"""ONNX Runtime: Microsoft's runtime, here on CPUs. Writes `model.onnx`.

What this runtime wants, measured (see LOG.md): it runs a convolution or an addition in int8 only where its output
is quantized too (`onnx_pairs`). It computes DequantizeLinear anew for every input, and a cast and a product of
constants once, when it loads a file: weights that no int8 kernel reads are written as the latter. A table of which
rows are looked up stays bytes. Weights that were left in floats it rounds, with one scale for all of them, where
everything round a layer is rounded; nobody asked for that, and `keep_floats` prevents it. It has no int8 kernel for a
Gemm with a float output, but one for MatMul.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import ExportError
from featherweight.onnx_pairs import COMMUTES, complete, constant, drop_unused, is_decoded, readers, replace
from featherweight.targets import Arrays, Kernel, Runner, Target, usual

if TYPE_CHECKING:
    from torch import nn

    from featherweight.workload import Workload

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CUDA = "CUDAExecutionProvider"
PROBED, PROBES = 64, 50  # operators of the graph that shows what a profile adds to each, and runs of it
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
        complete(network, workload, lambda file: _runner(_session(file, threads=0)), every_output=True)
        decode_once(network.graph)
        keep_floats(network.graph)
        onnx_ir.save(network, folder / "model.onnx")
        try:
            _session(folder / "model.onnx", threads=1)
        except Exception as error:
            raise ExportError(
                f"onnxruntime cannot run {type(model).__name__}: {' '.join(str(error).split())[:300]} "
                "Replace the operator that it names, or choose another target."
            ) from error

    def load(self, folder: Path, threads: int) -> Runner:
        return _runner(_session(folder / "model.onnx", threads))

    def load_on(self, device: str, folder: Path, threads: int) -> Runner:
        if device == "cpu":
            return self.load(folder, threads)
        number = int(device.partition(":")[2] or 0)
        if number >= self.count(device.partition(":")[0]):
            raise self.without(device, "there are fewer")
        session = _session(folder / "model.onnx", threads, device=number)
        if CUDA not in session.get_providers():  # it warns, and runs on the processor
            raise self.without(device, "its libraries of CUDA and cuDNN cannot be loaded, see what it says of them")
        return _runner(session)

    def count(self, device: str) -> int:
        import onnxruntime

        if device == "cpu":
            return super().count(device)
        if device != "cuda":
            raise self.without(device, "it runs on processors and GPUs only")
        if CUDA not in onnxruntime.get_available_providers():
            raise self.without(device, "the package onnxruntime-gpu is not installed in place of onnxruntime")
        found = sum(place.ep_name == CUDA for place in onnxruntime.get_ep_devices())
        if not found:
            raise self.without(device, "there is none here")
        return found

    def profile(self, folder: Path, inputs: Arrays, threads: int, runs: int = 3) -> list[Kernel]:
        return usual(_told(folder / "model.onnx", inputs, threads, runs, _added_ms(threads)))


def _told(source: Path | bytes, inputs: Arrays, threads: int, runs: int, added_ms: float) -> list[list[Kernel]]:
    """What the runtime says of each of several runs, less what saying so adds to an operator's time."""
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(source, threads, profile=str(Path(scratch) / "run"))
        run = _runner(session)
        for _ in range(runs):
            run(inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    found = [
        _kernel(event, added_ms)
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    each = len(found) // runs
    return [found[begin : begin + each] for begin in range(0, each * runs, each)] if each else []


@cache
def _added_ms(threads: int) -> float:
    """What a profile adds to the time of an operator: before its clock stops, sizes and what threads did are written.

    Found by a chain of operators on one number: what they seem to take together, over what a run of them takes.
    """
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Sin", [f"x{i}"], [f"x{i + 1}"]) for i in range(PROBED)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x0", f"x{PROBED}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    chain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    inputs, taken = [np.ones(1, np.float32)], []
    run = _runner(_session(chain, threads))
    for _ in range(PROBES):
        begin = time.perf_counter()
        run(inputs)
        taken.append(1e3 * (time.perf_counter() - begin))
    told = usual(_told(chain, inputs, threads, PROBES, added_ms=0.0))
    return max(0.0, sum(kernel.latency_ms for kernel in told) - float(np.median(taken))) / PROBED


def _session(source: Path | bytes, threads: int, profile: str = "", device: int | None = None) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    model = source if isinstance(source, bytes) else str(source)
    on_gpu = [] if device is None else [(CUDA, {"device_id": device})]
    return onnxruntime.InferenceSession(model, options, providers=[*on_gpu, "CPUExecutionProvider"])


def _runner(session: Any) -> Runner:
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _kernel(event: dict[str, Any], added_ms: float) -> Kernel:
    kind = event["args"]["op_name"]
    precision = "int8" if any(mark in kind for mark in INT8_KERNELS) else "fp32"
    return Kernel(event["name"].removesuffix("_kernel_time"), kind, precision, max(0.0, event["dur"] / 1e3 - added_ms))


# -------------------------------------------------------------------------------- what this runtime wants


def read_rows_as_codes(graph: Any) -> None:
    """Gather(DequantizeLinear(codes)) becomes Gather(codes) times Gather(scales): only the rows read are decoded."""
    import onnx_ir

    for node in list(graph):
        table = node.inputs[0].producer() if node.op_type == "Gather" else None
        if table is None or node.attributes.get_int("axis", 0) != 0 or not _has_scaled_rows(table):
            continue
        (codes, scales), rows = table.inputs[:2], node.inputs[1]
        last = constant(graph, "last_axis", np.array([-1]))
        gathered = [onnx_ir.node("Gather", [value, rows], {"axis": 0}) for value in (codes, scales)]
        as_float = onnx_ir.node("Cast", gathered[0].outputs, {"to": scales.dtype})
        columns = onnx_ir.node("Unsqueeze", [gathered[1].outputs[0], last])
        product = onnx_ir.node("Mul", [as_float.outputs[0], columns.outputs[0]])
        replace(graph, node, [*gathered, as_float, columns, product])
    drop_unused(graph)


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
        steps.append(onnx_ir.node("MatMul", [x, weight], name=node.name))
        if rest and rest[0] is not None:
            bias = constant(graph, f"{rest[0].name}.negated", -rest[0].const_value.numpy())
            steps.append(onnx_ir.node("Sub", [steps[-1].outputs[0], bias], name=f"{node.name}_bias"))
        replace(graph, node, steps)


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
            turned = constant(graph, f"{value.name}.turned", np.ascontiguousarray(codes.T), value.dtype)
        else:
            steps.append(onnx_ir.node("Transpose", [value], {"perm": [1, 0]}))
            turned = steps[0].outputs[0]
        axis = 1 - source.attributes.get_int("axis", 1)
        steps.append(onnx_ir.node("DequantizeLinear", [turned, source.inputs[1]], {"axis": axis}))
        replace(graph, node, steps)
    drop_unused(graph)


def decode_once(graph: Any) -> None:
    """DequantizeLinear(codes) becomes Cast(codes) times scales where no int8 kernel reads the codes."""
    import onnx_ir

    for node in list(graph):
        codes, scales = (*node.inputs, None, None)[:2]
        if node.op_type != "DequantizeLinear" or len(node.inputs) > 2 or _read_beside_codes(node):
            continue
        source = codes.producer()  # a matrix that is stored as another operator reads it
        stored = source.inputs[0].const_value if source is not None else codes.const_value
        if stored is None or (source is not None and source.op_type != "Transpose"):
            continue
        sizes = list(stored.shape) if source is None else list(stored.shape)[::-1]
        wide, axis = scales.const_value.numpy(), node.attributes.get_int("axis", 1)
        block = node.attributes.get_int("block_size", 0)
        apart = [sizes[0], -1, block] if block else [size if at == axis else 1 for at, size in enumerate(sizes)]
        wide = wide[..., None] if block else wide.reshape(apart if wide.ndim else [])
        wide = constant(graph, f"{scales.name}.of{'x'.join(map(str, wide.shape))}", wide)
        steps = [onnx_ir.node("Cast", [codes], {"to": scales.dtype})]
        if block:
            steps.append(_reshaped(graph, steps[-1].outputs[0], apart))
        steps.append(onnx_ir.node("Mul", [steps[-1].outputs[0], wide]))
        if block:
            steps.append(_reshaped(graph, steps[-1].outputs[0], sizes))
        replace(graph, node, steps)
    drop_unused(graph)


def keep_floats(graph: Any) -> None:
    """Layers with weights in floats read a rounded tensor decoded by one scale for each channel, all alike.

    Decoded by a single scale, and with an output that is rounded, the runtime would round the weights too, to 8 bits
    with one scale for all.
    """
    import onnx_ir

    for node in list(graph):
        if node.op_type not in LAYERS or is_decoded(node.inputs[1]):
            continue
        reader, value = node, node.inputs[0]
        while (source := value.producer()) is not None and source.op_type in (*COMMUTES, "Pad"):
            reader, value = source, source.inputs[0]
        if source is None or not is_decoded(value) or (start := source.inputs[0].producer()) is None:
            continue
        shape = start.inputs[0].shape or ()
        axis = next((i for i in range(1, len(shape)) if isinstance(shape[i], int) and shape[i] > 1), 0)
        if axis and all(v.const_value is not None and not v.const_value.shape for v in source.inputs[1:]):
            alike = [
                constant(graph, f"{v.name}.{shape[axis]}", np.full(shape[axis], v.const_value.numpy()))
                for v in source.inputs[1:]
            ]
            apart = onnx_ir.node("DequantizeLinear", [source.inputs[0], *alike], {"axis": axis})
            graph.insert_before(reader, apart)
            reader.replace_input_with(0, apart.outputs[0])


def _reshaped(graph: Any, value: Any, sizes: list[int]) -> Any:
    import onnx_ir

    shape = constant(graph, f"shape.{'x'.join(map(str, sizes))}", np.array(sizes))
    return onnx_ir.node("Reshape", [value, shape])


def _read_beside_codes(node: Any) -> bool:
    """Whether what a node decodes meets a rounded activation, so that an int8 kernel may read the codes of both."""
    own = node.outputs[0]
    meets = [value for reader in readers(own) for value in reader.inputs if value is not None and value is not own]
    return any(is_decoded(value) and value.producer().inputs[0].producer() is not None for value in meets)


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
    return is_decoded(x) and is_decoded(weight) and _has_scaled_rows(weight.producer())


def _only_transposed(codes: Any) -> bool:
    """Whether all that becomes of some codes is decoded and transposed."""
    decoders = readers(codes)
    return all(
        decoder.op_type == "DequantizeLinear"
        and all(reader.op_type == "Transpose" for reader in readers(decoder.outputs[0]))
        for decoder in decoders
    )
