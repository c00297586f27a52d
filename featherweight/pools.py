"""Pools: the processes in which a search has its networks built and judged, several side by side.

    serial          this process, one after the other
    processes:N     N processes on this machine, each on processor cores of its own
    ray             a Ray cluster that is started on this machine, with a worker for each core
    ray:ADDRESS     a Ray cluster that runs already: HOST:PORT, or auto for the one of this machine

Each is a `concurrent.futures.Executor`. A worker that is lost, be it killed, out of memory or gone with its machine,
costs time and nothing else: what it was at is done again by another, RETRIES times at most. Leaving the block ends all
workers; after an error or Ctrl-C they do not finish what they are at.

The bits of a training depend on the number of threads, not on where they run. So all workers of a pool have the same
number: as many as there are cores for each, one in Ray, or what OMP_NUM_THREADS says wherever it is set.

What is done in a pool is not known here. Nothing is timed in it: timing is done by the search alone (see `timing`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from featherweight.errors import BudgetError, ProcessError, TargetError

NAMES = "serial, processes:N, ray and ray:ADDRESS"
RETRIES = 2  # of what a lost worker was at
PATIENCE_S = 6.0  # for a cluster to answer, and for its workers to let go
STORE_BYTES = 128 << 20  # that a local Ray keeps for what is passed between processes: little is
SAME_BITS = {"MKL_DYNAMIC": "FALSE", "OMP_DYNAMIC": "FALSE"}  # as many threads as are asked for, on however few cores
LOST = (
    f"The process that was to build it was lost {1 + RETRIES} times over: killed, or out of memory. Make room, or let "
    "fewer networks be built side by side (--pool)."
)
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Pool(Executor):
    """Where networks are built and judged.

    Args:
        workers: how many work side by side.
        threads: of each worker; 0 for what this process has.
        here: whether it is this very process that works.
        far: whether workers may be on other machines, which do not see the files of this one.
    """

    def __init__(self, workers: int = 1, threads: int = 0, here: bool = False, far: bool = False) -> None:
        self.workers, self.threads, self.here, self.far = workers, threads, here, far

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=kind is not None)


def check_pool(name: str) -> tuple[str, str]:
    """The kind of pool that `name` means, and what follows the colon.

    Raises:
        BudgetError: there is no such pool, or more processes than cores are asked for.
        TargetError: Ray is not installed.

    >>> check_pool("serial"), check_pool("processes:1")
    (('serial', ''), ('processes', '1'))
    """
    kind, colon, rest = name.partition(":")
    if kind == "processes":
        _check_processes(name, rest)
    elif kind == "ray":
        _check_ray(name, rest, bool(colon))
    elif name != "serial":
        raise BudgetError(f"There is no pool {name!r}. There are: {NAMES}. Choose one of them.")
    return kind, rest


def open_pool(name: str) -> Pool:
    """The pool that `name` means, to be used as a context manager, which ends it.

    Raises:
        BudgetError, TargetError: as `check_pool` says.
        ProcessError: the cluster cannot be reached or started.
    """
    kind, rest = check_pool(name)
    if kind == "processes":
        return _Processes(int(rest))
    return _Ray(rest) if kind == "ray" else _Serial()


def _check_processes(name: str, count: str) -> None:
    from featherweight.machine import physical_cores

    if not re.fullmatch(r"[1-9]\d{0,5}", count):
        raise BudgetError(
            f"pool={name!r} does not say how many processes. Write a whole number above zero, such as processes:2."
        )
    if int(count) > (most := physical_cores()):
        raise BudgetError(
            f"pool={name!r} asks for {count} processes, but this one may use {most} processor "
            f"{'core' if most == 1 else 'cores'}, and each process needs one of its own. Ask for {most} at most."
        )


def _check_ray(name: str, address: str, named: bool) -> None:
    place = re.fullmatch(r"auto|(?:[\w.-]+|\[[\da-fA-F:]+\]):(\d{1,5})", address)
    if named and (place is None or not 0 < int(place[1] or 1) < 2**16):
        raise BudgetError(
            f"pool={name!r} names no cluster. Write ray:HOST:PORT as `ray start --head` shows it, ray:auto for the "
            "cluster of this machine, or ray for one that is started and ended with the search."
        )
    if importlib.util.find_spec("ray") is None:
        raise TargetError(
            f"pool={name!r} needs Ray, which is not installed. Install it with: pip install 'featherweight[ray]', or "
            "use processes:N."
        )


def _threads(cores: int) -> int:
    """Those of each worker that has so many cores: what the user has set counts more."""
    if not os.environ.get("OMP_NUM_THREADS"):
        return cores
    import torch

    return torch.get_num_threads()


# ------------------------------------------------------------------------------------------------ this process


class _Serial(Pool):
    """Does at once what it is given."""

    def __init__(self) -> None:
        super().__init__(here=True)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


# ------------------------------------------------------------------------------------------------ processes


class _Processes(Pool):
    """Processes of this machine.

    Python's own pool breaks as a whole when one of its processes dies. So each worker is a pool of one, which can be
    made anew while the others go on, and a thread waits for each.
    """

    def __init__(self, count: int) -> None:
        from featherweight.machine import cores, physical_cores

        super().__init__(count, _threads(physical_cores() // count))
        self._workers = [_Worker(own) for own in _shared_out(cores(), count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._waiting = ThreadPoolExecutor(count, "featherweight-pool")
        try:
            list(self._waiting.map(_Worker.begin, self._workers))
        except BaseException:
            self.shutdown(cancel_futures=True)
            raise

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._waiting.submit(self._run, (fn, args, kwargs))

    def _run(self, call: Call) -> Any:
        worker = self._idle.get()
        try:
            return worker.run(call)
        finally:
            self._idle.put(worker)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the workers, when they are done or, with `cancel_futures`, at once; returns when they are gone."""
        self._waiting.shutdown(wait=not cancel_futures, cancel_futures=cancel_futures)
        for worker in self._workers:
            worker.end()
        self._waiting.shutdown()


class _Worker:
    """A process on cores of its own; another takes its place when it is lost."""

    def __init__(self, own: Sequence[int]) -> None:
        self._cores = own
        self._process: ProcessPoolExecutor | None = None
        self._number, self._ended = -1, False

    def run(self, call: Call) -> Any:
        """What comes of the call.

        Raises:
            ProcessError: the process was lost each time.
        """
        fn, args, kwargs = call
        for _ in range(1 + RETRIES):
            if self._ended:
                break
            try:
                return (self._process or self.begin()).submit(fn, *args, **kwargs).result()
            except BrokenProcessPool:
                self._process = None
        raise ProcessError(LOST)

    def begin(self) -> ProcessPoolExecutor:
        """Starts the process.

        Raises:
            ProcessError: it ended at once.
        """
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _settle, (self._cores,))
        try:
            self._number = process.submit(os.getpid).result()
        except BrokenProcessPool as error:
            raise ProcessError(
                "A process of the pool ended before it had begun to work. It reads the program's main file anew: in a "
                'script of yours let the call stand below `if __name__ == "__main__":`. Else the machine may be short '
                "of memory: make room, or use fewer processes."
            ) from error
        self._process = process
        return process

    def end(self) -> None:
        """The process is gone afterwards, whatever it was at."""
        self._ended = True
        for child in multiprocessing.active_children():
            if child.pid == self._number:
                child.kill()
        if (process := self._process) is not None:
            process.shutdown()


def _shared_out(found: Sequence[Sequence[int]], count: int) -> Iterator[list[int]]:
    """The numbers of each worker's cores, which lie side by side.

    >>> list(_shared_out([(0, 4), (1, 5), (2, 6), (3, 7)], 2))
    [[0, 4, 1, 5], [2, 6, 3, 7]]
    """
    for index in range(count):
        begin, end = len(found) * index // count, len(found) * (index + 1) // count
        yield [number for core in found[begin:end] for number in core]


def _settle(own: Sequence[int]) -> None:
    """What a worker does first, before torch is loaded: its threads are born on the cores of the process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)
    os.environ.update(SAME_BITS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the search, which ends its workers
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # each worker would say what the search has said
    threading.Thread(target=_end_with_the_search, daemon=True).start()


def _end_with_the_search() -> None:
    """Ends this process when that of the search has died, however it died: two would write to the same files."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


# ------------------------------------------------------------------------------------------------ Ray


class _Ray(Pool):
    """Tasks of one core each on a Ray cluster; the one that this process is connected to, where it is."""

    def __init__(self, address: str) -> None:
        import ray

        self._stack = contextlib.ExitStack()
        mine = not ray.is_initialized()
        self._stack.enter_context(connected(address))
        try:
            cores = int(ray.cluster_resources().get("CPU", 0))
            if not cores:
                raise ProcessError(
                    "The Ray cluster has no processor cores to give. Add a machine to it, or use another pool."
                )
        except BaseException:
            self._stack.close()
            raise
        super().__init__(cores, _threads(1), far=bool(address) or not mine)
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_called).options(name="featherweight")
        self._going: dict[Future[Any], Any] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        self._going[done] = reference = self._task.remote((fn, args, kwargs))
        reference.future().add_done_callback(lambda found: self._pass_on(found, done))
        return done

    def _pass_on(self, found: Future[Any], done: Future[Any]) -> None:
        self._going.pop(done, None)
        if (error := found.exception()) is None:
            done.set_result(found.result())
        else:
            done.set_exception(_in_our_words(error))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends what goes on, when it is done or, with `cancel_futures`, at once; and the cluster if it is ours."""
        import ray

        going = list(self._going.values())
        if cancel_futures:
            for force in (False, True):  # by an exception, so that they tidy up; then by a signal
                for reference in going:
                    ray.cancel(reference, force=force)
                if going:
                    _, going = ray.wait(going, num_returns=len(going), timeout=PATIENCE_S)
        elif going:
            ray.wait(going, num_returns=len(going))
        self._stack.close()


def _called(call: Call) -> Any:
    fn, args, kwargs = call
    return fn(*args, **kwargs)


def _in_our_words(error: BaseException) -> BaseException:
    """What the function raised, or that its worker was lost."""
    from ray.exceptions import RayError, RaySystemError, RayTaskError

    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    if isinstance(error, RaySystemError):
        return TargetError(
            f"A Ray worker cannot read what it is to do: {str(error).splitlines()[0][:300]}. Install the same version "
            "of Featherweight on every machine of the cluster."
        )
    if isinstance(error, RayError):
        return ProcessError(f"{LOST} Ray says: {' '.join(str(error).split())[:300]}")
    return error


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Inside the block this process is connected to a cluster: the one at `address`, or one of its own.

    Where it is connected already, it stays with that.

    Raises:
        ProcessError: it cannot be reached or started.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if address not in ("", "auto"):
        _knock(address)
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of lost workers
        with _own_signals():
            _join(address)
        try:
            yield
        finally:
            ray.shutdown()


def _join(address: str) -> None:
    import ray

    from featherweight.machine import physical_cores

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    own: dict[str, Any] = {
        "num_cpus": physical_cores(),
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "_system_config": {"task_oom_retries": RETRIES},  # else without end
    }
    try:
        ray.init(address=address or "local", **quiet, **({} if address else own))
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what, why = f"joined at {address}" if address else "started", " ".join(str(error).split())[:300].rstrip(".")
        raise ProcessError(
            f"A Ray cluster cannot be {what}: {why}. Look at it with `ray status`, or use processes:N."
        ) from error


def _knock(address: str) -> None:
    """Raises a ProcessError where no cluster answers: Ray itself would wait long, or for ever, and not say why."""
    host, _, port = address.rpartition(":")
    begin = time.monotonic()
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
        said = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address],
            capture_output=True,
            text=True,
            timeout=max(1.0, PATIENCE_S - (time.monotonic() - begin)),
        )
    except OSError as error:
        raise _unanswered(address, error.strerror or str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise _unanswered(address, "something listens there, but says nothing") from error
    if said.returncode:
        why = said.stderr.strip().rpartition("\n")[2].rpartition("RPC error: ")[2]
        if "token" in why:
            raise ProcessError(
                f"The Ray cluster at {address} wants a token. Set RAY_AUTH_MODE=token, and give the cluster's in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN; its own machine shows it: `ray get-auth-token`."
            )
        raise _unanswered(address, why[:200])


def _unanswered(address: str, why: str) -> ProcessError:
    return ProcessError(
        f"No Ray cluster answers at {address}: {why}. Start one there with `ray start --head`, and give the address "
        "that it shows; or use ray for one on this machine."
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """What SIGTERM does is afterwards what it did before: Ray would have it exit at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
