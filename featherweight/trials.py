"""What lies between the search and its report: the budget, the trials, and the folder that holds them.

Trials lie on disk as `trials/<digest>.json`, and are all the state that a search has. Which recipe is tried next, and
trying it, is `search`'s affair; what a page says of it all, `report`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from featherweight.artifact import write_text_atomic
from featherweight.errors import ArtifactError, BudgetError, FeatherweightError
from featherweight.measure import Measurement
from featherweight.recipe import Recipe

BASELINE, DAMAGES, FRAGILE, SHAPES, COSTS, TRIALS, BEST, RESULT, RECIPE = (
    "baseline.json",
    "damages.json",
    "fragile.json",
    "shapes.json",
    "costs.json",
    "trials",
    "best",
    "result.json",
    "recipe.yaml",
)  # in the folder
OBJECTIVES = ("latency", "bytes", "throughput")  # what a search is for
BOUNDS = {"max_bytes": "bytes", "max_latency_ms": "latency_ms", "max_ram": "peak_rss_bytes"}  # and what they bound
TOO_MUCH = 3.0  # times the drop that is allowed, in the mean: more than a long distillation makes up for
DIGEST = "[0-9a-f]{16}"  # what the folder of a trial is called


# ------------------------------------------------------------------------------------------------ the budget


@dataclass(frozen=True)
class Budget:
    """What may be lost, what may be spent, and what is made as small as that allows.

    Args:
        max_drop: of the score: a number, or a share of the original's score such as "2%".
        max_bytes: of the artifact's files; None for no bound.
        max_latency_ms: of one run; None for no bound.
        max_ram: bytes that a process holds at most while it loads and runs the artifact, interpreter and libraries
            included; None for no bound.
        objective: "latency" of one run, "bytes" of the files, or "throughput", the inputs that are done in a second.

    >>> Budget("2%").allowed(0.5)
    0.01
    """

    max_drop: float | str
    max_bytes: int | None = None
    max_latency_ms: float | None = None
    objective: str = "latency"
    max_ram: int | None = None

    def __post_init__(self) -> None:
        share = isinstance(self.max_drop, str)
        number = _number(str(self.max_drop).removesuffix("%")) if share else self.max_drop
        if not isinstance(number, (int, float)) or (share and not str(self.max_drop).endswith("%")):
            raise BudgetError(
                f"max_drop={self.max_drop!r} is no number. Write how much of the score may be lost, such as 0.01, or a "
                "share of the original's score, such as 2%."
            )
        if not (math.isfinite(number) and number >= 0):
            raise BudgetError(
                f"max_drop={self.max_drop} makes no sense: a budget is what may be lost of the score, zero or more. "
                "Give such a number, 0.01 say."
            )
        for name in BOUNDS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BudgetError(f"{name}={value} cannot be met: it must be above zero. Raise it, or leave it out.")
        if self.objective not in OBJECTIVES:
            raise BudgetError(f"There is no objective {self.objective!r}. There are: {', '.join(OBJECTIVES)}.")

    def allowed(self, score: float) -> float:
        """How much the score may drop when the original's is `score`."""
        if isinstance(self.max_drop, str):
            return float(self.max_drop.removesuffix("%")) / 100 * abs(score)
        return float(self.max_drop)

    def cost(self, found: Measurement) -> float:
        """What is made small: bytes, or the time of a run beside that of the original, which was timed in turn with it.

        Milliseconds of different hours do not compare: the whole machine may be slower in one of them.
        """
        return float(found.bytes) if self.objective == "bytes" else 1 / max(found.latency_ratio, 1e-9)

    def excess(self, found: Measurement) -> dict[str, float]:
        """By how much each bound is exceeded, as a share of it; zero or less where it holds."""
        allowed = self.allowed(found.original_score)
        unit = max(allowed, 0.001 * abs(found.original_score), 1e-9)  # a bound of zero is no unit
        over = {"max_drop": (found.drop_upper - allowed) / unit}
        for name, field_name in BOUNDS.items():
            bound, value = getattr(self, name), getattr(found, field_name)
            if bound is not None:
                over[name] = math.inf if value is None else value / bound - 1  # what was not measured keeps to nothing
        return over

    def objection(self, found: Measurement) -> str:
        """Why it is rejected, in a few words; empty where it is accepted."""
        allowed = self.allowed(found.original_score)
        words = {
            "max_drop": f"the drop may be {found.drop_upper:.4g}, above {allowed:.4g}",
            "max_bytes": f"{found.bytes:,} bytes, above {self.max_bytes or 0:,}",
            "max_latency_ms": f"{found.latency_ms:.4g} ms, above {self.max_latency_ms or 0:.4g}",
            "max_ram": f"{found.peak_rss_bytes or 0:,} bytes of memory, above {self.max_ram or 0:,}",
        }
        return "; ".join(words[name] for name, over in self.excess(found).items() if over > 0)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------ trials


@dataclass(frozen=True)
class Trial:
    """One recipe, tried: what was measured of it, or why nothing could be.

    A failure `by_chance` is the machine's and not the recipe's: it is not stored, so that resuming tries it again.
    """

    recipe: Recipe
    measurement: Measurement | None
    error: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)  # by stage: passes, export, measure
    by_chance: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)  # of what it was made and measured with

    def drop_fits(self, budget: Budget) -> bool:
        """Whether it keeps enough of the score, whatever it weighs."""
        return self.measurement is not None and budget.excess(self.measurement)["max_drop"] <= 0

    def may_fit(self, budget: Budget) -> bool:
        """Whether the drop fits, or lacks nothing but certainty, which what is tried on top may have."""
        return self.drop_fits(budget) or self.over_allowed(budget) <= 1

    def over_allowed(self, budget: Budget) -> float:
        """The mean drop over that which the budget allows; infinite where none was measured."""
        if self.measurement is None:
            return math.inf
        return self.measurement.drop / max(budget.allowed(self.measurement.original_score), 1e-9)

    def lost_too_much(self, budget: Budget) -> bool:
        """Whether more is lost than a long distillation makes up for."""
        return self.over_allowed(budget) > TOO_MUCH

    def cost(self, budget: Budget) -> float:
        """What is made small; infinite where nothing was measured."""
        return budget.cost(self.measurement) if self.measurement else math.inf

    def accepted(self, budget: Budget) -> bool:
        """Whether it keeps to the whole budget."""
        return self.measurement is not None and not budget.objection(self.measurement)


def measurements(trials: Sequence[Trial]) -> list[Measurement]:
    """Of those trials that did not fail."""
    return [trial.measurement for trial in trials if trial.measurement is not None]


def best_of(trials: Sequence[Trial], budget: Budget) -> Trial | None:
    """The accepted trial that costs least, or None."""
    accepted = [
        (budget.cost(t.measurement), t.measurement.drop_upper, t)
        for t in trials
        if t.measurement and t.accepted(budget)
    ]
    return min(accepted, key=lambda item: item[:2])[2] if accepted else None


def nearest(trials: Sequence[Trial], budget: Budget) -> Trial | None:
    """The trial that exceeds the budget least, by the bound that it exceeds most; None where none was measured."""
    over = [
        (max(budget.excess(t.measurement).values()), budget.cost(t.measurement), t) for t in trials if t.measurement
    ]
    return min(over, key=lambda item: item[:2])[2] if over else None


def frontier(found: Sequence[Measurement], budget: Budget) -> list[Measurement]:
    """Those that no other beats both in cost and in drop, cheapest first."""
    kept: list[Measurement] = []
    for candidate in sorted(found, key=lambda m: (budget.cost(m), m.drop)):
        if not kept or candidate.drop < kept[-1].drop:
            kept.append(candidate)
    return kept


def in_words(recipe: Recipe) -> str:
    """The recipe in a few words: `prune_channels 0.4 + distill_soft + quantize_static`."""
    words = [
        f"{step.name()} {step.settings()['share']:g}" if "share" in step.settings() else step.name()
        for step in recipe.steps
    ]
    counted = [(word, len(list(same))) for word, same in groupby(words)]
    return " + ".join(word if count == 1 else f"{word} × {count}" for word, count in counted) or "as it is"


# ------------------------------------------------------------------------------------------------ on disk


@dataclass(frozen=True)
class Settings:
    """What a trial depends on beside its recipe."""

    seed: int
    threads: int
    batch: int
    fingerprint: str

    def digest(self, recipe: Recipe) -> str:
        """16 hexadecimal digits that stand for a trial."""
        return hashlib.sha256(json.dumps([recipe.digest, *dataclasses.astuple(self)]).encode()).hexdigest()[:16]


def check_folder(folder: Path, resume: bool) -> None:
    """Raises an ArtifactError unless a search may begin there, as `claimed` says."""
    with claimed(folder, resume):
        pass


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Inside the block no other process may search in `folder`, which is made where there is none.

    Raises:
        ArtifactError: another process searches there, it cannot be written, or it is not empty and `resume` not wanted.
    """
    used = check_writable(folder)
    with _locked(folder):
        if used and not resume:
            raise ArtifactError(
                f"{folder} is not empty, and what is there is not overwritten. Go on with the search that it holds "
                "with --resume (resume=True), or choose another folder."
            )
        if used and not (folder / BASELINE).exists():
            raise ArtifactError(f"{folder} holds files, but no search to go on with. Choose another folder.")
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside the block this process alone holds the lock of `folder`, where the system has locks for folders.

    It is the folder itself that is locked, so no file is left behind, and the system drops the lock when the process
    dies, however it dies. Where there are no such locks (Windows, some network file systems) nothing is held back.
    """
    try:
        fcntl: Any = importlib.import_module("fcntl")
        descriptor = os.open(folder, os.O_RDONLY)  # closed in programs that we start, as all of Python's are
    except (ImportError, OSError):
        yield
        return
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(
                f"{folder} is in use: another process searches there at this moment, and two would overwrite one "
                "another's files. Wait until it has ended, or end it, and go on with --resume (resume=True); or choose "
                "another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


def _drop_locks() -> None:
    while _locks:
        os.close(_locks.pop())


_locks: set[int] = set()  # descriptors of locked folders
if os.name == "posix":  # a forked child, a data loader's say, would hold the lock for longer than its parent lives
    os.register_at_fork(after_in_child=_drop_locks)


def check_writable(folder: Path) -> bool:
    """Makes `folder` where there is none; whether there is something in it.

    Raises:
        ArtifactError: it is no folder, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file, where a folder is needed for the results. Choose another name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
        with tempfile.TemporaryFile(dir=folder):
            return used
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot be written: {error.strerror}. Choose a folder that may be written."
        ) from error


def write_trial(folder: Path, settings: Settings, trial: Trial) -> None:
    """Puts the trial where `read_trials` finds it, all at once."""
    found, digest = trial.measurement, settings.digest(trial.recipe)
    record = {
        "digest": digest,
        "recipe": trial.recipe.to_yaml(),
        "target": trial.recipe.target,
        **dataclasses.asdict(settings),
        "versions": dict(trial.versions),
        "seconds": dict(trial.seconds),
        "measurement": None if found is None else dataclasses.asdict(found),
        "error": trial.error or None,
    }
    write_text_atomic(folder / TRIALS / f"{digest}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_trials(folder: Path) -> list[tuple[Settings, Trial]]:
    """The trials that lie in `folder`, oldest first, each with what it depends on beside its recipe.

    Raises:
        ArtifactError: one cannot be read.
    """
    found = []
    for path in sorted((folder / TRIALS).glob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name)):
        stored = read_json(path)
        try:
            settings = Settings(**{f.name: stored[f.name] for f in dataclasses.fields(Settings)})
            measured, recipe = stored["measurement"], Recipe.from_yaml(stored["recipe"], str(path))
            if stored["digest"] != settings.digest(recipe):
                raise ValueError("the passes have other defaults now, so it tells of another recipe")
            trial = Trial(
                recipe=recipe,
                measurement=None if measured is None else Measurement.from_json(json.dumps(measured)),
                error=stored["error"] or "",
                seconds={str(stage): float(seconds) for stage, seconds in stored["seconds"].items()},
                versions={str(name): str(version) for name, version in stored.get("versions", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, FeatherweightError) as error:
            raise ArtifactError(f"{path} is no trial of this version ({error}). Delete it, and resume.") from error
        found.append((settings, trial))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of a search holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({str(error)[:200]}). Delete it, and resume.") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} holds no JSON object. Delete it, and resume.")
    return found
