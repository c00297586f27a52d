"""Outputs of layers, kept on disk, so that what comes before a layer that changes is not computed again.

A network computes its layers in an order. What was returned before a layer began cannot depend on it; so in a copy of
the network in which that layer alone is stored otherwise, layers that were done by then return what they returned. Only
layers are kept, one file each, which the system maps into memory and may drop from it; what is between them is
computed. Where only that matters which the changing layer reads, all others return what they returned. How the networks
differ, and what is made of their outputs, is the caller's affair.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """When a layer was called and when it returned, in calls of layers; the shape that it read; where its output lies.

    There is no `path` where the output is no tensor, or one of several.
    """

    began: int
    ended: int
    read: torch.Size
    path: Path | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def output(self) -> Tensor:
        """The output, mapped from its file: what is written to it is not written to the file."""
        count = math.prod(self.shape)
        return torch.from_file(str(self.path), shared=False, size=count, dtype=self.dtype).reshape(self.shape)


def record(model: nn.Module, layers: Collection[str], run: Callable[[], Any], folder: Path) -> dict[str, Kept]:
    """What each of `layers` returned while `run()` ran the model, in files of `folder`."""
    clock = itertools.count()
    began: dict[str, list[int]] = {name: [] for name in layers}
    found: dict[str, Kept] = {}

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: began[name].append(next(clock))

    def end(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            now = next(clock)
            found[name] = Kept(began[name][0], now, _read(inputs))
            if isinstance(output, Tensor) and output.numel() and len(began[name]) == 1:
                path = folder / str(now)
                output.detach().contiguous().numpy().tofile(path)
                found[name] = replace(found[name], path=path, shape=tuple(output.shape), dtype=output.dtype)

        return keep

    handles = []
    for name in layers:
        layer = model.get_submodule(name)
        handles += [layer.register_forward_pre_hook(begin(name)), layer.register_forward_hook(end(name))]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def replaying(
    model: nn.Module, kept: Mapping[str, Kept], changing: Collection[str], *, throughout: bool = False
) -> Iterator[None]:
    """Inside the block layers that were done before any of `changing` began return what they returned.

    For inputs of the shape that was recorded; others are computed.

    Args:
        model: a copy of the network that was recorded, which is to be run on the same inputs.
        kept: what `record` found.
        changing: names of layers. Where one of them was never called, nothing is known of when it counts, and all
            is computed.
        throughout: whether layers that began later do so, too: then what `changing` read is right, and no output.
    """
    known = {name: one for name, one in kept.items() if name not in changing and one.path is not None and one.read}
    first = min((kept[name].began if name in kept else -1 for name in changing), default=-1)
    replaced = []
    for name, one in known.items():  # inputs given by name have no known shape
        if one.ended < first or (throughout and first >= 0):
            layer = model.get_submodule(name)
            replaced.append((layer, layer.forward))
            layer.forward = _returning(one, layer.forward)
    try:
        yield
    finally:
        for layer, forward in replaced:
            layer.forward = forward


def _returning(known: Kept, compute: Callable[..., Any]) -> Callable[..., Any]:
    """What is known where the input has the shape that was recorded; mapped anew, for an operator may write to it."""

    def forward(*inputs: Any, **named: Any) -> Any:
        return known.output() if _read(inputs) == known.read else compute(*inputs, **named)

    return forward


def _read(inputs: Sequence[Any]) -> torch.Size:
    return inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else torch.Size()
