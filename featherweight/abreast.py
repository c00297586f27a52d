"""Runs of a network on several batches, side by side: each layer is met once, with what it reads in all of them.

A pass that rounds layer after layer, each by what it reads from those rounded before it, needs what a layer reads in
all batches before any run goes on beyond it. Running the network anew for each layer costs its depth squared. Here
every batch has a run of its own, in a thread of its own, that waits where a watched layer is about to be called. One
thread works at a time, so nothing is faster than one run after the other and nothing hangs on chance; what it costs
is that the activations of all batches that are still needed are held at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight import memory
from featherweight.hooks import (
    watching,
)
from featherweight.workload import Batch, call


class _Stopped(BaseException):
    """The run is not wanted any more; no network that catches exceptions is to catch it."""


class _Run(threading.Thread):
    """One run of a network on one batch, which goes on only while `advance` waits for it."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(daemon=True)
        self.model, self.batch = model, batch
        self.at: tuple[str, Tensor] | None = None  # the layer before which it waits, and what that will read
        self.error: BaseException | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False

    def run(self) -> None:
        try:
            self._wait()
            with torch.no_grad():  # each thread has a mode of its own
                call(self.model, self.batch)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.at = None
        self._waits.release()

    def pause(self, name: str, x: Tensor) -> None:
        """Called by the run itself where it is about to call the layer `name`."""
        self.at = (name, x)
        self._waits.release()
        self._wait()
        self.at = None  # the input may be gone before the next layer is reached

    def _wait(self) -> None:
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def advance(self) -> None:
        """Lets it run on to the next layer that is watched, or to its end."""
        self._go.release()
        self._waits.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        if self.is_alive():
            self._stopped = True
            self._go.release()
            self.join()


def abreast(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Each call of one of `layers`, in the order of calls: its name and what it is about to read, for all batches.

    What is done to the layer before the next item is asked for is done before it is called. Where the batches make the
    network take different ways, those that meet first at a layer come together. Whoever asks for no more items ends
    all runs.
    """

    def pause(name: str, x: Tensor) -> None:
        run = threading.current_thread()
        assert isinstance(run, _Run), "a network that calls its layers in threads of its own cannot be watched so"
        run.pause(name, x)

    runs = [_Run(model, batch) for batch in batches]
    with watching(layers, pause), memory.in_one_arena():
        try:
            for run in runs:
                run.start()
                run.advance()
            while waiting := [(run, *run.at) for run in runs if run.at is not None]:
                memory.give_back()
                name = waiting[0][1]
                here = [run for run, other, _ in waiting if other == name]
                yield name, [x for _, other, x in waiting if other == name]
                waiting.clear()  # it would hold what the layer has read
                with parametrize.cached():  # an encoded weight is decoded once for all of them
                    for run in here:
                        run.advance()
        finally:
            for run in runs:
                run.stop()
