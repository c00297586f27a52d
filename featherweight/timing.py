"""Timing: networks in fresh processes, run in turn, every sample kept.

A worker, `python -m featherweight.timing`, loads one network and speaks JSON lines: requests on its standard input,
answers on its standard output; what the user's code prints goes to standard error instead. `interleave` lets several
workers run one after another in rounds, so that whatever slows the machine down meets all of them alike, and `ratio`
compares two of them round by round. What the figures mean for an artifact is `measure`'s affair.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from featherweight import errors, targets
from featherweight.errors import ArtifactError, FeatherweightError, ProcessError, WorkloadError
from featherweight.targets import Arrays, Kernel, usual

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
PINNED = {"OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "FALSE", "OPENVINO_TELEMETRY_OPT_OUT": "1", "PYTHONHASHSEED": "0"}
SETTLE_SECONDS = 0.05  # between subjects: threads spin on after a run, those of ONNX Runtime for 26 ms
FEWEST_ROUNDS = 5  # are always run, whatever the time limit says: fewer give no interval
MOST_RUNS = 2000  # a round, of one network
RESAMPLES = 4000
BUSY = 0.05  # share of time spent waiting for a processor, above which times mean little
TIMEOUT_S = 900.0  # for one answer of a worker, loading a large workload included
PATIENCE_S = 3.0  # for a worker to end by itself
TAIL = 1500  # characters of a dead worker's standard error that are shown


Key = tuple[str, str | None, int, str]  # of a worker: name, workload, threads, digest of the inputs
_kept: ContextVar[dict[Key, Worker] | None] = ContextVar("kept", default=None)


@dataclass(frozen=True)
class Subject:
    """What is timed: an artifact's folder, the network of a workload, or a function in this very process."""

    name: str
    folder: Path | None = None
    workload: str | None = None
    run: Callable[[], object] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.folder is not None) + (self.workload is not None) + (self.run is not None) != 1:
            raise ValueError(f"Subject {self.name!r} needs exactly one of folder, workload and run.")


@dataclass(frozen=True)
class Timings:
    """Milliseconds by name, one list per round; and bytes of memory, None for what ran in this process.

    `peak_rss_bytes` is the most that a process held while it ran (and, for artifacts, loaded) its network,
    interpreter and libraries included; `start_rss_bytes` what it held before it loaded anything. `waiting_share` is how
    much of the time in which a process could have run it had to wait for a processor that others held. That matters:
    long runs are interrupted, while short ones slip through, so that on a busy machine ratios come out too large.
    """

    rounds: dict[str, list[list[float]]]
    peak_rss_bytes: dict[str, int | None]
    start_rss_bytes: dict[str, int | None]
    waiting_share: dict[str, float | None]


@dataclass(frozen=True)
class Interval:
    """A median with the 95 % interval in which it lies."""

    median: float
    low: float
    high: float


# ------------------------------------------------------------------------------------------------ mathematics


def ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """How many times as long `a` takes as `b`: the median over rounds of the ratio of their medians in each round.

    The interval is where that median lies when rounds are drawn anew with replacement: as wide as the rounds differ.
    It is the percentile interval of the bootstrap, expanded for small numbers (Hesterberg 2015, arXiv:1411.5279,
    section 4.2): plain percentiles cover the truth in 88 % of all cases with 7 rounds, these in 95 % or more from 6
    rounds on. Fewer than 5 rounds give none: 0 to infinity.

    >>> ratio([[2.0, 2.2], [4.0, 4.4]] * 3, [[1.0, 1.1], [2.0, 2.2]] * 3)
    Interval(median=2.0, low=2.0, high=2.0)
    """
    from scipy.special import ndtr, stdtrit

    count = len(a)
    if not count or count != len(b):
        raise ValueError(f"ratio compares round with round, but got {len(a)} and {len(b)} rounds.")
    ratios = np.array([np.median(x) / np.median(y) for x, y in zip(a, b, strict=True)])
    median = float(np.median(ratios))
    if count < FEWEST_ROUNDS:
        return Interval(median, 0.0, float("inf"))
    picks = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    tail = ndtr(-np.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.975))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [tail, 1 - tail])
    return Interval(median, float(low), float(high))


def latency(rounds: Sequence[Sequence[float]]) -> float:
    """The median over rounds of the medians in each round.

    >>> latency([[1.0, 2.0, 9.0], [3.0], [5.0]])
    3.0
    """
    return float(np.median([np.median(samples) for samples in rounds]))


# ------------------------------------------------------------------------------------------------ the measuring side


def interleave(
    subjects: Sequence[Subject],
    inputs: Arrays,
    *,
    threads: int = 1,
    rounds: int = 15,
    round_seconds: float = 0.15,
    limit_seconds: float = 120.0,
) -> Timings:
    """Every subject timed on `inputs`, in turn, with `threads` threads.

    In each round every subject runs for about `round_seconds`, after one run that is not counted (the others have
    meanwhile taken its place in the caches). Who begins changes from round to round, and the order is reversed after
    a full turn, so that nobody always follows the same neighbour.

    Args:
        subjects: with different names.
        inputs: one array per input of the network; subjects with `run` do not look at them.
        threads: of each network.
        rounds: how many, if the time allows; five in any case.
        round_seconds: how long one subject runs in one round; at least one run.
        limit_seconds: after which no new round begins.

    Raises:
        ArtifactError, WorkloadError: a subject cannot be loaded or run; the message says why.
        ProcessError: a subject's process was killed, hung or ran out of memory, which may not be the subject's fault.
    """
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Subjects need names of their own, but they are {names}.")
    with started(subjects, inputs, threads) as runners:
        begin = time.monotonic()
        counts = [_runs_per_round(runner, round_seconds) for runner in runners]
        samples: dict[str, list[list[float]]] = {name: [] for name in names}
        waited: dict[str, list[float]] = {name: [] for name in names}
        for number in range(max(rounds, FEWEST_ROUNDS)):
            if number >= FEWEST_ROUNDS and time.monotonic() - begin > limit_seconds:
                break
            for index in turn(len(names), number):
                time.sleep(SETTLE_SECONDS)
                latencies, share = runners[index].run(counts[index])
                samples[names[index]].append(latencies)
                waited[names[index]].extend([] if share is None else [share])
        memory = {name: runner.memory() for name, runner in zip(names, runners, strict=True)}
    return Timings(
        samples,
        {name: peak for name, (_, peak) in memory.items()},
        {name: start for name, (start, _) in memory.items()},
        {name: float(np.mean(shares)) if shares else None for name, shares in waited.items()},
    )


def turn(count: int, number: int) -> list[int]:
    """Who follows whom in round `number`.

    >>> [turn(3, number) for number in range(4)]
    [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    """
    shift = number % count
    order = [*range(shift, count), *range(shift)]
    return order[::-1] if number // count % 2 else order


@contextlib.contextmanager
def started(subjects: Sequence[Subject], inputs: Arrays, threads: int) -> Iterator[list[Worker | Here]]:
    """One runner per subject, loaded and ready; their processes end with the block, however it ends."""
    kept, digest = _kept.get(), _digest(inputs)
    runners: list[Worker | Here] = []
    mine: dict[Key, Worker] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="featherweight-")))
        stack.callback(lambda: _close(mine.values()))
        if any(subject.run is None for subject in subjects):
            _write_inputs(folder / "inputs.safetensors", inputs)
        fresh = []
        for subject in subjects:
            if subject.run is not None:
                runners.append(Here(subject.run, threads))
                continue
            key = (subject.name, subject.workload, threads, digest)
            if kept is not None and key in kept:
                mine[key] = kept.pop(key)
            else:
                mine[key] = Worker(subject, threads)
                mine[key].begin_load(folder / "inputs.safetensors")
                fresh.append(mine[key])
            runners.append(mine[key])
        for worker in fresh:  # they load at the same time
            worker.end_load()
        yield runners
        if kept is not None:  # reached only when the block ended well
            for key in [key for key in mine if key[1] is not None]:
                kept[key] = mine.pop(key)


@contextlib.contextmanager
def keeping_originals() -> Iterator[None]:
    """Inside the block the processes of workloads' networks live on from one `interleave` to the next.

    They are slow to load, with their data, and the same every time. Artifacts have a fresh process in any case.
    """
    kept: dict[Key, Worker] = {}
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        _close(kept.values())


def profiled(
    folder: Path, inputs: Arrays, *, threads: int = 1, runs: int = 3, calls: int = 1
) -> tuple[list[Kernel], float]:
    """What the runtime says of its own runs of the artifact in `folder`, in a fresh process.

    And the share of the time that this process waited for a processor that others held. Some runtimes tell means, in
    which one interruption weighs more than the layer: of several calls those that waited are left out.

    Args:
        folder: of the artifact.
        inputs: one array per input of the network.
        threads: of the network.
        runs: of a network that was loaded.
        calls: how often it is loaded anew; each operator has the median of its times.

    Raises:
        ArtifactError: it cannot be loaded or run; the message says why.
        ProcessError: the process was killed, hung or ran out of memory.
    """
    with tempfile.TemporaryDirectory(prefix="featherweight-") as scratch:
        _write_inputs(path := Path(scratch) / "inputs.safetensors", inputs)
        worker = Worker(Subject(folder.name, folder=folder), threads)
        try:
            return quietest([worker.profile(path, runs) for _ in range(calls)])
        finally:
            worker.close()


def quietest(calls: Sequence[tuple[list[Kernel], float]]) -> tuple[list[Kernel], float]:
    """The usual times of those calls that hardly waited, and how long these waited; of the one that waited least else.

    >>> calls = [([Kernel("a", "Conv", "fp32", latency)], share) for latency, share in ((1.0, 0.01), (9.0, 0.5))]
    >>> quietest(calls)
    ([Kernel(name='a', kind='Conv', precision='fp32', latency_ms=1.0)], 0.01)
    """
    bound = max(BUSY, min(share for _, share in calls))
    kept = [(kernels, share) for kernels, share in calls if share <= bound]
    return usual([kernels for kernels, _ in kept]), float(np.mean([share for _, share in kept]))


def _close(workers: Collection[Worker]) -> None:
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:  # they end at the same time
            worker.dismiss()


def _write_inputs(path: Path, inputs: Arrays) -> None:
    from safetensors.numpy import save_file

    save_file({f"input{index}": np.ascontiguousarray(array) for index, array in enumerate(inputs)}, path)


def _digest(inputs: Arrays) -> str:
    digest = hashlib.sha256()
    for array in inputs:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _runs_per_round(runner: Worker | Here, round_seconds: float) -> int:
    """How many runs fill a round; finding out is the warm-up, which lasts about as long as a round."""
    (first,), _ = runner.run(1)
    if first > 1e3 * round_seconds:
        return 1
    begin, samples = time.monotonic(), [first]
    while time.monotonic() - begin < round_seconds:
        samples, _ = runner.run(min(MOST_RUNS, max(2, 2 * len(samples))))
    return min(MOST_RUNS, max(1, round(1e3 * round_seconds / max(float(np.median(samples)), 1e-6))))


class Here:
    """A function timed in this process, with the manners of a worker."""

    def __init__(self, function: Callable[[], object], threads: int) -> None:
        self._function, self._threads = function, threads

    def begin_load(self, inputs: Path) -> None:
        """Nothing to do."""

    def end_load(self) -> None:
        """Nothing to do."""

    def run(self, count: int) -> tuple[list[float], float | None]:
        """Milliseconds of `count` runs, after one that is not counted; and the share of time spent waiting."""
        with _torch_threads(self._threads):
            return _timed(self._function, count)

    def memory(self) -> tuple[int | None, int | None]:
        """Unknown: this process holds more than the network."""
        return None, None


class Worker:
    """A fresh process that holds one network. `close` ends it, also after an error or Ctrl-C."""

    def __init__(self, subject: Subject, threads: int) -> None:
        self._subject, self._threads, self._ended = subject, threads, False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._lines: queue.Queue[bytes] = queue.Queue()
        try:
            self._process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches us, and we end it
                [sys.executable, "-P", "-m", "featherweight.timing"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=_environment(threads),
                start_new_session=True,
            )
        except BaseException:
            self._stderr.close()
            raise
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def begin_load(self, inputs: Path) -> None:
        """Asks for the network; the answer is waited for by `end_load`."""
        folder, workload = self._subject.folder, self._subject.workload
        what = {"workload": workload} if folder is None else {"folder": str(folder.resolve())}
        self._send({"do": "load", **what, "inputs": str(inputs), "threads": self._threads})

    def end_load(self) -> None:
        """Waits until the network is loaded."""
        self._answer()

    def run(self, count: int) -> tuple[list[float], float | None]:
        """Milliseconds of `count` runs, after one that is not counted; and the share of time spent waiting."""
        self._send({"do": "run", "runs": count})
        answer = self._answer()
        return answer["latencies_ms"], answer["waiting_share"]

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes held before anything was loaded, and at most since."""
        self._send({"do": "memory"})
        answer = self._answer()
        return answer["start_rss_bytes"], answer["peak_rss_bytes"]

    def profile(self, inputs: Path, runs: int) -> tuple[list[Kernel], float]:
        """What the runtime says of `runs` runs of the artifact, loaded anew, and the share of time spent waiting."""
        folder = str(self._subject.folder and self._subject.folder.resolve())
        self._send({"do": "profile", "folder": folder, "inputs": str(inputs), "threads": self._threads, "runs": runs})
        answer = self._answer()
        return [Kernel(**kernel) for kernel in answer["kernels"]], answer["waiting_share"] or 0.0

    def dismiss(self) -> None:
        """Asks the process to end, and does not wait."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Ends the process and whatever it started: by asking, then by force."""
        assert self._process.stdout is not None
        self.dismiss()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=PATIENCE_S)
        finally:
            self._end()
            self._reader.join(timeout=PATIENCE_S)
            self._process.stdout.close()
            self._stderr.close()

    def _end(self) -> int:
        """The exit code, after the process and its children are gone."""
        if not self._ended:
            self._ended = True  # once: later its number may belong to somebody else
            if os.name == "posix":
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)  # the group is the worker's own: it leads a session
            else:
                self._process.kill()
        return self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # a worker that is gone is noticed, and explained, when its answer is read
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise self._loss(f"gave no answer within {TIMEOUT_S:.0f} s") from None
        if not line:
            self._lines.put(line)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=PATIENCE_S)
            code = self._end()
            if code < 0:
                raise self._loss(f"was ended by signal {-code} before it answered")
            raise self._failure(f"ended with exit code {code} before it answered")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["kind"], None)
            if isinstance(kind, type) and issubclass(kind, FeatherweightError):
                raise kind(answer["error"])
            if answer["kind"] == MemoryError.__name__:
                raise self._loss("ran out of memory")
            raise self._failure(f"raised {answer['kind']}: {answer['error']}")
        return answer

    def _loss(self, what: str) -> ProcessError:
        return ProcessError(
            f"The process that times {self._subject.name!r} {what}. The machine may be short of memory, or too busy: "
            "make room and try again; if that does not help, it needs more memory, or another target. "
            f"{self._last_words()}"
        )

    def _failure(self, what: str) -> FeatherweightError:
        artifact = self._subject.folder is not None
        advice = (
            "The runtime cannot hold this network here: look for memory that ran out, or choose another target."
            if artifact
            else "The workload must load by itself in a fresh process: run its file alone, and mend what it raises."
        )
        kind = ArtifactError if artifact else WorkloadError
        return kind(f"The process that times {self._subject.name!r} {what}. {advice} {self._last_words()}")

    def _last_words(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - TAIL))
        said = self._stderr.read().decode(errors="replace").strip() or "(nothing)"
        return f"Its last words:\n{said}"


def _environment(threads: int) -> dict[str, str]:
    """The variables of a worker: ours, the number of threads, and the same modules within reach."""
    package = str(Path(__file__).resolve().parent.parent)
    reachable = dict.fromkeys([*(path or os.getcwd() for path in sys.path), package])  # noqa: PTH109 - as Python does
    return {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        **PINNED,
        "PYTHONPATH": os.pathsep.join(reachable),
    }


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Inside the block torch, where it is loaded at all, has that many threads."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(function: Callable[[], object], count: int) -> tuple[list[float], float | None]:
    """Milliseconds of `count` runs, after one that is not counted, without collecting garbage meanwhile.

    And the share of the time in which this process could have run that it waited for a processor.
    """
    function()
    collecting = gc.isenabled()
    gc.disable()
    try:
        before = _scheduled()
        stamps = [time.perf_counter_ns()]
        for _ in range(count):
            function()
            stamps.append(time.perf_counter_ns())
        after = _scheduled()
    finally:
        if collecting:
            gc.enable()
    latencies = [round((end - begin) / 1e6, 5) for begin, end in itertools.pairwise(stamps)]
    return latencies, _waited(before, after)


def _waited(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of the time in which this process could have run that it waited, from two answers of `_scheduled`."""
    if before is None or after is None:
        return None
    ran, waited = (max(0, end - begin) for begin, end in zip(before, after, strict=True))
    return round(waited / max(1, ran + waited), 4)


def _scheduled() -> tuple[int, int] | None:
    """Nanoseconds for which the threads of this process have run, and waited to run; None where Linux does not say."""
    ran = waited = 0
    try:
        for task in os.scandir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                one, other, _ = Path(task.path, "schedstat").read_bytes().split()
                ran, waited = ran + int(one), waited + int(other)
    except (OSError, ValueError):
        return None
    return (ran, waited) if ran else None


# ------------------------------------------------------------------------------------------------ the worker's side


def peak_rss_bytes() -> int | None:
    """The most memory that this process ever held, as far as the system tells."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return None
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """The peak is from now on counted from what is held now, where the system can do that (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _read_inputs(path: str) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    stored = load_file(path)
    return [stored[f"input{index}"] for index in range(len(stored))]


def _profile(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The operators of the requested artifact, as its runtime reports them."""
    from featherweight.artifact import open_artifact

    artifact = open_artifact(Path(request["folder"]))
    inputs, target = _read_inputs(request["inputs"]), targets.find(artifact.target)
    return [asdict(kernel) for kernel in target.profile(artifact.folder, inputs, request["threads"], request["runs"])]


def _loaded(request: dict[str, Any]) -> Callable[[], object]:
    """A function that runs the requested network once on the stored inputs."""
    inputs = _read_inputs(request["inputs"])
    threads = request["threads"]
    if "folder" in request:
        from featherweight.artifact import open_artifact

        run = open_artifact(Path(request["folder"])).load(threads)
        return lambda: run(inputs)
    import torch

    from featherweight import workload as workloads

    torch.set_num_threads(threads)
    workload = workloads.load(request["workload"])
    torch.set_num_threads(threads)  # the workload's file may have set another number
    model, batch = workload.model, workloads.like(workload.example, [torch.from_numpy(array) for array in inputs])
    del workload  # and its data with it, so that the peak of memory is the network's
    gc.collect()
    _forget_peak()

    def eager() -> object:
        with torch.inference_mode():
            return workloads.call(model, batch)

    return eager


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers requests, one JSON object a line, until there are no more."""
    start = peak_rss_bytes()
    function: Callable[[], object] | None = None
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["do"] == "load":
                function = _loaded(request)
                answer = {}
            elif request["do"] == "run":
                assert function is not None
                latencies, waiting = _timed(function, request["runs"])
                answer = {"latencies_ms": latencies, "waiting_share": waiting}
            elif request["do"] == "profile":
                before = _scheduled()
                kernels = _profile(request)
                answer = {"kernels": kernels, "waiting_share": _waited(before, _scheduled())}
            else:
                answer = {"start_rss_bytes": start, "peak_rss_bytes": peak_rss_bytes()}
        except Exception as error:
            answer = {"kind": type(error).__name__, "error": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main() -> None:
    """A worker: keeps standard input and output for itself; other code reads nothing and prints to standard error."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    serve(requests, answers)


if __name__ == "__main__":
    main()
