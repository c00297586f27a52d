"""Model distribution by tensors: each process of a job holds a slice of the weights, and all compute the same rows.

Linear layers and convolutions are cut along their outputs, or along their inputs where those come in slices already, so
that two layers in a row need one exchange (Shoeybi et al. 2019, arXiv:1909.08053, section 3). What lies between goes by
the rules of torch's DTensor, which knows how slices pass through views, transpositions, matrix products and arithmetic:
heads of attention stay apart without a word about attention here. What it has no rule for is computed by all, whole.

Which layer is cut how is found by running the network once, not given by hand: a quantized, factorized or pruned
network is a program like any other. Layers in int8 are cut in their codes; of other encodings the decoded weight is
cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_leaves, tree_map

from featherweight.arrays import Rows
from featherweight.encodings import PACKED_BITS
from featherweight.int8 import computed, constants, use_int8
from featherweight.job import Job

LAYERS = {  # operators, and how many dimensions an input has behind its channels
    torch.ops.aten.linear.default: 0,
    torch.ops.aten.conv1d.default: 1,
    torch.ops.aten.conv1d.padding: 1,
    torch.ops.aten.conv2d.default: 2,
    torch.ops.aten.conv2d.padding: 2,
}
GROUPS = 6  # where a convolution has them among its arguments
OUTPUTS, INPUTS, GROUPWISE, WHOLE = "outputs", "inputs", "groups", "whole"  # what a layer is cut along
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _poolings() -> set[Any]:
    library = torch.ops.aten
    names = ("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
    return {getattr(library, name).default for name in names}


POOLINGS = _poolings()  # each channel by itself


class TensorSplit:
    """A network of which this process holds slices; see `distributed.Way`.

    Args:
        job: one slice for each of its processes.
        network: the whole, positional; torn apart.
        example: a batch, whose size all batches have.
        made: what it returns.
    """

    def __init__(self, job: Job, network: fx.GraphModule, example: Sequence[np.ndarray], made: Sequence[Rows]) -> None:
        self._job, self.rows = job, len(example[0])
        self._inputs = [array.copy() for array in example]
        self.plan = Plan(job)
        with torch.no_grad():
            _Planning(network, self.plan).run(*self._given(), enable_io_processing=False)
            biases = keep_slices(network, self.plan)
            if job.device == "cpu":
                network = use_int8(network)
            drop_unread(network)
        self._sliced = _Sliced(network, self.plan, biases)

    def _given(self) -> list[Tensor]:
        return [torch.from_numpy(array).to(self._job.device) for array in self._inputs]

    def step(self, rows: int, inputs: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
        for place, array in zip(self._inputs, inputs or [], strict=False):
            place[:rows], place[rows:] = array, array[-1]
        self._job.share(self._inputs)
        with torch.no_grad():
            found = self._sliced.run(*self._given(), enable_io_processing=False)
        return None if self._job.rank else [value[:rows].cpu().numpy() for value in found]


class Plan:
    """How each layer is cut, and where slices have to be put together: the same in all processes."""

    def __init__(self, job: Job) -> None:
        self.rank, self.count = job.rank, job.count
        self.mesh = init_device_mesh(job.device.partition(":")[0], (job.count,))
        self.ways: dict[str, str] = {}  # by a layer's node
        self.gathered: set[str] = set()  # nodes that get whole inputs

    def whole(self, value: Any) -> Any:
        """A plain tensor that all processes hold."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def slice(self, value: Any, dim: int) -> Tensor:
        """This process's part along `dim`, which the number of processes divides."""
        if is_cut(value, dim):
            return value.to_local()
        return self.whole(value).chunk(self.count, dim)[self.rank].contiguous()

    def cut(self, part: Tensor, dim: int) -> DTensor:
        """The tensor of which every process holds a part along `dim`."""
        return DTensor.from_local(part, self.mesh, [Shard(dim)], run_check=False)

    def summed(self, part: Tensor) -> Tensor:
        """The sum of what the processes hold, plain."""
        mine = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return mine.redistribute(placements=[Replicate()]).to_local()

    def way(self, kind: Any, x: Any, weight: Tensor, groups: int) -> str:
        """Along what a layer is cut whose input is `x`."""
        outputs, inputs = weight.shape[0] % self.count == 0, weight.shape[1] % self.count == 0
        if groups > 1:
            return GROUPWISE if groups % self.count == 0 else WHOLE
        if inputs and is_cut(x, x.dim() - 1 - LAYERS[kind]):
            return INPUTS
        return OUTPUTS if outputs else WHOLE

    def apply(self, way: str, behind: int, layer: Callable[[Any], Tensor], x: Any, bias: Tensor | None) -> Any:
        """What a layer makes of `x`, where `layer` computes with this process's slice and `bias` comes after."""
        channels = x.dim() - 1 - behind
        if way == WHOLE:
            return layer(self.whole(x))
        if way == OUTPUTS:
            return self.cut(layer(self.whole(x)), channels)
        part = layer(self.slice(x, channels))
        if way == GROUPWISE:
            return self.cut(part, channels)
        total = self.summed(part)
        return total if bias is None else total + bias.view(-1, *[1] * behind)


def is_cut(value: Any, dim: int) -> bool:
    """Whether processes hold equal parts of a tensor along `dim`."""
    return (
        isinstance(value, DTensor)
        and value.placements == (Shard(dim),)
        and value.shape[dim] % value.device_mesh.size() == 0
    )


class _Split(fx.Interpreter):
    """Runs a program on tensors that are plain and whole, or DTensors of which each process has a part."""

    def __init__(self, program: fx.GraphModule, plan: Plan) -> None:
        super().__init__(program)
        self.plan = plan

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return tree_map(self.plan.whole, super().run_node(n))
        args, keywords = self.fetch_args_kwargs_from_env(n)
        if (found := self.layer(n, args)) is not None:
            return found
        if n.op != "call_function" or not _any_cut((args, keywords)):
            return super().run_node(n)
        return self.cut_operator(n, args, keywords)

    def layer(self, n: fx.Node, args: tuple[Any, ...]) -> Any:
        """What a layer returns; None where the node is none."""
        raise NotImplementedError

    def cut_operator(self, n: fx.Node, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """What any other operator makes of tensors some of which are cut."""
        if n.name in self.plan.gathered:
            args, keywords = tree_map(self.plan.whole, (args, keywords))
            return n.target(*args, **keywords)  # type: ignore[operator]
        if (dim := _kept_apart(n.target, args)) is not None:
            local = tree_map(lambda value: value.to_local() if isinstance(value, DTensor) else value, (args, keywords))
            return self.plan.cut(n.target(*local[0], **local[1]), dim)  # type: ignore[operator]
        with implicit_replication():
            found = n.target(*args, **keywords)  # type: ignore[operator]
        return tree_map(_plain_unless_cut, found)


def _any_cut(values: Any) -> bool:
    return any(isinstance(value, DTensor) for value in tree_leaves(values))


def _plain_unless_cut(value: Any) -> Any:
    if not isinstance(value, DTensor) or any(isinstance(placement, Shard) for placement in value.placements):
        return value
    return value.full_tensor()


def _kept_apart(operator: Any, args: tuple[Any, ...]) -> int | None:
    """The dimension along which tensors are cut and each part is computed by itself; None where DTensor is to know."""
    cut = [value for value in args if isinstance(value, DTensor)]
    if not args or not isinstance(args[0], DTensor) or not isinstance(args[0].placements[0], Shard):
        return None
    dim = args[0].placements[0].dim
    if operator is torch.ops.featherweight.fake_quantize.default and len(cut) == 1:
        return dim
    if operator in POOLINGS and dim == 1 and is_cut(args[0], 1):
        return dim
    mask = args[3] if len(args) > 3 else None
    heads = args[0].dim() - 3
    shared = mask is None or (not isinstance(mask, DTensor) and (mask.dim() < 3 or mask.shape[-3] == 1))
    if operator is ATTENTION and len(cut) == 3 and shared and heads > 0 and all(is_cut(v, heads) for v in cut):
        return heads
    return None


class _Planning(_Split):
    """Decides how to cut each layer, by what comes to it; weights are cut as they are used."""

    def __init__(self, program: fx.GraphModule, plan: Plan) -> None:
        super().__init__(program, plan)
        self._fixed = constants(program.graph)

    def layer(self, n: fx.Node, args: tuple[Any, ...]) -> Any:
        if n.target not in LAYERS or not self._fixed.issuperset(a for a in n.args[1:3] if isinstance(a, fx.Node)):
            return None
        x, weight, *_ = args
        bias, groups = args[2] if len(args) > 2 else None, args[GROUPS] if len(args) > GROUPS else 1
        way = self.plan.ways[n.name] = self.plan.way(n.target, x, weight, groups)
        own, own_bias, rest = slices(self.plan, way, weight, bias, args[3:])
        operator: Any = n.target
        return self.plan.apply(way, LAYERS[operator], lambda part: operator(part, own, own_bias, *rest), x, bias)

    def cut_operator(self, n: fx.Node, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        try:
            return super().cut_operator(n, args, keywords)
        except Exception:  # DTensor has no rule, in all processes alike; what else is wrong is raised below
            self.plan.gathered.add(n.name)
            return super().cut_operator(n, args, keywords)


def slices(
    plan: Plan, way: str, weight: Tensor, bias: Tensor | None, rest: Sequence[Any]
) -> tuple[Tensor, Tensor | None, list[Any]]:
    """This process's weight, the bias that its layer adds, and what else the operator takes."""
    rest = list(rest)
    if way == WHOLE:
        return weight, bias, rest
    if way == INPUTS:
        return plan.slice(weight, 1), None, rest
    if way == GROUPWISE:
        rest[GROUPS - 3] //= plan.count
    return plan.slice(weight, 0), None if bias is None else plan.slice(bias, 0), rest


class _Sliced(_Split):
    """Runs a program in which weights are slices."""

    def __init__(self, program: fx.GraphModule, plan: Plan, biases: dict[str, Tensor]) -> None:
        super().__init__(program, plan)
        self._biases = biases

    def layer(self, n: fx.Node, args: tuple[Any, ...]) -> Any:
        name = n.name.removesuffix("_int8")
        if name not in self.plan.ways:
            return None
        target: Any = n.target
        layer = self.submodules[target] if n.op == "call_module" else lambda x: target(x, *args[1:])
        return self.plan.apply(self.plan.ways[name], n.meta["behind"], layer, args[0], self._biases.get(name))


# ------------------------------------------------------------------------------------------------ the slices


def keep_slices(program: fx.GraphModule, plan: Plan) -> dict[str, Tensor]:
    """Puts this process's slices in the place of weights. Returns the biases that come after an exchange."""
    known: dict[fx.Node, Tensor | None] = {}
    biases = {}
    for node in list(program.graph.nodes):
        if node.name not in plan.ways or node.target not in LAYERS:
            continue
        node.meta["behind"] = LAYERS[node.target]
        way, (x, weight, *_) = plan.ways[node.name], node.args
        offset = node.args[2] if len(node.args) > 2 else None
        dense, bias = computed(program, weight, known), None if offset is None else computed(program, offset, known)
        if way == WHOLE:
            continue
        assert dense is not None
        own, own_bias, rest = slices(plan, way, dense, bias, node.args[3:])
        if way == INPUTS and bias is not None:
            biases[node.name] = bias
        with program.graph.inserting_before(node):
            mine = _codes(program, plan, way, node.name, weight, own) or _read(program, f"{node.name}_weight", own)
            also = None if own_bias is None else _read(program, f"{node.name}_bias", own_bias)
        node.args = (x, mine, also, *rest) if len(node.args) > 2 else (x, mine)
    program.graph.eliminate_dead_code()
    program.recompile()
    return biases


def _codes(program: fx.GraphModule, plan: Plan, way: str, name: str, weight: fx.Node, own: Tensor) -> fx.Node | None:
    """The operator that decodes a slice of int8 codes with a scale for each output; None for other encodings."""
    if weight.target is not torch.ops.featherweight.dequantize.default:
        return None
    axis, block, bits = weight.args[3:]
    if (axis, block) != (0, 0) or bits <= PACKED_BITS:  # type: ignore[operator]
        return None
    codes, scale = (computed(program, node, {}) for node in weight.args[:2])  # type: ignore[arg-type]
    assert codes is not None and scale is not None
    dim = 1 if way == INPUTS else 0
    nodes = [_read(program, f"{name}_codes", plan.slice(codes, dim))]
    nodes.append(_read(program, f"{name}_scale", scale if dim else plan.slice(scale, 0)))
    return program.graph.call_function(weight.target, (*nodes, list(own.shape), axis, block, bits))


def _read(program: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    program.register_buffer(name, value)
    return program.graph.get_attr(name)


def drop_unread(program: fx.GraphModule) -> None:
    """Forgets weights that no node reads any more."""
    read = {str(node.target) for node in program.graph.nodes if node.op in ("get_attr", "call_module")}
    for holder, names in ((program._parameters, list(program._parameters)), (program._buffers, list(program._buffers))):
        for name in names:
            if name not in read:
                del holder[name]
    for name, _ in list(program.named_children()):
        if not any(target == name or target.startswith(f"{name}.") for target in read):
            delattr(program, name)
