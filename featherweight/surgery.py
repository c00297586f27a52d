"""Finding, watching and changing the layers of a network: the only place that walks or hooks modules.

Which channels hang together is `coupling`'s affair; what to put into a layer, a pass's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.encodings import Affine, DynamicQuantizer, Encoding, InputQuantizer
from featherweight.errors import ExportError, LayerError, RecipeError
from featherweight.workload import Batch, call, like, tensors

QUANTIZER = "input_quantizer"

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


# ------------------------------------------------------------------------------------------------ changing


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` stands."""
    model.set_submodule(name, module)


def encode(layer: nn.Module, encoding: Encoding, tensor: str = "weight") -> None:
    """From now on `layer.<tensor>` is what `encoding` decodes; the dense tensor is gone."""
    if encoding_of(layer, tensor) is not None:
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
    getattr(layer, tensor).requires_grad_(False)
    parametrize.register_parametrization(layer, tensor, encoding, unsafe=True)


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
    """Raises a RecipeError where one of `layers` has whole numbers for weights already."""
    for name, layer in layers.items():
        encoding = encoding_of(layer)
        if isinstance(encoding, Affine):
            raise RecipeError(
                f"{step} would quantize {name!r}, which an earlier step stored as {encoding.describe()}. "
                f"Leave one of the two steps out, or keep them apart with where, such as where: '!{name}'."
            )


def _quantize_first_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.get_submodule(QUANTIZER)(args[0]), *args[1:])


def quantize_input(layer: nn.Module, quantizer: InputQuantizer | DynamicQuantizer) -> None:
    """From now on `layer` sees its first input through `quantizer`."""
    fresh = QUANTIZER not in dict(layer.named_children())
    layer.add_module(QUANTIZER, quantizer)
    if fresh:
        layer.register_forward_pre_hook(_quantize_first_input)


def input_quantizer(layer: nn.Module) -> nn.Module | None:
    """The quantizer through which `layer` sees its input, or None."""
    return dict(layer.named_children()).get(QUANTIZER)


@contextlib.contextmanager
def thawed(model: nn.Module) -> Iterator[None]:
    """Inside the block encoded tensors can be trained, on their grids; outside they are codes again."""
    found = list(encodings(model).values())
    for encoding in found:
        encoding.thaw()
    try:
        yield
    finally:
        for encoding in found:
            encoding.freeze()


# ------------------------------------------------------------------------------------------------ watching


def watch_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    observe: Callable[[str, Tensor], None],
) -> None:
    """Runs `model` on `batches` and calls `observe(name, first input)` whenever one of `layers` is reached."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            observe(name, args[0].detach())  # returns None: a returned tensor would replace the input

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()


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
