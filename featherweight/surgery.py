"""Finding and changing the layers of a network: beside `hooks` and `replay` the only place that walks or hooks modules.

What flows through them is the affair of `hooks`, which channels hang together that of `coupling`, and what to put
into a layer a pass's.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from featherweight.encodings import ON_A_GRID, DynamicQuantizer, Encoding, InputQuantizer, Masked
from featherweight.errors import ExportError, LayerError, RecipeError
from featherweight.hooks import returns, watch_inputs
from featherweight.masks import misfit
from featherweight.workload import Batch, call, like, outputs, tensors

QUANTIZER = "input_quantizer"
FLOATS = "featherweight_floats"  # an attribute of a network: in what its target is to compute what stays in floats
OWN_KIND = "featherweight_kind"  # of a class that was derived: the one that its author wrote
NEVER_CALLED = "is not called on the calibration data, so that nothing is known of its inputs"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)  # what multiplies numbers that it reads with a weight
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What torch says of recurrent layers when they are traced: they gather their own parameters anew, which is harmless.
GATHERED = r"The tensor attributes? (self[\w.]*\._flat_weights\[\d+\](, | ))+(was|were) assigned during export"

# ------------------------------------------------------------------------------------------------ coverage


@dataclass(frozen=True)
class Coverage:
    """What a recipe did to each layer, in order: what was done, and what was left and why."""

    done: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def as_rows(self) -> list[dict[str, str]]:
        """One row per entry: `{"layer", "done"}` or `{"layer", "skipped"}`."""
        return [{"layer": layer, "done": what} for layer, what in self.done] + [
            {"layer": layer, "skipped": why} for layer, why in self.left
        ]


_coverage: ContextVar[Coverage | None] = ContextVar("coverage", default=None)


@contextlib.contextmanager
def recording() -> Iterator[Coverage]:
    """What passes say with `done` and `left` inside the block is collected in the Coverage that it yields."""
    coverage = Coverage()
    token = _coverage.set(coverage)
    try:
        yield coverage
    finally:
        _coverage.reset(token)


def done(layer: str, what: str) -> None:
    """A pass says that it changed `layer`."""
    if (coverage := _coverage.get()) is not None:
        coverage.done.append((layer, what))


def left(layer: str, why: str) -> None:
    """A pass says that it left `layer` as it was."""
    if (coverage := _coverage.get()) is not None:
        coverage.left.append((layer, why))


# ------------------------------------------------------------------------------------------------ selecting


def matches(name: str, where: str) -> bool:
    """Whether `name` is chosen by `where`: patterns with `*`, separated by commas, those with `!` left out.

    >>> matches("blocks.0.conv1", "blocks.*, !*.conv2"), matches("blocks.0.conv2", "blocks.*, !*.conv2")
    (True, False)
    """
    patterns = [part.strip() for part in where.split(",") if part.strip()]
    wanted = [p for p in patterns if not p.startswith("!")] or ["*"]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    return any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in unwanted)


def select(model: nn.Module, where: str, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """The layers of the given kinds whose names `where` chooses, in the model's order.

    Raises:
        LayerError: none is chosen; the message lists those there are.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    chosen = {name: module for name, module in layers.items() if matches(name, where)}
    if not chosen:
        kind_names = ", ".join(kind.__name__ for kind in kinds)
        names = list(layers)
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise LayerError(
            f"where={where!r} matches none of the {len(layers)} {kind_names} layers of {type(model).__name__}. "
            + (f"They are: {listed}." if layers else "There are none: leave this step out.")
        )
    return chosen


def layer_of(parameter: str) -> str:
    """The name of the layer that a parameter serves.

    >>> layer_of("blocks.0.conv.bias"), layer_of("blocks.0.conv.parametrizations.weight.0.latent")
    ('blocks.0.conv', 'blocks.0.conv')
    """
    layer, mark, _ = f".{parameter}".rpartition(".parametrizations.")
    return (layer if mark else parameter.rpartition(".")[0]).lstrip(".")


def leave_others(model: nn.Module, where: str, treated: Collection[str], step: str) -> None:
    """Says of every layer that `where` chooses and that has weights, but is none of `treated`, that `step` left it.

    Weights are floating-point tensors of two dimensions or more. `treated` are all that the step names otherwise.
    """
    dense = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()]
    masked = [(name, e.decode()) for name, e in encodings(model).items() if isinstance(e, Masked)]
    weights: dict[str, list[str]] = defaultdict(list)
    for name, value in (*dense, *masked):
        if value.dim() > 1:
            tensor = name.removeprefix(f"{layer_of(name)}.").removeprefix("parametrizations.").partition(".")[0]
            weights[layer_of(name)].append(tensor)
    for name, module in model.named_modules():
        if name in weights and name not in treated and matches(name, where):
            tensors_ = ", ".join(dict.fromkeys(weights[name]))
            left(name, f"is of kind {kind_of(module).__name__}, which {step} does not treat ({tensors_})")


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The class of `layer` as its author wrote it: parametrizations and `derive` make a class of their own of it."""
    kind = parametrize.type_before_parametrizations(layer)
    return getattr(kind, OWN_KIND, kind)


def groups_by_weight(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """`layers` in groups that share one weight, which is to be encoded once for all of a group.

    Layers that share theirs with a layer that is none of `layers` are left, and said to be: encoding it for some
    would store it twice.
    """
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if (encoding := encoding_of(module)) is not None:
            users[id(encoding)].append(name)
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].append(layer_of(f"{name}.tensor"))
    groups: dict[int, dict[str, nn.Module]] = defaultdict(dict)
    for name, layer in layers.items():
        # What another layer's weight is merely computed from is not what that layer is called with.
        own = id(_stored(layer))
        outside = [user for user in users[own] if user not in layers or id(_stored(layers[user])) != own]
        if outside:
            left(name, f"shares its weight with {outside[0]!r}, which is left out")
        else:
            groups[own][name] = layer
    return list(groups.values())


def _stored(layer: nn.Module) -> nn.Module | Tensor:
    """What holds the weight of `layer`: an encoding, a parameter, or the layer, where its weight is computed."""
    if (encoding := encoding_of(layer)) is not None:
        return encoding
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    return layer if weight is None else weight


# ------------------------------------------------------------------------------------------------ changing


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` stands, and wherever the same layer stands under another name."""
    old = model.get_submodule(name)
    for other in [key for key, found in model.named_modules(remove_duplicate=False) if found is old]:
        model.set_submodule(other, module)


def derive(layer: nn.Module, mixin: type[nn.Module]) -> None:
    """What `mixin` defines comes before what the class of `layer` does, which it reaches by `super()`."""
    layer.__class__ = _derived(mixin, type(layer))  # type: ignore[arg-type]


@cache  # so that layers of one class stay so
def _derived(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (mixin, kind), {OWN_KIND: getattr(kind, OWN_KIND, kind)})


class RecurrentWeight(nn.Module):
    """One weight of a recurrent layer, as a layer of its own, which is only read."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def open_recurrent(model: nn.Module) -> None:
    """Makes each weight of recurrent layers a layer of its own: `lstm.ih_l0` holds what `lstm.weight_ih_l0` reads."""
    kinds = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    for layer in list(model.modules()):
        kind: Any = type(layer)
        if kind in kinds:
            weights = {name: p for name, p in layer.named_parameters(recurse=False) if p.dim() > 1}
            for name, weight in weights.items():
                delattr(layer, name)
                layer.add_module(_opened(name), RecurrentWeight(weight).train(layer.training))
            layer.__class__ = type(kind.__name__, (kind,), {name: _reading(_opened(name)) for name in weights})


def _opened(weight: str) -> str:
    return weight.removeprefix("weight_")


def _reading(child: str) -> property:
    return property(lambda layer: layer.get_submodule(child).weight)


def use_linear(model: nn.Module) -> None:
    """Puts `nn.Linear` in the place of transformers' `Conv1D`, a linear layer whose weight lies the other way round."""
    for name, layer in list(model.named_modules()):
        kind: Any = type(layer)
        if f"{kind.__module__}.{kind.__name__}" != "transformers.pytorch_utils.Conv1D" or not name:
            continue
        linear = nn.utils.skip_init(nn.Linear, layer.nx, layer.nf).train(layer.training)
        weight = layer.weight
        linear.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
        linear.bias = layer.bias
        replace(model, name, linear)


def replaceable(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    kinds: tuple[type[nn.Module], ...],
    example: Batch,
    tied: bool = False,
) -> dict[str, nn.Module]:
    """Those of `layers` in whose place other modules can stand. The others are left, and said to be.

    Layers that share a weight are among them where `tied` says that all of them are replaced together.

    A network may do more with a layer than call it: read its weight, ask for its width, give its weight to another.
    So it is tried out: on `example` the outputs must stay as they are with each layer inside an `nn.Sequential`,
    which has neither weight nor width, and all of these must have been called.
    """
    found: dict[str, nn.Module] = {}
    for group in groups_by_weight(model, layers):
        for name, layer in group.items():
            others = [] if tied else [other for other in group if other != name]
            if why := _irreplaceable(name, layer, kinds, others):
                left(name, why)
            else:
                found[name] = layer
    reasons = _read_otherwise(model, found, example)
    for name, why in reasons.items():
        left(name, why)
    return {name: layer for name, layer in found.items() if name not in reasons}


def _irreplaceable(name: str, layer: nn.Module, kinds: tuple[type[nn.Module], ...], others: Sequence[str]) -> str:
    """Why nothing can take the place of `layer`, whatever the network does with it; empty where nothing says so."""
    norms = (WeightNorm, SpectralNorm)  # they only compute the weight
    hooks = [hook for hook in layer._forward_pre_hooks.values() if not isinstance(hook, norms)]
    if not name:
        return "is the whole network: wrap it in a module whose forward calls it"
    if kind_of(layer) not in kinds:
        return f"is of kind {kind_of(layer).__name__}, which may do more than its weight says"
    if others:
        return f"shares its weight with {others[0]!r}, which could not use it any more"
    if hooks or layer._forward_hooks:
        return "has hooks, which would be lost with it"
    return ""


def _read_otherwise(model: nn.Module, layers: Mapping[str, nn.Module], example: Batch) -> dict[str, str]:
    """By name of a layer with which the network does more than call it, or less: what it does."""
    expected = _seeded_outputs(model, example)
    stand_ins = {name: nn.Sequential(layer).eval() for name, layer in layers.items()}
    placed: list[str] = []
    reasons: dict[str, str] = {}

    def place(names: Iterable[str]) -> None:
        for name in names:
            replace(model, name, stand_ins[name])
            placed.append(name)

    def take_back(names: Iterable[str]) -> None:
        for name in list(names):
            replace(model, name, layers[name])
            placed.remove(name)

    try:
        place(stand_ins)
        if _objection(model, example, expected):
            take_back(placed)
            for name in stand_ins:
                place([name])
                if why := _objection(model, example, expected):
                    take_back([name])
                    reasons[name] = why
        called: set[str] = set()
        watch_inputs(model, {name: stand_ins[name] for name in placed}, [example], lambda name, _: called.add(name))
        reasons.update({name: "the network does not call it on the example" for name in placed if name not in called})
    finally:
        take_back(placed)
    return reasons


def _objection(model: nn.Module, example: Batch, expected: Sequence[Tensor]) -> str:
    """What is wrong with the outputs on `example`, where something stands in for a layer; empty where nothing is."""
    try:
        found = _seeded_outputs(model, example)
    except Exception as error:  # whatever the user's forward raises
        first = (str(error).strip().splitlines() or [""])[0][:160]
        return f"the network does more than call it: without it, it raises {type(error).__name__}: {first}"
    same = len(found) == len(expected) and all(map(_alike, found, expected))
    return "" if same else "the network does more than call it: without it, its outputs are others"


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    largest = float(b.detach().abs().max()) if b.is_floating_point() and b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=1e-4 * largest, equal_nan=True)


def _seeded_outputs(model: nn.Module, example: Batch) -> tuple[Tensor, ...]:
    """The outputs on `example`, with the same chance every time."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return outputs(call(model, example))


def encode(layer: nn.Module, encoding: Encoding, tensor: str = "weight") -> None:
    """From now on `layer.<tensor>` is what `encoding` decodes; the dense tensor is gone.

    Zeros of a `Masked` tensor stay zero through training after an encoding on a grid took its place. Layers that share
    a tensor are each encoded with the same object.
    """
    _own_class(layer)
    if (before := encoding_of(layer, tensor)) is not None:
        if isinstance(before, Masked) and isinstance(encoding, ON_A_GRID):
            encoding.mask = before.mask
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
    dense = dense_of(layer, tensor)
    # A fresh parameter takes the place of the old one, which a layer that stays as it is may use too.
    delattr(layer, tensor)
    layer.register_parameter(tensor, nn.Parameter(dense, requires_grad=False))
    parametrize.register_parametrization(layer, tensor, encoding, unsafe=True)


def encode_smaller(
    groups: Sequence[Mapping[str, nn.Module]], form: Callable[[Mapping[str, nn.Module]], Encoding], step: str
) -> None:
    """Encodes the weight of each group of `groups_by_weight` as `form` says, where that takes fewer bits than now.

    Where it does not, the layers are left, and said to be.

    Raises:
        LayerError: it does nowhere.
    """
    reason = "they share their weights with layers that `where` leaves out"
    changed = False
    for group in groups:
        encoding, bits = form(group), 8 * dense_of(next(iter(group.values()))).element_size()
        smaller = encoding.bits_per_weight < bits
        changed |= smaller
        for name, layer in group.items():
            if smaller:
                encode(layer, encoding)
                done(name, encoding.describe())
            else:
                reason = f"as {encoding.describe()} it would take {encoding.bits_per_weight:.0f} bits a weight"
                left(name, f"{reason}, where it takes {bits}")
    if not changed:
        raise LayerError(
            f"{step} would make none of the layers that it may change smaller: {reason}. Leave the step out, or widen "
            "its where."
        )


def dense_of(layer: nn.Module, tensor: str = "weight") -> Tensor:
    """`layer.<tensor>`, detached. Where weight norm or the like computes it, from now on it is stored as it is."""
    if is_computed(layer, tensor):
        _materialise(layer, tensor)
    return getattr(layer, tensor).detach()


def _materialise(layer: nn.Module, tensor: str) -> None:
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm) and hook.name == tensor:
            remove_weight_norm(layer, tensor)
        elif isinstance(hook, SpectralNorm) and hook.name == tensor:
            remove_spectral_norm(layer, tensor)
    if parametrize.is_parametrized(layer, tensor):
        _own_class(layer)
        stored: Any = layer.parametrizations[tensor]  # type: ignore[index]
        if (original := dict(stored.named_parameters(recurse=False)).get("original")) is not None:
            # Removal writes into the original, which another layer may use too.
            stored.original = nn.Parameter(original.detach().clone(), original.requires_grad)
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)


def _own_class(layer: nn.Module) -> None:
    """Parametrizations change the class that torch derived for `layer`, which its deep copies have too."""
    if parametrize.is_parametrized(layer):
        shared = type(layer)
        layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def is_computed(layer: nn.Module, tensor: str = "weight") -> bool:
    """Whether `layer.<tensor>` is made from other tensors before it is used, and not by an encoding of ours."""
    own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    absent = getattr(layer, tensor, None) is None
    return not absent and tensor not in dict(own) and encoding_of(layer, tensor) is None


def encoding_of(layer: nn.Module, tensor: str = "weight") -> Encoding | None:
    """The encoding behind `layer.<tensor>`, or None where it is stored densely."""
    if not parametrize.is_parametrized(layer, tensor):
        return None
    found = layer.parametrizations[tensor][0]  # type: ignore[index]
    return found if isinstance(found, Encoding) else None


def encodings(model: nn.Module) -> dict[str, Encoding]:
    """Every encoding by the name of the tensor it stands for: `blocks.0.conv1.weight`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Encoding):
            layer, _, tensor = f".{name.removesuffix('.0')}".rpartition(".parametrizations.")
            found[f"{layer}.{tensor}".lstrip(".")] = module
    return found


def refuse_quantized(layers: Mapping[str, nn.Module], step: str) -> None:
    """Raises a RecipeError where the weights of one of `layers` are stored in fewer bits already."""
    for name, layer in layers.items():
        encoding = encoding_of(layer)
        if encoding is not None and not isinstance(encoding, Masked):
            raise RecipeError(
                f"{step} would quantize {name!r}, which an earlier step stored as {encoding.describe()}. "
                f"Leave one of the two steps out, or keep them apart with where, such as where: '!{name}'."
            )


def prunable(
    model: nn.Module, layers: Mapping[str, nn.Module], pattern: str, step: str
) -> list[tuple[dict[str, nn.Module], Tensor]]:
    """The weights of `layers`, each with the layers that share it, as far as zeros can lie in them in `pattern`.

    Layers of other weights are left, and said to be.

    Raises:
        RecipeError: an earlier step stored one of the weights in a form that knows no mask.
    """
    found = []
    for group in groups_by_weight(model, layers):
        name, layer = next(iter(group.items()))
        encoding = encoding_of(layer)
        if encoding is not None and not isinstance(encoding, Masked):
            raise RecipeError(
                f"{step} would zero weights of {name!r}, which an earlier step stored as {encoding.describe()}. "
                f"Put {step} before that step."
            )
        weight = dense_of(layer)
        if why := misfit(weight.shape, pattern):
            for name in group:
                left(name, why)
        else:
            found.append((group, weight))
    return found


def keep_only(group: Mapping[str, nn.Module], dense: Tensor, kept: Tensor, pattern: str, spared: str) -> None:
    """From now on the weight of all layers of `group` is `dense` where `kept`, else zero, also through training.

    Args:
        group: layers that share one weight.
        dense: of the weight's shape.
        kept: bool, of the same shape.
        pattern: in which the zeros lie, for the words of `done`.
        spared: why the layers are left where everything is kept.
    """
    encoding, everything = Masked(dense, kept), bool(kept.all())
    for name, layer in group.items():
        if everything:
            left(name, spared)
            continue
        encode(layer, encoding)
        done(name, encoding.describe() + ("" if pattern == "free" else f" ({pattern})"))


def refuse_encoded(layers: Mapping[str, nn.Module], step: str, does: str) -> None:
    """Raises a RecipeError where the weights of one of `layers` are no longer stored as they were trained."""
    for name, layer in layers.items():
        if (encoding := encoding_of(layer)) is not None:
            raise RecipeError(
                f"{step} would {does} {name!r}, which an earlier step stored as {encoding.describe()}. Steps that "
                f"change the shape, such as {step}, come before those that change how weights are stored, such as "
                "prune_magnitude or quantize_static: swap them in the recipe."
            )


def _quantize_first_input(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    quantizer = layer.get_submodule(QUANTIZER)
    if args:
        return (quantizer(args[0]), *args[1:]), named
    first = next(iter(named))
    return args, {**named, first: quantizer(named[first])}


def quantize_input(layer: nn.Module, quantizer: InputQuantizer | DynamicQuantizer) -> None:
    """From now on `layer` sees its first input through `quantizer`."""
    fresh = QUANTIZER not in dict(layer.named_children())
    layer.add_module(QUANTIZER, quantizer)
    if fresh:
        layer.register_forward_pre_hook(_quantize_first_input, with_kwargs=True)


def input_quantizer(layer: nn.Module) -> nn.Module | None:
    """The quantizer through which `layer` sees its input, or None."""
    return dict(layer.named_children()).get(QUANTIZER)


@contextlib.contextmanager
def thawed(model: nn.Module) -> Iterator[None]:
    """Inside the block encoded tensors can be trained, on their grids; outside they are codes again.

    An encoding that layers share is one tensor to train.
    """
    found = list(encodings(model).values())
    for encoding in found:
        encoding.thaw()
    try:
        yield
    finally:
        for encoding in found:
            encoding.freeze()


def compute_floats_in(model: nn.Module, precision: str) -> None:
    """The target is to compute in `precision` what stays in floats; in torch nothing changes."""
    object.__setattr__(model, FLOATS, precision)


def floats_of(model: nn.Module) -> str:
    """In what the target is to compute what stays in floats."""
    return str(getattr(model, FLOATS, "float32"))


@contextlib.contextmanager
def computing_in(precision: str, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block `model` computes in "bfloat16" where torch's autocast deems that harmless, if that is asked for.

    It still returns floats of 32 bits, and what is computed with them is exact.
    """
    if precision == "float32":
        yield
        return
    forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    attention = _AttentionInFloats() if device.type == "cpu" else contextlib.nullcontext()

    def exact(*args: Any, **named: Any) -> Any:
        with attention:
            return tree_map(_in_floats, forward(*args, **named))

    model.forward = exact
    try:
        yield
    finally:
        del model.forward


class _AttentionInFloats(TorchFunctionMode):
    """Has attention computed in 32 bits, whose gradients torch 2.13 takes five times as long for in 16 on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*tree_map(_in_floats, args), **tree_map(_in_floats, kwargs or {}))


def _in_floats(value: Any) -> Any:
    return value.float() if _is_bfloat16(value) else value


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ blocks


KEPT = "featherweight_kept"  # of a container that lost blocks: what those left are called in the original


@dataclass(frozen=True)
class Block:
    """The child called `child` of the container called `container`, by their names in the original network."""

    container: str
    child: str

    @property
    def name(self) -> str:
        """The whole name."""
        return f"{self.container}.{self.child}".lstrip(".")


def blocks(model: nn.Module) -> Iterator[Block]:
    """The children of every list or sequence that has several of the same kind, themselves made of layers."""
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        children = dict(container.named_children())
        kinds = [kind_of(child) for child in children.values()]
        for child, module in children.items():
            composed = any(True for _ in module.children()) and any(True for _ in module.parameters())
            if composed and kinds.count(kind_of(module)) > 1 and not isinstance(module, (nn.ModuleList, nn.Sequential)):
                yield Block(name, child)


def without(model: nn.Module, gone: Sequence[Block]) -> nn.Module:
    """A copy of `model` in which the blocks are no longer in their containers, which know which they kept."""
    copied = copy.deepcopy(model)
    # all are found before any is changed, for names change with what is removed before them
    containers: dict[str, Any] = {block.container: copied.get_submodule(block.container) for block in gone}
    for name, container in containers.items():
        doomed = {block.child for block in gone if block.container == name}
        before = getattr(container, KEPT, list(container._modules))
        kept = [
            (first, child)
            for first, (key, child) in zip(before, container._modules.items(), strict=True)
            if key not in doomed
        ]
        container._modules.clear()
        for index, (_, child) in enumerate(kept):
            container.add_module(str(index), child)
        setattr(container, KEPT, [first for first, _ in kept])
    return copied


def counterparts(model: nn.Module, original: nn.Module) -> dict[str, str]:
    """By the name of a block in a container of `model` that lost some: the block in `original` that ends where it does.

    That is the one before the next that was kept: what a block of `model` returns, the same block reads next as in
    `original`. The last of all for the last.
    """
    found: dict[str, str] = {}
    theirs = dict(original.named_modules())
    for name, container in model.named_modules():
        kept, all_ = getattr(container, KEPT, []), list(theirs[name]._modules) if name in theirs else []
        if kept and set(kept) <= set(all_) and len(kept) == len(container._modules):
            ends = [all_[all_.index(following) - 1] for following in kept[1:]] + all_[-1:]
            found |= {
                f"{name}.{own}".lstrip("."): f"{name}.{end}".lstrip(".")
                for own, end in zip(container._modules, ends, strict=True)
            }
    return found


def landmarks(model: nn.Module) -> list[str]:
    """Layers whose outputs tell how far a network has come with its work.

    They are the blocks of its lists of alike blocks; without any, the smallest parts that are made of layers with
    weights; without those too, the layers that have weights.
    """
    if found := [block.name for block in blocks(model)]:
        return found
    composed = [name for name, module in model.named_modules() if name and _composed(module)]
    if smallest := [name for name in composed if not any(other.startswith(f"{name}.") for other in composed)]:
        return smallest
    return [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]


def _composed(module: nn.Module) -> bool:
    """Whether it has layers inside that have weights, and a forward of its own."""
    weighted = any(True for child in module.children() for _ in child.parameters())
    return weighted and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def unlike(model: nn.Module, original: nn.Module, example: Batch) -> dict[str, str]:
    """By the name of a layer in `original`, why what `model` calls so, or its counterpart, is something else."""
    now = dict(model.named_modules())
    lists = [
        (name, module)
        for name, module in original.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(getattr(now.get(name), "_modules", ())) != len(module._modules)
    ]
    found = counterparts(model, original)
    others = {
        f"{container}.{name}".lstrip("."): f"{container!r} has other members, and the same name may be another's"
        for container, module in lists
        for name, _ in module.named_modules()
        if name and f"{container}.{name}".lstrip(".") not in found.values()
    }
    folded = _folded(model, original, example)
    return others | {name: f"the batch norm {norm!r} was folded into it" for name, norm in folded.items()}


def _folded(model: nn.Module, original: nn.Module, example: Batch) -> dict[str, str]:
    """By layer of `original` whose output a batch norm reads that is gone from `model`: the name of that norm."""
    now = dict(model.named_modules())
    norms = {
        name: module
        for name, module in original.named_modules()
        if isinstance(module, BATCH_NORMS) and isinstance(now.get(name), nn.Identity)
    }
    found: dict[str, str] = {}
    with returns(original) as returned:

        def observe(norm: str, x: Tensor) -> None:
            found.update({name: norm for name, value in returned if value.data_ptr() == x.data_ptr()})

        watch_inputs(original, norms, [example], observe)
    return found


# ------------------------------------------------------------------------------------------------ tracing


def at_least_two(batch: Batch) -> Batch:
    """`batch`, doubled where it holds one example: tracing takes sizes 0 and 1 for constants."""
    values = tensors(batch)
    return batch if values[0].shape[0] > 1 else like(batch, [torch.cat([v, v]) for v in values])


def trace(model: nn.Module, example: Batch) -> torch.export.ExportedProgram:
    """The network as a graph of ATen operators with a free batch dimension.

    Raises:
        ExportError: control flow depends on data, or the batch size is fixed in the code.
    """
    batch = at_least_two(example)
    free = [{0: torch.export.Dim("batch", min=1, max=1 << 20)} for _ in tensors(batch)]
    named = isinstance(batch, Mapping)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", GATHERED, UserWarning)
            return torch.export.export(
                model,
                args=() if named else tuple(batch),
                kwargs=dict(batch) if named else None,  # type: ignore[arg-type]
                dynamic_shapes=dict(zip(batch, free, strict=True)) if isinstance(batch, Mapping) else tuple(free),
                strict=False,
            )
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"{type(model).__name__} cannot be traced with a free batch size: {first} "
            "Its forward branches on the data, or fixes the batch size in code: use tensor operators "
            "(torch.where) for the branch, and x.shape[0] or -1 for the batch."
        ) from error
