"""Model distribution by layers: each process of a job holds some of a network's layers, and rows pass through them.

The network is cut where the slowest stage takes least time: what each node of the program takes is measured, and so is
how fast two processes pass data, for what crosses a cut has to be sent. The cutting, the sending and the schedule
(GPipe, Huang et al. 2019, arXiv:1811.06965, without the way back) are those of `torch.distributed.pipelining`.

Two of its habits are worked round. It passes a value straight to the stage that reads it, in an order that sender and
receiver may see differently where a value skips a stage: here each stage hands on what a later one reads, so that
values only go to the next. And it passes what is computed from weights alone: here each stage computes that itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.pipelining import ScheduleGPipe, pipeline
from torch.distributed.pipelining.stage import build_stage
from torch.utils._pytree import tree_leaves

from featherweight.arrays import Rows
from featherweight.errors import ArtifactError
from featherweight.int8 import constants, use_int8
from featherweight.job import Job

PARTS = 4  # of a step for each stage: how many batches are on their way at once
RUNS = 3  # of the network, to time its nodes
MESSAGE = 1 << 20  # bytes, to time how fast they pass
MESSAGES = 5
IN_ONE_PIECE: dict[str, Any] = {"memory_format": torch.contiguous_format}


class LayerSplit:
    """One stage of a network, and its place in the pipeline; see `distributed.Way`.

    Args:
        job: one stage for each of its processes.
        network: the whole, positional; torn apart.
        example: a batch, whose size all batches have.
        made: what it returns.

    Raises:
        ArtifactError: it has fewer nodes than there are processes.
    """

    def __init__(self, job: Job, network: fx.GraphModule, example: Sequence[np.ndarray], made: Sequence[Rows]) -> None:
        self._job, self._made = job, made
        batch, parts = len(example[0]), PARTS * job.count
        self.rows = batch * parts
        self._inputs = [np.empty((self.rows, *array.shape[1:]), array.dtype) for array in example]
        tensors = tuple(torch.from_numpy(array).to(job.device) for array in example)
        with torch.no_grad():
            pipe = pipeline(network, tensors, split_policy=lambda traced: _cut(traced, tensors, job))
        self._order = _first_inputs(pipe.split_gm)
        stage: Any = pipe.get_stage_module(job.rank)
        if job.device == "cpu":
            stage = use_int8(stage)
        self.stage = build_stage(stage, job.rank, pipe.info(), torch.device(job.device))
        self._schedule = ScheduleGPipe(self.stage, parts)

    def step(self, rows: int, inputs: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
        last = self._job.count - 1
        found = tree_leaves(self._stepped(rows, inputs))  # the library returns a single output by itself
        if last == 0:
            return [value[:rows].cpu().numpy() for value in found]
        if self._job.rank == last:
            self._job.send([value[:rows].cpu().numpy() for value in found], 0)
        if self._job.rank:
            return None
        outputs = [np.empty((rows, *spec.shape), spec.dtype) for spec in self._made]
        self._job.receive(outputs, last)
        return outputs

    def _stepped(self, rows: int, inputs: Sequence[np.ndarray] | None) -> Any:
        """What the last stage returns; the last row fills up what is missing, as for replicas."""
        with torch.no_grad():
            if inputs is None:
                return self._schedule.eval()
            for place, array in zip(self._inputs, inputs, strict=True):
                place[:rows], place[rows:] = array, array[-1]
            return self._schedule.eval(*(torch.from_numpy(self._inputs[i]).to(self._job.device) for i in self._order))


def _first_inputs(whole: fx.GraphModule) -> list[int]:
    """Which of the network's inputs the first stage reads, in its order."""
    places = [node for node in whole.graph.nodes if node.op == "placeholder"]
    first = next(node for node in whole.graph.nodes if node.op == "call_module")
    return [places.index(node) for node in first.args]


# ------------------------------------------------------------------------------------------------ where to cut


def _cut(traced: fx.GraphModule, example: Sequence[Tensor], job: Job) -> fx.GraphModule:
    """The program with a mark at each cut, on which all processes agree, and values handed on from stage to stage."""
    graph, fixed = traced.graph, constants(traced.graph)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output") and node not in fixed]
    pace = seconds_per_byte(job)
    places: list[int] = []
    if job.rank == 0:
        seconds = node_seconds(traced, example, job.device)
        crossing = [size * pace for size in crossing_bytes(graph, nodes)]
        places = balanced([seconds.get(node.name, 0.0) for node in nodes], crossing, job.count)
    starts = [begin for begin, _ in job.share_pairs([(place, 0) for place in places])]
    if len(starts) < job.count - 1:
        raise ArtifactError(
            f"The network cannot be cut into {job.count} parts: it is too short. Start fewer processes."
        )
    stage_of = _marked(graph, [nodes[start] for start in starts])
    _own_constants(graph, stage_of, fixed)
    _hand_on(graph, stage_of, fixed)
    for node in graph.nodes:  # the file does not tell modules apart, and the library wants each node to lie in one
        node.meta["nn_module_stack"] = {"": ("", "torch.fx.GraphModule")}
    graph.lint()
    traced.recompile()
    return traced


def node_seconds(program: fx.GraphModule, example: Sequence[Tensor], device: str) -> dict[str, float]:
    """What each node takes, by the name it has before layers become int8: the median of a few runs."""
    timed = fx.GraphModule(program, copy.deepcopy(program.graph))  # the weights are the same
    if device == "cpu":
        timed = use_int8(timed)
    found: dict[str, list[float]] = {}

    class Timing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            begin = time.perf_counter()
            value = super().run_node(n)
            if device != "cpu":
                torch.cuda.synchronize()
            found.setdefault(n.name.removesuffix("_int8"), []).append(time.perf_counter() - begin)
            return value

    with torch.no_grad():
        for _ in range(RUNS + 1):
            Timing(timed).run(*example, enable_io_processing=False)
    return {name: float(np.median(values[1:])) for name, values in found.items()}


def seconds_per_byte(job: Job) -> float:
    """How long a byte takes between the first two processes; 0 where there is one."""
    message, times = [np.zeros(MESSAGE, np.uint8)], []
    for _ in range(MESSAGES if job.count > 1 else 0):
        dist.barrier()
        begin = time.perf_counter()
        if job.rank == 0:
            job.send(message, 1)
        elif job.rank == 1:
            job.receive(message, 0)
        times.append((time.perf_counter() - begin) / MESSAGE)
    return float(np.median(times)) if times else 0.0


def crossing_bytes(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[float]:
    """For each node, how much is computed before it (or given) and read from it on: what a cut there has to pass.

    What is no tensor cannot be passed: infinitely much.
    """
    at = {node: number for number, node in enumerate(nodes)}
    passed = np.zeros(len(nodes) + 1)
    for node in graph.nodes:
        if node in at or node.op == "placeholder":
            last = max((at.get(user, len(nodes) - 1) for user in node.users), default=-1)
            passed[at.get(node, -1) + 1 : last + 1] += _bytes_of(node)
    return [float(size) for size in passed[:-1]]


def _bytes_of(node: fx.Node) -> float:
    value = node.meta.get("val")
    return float(value.numel() * value.element_size()) if isinstance(value, Tensor) else float("inf")


def balanced(seconds: Sequence[float], crossing: Sequence[float], stages: int) -> list[int]:
    """The first node of each stage but the first, so that the slowest takes least time, what it is sent included.

    Args:
        seconds: of each node.
        crossing: seconds that it takes to pass what crosses a cut before the node.
        stages: as many as the nodes at most; else fewer places are returned.

    >>> balanced([1, 1, 1, 3], [0, 0, 0, 0], 2), balanced([1, 1, 1, 1], [0, 0, 9, 0], 2), balanced([2], [0], 3)
    ([3], [1], [])
    """
    count = len(seconds)
    total = np.concatenate([[0.0], np.cumsum(seconds)])
    best, cuts = total[1:], []  # best: of the slowest stage, if the nodes so far were all
    for _ in range(1, min(stages, count)):
        # rows: the stage's last node; columns: its first
        stage = total[1:, None] - total[None, :-1] + np.asarray(crossing, float)[None, :]
        before = np.concatenate([[np.inf], best[:-1]])
        slowest = np.maximum(stage, before[None, :])
        slowest[np.triu_indices(count, 1)] = np.inf
        cuts.append(slowest.argmin(axis=1))
        best = slowest.min(axis=1)
    if not np.isfinite(best[-1]):
        return []
    places, last = [], count - 1
    for first in reversed(cuts):
        places.append(int(first[last]))
        last = places[-1] - 1
    return places[::-1]


def _marked(graph: fx.Graph, starts: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Puts a mark before each of `starts`. Returns the stage of every node."""
    marks = set()
    for start in starts:
        with graph.inserting_before(start):
            marks.add(graph.call_function(torch.ops.pippy._pipe_split.default))
    stage, stage_of = 0, {}
    for node in graph.nodes:
        stage += node in marks
        if node not in marks:
            stage_of[node] = stage
    return stage_of


def _own_constants(graph: fx.Graph, stage_of: dict[fx.Node, int], fixed: set[fx.Node]) -> None:
    """What is computed from weights alone is computed in each stage that reads it."""
    copies: dict[tuple[fx.Node, int], fx.Node] = {}

    def own(node: fx.Node, stage: int, before: fx.Node) -> fx.Node:
        if node.op == "get_attr" or stage_of[node] == stage:
            return node
        if (node, stage) not in copies:
            read = {other: own(other, stage, before) for other in node.all_input_nodes}
            with graph.inserting_before(before):
                copies[node, stage] = graph.node_copy(node, read.__getitem__)
            stage_of[copies[node, stage]] = stage
        return copies[node, stage]

    for node in list(stage_of):
        if node not in fixed:
            for read in node.all_input_nodes:
                if read in fixed:
                    node.replace_input_with(read, own(read, stage_of[node], node))
    fixed.update(copies.values())


def _hand_on(graph: fx.Graph, stage_of: dict[fx.Node, int], fixed: set[fx.Node]) -> None:
    """Values pass to the next stage only: those that a later one reads are copied in each between.

    The first copy is made where the value is computed, so that it lies in one piece, as gloo wants what it sends. What
    the network is given is copied in the first stage: later ones are given nothing.
    """
    firsts: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node in stage_of and node.op not in ("placeholder", "get_attr"):
            firsts.setdefault(stage_of[node], node)
    for node in [node for node in graph.nodes if node in stage_of and node not in fixed]:
        own = stage_of[node]
        users = [user for user in node.users if stage_of[user] > own]
        last, value = max((stage_of[user] for user in users), default=own), node
        for stage in range(own, last + 1):
            for user in users:
                if stage_of[user] == stage:
                    user.replace_input_with(node, value)
            if stage < last:
                computed_here = stage == own and node.op != "placeholder"
                with graph.inserting_after(node) if computed_here else graph.inserting_before(firsts[stage]):
                    copied = graph.call_function(torch.ops.aten.clone.default, (value,), IN_ONE_PIECE)
                copied.meta, value = {**value.meta, "val": value.meta["val"].contiguous()}, copied
