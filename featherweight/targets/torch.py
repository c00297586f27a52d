"""PyTorch itself: an exported program, `model.pt2`, for wherever torch is at hand and nothing else.

The file is an archive of JSON and raw tensors. Before it is read, and after it is written, it is checked to be no
more than that: torch's own reader would unpickle objects, look up any attribute as an operator and evaluate size
expressions, so files that hold other than tensors, known operators and arithmetic on sizes are refused. When it is
loaded, quantized layers become oneDNN's int8 operators, and weights that are only stored in few bits are decoded
once; linear layers with nearly no weights left are multiplied in compressed rows where that measures faster. Nothing is
compiled: the gain over eager is smaller than that of the other targets.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import ArtifactError, ExportError, TargetError
from featherweight.targets import Arrays, Kernel, Runner, Target, usual

if TYPE_CHECKING:
    from torch import nn

    from featherweight.workload import Workload

# Nothing else of an archive is read. In particular: no pickle, no library, no source.
RECORDS = re.compile(
    r"[\w.-]+/(data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/model_\w+_config\.json"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|\.data/\w+)"
)
PAYLOAD = re.compile(r"(weight|tensor)_\d+")  # torch's reader unpickles payloads of other names
OPERATORS = re.compile(
    r"torch\.ops\.(aten\.(?!from_file\b)|featherweight\.)[\w.]+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(float|int|ite|max|min|not|sqrt)"
)
NAME = re.compile(r"[\w.+]*")  # names become part of the source that torch.fx generates
TEXT = re.compile(r"[\w.+,> -]*")  # what operators take, quoted there: "same", "bij,bjk->bik"
SPECS = ("in_spec", "out_spec")  # JSON inside the JSON
# torch evaluates sizes, so they must be written in these words. Their value grows no faster than their length.
SYMBOL = re.compile(r"Symbol\('[su]\d{1,9}'(, (positive|integer|nonnegative)=(True|False))*\)")
NUMBER = re.compile(
    r"Integer\(-?\d{1,20}\)|Rational\(-?\d{1,20}, \d{1,20}\)|Float\('-?\d{1,20}(\.\d{1,40})?', precision=\d{1,3}\)"
    r"|Pow\(@, Integer\(-?\d\)\)"  # of a symbol only
)
ARITHMETIC = re.compile(
    r"(Add|Mul|Max|Min|Mod|FloorDiv|CleanDiv|PythonMod|IntTrueDiv|FloatTrueDiv|CeilToInt|FloorToInt|TruncToInt|ToFloat"
    r"|FloatPow|Equality|Unequality|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|And|Or|Not)\(@(, @)*\)"
)
SIZE = re.compile(r"@|-?\d{1,20}|-?int_oo|true|false")  # what is left when the above were taken out from inside
DEEPEST_SIZE = 50
LARGEST_SIZE = 10_000  # characters
LARGEST_JSON = 64 << 20
INT8_OPERATORS = ("onednn::qconv", "onednn::qlinear")
NODE = "node "  # begins the notes in a profile that tell the node of the program


class Torch(Target):
    """PyTorch without a compiler: int8 through oneDNN's operators."""

    requires = ("torch",)
    extra = "torch"

    def export(self, model: nn.Module, workload: Workload, folder: Path) -> None:
        import torch

        from featherweight.surgery import trace

        program = trace(model, workload.example)
        _inline_blocks(program)
        _name_by_layer(program, model)
        _return_tuple(program)
        program._example_inputs = None  # the archive would hold them pickled
        program._guards_code = []  # Python source, which a reader would have to run
        for node in program.graph.nodes:  # where the network was made is nobody's business
            for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(note, None)
        try:
            torch.export.save(program, folder / "model.pt2")
        except Exception as error:
            raise ExportError(
                f"torch cannot save {type(model).__name__}: {' '.join(str(error).split())[:300]} "
                "Replace the operator that it names, or choose another target."
            ) from error
        _without_pickles(folder / "model.pt2")
        for complaint in _archive_complaints(folder / "model.pt2"):
            (folder / "model.pt2").unlink()
            raise ExportError(
                f"torch cannot hold {type(model).__name__} as data: {complaint}. Replace what it names in the network, "
                "take torch.autocast out of forward if it is that, or choose another target."
            )

    def load(self, folder: Path, threads: int) -> Runner:
        return _runner(*_read(folder / "model.pt2"), "cpu", threads)

    def load_on(self, device: str, folder: Path, threads: int) -> Runner:
        if device == "cpu":
            return self.load(folder, threads)
        from featherweight.devices import moved

        kind, _, number = device.partition(":")
        if int(number or 0) >= self.count(kind):
            raise self.without(device, "there are fewer")
        program, names = _program(folder / "model.pt2")
        return _runner(moved(program, device), names, device, threads)

    def count(self, device: str) -> int:
        if device == "cpu":
            return super().count(device)
        from featherweight.devices import count

        try:
            return count(device)
        except TargetError as error:
            raise self.without(device, str(error)) from error

    def profile(self, folder: Path, inputs: Arrays, threads: int, runs: int = 3) -> list[Kernel]:
        import torch
        from torch.profiler import ProfilerActivity, profile, record_function

        class Noting(torch.fx.Interpreter):
            """Runs a program node by node, with a note in the profile of where each begins and ends."""

            def run_node(self, n: torch.fx.Node) -> Any:
                with record_function(NODE + n.name):
                    return super().run_node(n)

        network, _ = _read(folder / "model.pt2")
        found, values = [], [torch.from_numpy(array) for array in inputs]
        with _threads(threads), torch.inference_mode():
            run = Noting(network).run
            run(*values, enable_io_processing=False)
            for _ in range(runs):
                with profile(activities=[ProfilerActivity.CPU]) as profiler:
                    run(*values, enable_io_processing=False)
                found.append([_kernel(event) for event in profiler.events() if not event.name.startswith(NODE)])
        return usual(found)


def _runner(network: Any, names: Sequence[str], device: str, threads: int) -> Runner:
    """`network` on arrays, which go to the device and come back."""
    import torch

    from featherweight.workload import outputs

    def call(values: list[torch.Tensor]) -> object:
        return network(**dict(zip(names, values, strict=True))) if names else network(*values)

    def run(inputs: Arrays) -> list[np.ndarray]:
        with _threads(threads), torch.inference_mode():
            found = call([torch.from_numpy(array).to(device) for array in inputs])
            return [value.cpu().numpy() for value in outputs(found)]

    return run


def _kernel(event: Any) -> Kernel:
    """An operator that torch ran, named after the node of the program that it is a part of."""
    node = event
    while node.cpu_parent is not None:
        node = node.cpu_parent
    precision = "int8" if event.name.startswith(INT8_OPERATORS) else "fp32"
    return Kernel(node.name.removeprefix(NODE), event.name, precision, event.self_cpu_time_total / 1e3)


def _read(path: Path) -> tuple[Any, Sequence[str]]:
    """The network in a file, as it is to run on processors, and the names of inputs that are given by keyword."""
    from featherweight.int8 import use_int8
    from featherweight.sparse import use_sparse

    program, names = _program(path)
    return use_sparse(use_int8(program.module())), names


def _program(path: Path) -> tuple[Any, Sequence[str]]:
    """The program in a file, as it was written, and the names of inputs where they are given by keyword."""
    import torch

    import featherweight.encodings  # noqa: F401 - has the operators that programs name

    check_archive(path)
    try:
        program = torch.export.load(path)
    except RuntimeError as error:
        raise ArtifactError(
            f"torch cannot read {path}: {' '.join(str(error).split())[:200]} It was written by "
            "another version of torch or Featherweight. Export the network again."
        ) from error
    return program, program.call_spec.in_spec.child(1).context or ()


def positional(path: Path, device: str = "cpu") -> Any:
    """The program in a file, as it was written: a GraphModule that takes inputs by position and returns a tuple."""
    import torch

    from featherweight.devices import moved

    program, _ = _program(path)
    network = program.module(check_guards=False) if device == "cpu" else moved(program, device)
    graph = network.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    return torch.fx.GraphModule(network, graph)  # without the hooks that look at keywords


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch on `count` threads, and then on as many as before: the number is the whole process's."""
    import torch

    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def _inline_blocks(program: Any) -> None:
    """Blocks under torch.no_grad() or a disabled torch.autocast, which trace as calls of subgraphs, become plain nodes.

    A program that is run computes the same without them: gradients are off in any case, and so is autocast.
    """
    for old, new in _inline_calls(program.graph_module).items():
        program.graph_signature.replace_all_uses(old, new)


def _inline_calls(module: Any) -> dict[str, str]:
    """Inlines blocks in `module`, inner ones first. Returns the names of what they returned: old to new."""
    import torch

    library = torch.ops.higher_order
    names: dict[str, str] = {}
    for node in list(module.graph.nodes):
        if node.target is library.wrap_with_set_grad_enabled:
            block, *arguments = node.args[1:]
        elif node.target is library.wrap_with_autocast and not node.args[2]:
            block, *arguments = node.args[4:]
        else:
            continue
        body = getattr(module, block.target)
        _inline_calls(body)
        if all(inner.op != "get_attr" for inner in body.graph.nodes):  # else a block is left in it
            names |= _inline(module.graph, node, body.graph, arguments)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return names


def _inline(graph: Any, call: Any, body: Any, arguments: list[Any]) -> dict[str, str]:
    """Puts the nodes of `body` in the place of `call`, whose users are getitems on what the body returns."""
    names = {}
    inputs = [node for node in body.nodes if node.op == "placeholder"]
    with graph.inserting_before(call):
        results = graph.graph_copy(body, dict(zip(inputs, arguments, strict=True)))
    for user in list(call.users):
        result = results[user.args[1]]
        names[user.name] = result.name
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(call)
    return names


def _name_by_layer(program: Any, model: nn.Module) -> None:
    """Nodes are named after their layer, so that a profile tells where time goes."""
    layers = {name for name, _ in model.named_modules() if name}
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        layer = stack[-1][0] if stack else ""
        if layer in layers and node.op == "call_function":
            before = node.name
            node._rename(re.sub(r"\W", "_", f"{layer}_{before}"))
            program.graph_signature.replace_all_uses(before, node.name)


def _return_tuple(program: Any) -> None:
    """The program returns its outputs as a tuple, so that whoever loads it needs no class of the network's library."""
    from torch.utils import _pytree

    count = len(program.graph_signature.user_outputs)
    program.module_call_graph[0].signature.out_spec = _pytree.tree_structure((0,) * count)


# -------------------------------------------------------------------------------- the archive is data


def _without_pickles(path: Path) -> None:
    """Empties the record of sample inputs, which torch writes as a pickle even when there are none.

    Records carry no time, so that the same network is the same file whenever it is written.
    """
    kept = path.with_suffix(".kept")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            record = zipfile.ZipInfo(item.filename)
            target.writestr(record, b"" if "/sample_inputs/" in item.filename else source.read(item))
    kept.replace(path)


def check_archive(path: Path) -> None:
    """Raises an ArtifactError unless the archive holds raw tensors and graphs of known operators only."""
    for complaint in _archive_complaints(path):
        raise ArtifactError(f"{path} is no program that Featherweight wrote: {complaint}. Export the network again.")


def _archive_complaints(path: Path) -> Iterator[str]:
    """What in an archive is more than data."""
    try:
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if not RECORDS.fullmatch(item.filename):
                    yield f"it contains {item.filename[:80]!r}, which is neither tensor nor graph"
                elif item.filename.endswith(".json"):
                    if item.file_size > LARGEST_JSON:
                        yield f"{item.filename} has {item.file_size} bytes"
                    else:
                        for complaint in _complaints(json.loads(archive.read(item))):
                            yield f"{item.filename} {complaint}"
                elif item.file_size and item.filename.endswith(".pt"):
                    yield f"it contains {item.filename}, which would have to be unpickled or run"
    except (zipfile.BadZipFile, ValueError, RecursionError, OSError) as error:  # ValueErrors: no JSON, or no Unicode
        yield f"it cannot be read: {error}"


def _complaints(value: Any, key: str = "") -> Iterator[str]:
    """What in a parsed JSON file would make torch's reader do more than read."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            yield "holds a pickled tensor"
        if value.get("guards_code"):
            yield "holds source code, as guards"
        for name, part in value.items():
            if not NAME.fullmatch(name):
                yield f"has the key {name[:80]!r}"
            yield from _complaints(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _complaints(part, key)
    elif isinstance(value, str):
        yield from _text_complaints(value, key)


def _text_complaints(text: str, key: str) -> Iterator[str]:
    if key in ("target", "as_operator"):
        if not OPERATORS.fullmatch(text):
            yield f"calls {text[:80]!r}"
    elif key == "path_name":
        if not PAYLOAD.fullmatch(text):
            yield f"reads {text[:80]!r}, which is no tensor"
    elif key == "expr_str":
        if not _is_size(text):
            yield f"has the size {text[:80]!r}"
    elif key in ("as_string", "as_strings"):
        if not TEXT.fullmatch(text):
            yield f"has the text {text[:80]!r}"
    elif key in SPECS or (key == "context" and text.startswith("[")):
        yield from _complaints(json.loads(text))
    elif not NAME.fullmatch(text):
        yield f"has the text {text[:80]!r} for {key}"


def _is_size(text: str) -> bool:
    """Whether a size is arithmetic on symbols and numbers, as sympy's srepr writes it, and nothing else.

    >>> _is_size("Mul(Integer(2), Symbol('s77', positive=True, integer=True))"), _is_size("Mul(exit(), exit())")
    (True, False)
    """
    if len(text) > LARGEST_SIZE:
        return False
    text = NUMBER.sub("@", SYMBOL.sub("@", text))
    for _ in range(DEEPEST_SIZE):
        text, count = ARITHMETIC.subn("@", text)
        if not count:
            break
    return bool(SIZE.fullmatch(text))
