"""One replica of an artifact: a process of its own, on processor cores or a device of its own, that computes shards.

Inputs and outputs lie in memory that both processes see, in a few slots of one batch each, so that the next shard is
laid ready while one is computed. Only numbers of slots and rows go through pipes, a line of JSON each. A replica that
dies leaves its slots as they were: `restart` begins another in its place. Which shard goes where is `parallel`'s
affair.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from featherweight.arrays import Rows
from featherweight.errors import ArtifactError, FeatherweightError, ProcessError, TargetError

SLOTS = 2  # one is computed while the next is filled
ALIGNED = 64  # bytes: where arrays begin
TAIL = 2000  # characters of a process's last words
PATIENCE_S = 5.0  # for a process that was asked to end
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Layout:
    """Where in a replica's memory arrays lie.

    Args:
        inputs, outputs: what one row is made of.
        batch: rows of a slot.
    """

    inputs: tuple[Rows, ...]
    outputs: tuple[Rows, ...]
    batch: int

    @property
    def slot_bytes(self) -> int:
        """Of one slot."""
        return sum(_aligned(spec.bytes * self.batch) for spec in (*self.inputs, *self.outputs))

    def views(self, memory: memoryview, slot: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The arrays of a slot, inputs and outputs."""
        at, found = slot * self.slot_bytes, []
        for spec in (*self.inputs, *self.outputs):
            shape, dtype = (self.batch, *spec.shape), np.dtype(spec.dtype)
            found.append(np.frombuffer(memory, dtype, math.prod(shape), at).reshape(shape))
            at += _aligned(spec.bytes * self.batch)
        return found[: len(self.inputs)], found[len(self.inputs) :]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Replica:
    """The process, seen from the one that hands out shards.

    Args:
        folder: of the artifact, which was checked.
        target: that runs it.
        layout: of its memory.
        threads: of the runtime.
        cores: numbers of the processors it may use; empty for all.
        device: that it computes on, `cpu` or `cuda:0`, say.
    """

    def __init__(
        self, folder: Path, target: str, layout: Layout, threads: int, cores: Sequence[int], device: str = "cpu"
    ) -> None:
        self._about: dict[str, Any] = {
            "folder": str(folder.resolve()),
            "target": target,
            "inputs": [asdict(spec) for spec in layout.inputs],
            "outputs": [asdict(spec) for spec in layout.outputs],
            "batch": layout.batch,
            "threads": threads,
            "cores": list(cores),
            "device": device,
        }
        self._file = tempfile.TemporaryFile(dir=_memory_folder())  # noqa: SIM115 - closed by close()
        try:
            self._file.truncate(SLOTS * layout.slot_bytes)
            self._memory = mmap.mmap(self._file.fileno(), SLOTS * layout.slot_bytes)
        except (OSError, ValueError, OverflowError) as error:
            self._file.close()
            raise ProcessError(
                f"{SLOTS} shards of {layout.batch} examples need {SLOTS * layout.slot_bytes:,} bytes of memory, which "
                f"cannot be had: {error}. Choose a smaller batch, or fewer replicas."
            ) from error
        self.slots = [layout.views(memoryview(self._memory), slot) for slot in range(SLOTS)]
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        try:
            self.restart()
        except BaseException:
            self.close()
            raise

    @property
    def answers(self) -> IO[bytes]:
        """Where answers come from, to be waited for."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None
        return self._process.pid

    def restart(self) -> None:
        """Begins a process, in place of one that is gone; it answers once when it is ready."""
        self._end()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _end()
        self._process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches us, and we end it
            [sys.executable, "-P", "-m", "featherweight.replica", str(self._file.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            pass_fds=(self._file.fileno(),),
            env=_environment(self._about["threads"]),
            start_new_session=True,
            bufsize=0,
        )
        self._send(self._about)

    def compute(self, slot: int, rows: int) -> None:
        """Asks for the outputs of a slot's first rows; `answer` tells when they are there."""
        self._send({"slot": slot, "rows": rows})

    def answer(self) -> int:
        """The slot that is done; -1 when it has loaded the network. Waits for it.

        Raises:
            ArtifactError, TargetError: the network cannot be loaded, or cannot compute what it was given.
            ProcessError: the process is gone.
        """
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise ProcessError(f"was lost ({self._fate()}). {self.last_words()}")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            kinds: dict[str, type[FeatherweightError]] = {"TargetError": TargetError, "ArtifactError": ArtifactError}
            raise kinds.get(said["kind"], ArtifactError)(said["error"])
        return int(said["done"])

    def last_words(self) -> str:
        """What the process wrote to its standard error, its end."""
        if self._said is None:
            return ""
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - TAIL))
        said = self._said.read().decode(errors="replace").strip()
        return f"Its last words: {said}" if said else "It said nothing."

    def close(self) -> None:
        """Ends the process, whatever it is at, and gives its memory back."""
        self._end()
        self.slots = []
        with contextlib.suppress(BufferError):  # somebody holds a view: it goes with that
            self._memory.close()
        self._file.close()

    def _fate(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"ended by signal {-code}" if code < 0 else f"exit code {code}"

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # one that is gone is noticed when its answer is read
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _end(self) -> None:
        if (process := self._process) is not None:
            self._process = None
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            if process.poll() is None:
                process.kill()
            process.wait()
        if self._said is not None:
            self._said.close()
            self._said = None


def _memory_folder() -> str | None:
    """Where files are memory and not disk; None for wherever temporary files lie."""
    place = "/dev/shm"
    return place if os.path.isdir(place) and os.access(place, os.W_OK) else None  # noqa: PTH112


def _environment(threads: int) -> dict[str, str]:
    package = str(Path(__file__).resolve().parent.parent)
    reachable = dict.fromkeys([*(path or os.getcwd() for path in sys.path), package])  # noqa: PTH109 - as Python does
    return {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "PYTHONPATH": os.pathsep.join(reachable),
    }


# ------------------------------------------------------------------------------------------------ the process itself


def serve(requests: IO[bytes], answers: IO[bytes], memory: int) -> None:
    """Loads what the first line asks for, then computes slots until there are no more lines."""
    about = json.loads(requests.readline())
    _settle(about["cores"])
    try:
        work = _loaded(about, memory)
        _say(answers, {"done": -1})
        for line in requests:
            request = json.loads(line)
            work(request["slot"], request["rows"])
            _say(answers, {"done": request["slot"]})
    except Exception as error:  # whatever a runtime raises is told, not printed
        _say(answers, {"kind": type(error).__name__, "error": " ".join(str(error).split())[:1000]})


def _settle(cores: Sequence[int]) -> None:
    """Before a runtime is loaded, so that its threads are born on the cores of the process."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loaded(about: dict[str, Any], memory: int) -> Any:
    """A function of a slot and a number of rows, which writes the outputs where they belong."""
    from featherweight import targets

    specs = {
        what: tuple(Rows(spec["name"], tuple(spec["shape"]), spec["dtype"]) for spec in about[what])
        for what in ("inputs", "outputs")
    }
    layout = Layout(**specs, batch=about["batch"])
    shared = memoryview(mmap.mmap(memory, SLOTS * layout.slot_bytes))
    slots = [layout.views(shared, slot) for slot in range(SLOTS)]
    run = targets.find(about["target"]).load_on(about["device"], Path(about["folder"]), about["threads"])

    def work(slot: int, rows: int) -> None:
        inputs, places = slots[slot]
        for place, found in zip(places, whole(run, inputs, rows, layout.outputs), strict=True):
            place[:rows] = found

    return work


def whole(run: Any, inputs: list[np.ndarray], rows: int, made: Sequence[Rows]) -> list[np.ndarray]:
    """What the network makes of the first rows, which are run as a whole batch.

    A shorter one would be compiled anew. The last row is there as often as it takes, for zeros may be far from anything
    that the network has seen, which counts where ranges are found while it runs.

    Raises:
        ArtifactError: it is not what `made` says.
    """
    for place in inputs:
        place[rows:] = place[rows - 1]
    outputs = [found[:rows] for found in run(inputs)]
    found, said = [(v.shape, v.dtype) for v in outputs], [((rows, *s.shape), np.dtype(s.dtype)) for s in made]
    if found != said:
        raise ArtifactError(
            f"The network returned {_listed(found)} for {rows} examples, where its manifest says {_listed(said)}. Make "
            "the artifact again with `featherweight apply`."
        )
    return outputs


def _listed(arrays: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{dtype} of shape {shape}" for shape, dtype in arrays) or "nothing"


def _say(answers: IO[bytes], what: dict[str, Any]) -> None:
    answers.write(json.dumps(what).encode() + b"\n")
    answers.flush()


def main() -> None:
    """What a runtime prints goes to the standard error: the standard output is for answers alone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers, int(sys.argv[1]))


if __name__ == "__main__":
    main()
