"""Distributed execution: the processes of one job, on one host or several, compute the rows of an input together.

    data        each holds the network and computes its share of the rows of a step, x_i = x · mask_i
    layers      each holds some of the layers, and rows pass through them like through a pipeline: `layer_split`
    tensors     each holds a slice of the weights, and all compute the same rows: `tensor_split`
    networks    each holds another network; what they return for the same rows is combined: `combining`

A job is what torchrun starts, once on each host, where the artifact must lie in the same folder:

    torchrun --nproc-per-node 2 -m featherweight predict DIR in.npz --out out.npz --split layers

Process 0 alone reads the input and writes the output. Who computes what follows from the number of rows and processes,
and outputs are put in order or combined in the order of the processes, whoever is done first. A process that is lost
closes its connections, which ends the others with an error; torchrun ends those on its host. A run that was killed goes
on when it is started again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from featherweight import targets
from featherweight.arrays import Rows
from featherweight.artifact import MANIFEST, Artifact, stored_vectors
from featherweight.columns import Prepare, open_input
from featherweight.combining import combined
from featherweight.errors import ArtifactError, FeatherweightError, SettingError
from featherweight.job import Job, joined
from featherweight.machine import physical_cores
from featherweight.outputs import OutFile
from featherweight.parallel import (
    Ordered,
    Told,
    check_counts,
    check_fits,
    check_some,
    combined_outputs,
    inputs_of,
    key_of,
    matched,
    outputs_of,
    shards,
)
from featherweight.replica import whole

BATCH = 16  # rows, where none is asked for
ALIKE = 0.02  # of the largest output: what a network that was split may be off by, where a rounding flips
REFUSED = (-1, -1)  # rows that process 0 names when it cannot begin


class Way(Protocol):
    """How the processes share a step. All of them are made, and step, together."""

    rows: int  # of a step, at most

    def step(self, rows: int, inputs: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
        """The outputs of `rows` rows, which process 0 gives and gets; others give and get None."""


def predict_split(
    artifacts: Sequence[Artifact],
    source: Path,
    out: Path,
    split: str,
    *,
    batch: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    combine: str = "mean",
    weights: Sequence[float] = (),
    prepare: Prepare | None = None,
    say: Callable[[str], None] = lambda text: None,
    told: Told = lambda done, rows: None,
) -> bool:
    """Writes what the network makes of the arrays in a file to another. All processes of the job call it alike.

    Args:
        artifacts: one, or for `networks` as many as there are processes.
        source: see `columns`; process 0 reads it.
        out: new; process 0 writes it.
        split: `data`, `layers`, `tensors` or `networks`.
        batch: rows that are computed at once.
        threads: of each process; by default the cores of a host are shared out.
        device: `cpu` or `cuda`.
        combine, weights: for `networks`, see `combining`.
        prepare: for images.
        say, told: as for `parallel.predict_file`.

    Returns:
        Whether this process is the one that wrote.

    Raises:
        ArtifactError: the network cannot be run or split, or another process has another one.
        DataError: the input does not fit, or a file cannot be read or written. Process 0 alone raises it.
        ProcessError: another process was lost, or cannot be reached.
        SettingError: this is no job, or the settings make no sense.
        TargetError: the runtime, or the device, is not there.
    """
    weights = list(weights) or [1.0] * len(artifacts)
    made = _checked(artifacts, split, batch, threads, combine, weights)
    with joined(device) as job:
        _check_count(job, artifacts, split)
        _check_same(job, artifacts)
        threads = threads or max(1, physical_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(threads)

        def begin() -> Way:
            if split == "networks":
                return _Networks(job, artifacts, batch or BATCH, threads, combine, weights)
            return WAYS[split](job, artifacts[0], batch or BATCH, threads)

        if job.rank:
            if (spans := job.share_pairs([])) != [REFUSED]:
                _follow(begin(), spans)
            return False
        _lead(job, begin, artifacts, (split, combine, weights), source, prepare, out, made, say, told)
        return True


def _checked(
    artifacts: Sequence[Artifact],
    split: str,
    batch: int | None,
    threads: int | None,
    combine: str,
    weights: Sequence[float],
) -> list[Rows]:
    """What a row of each output will be, after a look at all that is known before others are met."""
    if split not in SPLITS:
        raise SettingError(f"There is no split {split!r}. There are: {', '.join(SPLITS)}.")
    check_counts(threads=threads, batch=batch)
    if split == "networks":
        return combined_outputs(artifacts, combine, weights)
    if len(artifacts) > 1:
        raise SettingError(
            f"{len(artifacts)} networks cannot be split by {split} at once. Split by networks, or name one."
        )
    if split in ("layers", "tensors") and artifacts[0].target != "torch":
        raise SettingError(
            f"{artifacts[0].folder} is for {artifacts[0].target}, whose files cannot be cut by {split}. Make it for "
            "the target torch, or split by data."
        )
    return outputs_of(artifacts[0])


def _check_count(job: Job, artifacts: Sequence[Artifact], split: str) -> None:
    if split == "networks" and len(artifacts) != job.count:
        raise SettingError(
            f"There are {job.count} processes for {len(artifacts)} networks: each computes one. Start as many."
        )


def _check_same(job: Job, artifacts: Sequence[Artifact]) -> None:
    """Every host must hold the same files."""
    own = np.frombuffer(b"".join(_digest(artifact) for artifact in artifacts), np.uint8)
    first = own.copy()
    job.share([first])
    if not np.array_equal(own, first):
        raise ArtifactError(
            f"{', '.join(str(artifact.folder) for artifact in artifacts)}: process {job.rank} finds other files there "
            "than process 0. Copy the same artifact to all hosts."
        )


def _digest(artifact: Artifact) -> bytes:
    return hashlib.sha256((artifact.folder / MANIFEST).read_bytes()).digest()


# ------------------------------------------------------------------------------------------------ reading and writing


def _lead(
    job: Job,
    begin: Callable[[], Way],
    artifacts: Sequence[Artifact],
    about: tuple[object, ...],
    source: Path,
    prepare: Prepare | None,
    out: Path,
    made: Sequence[Rows],
    say: Callable[[str], None],
    told: Told,
) -> None:
    """What process 0 does: reads, steps, writes."""
    wanted = inputs_of(artifacts[0])
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_input(source, prepare))
            order = matched(file.specs, wanted, str(source))
            check_fits([file.specs[at] for at in order], wanted, str(source))
            check_some(file.rows, str(source))
            key = hashlib.sha256(repr((about, [key_of(artifact, source) for artifact in artifacts])).encode())
            sink = stack.enter_context(OutFile(out, made, file.rows, key.hexdigest()))
        except FeatherweightError:
            job.share_pairs([REFUSED])
            raise
        left = job.share_pairs(sink.left())
        way, rows, at = begin(), Ordered(file, order), 0
        done = file.rows - sum(end - first for first, end in left)
        say(f"{job.count} processes, {way.rows} rows at once" + (f"; {done} rows are there already" if done else ""))
        told(done, file.rows)
        for first, end in shards(left, way.rows):
            inputs = [np.empty((end - first, *spec.shape), spec.dtype) for spec in wanted]
            rows.skip(first - at)
            rows.read(inputs)
            outputs = way.step(end - first, inputs)
            assert outputs is not None
            sink.write(first, outputs)
            at, done = end, done + end - first
            told(done, file.rows)
        rows.skip(file.rows - at)
        file.finish()
        sink.finish()


def _follow(way: Way, spans: Sequence[tuple[int, int]]) -> None:
    """What all others do."""
    for first, end in shards(spans, way.rows):
        way.step(end - first, None)


# ------------------------------------------------------------------------------------------------ whole networks


class _Alone:
    """A network that this process runs by itself, on batches of one size."""

    def __init__(self, job: Job, artifact: Artifact, batch: int, threads: int) -> None:
        self._run = targets.find(artifact.target).load_on(job.device, artifact.folder, threads)
        self._made = outputs_of(artifact)
        self.inputs = [np.empty((batch, *spec.shape), spec.dtype) for spec in inputs_of(artifact)]

    def outputs(self, rows: int) -> list[np.ndarray]:
        """Of the first rows of `inputs`."""
        return whole(self._run, self.inputs, rows, self._made)


class _Data:
    """Each process computes a range of the rows of a step, as equal as can be; some none where there are too few."""

    def __init__(self, job: Job, artifact: Artifact, batch: int, threads: int) -> None:
        self._job, self.rows = job, batch * job.count
        self._network, self._made = _Alone(job, artifact, batch, threads), outputs_of(artifact)

    def step(self, rows: int, inputs: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
        ends = [rows * number // self._job.count for number in range(self._job.count + 1)]
        own = ends[self._job.rank + 1] - ends[self._job.rank]
        if inputs is None:
            if own:
                self._job.receive([place[:own] for place in self._network.inputs], 0)
                self._job.send(self._network.outputs(own), 0)
            return None
        others = list(zip(range(1, self._job.count), ends[1:], ends[2:], strict=False))
        for rank, begin, end in others:
            self._job.send([array[begin:end] for array in inputs], rank)
        outputs = [np.empty((rows, *spec.shape), spec.dtype) for spec in self._made]
        if own:
            for place, array in zip(self._network.inputs, inputs, strict=True):
                place[:own] = array[:own]
            for place, array in zip(outputs, self._network.outputs(own), strict=True):
                place[:own] = array
        for rank, begin, end in others:
            self._job.receive([place[begin:end] for place in outputs], rank)
        return outputs


class _Networks:
    """Each process computes the same rows with a network of its own."""

    def __init__(
        self,
        job: Job,
        artifacts: Sequence[Artifact],
        batch: int,
        threads: int,
        combine: str,
        weights: Sequence[float],
    ) -> None:
        self._job, self.rows, self._way, self._weights = job, batch, combine, weights
        self._network, self._made = _Alone(job, artifacts[job.rank], batch, threads), outputs_of(artifacts[0])

    def step(self, rows: int, inputs: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
        places = [place[:rows] for place in self._network.inputs]
        for place, array in zip(places, inputs or [], strict=False):
            place[...] = array
        self._job.share(places)
        own = self._network.outputs(rows)
        if self._job.rank:
            self._job.send(own, 0)
            return None
        found = [own]
        for rank in range(1, self._job.count):
            found.append([np.empty((rows, *spec.shape), spec.dtype) for spec in self._made])
            self._job.receive(found[-1], rank)
        return [combined(self._way, values, self._weights) for values in zip(*found, strict=True)]


# ------------------------------------------------------------------------------------------------ networks in parts


def _layers(job: Job, artifact: Artifact, batch: int, threads: int) -> Way:
    from featherweight.layer_split import LayerSplit

    return _compared(LayerSplit, job, artifact, batch)


def _tensors(job: Job, artifact: Artifact, batch: int, threads: int) -> Way:
    from featherweight.tensor_split import TensorSplit

    return _compared(TensorSplit, job, artifact, batch)


def _compared(kind: Callable[..., Way], job: Job, artifact: Artifact, batch: int) -> Way:
    """A network in parts, after a look whether they compute what the whole does, of the inputs that it ships with."""
    from featherweight.targets.torch import positional

    given, _ = stored_vectors(artifact)
    example = [np.resize(array, (batch, *array.shape[1:])) for array in given]
    network = positional(artifact.folder / "model.pt2", job.device)
    with torch.no_grad():
        expected = [v.cpu().numpy() for v in network(*(torch.from_numpy(array).to(job.device) for array in example))]
    way = kind(job, network, example, outputs_of(artifact))
    found = way.step(batch, example if job.rank == 0 else None)
    for number, (mine, theirs) in enumerate(zip(found or [], expected, strict=False)):
        off = float(np.abs(mine.astype(np.float64) - theirs).max(initial=0.0))
        size = float(np.abs(theirs.astype(np.float64)).max(initial=0.0))
        if not off <= ALIKE * size:
            raise ArtifactError(
                f"Output {number} of {artifact.folder} in parts differs from that of the whole by {off:.3g}, where the "
                f"largest is {size:.3g}: a rule of the split does not hold for this network. Split it by data."
            )
    return way


WAYS: dict[str, Callable[[Job, Artifact, int, int], Way]] = {"data": _Data, "layers": _layers, "tensors": _tensors}
SPLITS = (*WAYS, "networks")
