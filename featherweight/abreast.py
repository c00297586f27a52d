"""Runs of a network on several batches, side by side: each layer is met once, with what it reads in all of them.

A pass that rounds layer after layer, each by what it reads from those rounded before it, needs what a layer reads in
all batches before any run goes on beyond it. Running the network anew for each layer costs its depth squared. Here
every batch has a run of its own that stops where a watched layer is about to be called. Runs are greenlets: one thread
works on them by turns, for with a thread for each the buffers of the matrix library would be there as often. What it
costs is that the activations of all batches that are still needed are held at the same time.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight import memory
from featherweight.hooks import watching
from featherweight.workload import Batch, call


class _Run(greenlet):
    """One run of a network on one batch, which goes on only while `advance` waits for it."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.gr_context = contextvars.copy_context()
        self.model, self.batch = model, batch
        self.at: tuple[str, Tensor] | None = None  # the layer before which it waits, and what that will read

    def run(self) -> None:
        call(self.model, self.batch)

    def pause(self, name: str, x: Tensor) -> None:
        """Called by the run itself where it is about to call the layer `name`."""
        assert self.parent is not None
        graded, self.at = torch.is_grad_enabled(), (name, x)
        self.parent.switch()
        torch.set_grad_enabled(graded)  # the mode is the thread's, and other runs have been there

    def advance(self) -> None:
        """Lets it run on to the next layer that is watched, or to its end."""
        self.at = None  # the input may be gone before the next layer is reached
        with torch.no_grad():
            self.switch()


def abreast(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Each call of one of `layers`, in the order of calls: its name and what it is about to read, for all batches.

    What is done to the layer before the next item is asked for is done before it is called. Where the batches make the
    network take different ways, those that meet first at a layer come together. Whoever asks for no more items ends
    all runs.
    """

    def pause(name: str, x: Tensor) -> None:
        run = getcurrent()
        assert isinstance(run, _Run), "a network that calls its layers in threads of its own cannot be watched so"
        run.pause(name, x)

    runs = [_Run(model, batch) for batch in batches]
    with watching(layers, pause):
        try:
            for run in runs:
                run.advance()
            while waiting := [(run, *run.at) for run in runs if run.at is not None]:
                name = waiting[0][1]
                here = [run for run, other, _ in waiting if other == name]
                memory.give_back()
                yield name, [x for _, other, x in waiting if other == name]
                waiting.clear()  # it would hold what the layer has read
                with parametrize.cached():  # an encoded weight is decoded once for all of them
                    for run in here:
                        run.advance()
        finally:
            for run in runs:
                run.throw()
