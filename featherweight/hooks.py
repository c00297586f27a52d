"""What flows through a network, seen by hooks: what its layers read and return.

Nothing is changed here; that is `surgery`'s affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.workload import Batch, call, outputs

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call: those by place and those by name


@contextlib.contextmanager
def watching(layers: Mapping[str, nn.Module], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block, `observe(name, first input)` is called whenever one of `layers` is."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            # returns None: a returned tensor would replace the input
            observe(name, next(iter((*args, *named.values()))).detach())

        return look

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    observe: Callable[[str, Tensor], None],
) -> None:
    """Runs `model` on `batches` and calls `observe(name, first input)` whenever one of `layers` is called."""
    with watching(layers, observe), torch.no_grad():
        for batch in batches:
            call(model, batch)


@contextlib.contextmanager
def returns(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Inside the block, what the inner modules returned, in order, where it is a tensor."""
    returned: list[tuple[str, Tensor]] = []

    def remember(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                returned.append((name, output))

        return look

    handles = [module.register_forward_hook(remember(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            yield returned
    finally:
        for handle in handles:
            handle.remove()


def returned_by(model: nn.Module, batch: Batch) -> list[tuple[Tensor, nn.Module | None]]:
    """The outputs for `batch`, each with the innermost module that returned it as it is; None where none did."""
    with returns(model) as returned:
        found = outputs(call(model, batch))
    names = [next((name for name, value in returned if value is y), None) for y in found]
    return [(y, None if name is None else model.get_submodule(name)) for y, name in zip(found, names, strict=True)]


def returning_outputs(model: nn.Module, batch: Batch) -> set[str]:
    """The names of all layers that return one of the network's outputs as it is."""
    with returns(model) as returned:
        found = outputs(call(model, batch))
    return {name for name, value in returned if any(value is y for y in found)}


@contextlib.contextmanager
def watch_calls(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Arguments]]:
    """Inside the block, the arguments with which each of the named layers was last called."""
    seen: dict[str, Arguments] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[name] = (args, named)

        return look

    layers = [(name, model.get_submodule(name)) for name in names]
    handles = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def returned_inside(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The first floating tensor that each inner layer returned, of those that are called and return one."""
    names = [name for name, _ in model.named_modules() if name]
    with torch.no_grad(), watch_outputs(model, names) as inside:
        call(model, batch)
    return inside


@contextlib.contextmanager
def watch_outputs(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Inside the block, what each of the named layers last returned: its first floating tensor, with its gradient.

    The network goes on with a copy, so that what is watched stays as it was even where later layers work in place.
    Where gradients are recorded, a tensor that no parameter before it makes differentiable becomes so here.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def look(_: nn.Module, __: Any, output: Any) -> Tensor | None:
            if (value := _first_float(output)) is None:
                return None
            if output is not value:
                seen[name] = value
                return None
            if torch.is_grad_enabled() and not value.requires_grad:
                value = value.detach().requires_grad_()
            seen[name] = value
            return value.clone()

        return look

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_float(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for part in parts if (value := _first_float(part)) is not None), None)


def channel_dim(layer: nn.Module, output: Tensor) -> int:
    """The dimension of the channels or features in what `layer` returned: 1 after convolutions, the last elsewhere."""
    kinds = {type(module).__name__ for module in layer.modules()}
    convolves = any(kind.startswith(("Conv", "BatchNorm")) for kind in kinds)
    mixes = any(kind in ("Linear", "LayerNorm", "Embedding") for kind in kinds)
    return 1 if convolves or (output.dim() > 3 and not mixes) else output.dim() - 1
