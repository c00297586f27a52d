"""Linear layers with nearly no weights left, multiplied in compressed rows (CSR, MKL's kernel) where that is faster.

The torch target puts them where a program holds a linear layer whose weight is dense in the file but nearly all zero.
Whether compressed rows win depends on the machine, the threads and how many rows the input has, so the first input
decides, by measurement. Convolutions stay dense: unfolding their
input for such a product was not tried.
"""

from __future__ import annotations

import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from featherweight.int8 import constant

ZEROS = 0.9  # share of the weights from which compressed rows are tried: fewer were not measured
TURNS = 5  # how often each way is tried; the best time of each counts


class SparseLinear(nn.Module):
    """x Wᵀ + b. Holds W both ways until the first input has shown which is faster, then the better one alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dense: Tensor | None = weight.detach()
        self.rows: Tensor | None = compressed(self.dense)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None and self.rows is not None and x.numel():
            self._decide(x)
        return self._sparse(x) if self.dense is None else self._dense(x)

    def _dense(self, x: Tensor) -> Tensor:
        assert self.dense is not None
        return F.linear(x, self.dense, self.bias)

    def _sparse(self, x: Tensor) -> Tensor:
        assert self.rows is not None
        y = (self.rows @ x.reshape(-1, x.shape[-1]).t()).t()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _decide(self, x: Tensor) -> None:
        best = {self._dense: float("inf"), self._sparse: float("inf")}
        for _ in range(TURNS):
            for way in best:
                start = time.perf_counter()
                way(x)
                best[way] = min(best[way], time.perf_counter() - start)
        if best[self._sparse] < best[self._dense]:
            self.dense = None
        else:
            self.rows = None


def compressed(weight: Tensor) -> Tensor:
    """`weight`, (out, in), in compressed rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return weight.to_sparse_csr()


def use_sparse(program: fx.GraphModule) -> fx.GraphModule:
    """`program` with a SparseLinear for each linear layer of which at least `ZEROS` of the weights are zero."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.linear.default:
            _replace(program, node)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _replace(program: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias = (*node.args, None)[:3]
    dense, offset = constant(program, weight), constant(program, bias)
    if dense is None or dense.dtype != torch.float32 or (dense == 0).float().mean() < ZEROS:
        return
    if bias is not None and offset is None:
        return  # it is computed
    name = f"sparse_{node.name}"
    program.add_submodule(name, SparseLinear(dense, offset))
    with program.graph.inserting_before(node):
        node.replace_all_uses_with(program.graph.call_module(name, (x,)))
    program.graph.erase_node(node)
