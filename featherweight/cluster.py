"""Parallel execution on a cluster: Ray Data passes the rows of a large input through replicas of an artifact.

A row of Ray's dataset is a stretch of several shards, so that what Ray takes for each is little beside its computing,
and a replica computes the same batches as one of `parallel` does, however Ray groups and orders them: with the same
batch and threads it returns the same bits. Each replica is an actor; what a lost one was at, Ray gives to another. This
process writes the outputs, as `parallel` does, and goes on with a run that was killed.

Parquet and images are read side by side, wherever the cluster has room for it, and must lie where all its machines see
them; `.npz` and `.npy` are read on this one. The artifact goes to other machines through Ray.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight import targets
from featherweight.arrays import Rows
from featherweight.artifact import MANIFEST, Artifact, write_artifact
from featherweight.columns import Prepare, open_input
from featherweight.errors import FeatherweightError, ProcessError, SettingError, TargetError
from featherweight.outputs import OutFile
from featherweight.parallel import (
    Ordered,
    Told,
    check_counts,
    check_fits,
    check_some,
    inputs_of,
    key_of,
    matched,
    outputs_of,
    shards,
)
from featherweight.pools import check_pool, connected
from featherweight.replica import whole

BATCH = 64  # rows, where none is asked for
RESTARTS = 4  # of each replica, after which the run ends
STRETCH_BYTES = 4 << 20  # of inputs and outputs of one stretch, at most, if it is more than one batch
STRETCHES = 8  # for each replica, at least, where there are enough batches: the last to be done ends the run
BEGIN, COUNT = "featherweight begin", "featherweight count"  # columns of the dataset, beside those of the arrays


@dataclass(frozen=True)
class _Given:
    """What is read where: all that a task on another machine needs to read stretches of the input."""

    source: Path
    prepare: Prepare | None
    order: tuple[int, ...]
    inputs: tuple[Rows, ...]
    size: int  # rows of a stretch

    @property
    def bytes(self) -> int:
        """Of a stretch."""
        return self.size * sum(spec.bytes for spec in self.inputs)

    def stretches(self, spans: Sequence[tuple[int, int]], to_the_end: bool) -> Iterator[Any]:
        """A block of one row for each stretch; shorter ones are filled up with zeros, which are not computed."""
        from ray.data.block import BlockAccessor

        with open_input(self.source, self.prepare) as file:
            rows, at = Ordered(file, self.order), 0
            for begin, end in spans:
                places = [np.zeros((self.size, *spec.shape), spec.dtype) for spec in self.inputs]
                rows.skip(begin - at)
                rows.read([place[: end - begin] for place in places])
                at = end
                columns = {spec.name: place[None] for spec, place in zip(self.inputs, places, strict=True)}
                yield BlockAccessor.batch_to_block(_marked(begin, end - begin) | columns)
            if to_the_end:
                rows.skip(file.rows - at)
                file.finish()


def _marked(begin: int, count: int) -> dict[str, np.ndarray]:
    return {BEGIN: np.array([begin], np.int64), COUNT: np.array([count], np.int64)}


def predict_ray(
    artifact: Artifact,
    source: Path,
    out: Path,
    *,
    address: str = "",
    replicas: int | None = None,
    threads: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    prepare: Prepare | None = None,
    say: Callable[[str], None] = lambda text: None,
    told: Told = lambda done, rows: None,
) -> None:
    """Writes what the network makes of the rows in a file or folder to another file.

    Args:
        source: see `columns`.
        out: new, `.npz`, `.npy` or `.parquet`.
        address: HOST:PORT of a cluster, `auto` for the one of this machine, or nothing for one that is started.
        replicas: by default as many as there are cores, or GPUs.
        threads: of each replica, and cores that Ray keeps free for it (1).
        batch: rows at once.
        device: `cpu` or `cuda`.
        prepare: for images.
        say, told: as for `parallel.predict_file`.

    Raises:
        ArtifactError, DataError: as `parallel.predict_file`.
        ProcessError: the cluster cannot be reached, or lost replicas again and again.
        SettingError: the settings make no sense.
        TargetError: Ray is not installed, or the device is not there.
    """
    _check(address, replicas, threads, batch, device)
    threads, batch = threads or 1, batch or BATCH
    wanted, made = inputs_of(artifact), outputs_of(artifact)
    with open_input(source, prepare) as file:
        order, rows, apart = matched(file.specs, wanted, str(source)), file.rows, file.apart
        check_fits([file.specs[at] for at in order], wanted, str(source))
        check_some(rows, str(source))
    with OutFile(out, made, rows, key_of(artifact, source)) as sink, connected(address):
        count = _count(replicas, threads, device)
        left = sink.left()
        todo = sum(end - begin for begin, end in left)
        size = _stretch(todo, batch, count, sum(spec.bytes for spec in (*wanted, *made)))
        say(
            f"{count} replicas on Ray, batch {batch}"
            + (f"; {rows - todo} rows are there already" if todo < rows else "")
        )
        told(rows - todo, rows)
        if prepare is not None:
            _pass_on(prepare)
        given = _Given(Path(source).resolve(), prepare, tuple(order), tuple(wanted), size)
        stretches = list(shards(left, size))
        parts = _dealt(stretches, count) if apart else [stretches]
        replica = (_files(artifact), artifact.target, wanted, made, batch, threads, device)
        for begin, outputs in _computed(given, parts, apart, replica, min(count, max(1, len(stretches)))):
            sink.write(begin, outputs)
            todo -= len(outputs[0])
            told(rows - todo, rows)
        sink.finish()


def _check(address: str, replicas: int | None, threads: int | None, batch: int | None, device: str) -> None:
    """Whether what is asked for makes sense, before anything is opened."""
    check_counts(replicas=replicas, threads=threads, batch=batch)
    if device not in ("cpu", "cuda"):
        raise SettingError(f"Replicas on Ray run on cpu or cuda, not on {device}.")
    check_pool(f"ray:{address}" if address else "ray")
    try:
        import pandas  # noqa: F401 - Ray Data needs both, and says so in a traceback
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise TargetError(
            f"Ray passes rows on with pyarrow and pandas, and {error.name} is not installed. Install both with: pip "
            "install 'featherweight[ray]'."
        ) from error


def _count(replicas: int | None, threads: int, device: str) -> int:
    """How many replicas the cluster has room for, or those that are asked for."""
    import ray

    there = ray.cluster_resources()
    most = int(there.get("GPU", 0)) if device == "cuda" else int(there.get("CPU", 0)) // threads
    if most < (replicas or 1):
        raise SettingError(
            f"The Ray cluster has room for {most} replicas of {threads} threads on {device}, not for {replicas or 1}. "
            "Ask for fewer, or add machines to it."
        )
    return replicas or most


def _files(artifact: Artifact) -> Any:
    """The artifact's files, in Ray's hands, for all replicas."""
    import ray

    return ray.put({name: (artifact.folder / name).read_bytes() for name in (MANIFEST, *artifact.manifest["files"])})


def _pass_on(prepare: Prepare) -> None:
    """The user's function goes to other machines as what it does, not as the name of a file that they may not have."""
    from ray import cloudpickle

    if (module := sys.modules.get(prepare.__module__)) is not None and module.__name__ != "__main__":
        cloudpickle.register_pickle_by_value(module)


def _stretch(rows: int, batch: int, replicas: int, row_bytes: int) -> int:
    """Rows of a stretch: whole batches, few bytes, and enough of them for all replicas.

    >>> _stretch(1000, 64, 2, 1000), _stretch(20000, 64, 2, 1000), _stretch(10**6, 64, 2, 1000), _stretch(10, 64, 2, 10)
    (64, 1280, 4160, 64)
    """
    fair = -(-rows // (STRETCHES * replicas * batch))
    return batch * max(1, min(fair, STRETCH_BYTES // (row_bytes * batch)))


def _dealt(stretches: Sequence[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """Parts of the input that lie side by side, one for each task that reads."""
    ends = [len(stretches) * number // count for number in range(count + 1)]
    return [list(stretches[begin:end]) for begin, end in itertools.pairwise(ends) if begin < end]


# ------------------------------------------------------------------------------------------------ Ray


def _computed(
    given: _Given,
    parts: Sequence[Sequence[tuple[int, int]]],
    apart: bool,
    replica: tuple[Any, ...],
    count: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """First rows and outputs of stretches, in the order in which they are done; `replica`: what each is made of."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    *_, made, _, threads, device = replica
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray warns of settings of its own, which nobody has touched
        context = DataContext.get_current()
    context.enable_progress_bars = False
    _hush()
    context.target_max_block_size = max(1, given.bytes)  # a stretch that was read is passed on at once, by itself
    here = {} if apart else {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
    read = ray.data.read_datasource(
        _datasource(given, parts, apart), num_cpus=0, override_num_blocks=len(parts), **here
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no other way to say how often it may try again, else without end
        results = read.map_batches(
            _Replica,
            fn_constructor_args=replica,
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=count),
            num_cpus=threads,
            num_gpus=1 if device == "cuda" else None,
            max_restarts=RESTARTS,
            max_task_retries=-1,  # one that waits for its machine to be given up uses many
        )
    try:
        for stretch in results.iter_rows():
            rows = int(stretch[COUNT])
            yield int(stretch[BEGIN]), [np.asarray(stretch[spec.name])[:rows] for spec in made]
    except Exception as error:
        raise _in_our_words(error) from error


def _hush() -> None:
    """What Ray Data tells of a run goes to its log files alone: progress is told here, and errors are raised."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


def _datasource(given: _Given, parts: Sequence[Sequence[tuple[int, int]]], apart: bool) -> Any:
    """The stretches as a source of Ray Data, with a task for each part."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Stretches(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return given.bytes * sum(map(len, parts))

        def get_read_tasks(self, *args: Any, **keywords: Any) -> list[Any]:
            return [
                ReadTask(
                    functools.partial(given.stretches, part, not apart),
                    BlockMetadata(num_rows=len(part), size_bytes=given.bytes * len(part), exec_stats=None),
                )
                for part in parts
            ]

    return Stretches()


def _in_our_words(error: Exception) -> Exception:
    """What one of us raised in another process, or that Ray could not go on."""
    from ray.exceptions import RayError

    found: BaseException | None = error
    while found is not None:
        for inner in (getattr(found, "cause", None), found):  # Ray's error is one of ours, too, and has it as its cause
            if isinstance(inner, FeatherweightError) and not isinstance(inner, RayError):
                return type(inner)(str(inner).partition("\nFailed to apply UDF")[0])  # which Ray writes into it
        found = found.__cause__
    if isinstance(error, RayError):
        return ProcessError(
            f"Ray could not go on: {' '.join(str(error).split())[:300]} The same command goes on from what is written. "
            "If it fails again, make room, or choose fewer replicas or a smaller batch."
        )
    return error


class _Replica:
    """A replica in an actor of Ray, with a copy of the artifact of its own."""

    def __init__(
        self,
        files: Any,
        target: str,
        inputs: Sequence[Rows],
        made: Sequence[Rows],
        batch: int,
        threads: int,
        device: str,
    ) -> None:
        import ray

        self._inputs, self._made, self._batch = inputs, made, batch
        self._stack = contextlib.ExitStack()
        place = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="featherweight-"))
        artifact = write_artifact(ray.get(files), Path(place) / "artifact")
        self._run = targets.find(target).load_on(device, artifact.folder, threads)

    def __call__(self, stretch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        begin, rows = int(stretch[BEGIN][0]), int(stretch[COUNT][0])
        given = [stretch[spec.name][0] for spec in self._inputs]
        places = [np.zeros((len(given[0]), *spec.shape), spec.dtype) for spec in self._made]
        for first, end in shards([(0, rows)], self._batch):
            batch = [np.array(array[first : first + self._batch]) for array in given]  # what Ray passes is not writable
            for place, found in zip(places, whole(self._run, batch, end - first, self._made), strict=True):
                place[first:end] = found
        columns = {spec.name: place[None] for spec, place in zip(self._made, places, strict=True)}
        return _marked(begin, rows) | columns
