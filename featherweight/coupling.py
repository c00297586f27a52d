"""Which channels must be removed together, and their removal.

`groups` traces a network and asks `channel_rules` which indices of which tensors hang together. What must go at
once is a *unit* (a channel, a feature, an attention head, with every row and column of every weight that belongs
to it); units that look alike form a `Group` and compete with one another. `cut` takes units out, `trial` does so
on a copy and compares it with the original whose units were silenced. How much each unit matters is not known here.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from featherweight import surgery
from featherweight.channel_rules import Nodes, Ties, follow
from featherweight.errors import LayerError, RecipeError
from featherweight.workload import Batch, call, outputs, tensors


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one tensor that belongs to the units of a group.

    Args:
        names: all the names of the tensor in its network: more than one where layers share it.
        dim: the dimension along which it is cut.
        index: which indices belong to which unit.
        role: "makes" where the tensor computes the units, "reads" where it contracts them, else "carries".
    """

    names: tuple[str, ...]
    dim: int
    index: Int[np.ndarray, "units each"]
    role: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that hold the tensor; the tensor itself where that is the whole network."""
        return tuple(name.rpartition(".")[0] or name for name in self.names)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that look alike.

    Args:
        slices: where the units are; all list them in the same order.
        kind: "channels" (of convolutions), "features" (of the others) or "heads".
        macs: multiply-adds per example that one unit takes part in, as input or output.
        frozen: why none can be removed, or None.
    """

    slices: tuple[Slice, ...]
    kind: str
    macs: float
    frozen: str | None = None

    def __len__(self) -> int:
        return len(self.slices[0].index)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that compute the units."""
        return tuple(dict.fromkeys(layer for s in self.slices if s.role == "makes" for layer in s.layers))

    @property
    def name(self) -> str:
        """The layers that compute the units, the first three of them by name: `a.query + key + value`."""
        first, *others = self.layers[:3]
        beside = first.rpartition(".")[0] + "."
        more = len(self.layers) - 3
        return " + ".join([first, *(name.removeprefix(beside) for name in others), *([f"{more} more"] * (more > 0))])

    @property
    def width(self) -> int:
        """How many channels of the layer that computes it one unit is."""
        return next(s.index.shape[1] for s in self.slices if s.role == "makes")

    @property
    def inlets(self) -> tuple[Slice, ...]:
        """The slices that, set to zero, silence the units: those that read them, or all where none does."""
        return tuple(s for s in self.slices if s.role == "reads") or self.slices


Cuts = Sequence[tuple[Group, Sequence[int]]]

# ------------------------------------------------------------------------------------------------ finding


def groups(model: nn.Module, example: Batch) -> list[Group]:
    """All groups of units that layers of `model` compute, frozen ones included, in the order of the network.

    Raises:
        RecipeError: weights are encoded already.
        ExportError: the network cannot be traced.
    """
    _refuse_encoded(model)
    program = surgery.trace(model, example)
    owners = _owners(model)
    named = {name: owner for owner in owners for name in owner.names}
    signature = program.graph_signature
    origin = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored = {
        node: named[origin[node.name]].labels
        for node in program.graph.nodes
        if node.op == "placeholder" and origin.get(node.name) in named
    }
    ties = Ties(sum(sum(owner.shape) for owner in owners))
    follow(program.graph, stored, ties, max(2, tensors(example)[0].shape[0]))
    return _grouped(owners, ties)


def _refuse_encoded(model: nn.Module) -> None:
    for name, encoding in surgery.encodings(model).items():
        raise RecipeError(
            f"Channels of {type(model).__name__} cannot be removed any more: {name!r} is stored as "
            f"{encoding.describe()}. Steps that change the shape, such as prune_channels, come before those that "
            "change how weights are stored, such as quantize_static: swap them in the recipe."
        )


@dataclass(frozen=True, eq=False)
class _Owner:
    """One tensor and the first of the nodes that stand for its indices: those of dim 0, then of dim 1, ..."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    first: int
    convolves: bool

    @property
    def labels(self) -> tuple[Nodes, ...]:
        starts = self.first + np.cumsum((0, *self.shape))
        return tuple(np.arange(a, b) for a, b in pairwise(starts))


def _owners(model: nn.Module) -> list[_Owner]:
    names: dict[int, list[str]] = defaultdict(list)
    values: dict[int, Tensor] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, value in named(remove_duplicate=False):
            if value.is_floating_point():
                names[id(value)].append(name)
                values[id(value)] = value
    found, first = [], 0
    for key, value in values.items():
        layer = model.get_submodule(names[key][0].rpartition(".")[0])
        found.append(_Owner(tuple(names[key]), tuple(value.shape), first, isinstance(layer, nn.modules.conv._ConvNd)))
        first += sum(value.shape)
    return found


def _grouped(owners: list[_Owner], ties: Ties) -> list[Group]:
    unit_of = _units(ties)
    makes, reads, heads = (_mask(ties.count, arrays) for arrays in (ties.makes, ties.reads, ties.heads))
    frozen: dict[int, str] = {}
    for nodes, why in ties.frozen:
        for unit in np.unique(unit_of[nodes]):
            frozen.setdefault(int(unit), why)
    is_head = set(unit_of[heads].tolist())

    dims = [(owner, dim, nodes) for owner in owners for dim, nodes in enumerate(owner.labels)]
    parts: dict[int, dict[int, Nodes]] = defaultdict(dict)  # unit -> dim -> its nodes there
    wanted = np.zeros(ties.count, dtype=bool)
    wanted[unit_of[makes]] = True  # by unit: only what a layer computes is listed
    for key, (_, _, nodes) in enumerate(dims):
        for unit, members in _by_unit(nodes[wanted[unit_of[nodes]]], unit_of):
            parts[unit][key] = members

    alike: dict[tuple, list[int]] = defaultdict(list)
    for unit, found in parts.items():
        structure = tuple((key, len(nodes)) for key, nodes in found.items())
        alike[structure, frozen.get(unit), unit in is_head].append(unit)

    result = []
    for (structure, why, head), units in alike.items():
        slices, convolves = [], False
        for key, _ in structure:
            owner, dim, all_nodes = dims[key]
            index = np.stack([parts[unit][key] for unit in units])
            role = "makes" if makes[index].any() else "reads" if reads[index].any() else "carries"
            convolves |= role == "makes" and owner.convolves
            slices.append(Slice(owner.names, dim, index - all_nodes[0], role))
        macs = sum(float(ties.macs[parts[units[0]][key]].sum()) for key, _ in structure)
        if len(units) == 1:
            why = why or "all its channels hang together"
        kind = "heads" if head else "channels" if convolves else "features"
        result.append(Group(tuple(slices), kind, macs, why))
    return result


def _units(ties: Ties) -> Nodes:
    """The number of the unit that each node belongs to: the connected components of all ties."""
    nothing = np.zeros(0, dtype=np.int64)
    a = np.concatenate([nothing, *(pair[0] for pair in ties.united)])
    b = np.concatenate([nothing, *(pair[1] for pair in ties.united)])
    return connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(ties.count, ties.count)), directed=False)[1]


def _mask(count: int, arrays: Iterable[Nodes]) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    for nodes in arrays:
        mask[nodes] = True
    return mask


def _by_unit(nodes: Nodes, unit_of: Nodes) -> list[tuple[int, Nodes]]:
    """`nodes` sorted into their units, in the order in which these first appear."""
    order = np.argsort(unit_of[nodes], kind="stable")
    units, starts = np.unique(unit_of[nodes][order], return_index=True)
    found = zip(units.tolist(), np.split(nodes[order], starts[1:]), strict=False)
    return sorted(found, key=lambda pair: int(pair[1][0]))


# ------------------------------------------------------------------------------------------------ cutting


def cut(model: nn.Module, cuts: Cuts) -> None:
    """Removes units from `model`, all at once, and puts the sizes of its layers right.

    Indices are those of the network in which the groups were found, so cuts do not follow one another.

    Args:
        model: changed in place: new parameters, that require gradients where the old ones did.
        cuts: groups and the units that go.
    """
    touched: dict[str, nn.Module] = {}
    for names, dim, index in _collected(cuts, lambda group: group.slices):
        old = tensor_of(model, names[0])
        keep = torch.ones(old.shape[dim], dtype=torch.bool)
        keep[index] = False
        new = old.detach().index_select(dim, keep.nonzero()[:, 0].to(old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for name in names:
            path, _, tensor = name.rpartition(".")
            touched[path] = model.get_submodule(path)
            setattr(touched[path], tensor, new)
            above = path.rpartition(".")[0]  # the recurrent layer, where a weight of one is a layer of its own
            touched[above] = model.get_submodule(above)
    for layer in dict.fromkeys(touched.values()):
        _put_sizes_right(layer)


def silence(model: nn.Module, cuts: Cuts) -> None:
    """Sets to zero, in place, what reads the units: `model` then computes what it will without them."""
    with torch.no_grad():
        for names, dim, index in _collected(cuts, lambda group: group.inlets):
            tensor_of(model, names[0]).index_fill_(dim, torch.from_numpy(index), 0.0)


def trial(model: nn.Module, example: Batch, cuts: Cuts, tolerance: float = 1e-4) -> nn.Module:
    """A copy of `model` without the units, whose outputs on `example` are those of `model` with them silenced.

    Raises:
        LayerError: it does not run, or its outputs differ by more than `tolerance` times the largest of them. The
            message is the reason alone.
    """
    copied = copy.deepcopy(model)
    silence(copied, cuts)
    with torch.no_grad():
        expected = outputs(call(copied, example))
        cut(copied, cuts)
        try:
            found = outputs(call(copied, example))
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0][:160]
            raise LayerError(f"its forward fixes the width: {type(error).__name__}: {first}") from error
    for before, after in zip(expected, found, strict=True):
        if before.shape != after.shape:
            raise LayerError(f"without some of it the output is {tuple(after.shape)}, not {tuple(before.shape)}")
        limit = tolerance * max(float(before.float().abs().max()), torch.finfo(torch.float32).tiny)
        if not bool(((before.float() - after.float()).abs() <= limit).all()):
            raise LayerError("its forward depends on the width: without some of it the other channels change")
    return copied


def _collected(cuts: Cuts, slices: Callable[[Group], tuple[Slice, ...]]) -> list[tuple[tuple[str, ...], int, Nodes]]:
    """The indices that go, joined over all groups, by tensor and dimension."""
    found: dict[tuple[tuple[str, ...], int], list[Nodes]] = defaultdict(list)
    for group, units in cuts:
        for s in slices(group):
            found[s.names, s.dim].append(s.index[list(units)].reshape(-1))
    return [(names, dim, np.concatenate(parts)) for (names, dim), parts in found.items()]


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called `name`."""
    layer, _, tensor = name.rpartition(".")
    return getattr(model.get_submodule(layer), tensor)


def _put_sizes_right(layer: nn.Module) -> None:
    """The attributes that say how wide a layer is, from the tensors that it now has."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        layer.in_channels, layer.out_channels = layer.weight.shape[:2]
    elif isinstance(layer, nn.modules.conv._ConvNd):
        if 1 < layer.groups == layer.in_channels:  # depthwise
            layer.groups = layer.groups * layer.weight.shape[0] // layer.out_channels
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.RNNBase):
        first, hidden = (getattr(layer, name) for name in ("weight_ih_l0", "weight_hh_l0"))
        layer.input_size, layer.hidden_size = first.shape[1], hidden.shape[1]
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = len(next(t for t in (layer.running_mean, layer.weight) if t is not None))
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
