"""Runtime knobs: on how many threads, and with how many inputs at once, an artifact runs best on this machine.

Which of them count depends on what is made small: for latency the threads, for throughput the inputs that are run
together. Precision hints are no knob here: a target sets them itself. bfloat16 is slower for some networks and a
tenth faster for others (LOG.md), but changes outputs, so it would have to be judged, not only timed. Several replicas
side by side are `parallel`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from featherweight.artifact import Artifact
from featherweight.measure import timing_inputs
from featherweight.timing import Subject, interleave, latency
from featherweight.workload import Workload

BATCHES = (1, 4, 16, 64)
ROUNDS, ROUND_SECONDS, LIMIT_SECONDS = 7, 0.1, 10.0  # of each setting


@dataclass(frozen=True)
class Knob:
    """One way to run a network.

    Args:
        threads: of the runtime.
        batch: inputs that are run together.
        latency_ms: of one run, the median over rounds.
    """

    threads: int
    batch: int
    latency_ms: float

    @property
    def examples_per_s(self) -> float:
        """How many inputs it gets through in a second.

        >>> Knob(threads=1, batch=4, latency_ms=8.0).examples_per_s
        500.0
        """
        return 1000 * self.batch / self.latency_ms


def settings(objective: str, threads: int, batch: int) -> Iterator[tuple[int, int]]:
    """Threads and batches worth a try, those of the search first.

    >>> list(settings("latency", threads=4, batch=1)), list(settings("throughput", threads=2, batch=16))
    ([(4, 1), (2, 1), (1, 1)], [(2, 16), (2, 1), (2, 4), (2, 64)])
    """
    yield threads, batch
    if objective == "throughput":
        yield from ((threads, other) for other in BATCHES if other != batch)
    else:
        while threads > 1:
            threads //= 2
            yield threads, batch


def timed(artifact: Artifact, workload: Workload, ways: Sequence[tuple[int, int]]) -> list[Knob]:
    """Each of `ways`, threads and batch, timed in a fresh process, one after the other.

    Raises:
        ArtifactError: the artifact cannot be run so.
        ProcessError: a process was lost, for want of memory say.
    """
    found = []
    for threads, batch in ways:
        timings = interleave(
            [Subject("artifact", folder=artifact.folder)],
            timing_inputs(workload, batch),
            threads=threads,
            rounds=ROUNDS,
            round_seconds=ROUND_SECONDS,
            limit_seconds=LIMIT_SECONDS,
        )
        found.append(Knob(threads, batch, latency(timings.rounds["artifact"])))
    return found


def best(found: Sequence[Knob], objective: str) -> Knob:
    """The soonest done or, for throughput, that which gets through most.

    >>> few, many = Knob(2, 1, 1.0), Knob(2, 16, 8.0)
    >>> best([few, many], "latency").batch, best([few, many], "throughput").batch
    (1, 16)
    """
    return max(found, key=lambda knob: knob.examples_per_s if objective == "throughput" else -knob.latency_ms)
