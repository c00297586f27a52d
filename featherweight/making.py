"""Making: a recipe's artifact, and the judgement of it: the part of a trial that any process can do, on any machine.

What is wanted is text and numbers, and so is what comes of it. A process that is not the search's loads the workload
from where the search found it, once, and refuses to work on another one or with other versions: it would be another
trial. A build that was cut short goes on from its last checkpoint, where that can be found again. Which recipes are
made, and where, is `search`'s affair; what they cost in time, that of `measure`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from featherweight.artifact import Artifact, build, open_artifact, versions_of, write_artifact
from featherweight.checkpoints import kept_in
from featherweight.errors import ArtifactError, FeatherweightError, ProcessError, TargetError, WorkloadError
from featherweight.facts import fingerprint
from featherweight.measure import Judgement, judge, outputs_on_calibration
from featherweight.progress import Progress, Stopwatch
from featherweight.recipe import Recipe
from featherweight.workload import Workload, load

CHECKPOINTS = ".checkpoints"  # ending of the folder with those of a trial


@dataclass(frozen=True)
class Order:
    """What is to be made.

    Args:
        recipe: as YAML.
        folder: of the artifact.
        others: folders in which it may lie already.
        seed: of all chance.
        threads: that compute; 0 for as many as the process has.
        source: where the workload is loaded from.
        fingerprint: of the workload that is meant.
        versions: of everything that it is to be made with.
        far: a name for the folder of this search on a machine that does not see its files; empty where they are seen.
        files: of the artifact by name, where it is there already and a far machine is to judge it.
    """

    recipe: str
    folder: Path
    others: tuple[Path, ...] = ()
    seed: int = 0
    threads: int = 0
    source: str = ""
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    far: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Made:
    """What came of an order.

    Args:
        artifact: None where it failed.
        judgement: of the artifact; None where it failed.
        error: why it failed.
        by_chance: whether that is the machine's fault and not the recipe's.
        seconds: by stage.
        files: those of the artifact by name, where it was made on a machine whose files are not seen.
    """

    artifact: Artifact | None = None
    judgement: Judgement | None = None
    error: str = ""
    by_chance: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def make(order: Order, workload: Workload, originals: Sequence[tuple[Tensor, ...]], watch: Stopwatch) -> Made:
    """The artifact, from disk where it lies there whole, else made anew; and what its outputs are worth.

    Args:
        order: source and far are not looked at.
        workload: that is meant.
        originals: the outputs of its network, as `outputs_on_calibration` gives them.
        watch: told of each stage.

    Raises:
        MemoryError, OSError: there is no room; also as the cause of another error. The next one would fail as well.
    """
    try:
        artifact = built(order, workload, watch)
        watch("judge")
        judgement = judge(artifact, workload, originals, threads=torch.get_num_threads())
    except Exception as problem:
        watch("")
        return Made(error=reason(problem), by_chance=isinstance(problem, ProcessError), seconds=watch.seconds)
    watch("")
    return Made(artifact, judgement, seconds=watch.seconds)


def made_elsewhere(order: Order) -> Made:
    """The same in a process that knows nothing of the search.

    Raises:
        WorkloadError, TargetError: another workload is found here, or other versions.
        MemoryError, OSError: as `make` says.
    """
    workload, originals = workload_of(order)
    watch = Stopwatch(Progress())
    try:
        if not order.far:
            return make(order, workload, originals, watch)
        with _own_folder(order) as folder:
            if order.files:
                write_artifact(order.files, folder)
            made = make(replace(order, folder=folder), workload, originals, watch)
            return replace(made, artifact=None, files=_files_of(made.artifact) if made.artifact else {})
    except OSError as error:
        raise _plain(error) from None


def built(order: Order, workload: Workload, watch: Stopwatch) -> Artifact:
    """The artifact: from disk where it lies there whole, else made anew."""
    recipe = Recipe.from_yaml(order.recipe)
    if (there := known_artifact(recipe, order.seed, (order.folder, *order.others))) is not None:
        return there
    shutil.rmtree(order.folder, ignore_errors=True)
    with kept_in(order.folder.with_suffix(CHECKPOINTS)):
        return build(recipe, workload, order.folder, order.seed, progress=watch)


def known_artifact(recipe: Recipe, seed: int, folders: Sequence[Path]) -> Artifact | None:
    """Its artifact, where it lies on disk whole and would be made the same now."""
    wanted = {"recipe_digest": recipe.digest, "seed": seed, "versions": versions_of(recipe.target)}
    for folder in folders:
        with contextlib.suppress(ArtifactError):
            there = open_artifact(folder)
            if all(there.manifest[name] == value for name, value in wanted.items()):
                return there
    return None


def reason(problem: Exception) -> str:
    """Why a trial failed, in words; raises the problem itself where the next trial would fail as well."""
    if isinstance(problem, (MemoryError, OSError)) or isinstance(problem.__cause__, OSError):  # the disk is full, say
        raise problem
    return str(problem) if isinstance(problem, FeatherweightError) else f"{type(problem).__name__}: {problem}"


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two sets of versions, in words.

    >>> changes({"torch": "2.12.0", "numpy": "2.3"}, {"torch": "2.13.0", "numpy": "2.3", "onnx": "1.19"})
    ['torch 2.12.0, now 2.13.0', 'onnx unknown, now 1.19']
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} {before.get(name, 'unknown')}, now {now.get(name, 'not there')}" for name in names]


# ------------------------------------------------------------------------------------------------ elsewhere


def for_others(order: Order, workload: Workload, of_workload: str, threads: int) -> Order:
    """The same for a process that knows nothing of the search.

    Args:
        order: what is to be made.
        workload: of the search; the process loads it from its file.
        of_workload: its fingerprint.
        threads: that compute there.
    """
    versions = versions_of(Recipe.from_yaml(order.recipe).target)
    source = workload.source or ""
    return replace(order, threads=threads, source=source, fingerprint=of_workload, versions=versions)


def workload_of(order: Order) -> tuple[Workload, list[tuple[Tensor, ...]]]:
    """The workload that is meant, and its network's outputs, in a process that knows nothing of the search.

    Args:
        order: of which folders are not looked at.

    Raises:
        WorkloadError, TargetError: another workload is found here, or other versions.
    """
    _set_threads(order.threads)
    loaded = _loaded(order.source, order.fingerprint)
    _set_threads(order.threads)  # the workload's file may have set another number
    _check_versions(order)
    return loaded


@lru_cache(maxsize=1)
def _loaded(source: str, wanted: str) -> tuple[Workload, list[tuple[Tensor, ...]]]:
    """The workload and its network's outputs, once for each process."""
    workload = load(source)
    if (here := fingerprint(workload)) != wanted:
        raise WorkloadError(
            f"{source} gives another workload in a process of the pool than in the search ({here}, not {wanted}): its "
            "file, or the network's parameters, differ there. Leave the file alone while the search runs, have the "
            "same one on every machine, and let it read parameters from a file if it computes them when it is loaded; "
            "or use --pool serial."
        )
    return workload, outputs_on_calibration(workload)


def _check_versions(order: Order) -> None:
    here = versions_of(Recipe.from_yaml(order.recipe).target)
    if differ := changes(order.versions, here):
        raise TargetError(
            f"A process of the pool has other versions than the search: {', '.join(differ)}. Install the same ones on "
            "all machines of the cluster, or use --pool serial."
        )


def _set_threads(count: int) -> None:
    if count:
        torch.set_num_threads(count)


@contextlib.contextmanager
def _own_folder(order: Order) -> Iterator[Path]:
    """A folder on this machine for the artifact. Checkpoints of a process that is killed are there for the next one."""
    home = Path(tempfile.gettempdir()) / f"featherweight-{order.far}"
    place = home / order.folder.name
    home.mkdir(mode=0o700, exist_ok=True)
    try:
        yield place
    finally:
        for path in (place, place.with_suffix(CHECKPOINTS), *home.glob(f".{place.name}.*.partial")):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process of this search is at work there
            home.rmdir()


def _files_of(artifact: Artifact) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in artifact.folder.iterdir()}


def _plain(error: OSError) -> OSError:
    """One that can be sent: those of libraries may not come out of a pickle again."""
    if type(error).__module__ == "builtins":
        return error
    return OSError(f"{type(error).__name__}: {error}")
