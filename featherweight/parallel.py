"""Parallel execution on one machine: an artifact's replicas share the rows of a large input among them.

The input is cut into shards of one batch each. Shard i is the rows whose mask_i is set, x_i = x · mask_i: masks are
ranges, which share no row and leave none out, so that each example is computed once; the last may be shorter. A replica
is a process (`replica`) on processor cores of its own, or on a GPU of its own. The next shard is read when a replica
has room for it, so memory does not depend on the input; outputs are written where they belong, whoever is done first. A
replica that dies is begun anew and its shards are done once more; after a second death an error names them.

How many replicas, with how many threads and rows at once, `auto` finds by running a few settings for a moment on rows
of the input itself. A network that is itself split among processes is `distributed`'s affair, machines that of
`cluster`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import selectors
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featherweight import targets
from featherweight.arrays import InFile, Rows
from featherweight.artifact import MANIFEST, Artifact
from featherweight.columns import Input, Prepare, open_input
from featherweight.combining import check_way, combined
from featherweight.errors import ArtifactError, DataError, ProcessError, SettingError
from featherweight.machine import cores, physical_cores
from featherweight.outputs import OutFile, check_new
from featherweight.replica import Layout, Replica

BATCHES = (1, 4, 16, 64)
COMBINED = 256  # rows that are combined at once
MEASURED_S = 0.3  # of each setting, after a first shard that is not counted
OBJECTIVES = ("throughput", "latency")
DEATHS = 2  # of replicas at the same shard, after which it is to blame


@dataclass(frozen=True)
class Setting:
    """One way to run an artifact.

    Args:
        replicas: side by side.
        threads: of each.
        batch: rows that are computed at once.
        device: `cpu`, or one with a number for each replica, `cuda` say.
    """

    replicas: int
    threads: int
    batch: int
    device: str = "cpu"

    def __str__(self) -> str:
        replicas = f"{self.replicas} replica{'s' * (self.replicas > 1)}"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)} each" if self.device == "cpu" else self.device
        return f"{replicas}, {threads}, batch {self.batch}"


class Source(Protocol):
    """Rows that are read in order."""

    rows: int

    def read(self, places: Sequence[np.ndarray]) -> None:
        """Fills `places` with the next rows."""

    def skip(self, rows: int) -> None:
        """Passes over the next rows."""


Sink = Callable[[int, Sequence[np.ndarray]], None]  # first row, outputs
Told = Callable[[int, int], None]  # rows done, of all


def predict(
    artifact: Artifact,
    inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray],
    *,
    replicas: int | str = "auto",
    threads: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    objective: str = "throughput",
) -> list[np.ndarray]:
    """What the network makes of `inputs`, computed by replicas side by side.

    Args:
        artifact: opened, so that its digests were checked.
        inputs: one array for each input, in the manifest's order or by name, all with as many rows.
        replicas: how many, or `auto`.
        threads: of each; by default the cores are shared out.
        batch: rows at once; by default measured.
        device: `cpu`, `cuda` or `tpu`.
        objective: what `auto` looks for, `throughput` (rows a second) or `latency` (of a single row).

    Returns:
        One array for each output, rows in the order of the inputs.

    Raises:
        ArtifactError: the network cannot be run, or its outputs are not those of its manifest.
        DataError: the inputs do not fit the network.
        ProcessError: replicas died again and again at the same rows.
        SettingError: the settings make no sense.
        TargetError: the runtime, or the device, is not there.
    """
    specs = inputs_of(artifact)
    arrays = _Arrays(_in_order(inputs, specs))
    check_fits(arrays.specs, specs, "the inputs")
    setting = settled(artifact, lambda: _Arrays(arrays.arrays), replicas, threads, batch, device, objective)
    outputs = [np.empty((arrays.rows, *spec.shape), spec.dtype) for spec in outputs_of(artifact)]

    def sink(begin: int, found: Sequence[np.ndarray]) -> None:
        for place, values in zip(outputs, found, strict=True):
            place[begin : begin + len(values)] = values

    run(artifact, arrays, [(0, arrays.rows)], setting, sink)
    return outputs


def predict_file(
    artifact: Artifact,
    source: Path,
    out: Path,
    *,
    replicas: int | str = "auto",
    threads: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    objective: str = "throughput",
    prepare: Prepare | None = None,
    say: Callable[[str], None] = lambda text: None,
    told: Told = lambda done, rows: None,
) -> Setting:
    """Writes what the network makes of the arrays in a file to another, in memory that does not depend on either.

    A run that was killed goes on when it is called again for the same artifact, input and output.

    Args:
        source: `.npz`, `.npy`, Parquet or a folder, see `columns`.
        out: new, see `outputs`; outputs are called `output0`, `output1` and so on.
        prepare: for a folder of images, what makes a row of one.
        say: told what is going on.
        told: told how many rows are there, of how many.

    Others as for `predict`.

    Returns:
        The setting that it ran with.

    Raises:
        As `predict`; DataError also where a file cannot be read or written.
    """
    wanted, made = inputs_of(artifact), outputs_of(artifact)
    with open_input(source, prepare) as file:
        order = matched(file.specs, wanted, str(source))
        check_fits([file.specs[at] for at in order], wanted, str(source))
        check_some(file.rows, str(source))
        with OutFile(out, made, file.rows, key_of(artifact, source)) as sink:
            left = sink.left()
            if left != [(0, file.rows)]:
                say(f"{out}: {file.rows - sum(end - begin for begin, end in left)} rows are there from an earlier run")

            def again() -> Ordered:
                return stack.enter_context(Ordered(open_input(source, prepare), order))

            with contextlib.ExitStack() as stack:
                setting = settled(artifact, again, replicas, threads, batch, device, objective)
            say(str(setting))
            run(artifact, Ordered(file, order), left, setting, sink.write, told)
            file.finish()
            sink.finish()
    return setting


def predict_together(
    artifacts: Sequence[Artifact],
    source: Path,
    out: Path,
    combine: str,
    weights: Sequence[float],
    say: Callable[[str], None] = lambda text: None,
    told: Told = lambda done, rows: None,
    **settings: Any,
) -> None:
    """Writes what several networks make together of the arrays in a file: one after the other, each on all replicas.

    Args:
        combine: `mean` or `vote`, see `combining`.
        weights: one for each network.
        settings: as for `predict_file`.

    Raises:
        As `predict_file`; DataError also where the networks return different things.
    """
    made = combined_outputs(artifacts, combine, weights)
    check_new(out, len(made))
    parts = [out.with_name(f"{out.name}.{key_of(artifact, source)[:16]}.npz") for artifact in artifacts]
    for number, (artifact, part) in enumerate(zip(artifacts, parts, strict=True)):
        say(f"network {number + 1} of {len(artifacts)}: {artifact.folder}")
        if not part.exists():
            predict_file(artifact, source, part, **settings, say=say, told=told)
    key = hashlib.sha256("".join(key_of(artifact, source) for artifact in artifacts).encode()).hexdigest()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(InFile(part)) for part in parts]
        with OutFile(out, made, files[0].rows, key) as sink:
            for begin, end in shards([(0, files[0].rows)], COMBINED):
                found = [_read(file, end - begin) for file in files]
                sink.write(begin, [combined(combine, values, weights) for values in zip(*found, strict=True)])
            for file in files:
                file.finish()
            sink.finish()
    for part in set(parts):
        part.unlink()


def combined_outputs(artifacts: Sequence[Artifact], combine: str, weights: Sequence[float]) -> list[Rows]:
    """What one row of each output of several networks together is.

    Raises:
        DataError: they return different things, or what there is no vote on.
        SettingError: there is no such way to combine, or the weights do not fit.
    """
    check_way(combine, weights, len(artifacts))
    made = outputs_of(artifacts[0])
    for artifact in artifacts[1:]:
        if outputs_of(artifact) != made:
            raise DataError(
                f"{artifact.folder} returns {_said(outputs_of(artifact))}, but {artifacts[0].folder} {_said(made)}: "
                "only alike outputs can be combined."
            )
    if combine != "vote":
        return made
    if any(len(spec.shape) != 1 for spec in made):
        raise DataError(f"There is no vote on {_said(made)}: it takes one score for each class. Combine by mean.")
    return [Rows(spec.name, (), np.dtype(np.int64).str) for spec in made]


def _read(file: InFile, rows: int) -> list[np.ndarray]:
    places = [np.empty((rows, *spec.shape), spec.dtype) for spec in file.specs]
    file.read(places)
    return places


def _said(specs: Sequence[Rows]) -> str:
    return ", ".join(f"{np.dtype(spec.dtype)} of shape {spec.shape}" for spec in specs)


def inputs_of(artifact: Artifact) -> list[Rows]:
    """What one row of each input is."""
    return [_rows(spec, spec["name"]) for spec in artifact.manifest["inputs"]]


def outputs_of(artifact: Artifact) -> list[Rows]:
    """What one row of each output is; they are called by their number."""
    return [_rows(spec, f"output{number}") for number, spec in enumerate(artifact.manifest["outputs"])]


def _rows(spec: Mapping[str, Any], name: str) -> Rows:
    return Rows(name, tuple(spec["shape"][1:]), np.dtype(spec["dtype"]).str)


def matched(given: Sequence[Rows], wanted: Sequence[Rows], where: str) -> list[int]:
    """Which of the given arrays each input reads: the one of its name; a single one has no need of a name.

    Raises:
        DataError: there is none, or one too many.
    """
    names = [spec.name for spec in given]
    if len(given) == len(wanted) == 1:
        return [0]
    missing = [spec.name for spec in wanted if spec.name not in names]
    strange = [name for name in names if name not in [spec.name for spec in wanted]]
    if missing or strange:
        raise DataError(
            f"The network reads {', '.join(spec.name for spec in wanted)}, but {where} holds {', '.join(names)}. Name "
            "the arrays after the inputs, and leave out others."
        )
    return [names.index(spec.name) for spec in wanted]


def check_fits(given: Sequence[Rows], wanted: Sequence[Rows], where: str) -> None:
    """Refuses arrays that are not what the network reads, to the last bit: none is converted in silence.

    Raises:
        DataError: it is so.
    """
    for array, spec in zip(given, wanted, strict=True):
        if array.shape != spec.shape:
            raise DataError(
                f"A row of {array.name!r} in {where} has shape {array.shape}, but the network reads {spec.shape} as "
                f"{spec.name!r}. Prepare examples as for the network's training."
            )
        if np.dtype(array.dtype) != np.dtype(spec.dtype):
            raise DataError(
                f"{array.name!r} in {where} is {np.dtype(array.dtype)}, but the network reads {np.dtype(spec.dtype)} "
                f"as {spec.name!r}. Prepare examples as for its training: converting alone may not be enough."
            )


def check_some(rows: int, where: str) -> None:
    """Refuses an input without examples.

    Raises:
        DataError: it is one.
    """
    if not rows:
        raise DataError(f"There are no examples in {where}: the first dimension is 0. Give at least one.")


def _in_order(inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray], wanted: Sequence[Rows]) -> list[np.ndarray]:
    if isinstance(inputs, Mapping):
        given = [Rows(name, array.shape[1:], array.dtype.str) for name, array in inputs.items()]
        arrays = list(inputs.values())
        return [arrays[at] for at in matched(given, wanted, "the inputs")]
    if len(inputs) != len(wanted):
        raise DataError(f"The network reads {len(wanted)} arrays, but {len(inputs)} were given.")
    return list(inputs)


class _Arrays:
    """Arrays in memory, read in order."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        if bare := [array.dtype for array in arrays if not array.ndim]:
            raise DataError(f"A single {bare[0]} is no array of examples: the first dimension must count them.")
        self.arrays, self.rows, self._at = list(arrays), len(arrays[0]), 0
        self.specs = [Rows(f"array {i}", array.shape[1:], array.dtype.str) for i, array in enumerate(arrays)]
        if len({len(array) for array in arrays}) > 1:
            raise DataError(
                f"The arrays have {', '.join(str(len(array)) for array in arrays)} rows: the first dimension counts "
                "examples, and must be the same in all."
            )
        check_some(self.rows, "the inputs")

    def read(self, places: Sequence[np.ndarray]) -> None:
        for place, array in zip(places, self.arrays, strict=True):
            place[...] = array[self._at : self._at + len(place)]
        self._at += len(places[0])

    def skip(self, rows: int) -> None:
        self._at += rows


class Ordered:
    """A file whose arrays come in the order of the network's inputs."""

    def __init__(self, file: Input, order: Sequence[int]) -> None:
        self._file, self._order, self.rows = file, order, file.rows

    def __enter__(self) -> Ordered:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, places: Sequence[np.ndarray]) -> None:
        by_number = dict(zip(self._order, places, strict=True))
        self._file.read([by_number[number] for number in range(len(places))])

    def skip(self, rows: int) -> None:
        self._file.skip(rows)


def key_of(artifact: Artifact, source: Path) -> str:
    """The digest of what is computed: the same artifact, and an input that was not touched meanwhile."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    about: list[Any] = [(artifact.folder / MANIFEST).read_text(encoding="utf-8"), source.name]
    for path in files:
        status = path.stat()
        about.append([str(path.relative_to(source)), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ shards


@dataclass
class _Shard:
    """Rows that a replica has in one of its slots."""

    begin: int
    end: int
    deaths: int = 0


def shards(spans: Sequence[tuple[int, int]], batch: int) -> Iterator[tuple[int, int]]:
    """The rows of each shard, first and behind the last: all of `spans`, none twice, in order.

    >>> list(shards([(0, 5), (8, 9)], batch=2))
    [(0, 2), (2, 4), (4, 5), (8, 9)]
    """
    for begin, end in spans:
        yield from ((at, min(at + batch, end)) for at in range(begin, end, batch))


def run(
    artifact: Artifact,
    source: Source,
    spans: Sequence[tuple[int, int]],
    setting: Setting,
    sink: Sink,
    told: Told = lambda done, rows: None,
) -> None:
    """Computes the rows of `spans`, which are in order, and hands outputs to `sink` as they come.

    Raises:
        ArtifactError, ProcessError, TargetError: as `predict` says.
    """
    size = sum(end - begin for begin, end in spans)
    most = max((end - begin for begin, end in shards(spans, setting.batch)), default=0)
    if not most:
        return
    fitting = replace(setting, replicas=min(setting.replicas, -(-size // most)), batch=most)
    with _Crew(artifact, fitting) as crew:
        at, done = 0, source.rows - size
        told(done, source.rows)
        for begin, end in shards(spans, fitting.batch):
            replica, slot = crew.idle(sink)
            inputs, _ = replica.slots[slot]
            source.skip(begin - at)
            source.read([place[: end - begin] for place in inputs])
            at = end
            crew.begin(replica, slot, _Shard(begin, end))
            told(done + crew.done, source.rows)
        source.skip(source.rows - at)
        while crew.busy:
            crew.collect(sink)
            told(done + crew.done, source.rows)


class _Crew:
    """All replicas, and which shard lies in which of their slots. A context manager, which ends them."""

    def __init__(self, artifact: Artifact, setting: Setting) -> None:
        layout = Layout(tuple(inputs_of(artifact)), tuple(outputs_of(artifact)), setting.batch)
        self._stack, self.done = contextlib.ExitStack(), 0
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        self._free: list[tuple[Replica, int]] = []
        self._going: dict[Replica, dict[int, _Shard]] = {}
        try:
            for number, place in enumerate(_places(setting)):
                device = setting.device if setting.device == "cpu" else f"{setting.device}:{number}"
                replica = Replica(artifact.folder, artifact.target, layout, setting.threads, place, device)
                self._stack.callback(replica.close)
                self._going[replica] = {}
                self._selector.register(replica.answers, selectors.EVENT_READ, replica)
            for replica in self._going:
                self._loaded(replica)
        except BaseException:
            self._stack.close()
            raise
        # one slot of each first: the next shard is laid ready only when all have one
        self._free = [(replica, slot) for slot in (1, 0) for replica in reversed(self._going)]

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def busy(self) -> bool:
        """Whether there are shards whose outputs are not there."""
        return any(self._going.values())

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [replica.pid for replica in self._going]

    def idle(self, sink: Sink) -> tuple[Replica, int]:
        """A replica that has room for a shard, and the slot; waits for one."""
        while not self._free:
            self.collect(sink)
        return self._free.pop()

    def begin(self, replica: Replica, slot: int, shard: _Shard) -> None:
        """The shard whose inputs lie in the slot is computed."""
        self._going[replica][slot] = shard
        replica.compute(slot, shard.end - shard.begin)

    def collect(self, sink: Sink) -> None:
        """Waits until something is done, and hands it on."""
        for key, _ in self._selector.select():
            replica: Replica = key.data
            try:
                slot = replica.answer()
            except ProcessError as error:
                self._again(replica, error)
                continue
            except ArtifactError as error:
                raise ArtifactError(f"{self._rows(replica)} cannot be computed: {error}") from error
            shard = self._going[replica].pop(slot)
            _, outputs = replica.slots[slot]
            sink(shard.begin, [place[: shard.end - shard.begin] for place in outputs])
            self.done += shard.end - shard.begin
            self._free.insert(0, (replica, slot))

    def _again(self, replica: Replica, error: ProcessError) -> None:
        """Another process takes the place of one that died; what it was at is blamed for a second death."""
        current, *_ = sorted(self._going[replica].values(), key=lambda shard: shard.begin) or [_Shard(0, 0)]
        current.deaths += 1
        if current.deaths >= DEATHS:
            raise ProcessError(
                f"The replica that computes rows {current.begin} to {current.end - 1} {error} It was the second one to "
                "die there: look at these rows, or make room, or choose fewer replicas or a smaller batch."
            ) from error
        warnings.warn(
            f"A replica {error} Another takes its place, and does rows {current.begin} to {current.end - 1} again.",
            stacklevel=2,
        )
        self._selector.unregister(replica.answers)
        replica.restart()
        self._selector.register(replica.answers, selectors.EVENT_READ, replica)
        self._loaded(replica)
        for slot, shard in sorted(self._going[replica].items(), key=lambda item: item[1].begin):
            replica.compute(slot, shard.end - shard.begin)

    def _loaded(self, replica: Replica) -> None:
        try:
            replica.answer()
        except ProcessError as error:
            raise ProcessError(
                f"A replica {error} It had not yet loaded the network: the machine may be short of memory. Make room, "
                "or choose fewer replicas."
            ) from error

    def _rows(self, replica: Replica) -> str:
        shards = sorted(self._going[replica].values(), key=lambda shard: shard.begin)
        return f"Rows {shards[0].begin} to {shards[-1].end - 1}" if shards else "The network"


def _places(setting: Setting) -> list[list[int]]:
    """The processors of each replica: cores that lie side by side, or in turn where there are too few."""
    found = cores()
    if setting.device != "cpu":
        return [[] for _ in range(setting.replicas)]
    if setting.replicas > len(found):
        return [found[number % len(found)] for number in range(setting.replicas)]
    ends = [len(found) * number // setting.replicas for number in range(setting.replicas + 1)]
    return [list(itertools.chain(*found[begin:end])) for begin, end in itertools.pairwise(ends)]


# ------------------------------------------------------------------------------------------------ settings


def settled(
    artifact: Artifact,
    again: Callable[[], Source],
    replicas: int | str,
    threads: int | None,
    batch: int | None,
    device: str,
    objective: str,
) -> Setting:
    """What is asked for, and where that is left open what a short measurement finds best.

    Args:
        again: the input from its beginning.

    Raises:
        SettingError: it makes no sense.
        TargetError: the device is not there.
    """
    _check(replicas, threads, batch, objective)
    most = targets.find(artifact.target).count(device)
    if isinstance(replicas, int) and replicas > most:
        what = "processor core" if device == "cpu" else f"{device} device"
        if device != "cpu":
            raise SettingError(f"There are {most} {what}s for {replicas} replicas. Ask for {most} at most.")
        warnings.warn(f"{replicas} replicas share {most} {what}s: more than {most} gain nothing.", stacklevel=3)
    ways = list(_ways(most, replicas, threads, batch, device, objective))
    return ways[0] if len(ways) == 1 else _best(artifact, again(), ways, objective)


def _check(replicas: int | str, threads: int | None, batch: int | None, objective: str) -> None:
    if objective not in OBJECTIVES:
        raise SettingError(f"There is no objective {objective!r}. There are: {', '.join(OBJECTIVES)}.")
    if replicas != "auto" and not (isinstance(replicas, int) and replicas > 0):
        raise SettingError(f"replicas={replicas!r} is neither auto nor a whole number above zero.")
    check_counts(threads=threads, batch=batch)


def check_counts(**counts: int | None) -> None:
    """Refuses counts below one; None says nothing.

    Raises:
        SettingError: there is one.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise SettingError(f"{name}={value!r} is no whole number above zero.")


def _ways(
    most: int, replicas: int | str, threads: int | None, batch: int | None, device: str, objective: str
) -> Iterator[Setting]:
    """Settings worth a try: many narrow replicas, a single wide one, and what lies between."""
    at_once = (1,) if objective == "latency" else BATCHES
    for count in [replicas] if isinstance(replicas, int) else _counts(most, objective):
        wide = threads or (max(1, physical_cores() // count) if device == "cpu" else 1)
        for size in [batch] if batch else at_once:
            yield Setting(count, wide, size, device)


def _counts(most: int, objective: str) -> list[int]:
    """Numbers of replicas: a single row has no use for a second one.

    >>> _counts(8, "throughput"), _counts(1, "throughput"), _counts(8, "latency")
    ([8, 4, 1], [1], [1])
    """
    return [1] if objective == "latency" else list(dict.fromkeys((most, max(1, most // 2), 1)))


def _best(artifact: Artifact, source: Source, ways: Sequence[Setting], objective: str) -> Setting:
    """The setting that gets through most rows in a second, or that takes least time for one."""
    largest = max(way.batch for way in ways)
    rows = min(source.rows, largest)
    sample = [np.empty((rows, *spec.shape), spec.dtype) for spec in inputs_of(artifact)]
    source.read(sample)
    sizes = dict.fromkeys((way.replicas, way.threads, min(way.batch, rows), way.device) for way in ways)
    paces = {Setting(*size): _pace(artifact, sample, Setting(*size)) for size in sizes}
    return max(paces, key=lambda way: paces[way])


def _pace(artifact: Artifact, sample: Sequence[np.ndarray], setting: Setting) -> float:
    """Rows in a second."""
    finished: list[float] = []

    def sink(begin: int, outputs: Sequence[np.ndarray]) -> None:
        finished.append(time.perf_counter())

    with _Crew(artifact, setting) as crew:
        warm = 2 * setting.replicas  # what is compiled for the first shards is not counted
        while len(finished) <= warm or finished[-1] - finished[warm] < MEASURED_S:
            replica, slot = crew.idle(sink)
            for place, array in zip(replica.slots[slot][0], sample, strict=True):
                place[...] = array[: setting.batch]
            crew.begin(replica, slot, _Shard(0, setting.batch))
    return setting.batch * (len(finished) - 1 - warm) / (finished[-1] - finished[warm])
