"""The search: which recipe is tried next, and the loop that tries it.

`next_recipe` is a pure function of what is known of the workload, the budget and the trials so far; the trials, which
lie on disk (see `trials`), are all the state there is. So a search that was killed goes on where it stopped, within a
long training from its last checkpoint, and the same scores lead to the same result.

Three rungs, cheapest first. The network as it is on every target, and whole in int8 on those that are not far slower
than another: the best target is kept. Where int8 loses too much, int8 trained by distillation, int8 with ranges found
while running, and weights alone in 8 bits. Then a bisection over one knob, the share of channels that is removed, each
candidate distilled and turned to numbers as the second rung found best. Networks that repeat alike blocks, as
transformers do, then lose whole blocks too, as many as the budget bears. Whether a trial is accepted is decided on the
search's own data; `test_score` is computed for the best alone, and only reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featherweight import passes, targets
from featherweight.artifact import Artifact, build, open_artifact, replace_artifact, versions_of, write_text_atomic
from featherweight.checkpoints import kept_in
from featherweight.errors import (
    ArtifactError,
    BudgetError,
    ExportError,
    FeatherweightError,
    LayerError,
    ProcessError,
    TargetError,
    WorkloadError,
)
from featherweight.measure import Baseline, Measurement, baseline, measure, physical_cores
from featherweight.passes import Pass
from featherweight.passes.drop_layers import removable
from featherweight.processes import processes
from featherweight.recipe import Recipe, compress_model
from featherweight.timing import keeping_originals
from featherweight.trials import (
    BASELINE,
    BEST,
    DIGEST,
    RECIPE,
    RESULT,
    TRIALS,
    Budget,
    Settings,
    Trial,
    best_of,
    claimed,
    frontier,
    in_words,
    measurements,
    nearest,
    read_json,
    read_trials,
    write_trial,
)
from featherweight.workload import Batch, Workload, call, count_batches, raw, tensors
from featherweight.workload import check as check_workload

LARGEST_SHARE = 0.8  # of channels that may be removed: the bisection's upper end
CANDIDATES = 4  # of the bisection: shares are found to LARGEST_SHARE / 2**4
BLOCK_CANDIDATES = 2  # at most, for whole blocks, where there are such: channels then get one less
HOPELESS = 2.0  # times the cost of the best target, uncompressed: int8 is not tried there
TRAINING_FLOP = 9e12  # of one candidate's distillation: under a minute on two cores
FEWEST_STEPS, MOST_STEPS = 250, 500  # of one candidate's distillation
NORMED_LR, PLAIN_LR = 0.005, 0.003  # with batch norms, which make rescaled weights harmless, and without
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CHECKPOINTS = ".checkpoints"  # ending of the folder with those of a trial


# ------------------------------------------------------------------------------------------------ the strategy


@dataclass(frozen=True)
class Facts:
    """What the strategy knows of a workload.

    Args:
        targets: that may be used.
        folds: whether there are batch norms to fold.
        linear: whether there are linear layers.
        epochs: how long a candidate is distilled.
        blocks: how many alike blocks there are that may be removed whole; 0 for none.
        multiples: by target, the number of which channel counts should be multiples.
    """

    targets: tuple[str, ...]
    folds: bool
    linear: bool
    epochs: float
    blocks: int = 0
    multiples: Mapping[str, int] = field(default_factory=dict)

    def steps(self, *names: str | Pass, shape: Sequence[Pass] = ()) -> tuple[Pass, ...]:
        """`shape`, then the fold where there is something to fold, then the passes named."""
        fold = ("fold_batchnorm",) if self.folds else ()
        return (*shape, *(step if isinstance(step, Pass) else _step(step) for step in (*fold, *names)))

    def distil(self, share: float = 0.0) -> Pass:
        """The distillation of a candidate that lost `share`: a smaller network takes more steps in the same time.

        Of four parts of the arithmetic of a step one is the teacher's, and three are the candidate's.
        """
        epochs = float(f"{self.epochs * 4 / (1 + 3 * (1 - share)):.2g}")
        return _step("distill_soft", epochs=epochs, lr=NORMED_LR if self.folds else PLAIN_LR)

    def candidate(self, target: str, numbers: Numbers, share: float, dropped: int = 0) -> Recipe:
        """Blocks and channels removed, what is left trained, and turned to numbers."""
        lost = dropped / self.blocks if dropped else 0.0
        shape = [_step("drop_layers", share=round(lost, 4))] if dropped else []
        if share:
            shape.append(_step("prune_channels", share=share, multiple=self.multiples.get(target, 8)))
        shape.append(self.distil(1 - (1 - lost) * (1 - share)))
        return Recipe(self.steps(*numbers, shape=shape), target)


Numbers = tuple[Pass, ...]  # the last steps of a recipe, which turn weights into numbers of few bits


Plan = Generator[Recipe, Trial, None]


def next_recipe(facts: Facts, budget: Budget, trials: Sequence[Trial]) -> Recipe | None:
    """What to try after `trials`, in whatever order they are given; None when there is nothing left."""
    known = {trial.recipe.digest: trial for trial in trials}
    course = plan(facts, budget)
    try:
        recipe = next(course)
        while recipe.digest in known:
            recipe = course.send(known[recipe.digest])
    except StopIteration:
        return None
    return recipe


def plan(facts: Facts, budget: Budget) -> Plan:
    """The whole search, as it would go: yields recipes, and is sent what became of them."""
    plain, static = {}, {}
    for target in facts.targets:
        plain[target] = yield Recipe(facts.steps(), target)
    costs = {target: _cost(trial, trial, budget) for target, trial in plain.items()}
    working = [target for target, cost in costs.items() if cost <= HOPELESS * min(costs.values()) < math.inf]
    for target in working:
        static[target] = yield Recipe(facts.steps("quantize_static"), target)
    if not working:
        return
    target = min(working, key=lambda name: _cost(static[name], plain[name], budget))
    numbers = yield from _numbers(facts, budget, target, plain[target])
    yield from _shapes(facts, budget, target, numbers)


def expected(facts: Facts, done: int) -> int:
    """How many trials there will be, about."""
    candidates = CANDIDATES + (BLOCK_CANDIDATES - 1 if facts.blocks > 1 else 0)
    return max(done + 1, 2 * len(facts.targets) + candidates)


def share_to_try(tried: Sequence[tuple[float, bool]], most: int = CANDIDATES) -> float | None:
    """The next share of a bisection: more after what fitted, less after what did not; None after `most`.

    >>> share_to_try([]), share_to_try([(0.4, True)]), share_to_try([(0.4, True), (0.6, False)])
    (0.4, 0.6, 0.5)
    """
    if len(tried) >= most:
        return None
    low = max([share for share, fitted in tried if fitted], default=0.0)
    high = min([share for share, fitted in tried if not fitted], default=LARGEST_SHARE)
    return round((low + high) / 2, 4)


def _numbers(facts: Facts, budget: Budget, target: str, plain: Trial) -> Generator[Recipe, Trial, Numbers]:
    """The cheapest numbers whose loss the budget bears; none where it bears no loss."""
    tried: list[tuple[Trial, Numbers]] = [(plain, ())]
    for numbers in _rungs(facts, budget):
        trial = yield Recipe(facts.steps(*numbers), target)
        tried.append((trial, numbers))
        if trial.drop_fits(budget) and _cost(trial, trial, budget) < _cost(plain, plain, budget):
            break
    return min(tried, key=lambda item: (not item[0].drop_fits(budget), _cost(item[0], item[0], budget)))[1]


def _rungs(facts: Facts, budget: Budget) -> Iterator[Numbers]:
    """Ways to turn the whole network to numbers, most promising first."""
    if budget.objective == "bytes":
        yield (_step("quantize_weights", bits=4, block=64),)
    yield (_step("quantize_static"),)
    yield (_step("quantize_static"), facts.distil())
    if facts.linear:
        yield (_step("quantize_dynamic"),)
    yield (_step("quantize_weights"),)


def _shapes(facts: Facts, budget: Budget, target: str, numbers: Numbers) -> Plan:
    """First fewer channels, then fewer whole blocks of what is left, where there are such."""
    share = yield from _fewer_channels(facts, budget, target, numbers)
    yield from _fewer_blocks(facts, budget, target, numbers, share)


def _fewer_channels(facts: Facts, budget: Budget, target: str, numbers: Numbers) -> Generator[Recipe, Trial, float]:
    """The largest share that the budget bears, by bisection."""
    tried: list[tuple[float, bool]] = []
    failed = 0
    while (share := share_to_try(tried, CANDIDATES - (facts.blocks > 1))) is not None:
        trial = yield facts.candidate(target, numbers, share)
        tried.append((share, trial.drop_fits(budget)))
        failed += trial.measurement is None
        if failed == len(tried) == 2:  # what cannot be pruned at two shares cannot at any
            break
    return max([share for share, fitted in tried if fitted], default=0.0)


def _fewer_blocks(facts: Facts, budget: Budget, target: str, numbers: Numbers, share: float) -> Plan:
    """A few blocks more each time, as long as the budget bears it; channels by `share`."""
    few = max(1, facts.blocks // 8)
    for count in range(few, min(facts.blocks, (BLOCK_CANDIDATES + 1) * few), few):
        trial = yield facts.candidate(target, numbers, share, dropped=count)
        if not trial.drop_fits(budget):
            return


def _cost(first: Trial, second: Trial, budget: Budget) -> float:
    """Of the first that was measured; infinite where none was."""
    found = first.measurement or second.measurement
    return budget.cost(found) if found else math.inf


def _step(name: str, **settings: Any) -> Pass:
    return passes.build(name, settings, "the search")


# ------------------------------------------------------------------------------------------------ facts of a workload


def facts_of(workload: Workload, names: Sequence[str]) -> Facts:
    """What the strategy has to know; nothing in it depends on time or chance."""
    kinds = {type(module) for module in workload.start.modules()}
    return Facts(
        targets=tuple(names),
        folds=bool(kinds & set(NORMS)) and _something_folds(workload, names[0]),
        linear=nn.Linear in kinds,
        epochs=_epochs(workload),
        # with batch norms it is a convolutional network, where width is what the time goes into
        blocks=0 if kinds & set(NORMS) else len(removable(workload.start, workload)),
        multiples={name: targets.find(name).width_multiple for name in names},
    )


def _something_folds(workload: Workload, target: str) -> bool:
    try:
        compress_model(Recipe((_step("fold_batchnorm"),), target), workload)
    except LayerError:
        return False
    except FeatherweightError:
        return True  # something else is wrong with it, and the first trial will say what
    return True


def _epochs(workload: Workload) -> float:
    """So many that the training of one candidate takes TRAINING_FLOP, within bounds."""
    data = workload.calibration if workload.train is None else workload.train
    try:
        first = next(iter(data), None)
        length = count_batches(data)
    except Exception as error:
        raise WorkloadError(
            f"train raised {type(error).__name__}: {' '.join(str(error).split())[:300]} when it was iterated. Iterate "
            "over it yourself and mend it, or leave it out: the calibration batches are then trained on."
        ) from error
    if first is None or not length:
        return 1.0  # distill_soft explains what is wrong with that
    batch = workload.calibration[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(workload.start, batch)
    forward = counter.get_total_flops() / tensors(batch)[0].shape[0] * _batch_size(first)
    steps = TRAINING_FLOP / max(4 * forward, 1.0)  # forward, backward twice that, and the teacher's forward
    return float(f"{min(max(steps, FEWEST_STEPS), MOST_STEPS) / length:.2g}")


def _batch_size(item: Any) -> int:
    """Of a batch, or of a pair of a batch and its targets; 1 where it is neither, which distill_soft explains."""
    while isinstance(item, (tuple, list, Mapping)) and item:
        item = next(iter(item.values() if isinstance(item, Mapping) else item))
    return int(item.shape[0]) if isinstance(item, Tensor) and item.dim() else 1


def seconds_of(recipe: Recipe, trials: Sequence[Trial]) -> float:
    """How long a trial will take, from how long each of its stages took at most before; unknown ones count nothing."""

    def once(trial: Trial, stage: str) -> float:
        return trial.seconds.get(stage, 0.0) / max(1, _stages(trial.recipe)[stage])

    return sum(
        times * max((once(trial, stage) for trial in trials), default=0.0) for stage, times in _stages(recipe).items()
    )


def _stages(recipe: Recipe) -> Counter[str]:
    """The stages of a trial, and how often each comes: a recipe may hold a pass twice."""
    return Counter([*(step.name() for step in recipe.steps), "export", "measure"])


def fingerprint(workload: Workload) -> str:
    """16 hexadecimal digits that stand for the workload's file, the networks' parameters and what it reads."""
    digest = hashlib.sha256()
    if workload.source is not None and (path := _source_file(workload.source)) is not None:
        digest.update(path.read_bytes())
    students = {} if workload.student is None else workload.student.state_dict()
    for name, value in [*workload.model.state_dict().items(), *students.items()]:
        if not isinstance(value, Tensor):  # what a module keeps with get_extra_state
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(raw(value).data)
    digest.update(_described(workload.example).encode())
    return digest.hexdigest()[:16]


def _described(batch: Batch) -> str:
    names = list(batch) if isinstance(batch, Mapping) else None
    return str((names, [(value.dtype, tuple(value.shape[1:])) for value in tensors(batch)]))


def _source_file(source: str) -> Path | None:
    place = source.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    spec = importlib.util.find_spec(place)
    return Path(spec.origin) if spec and spec.origin else None


# ------------------------------------------------------------------------------------------------ progress


class Progress:
    """What a long run says of itself; this one keeps silent."""

    def line(self, text: str) -> None:
        """Something is done."""

    def stage(self, text: str) -> None:
        """Something begins."""

    def count(self, done: int, total: int) -> None:
        """So many trials are done of about so many."""

    def close(self) -> None:
        """There is no more to say."""


class Stopwatch:
    """Seconds by stage; a stage lasts until the next one begins."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._stage, self._begin = progress, "", 0.0

    def __call__(self, text: str) -> None:
        """The stage `2/4 distill_soft` or `export to openvino` begins; an empty text only ends the last one."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._begin, 3)
        self._stage, self._begin = re.sub(r"^\d+/\d+ | to \w+$", "", text), now
        if text:
            self._progress.stage(text)


# ------------------------------------------------------------------------------------------------ the result


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found.

    Args:
        verdict: "accepted", or "infeasible": then `best` is the nearest point.
        binding: the bound that no trial met, or why nothing was measured; empty when accepted.
        interrupted: whether a signal ended it.
        late: whether the time limit ended it, before it had tried all that it would have.
        baseline: of the original.
        best: measured fully and on `test_score` too, unless the search was interrupted.
        frontier: the trials that none beats both in cost and in drop.
        rejected: the others' digests, recipes and reasons, with what was measured of them.
        seconds: where the time went, by stage.
    """

    verdict: str
    budget: Budget
    baseline: Measurement | None
    best: Measurement | None
    frontier: list[Measurement]
    rejected: list[dict[str, Any]]
    binding: str
    interrupted: bool
    late: bool
    seconds: dict[str, float]
    folder: Path

    def to_json(self) -> str:
        """As `result.json` holds it."""
        values = dataclasses.asdict(self)
        del values["folder"]
        return json.dumps(values, indent=1, allow_nan=False) + "\n"


# ------------------------------------------------------------------------------------------------ the loop


def compress(
    workload: Workload,
    budget: Budget,
    folder: Path | str,
    *,
    targets: Sequence[str] = ("auto",),
    threads: int | None = None,
    batch: int = 1,
    time_limit: float | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """The smallest or fastest artifact of the workload's network that keeps to the budget, in `folder`/best.

    Ctrl-C (and SIGTERM) ends it with the best so far.

    Args:
        workload: never modified.
        budget: what may be lost, and what is made small.
        folder: new or empty, or that of a search which is to go on.
        targets: their names, or ("auto",) for all that are installed.
        threads: of the networks when they are timed; None for the processor's cores.
        batch: of the inputs when they are timed.
        time_limit: seconds after which nothing new is begun; None for none.
        seed: of all chance.
        resume: whether trials that lie in `folder` are taken over.
        progress: told what goes on.

    Raises:
        BudgetError, TargetError, WorkloadError, ArtifactError: what is given does not fit; nothing was spent.
        ExportError: not even the original can be put on any of the targets.
    """
    begin = time.monotonic()
    names = check_targets(targets)
    if (count := processes().count) > 1:
        raise TargetError(
            f"This is one of {count} processes that were started together, but a search runs in one: it times "
            "networks, which others would disturb. Start it alone; several processes are for featherweight apply."
        )
    if not 0 <= seed < 2**63:
        raise BudgetError(f"seed={seed} makes no sense: give a whole number from 0 to 2**63 - 1.")
    for name, value in (("threads", threads), ("batch", batch), ("time_limit", time_limit)):
        if value is not None and not value > 0:
            raise BudgetError(f"{name}={value} makes no sense: give a number above zero.")
    with claimed(Path(folder), resume):
        check_workload(workload)
        settings = Settings(seed, physical_cores() if threads is None else threads, batch, fingerprint(workload))
        search = _Search(workload, budget, Path(folder), settings, progress or Progress())
        return _brought_to_an_end(search, names, math.inf if time_limit is None else begin + time_limit)


def _brought_to_an_end(search: _Search, names: Sequence[str], deadline: float) -> Result:
    """The result of a search that ends by itself or is interrupted."""
    interrupted = False
    with _interruptible(), keeping_originals():
        try:
            search.run(names, deadline)
        except KeyboardInterrupt:
            interrupted = True
        best = None
        if not interrupted:
            try:
                best = search.final()
            except KeyboardInterrupt:
                interrupted = True
        return search.save(best or search.available(), interrupted)


def check_targets(names: Sequence[str]) -> tuple[str, ...]:
    """The targets meant, all of them installed.

    Raises:
        TargetError: one is unknown or not installed; the message says what to do.
    """
    if tuple(names) == ("auto",):
        found = targets.installed()
        if not found:
            raise TargetError(
                "No target is installed, so there is nothing to compress for. "
                "Install one, for instance with: pip install 'featherweight[openvino]'."
            )
        return found
    for name in names:
        targets.find(name)
    return tuple(dict.fromkeys(names))


class _Search:
    """The trials in a folder, and the means to make more of them."""

    def __init__(
        self, workload: Workload, budget: Budget, folder: Path, settings: Settings, progress: Progress
    ) -> None:
        self.workload, self.budget, self.folder, self.settings = workload, budget, folder, settings
        self.progress, self.watch = progress, Stopwatch(progress)
        self.original: Baseline | None = None
        self.trials = self._stored_trials()
        self.late = False

    # ---- what lies on disk

    def _stored_trials(self) -> list[Trial]:
        """Those of earlier runs with the same settings and the same versions of everything, oldest first."""
        for stale in (self.folder / TRIALS).glob(".*.partial"):  # of a run that was killed
            if re.fullmatch(rf"\.{DIGEST}\..*", stale.name):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        found = []
        changed: dict[str, None] = {}  # in order, once each
        for settings, trial in read_trials(self.folder):
            self._check_fingerprint(settings.fingerprint)
            if settings == self.settings:
                changes = _changes(trial.versions, _versions_now(trial.recipe.target))
                changed |= dict.fromkeys(changes)
                found += [] if changes else [trial]
        if changed:
            self.progress.line(f"trials made with other versions are not reused: {', '.join(changed)}")
        return found

    def _check_fingerprint(self, found: str) -> None:
        if found != self.settings.fingerprint:
            raise BudgetError(
                f"{self.folder} holds the search of another workload: its file, or the network's parameters, have "
                "changed since. Choose another folder, or give the workload as it was; if it computes parameters when "
                "it is loaded, let it read them from a file, so that they are the same every time."
            )

    def _measured_original(self) -> Baseline:
        """From disk where it lies there, for the same settings."""
        path = self.folder / BASELINE
        key = {name: value for name, value in dataclasses.asdict(self.settings).items() if name != "seed"}
        if path.exists():
            stored = read_json(path)
            self._check_fingerprint(stored.get("fingerprint", ""))
            if "baseline" in stored and all(stored.get(name) == value for name, value in key.items()):
                known = Baseline.from_json(json.dumps(stored["baseline"]), self.workload)
                if known.measurement.versions == versions_of(known.measurement.target):
                    return known
        self.watch("baseline")
        seed = self.settings.seed
        found = baseline(self.workload, threads=self.settings.threads, batch=self.settings.batch, seed=seed)
        write_text_atomic(path, json.dumps({**key, "baseline": json.loads(found.to_json())}, indent=1) + "\n")
        return found

    # ---- trying

    def run(self, names: Sequence[str], deadline: float) -> None:
        """Tries one recipe after the other, until there is none left or no time for the next."""
        self.original = self._measured_original()
        self.progress.line(f"the original: {figures(self.original.measurement)}")
        self.watch("facts")
        facts = facts_of(self.workload, names)
        self.watch("")
        while (recipe := next_recipe(facts, self.budget, self.trials)) is not None:
            self.progress.count(len(self.trials), expected(facts, len(self.trials)))
            if time.monotonic() + seconds_of(recipe, self.trials) + self._seconds_of_final() > deadline:
                self.late = True
                self.progress.line("the time limit leaves no room for another trial")
                return
            trial = self._try(recipe)
            if not trial.by_chance:
                write_trial(self.folder, self.settings, trial)
            self.trials.append(trial)
            self.progress.line(self._told(trial))
        if not measurements(self.trials):
            raise ExportError(
                f"The network can be put on none of {', '.join(names)}, even uncompressed. The first said: "
                f"{self.trials[0].error}"
            )
        self.progress.count(len(self.trials), len(self.trials))

    def _try(self, recipe: Recipe) -> Trial:
        watch, by_chance = Stopwatch(self.progress), False
        try:
            artifact = self._built(recipe, watch)
            watch("measure")
            found, error = self._measured(artifact, quick=True), ""
        except (MemoryError, OSError):
            raise
        except Exception as problem:
            if isinstance(problem.__cause__, OSError):  # the disk is full, say: the next trial would fail as well
                raise
            known, by_chance = isinstance(problem, FeatherweightError), isinstance(problem, ProcessError)
            found, error = None, str(problem) if known else f"{type(problem).__name__}: {problem}"
        finally:
            watch("")
            for stage, seconds in watch.seconds.items():
                self.watch.seconds[stage] = round(self.watch.seconds.get(stage, 0.0) + seconds, 3)
        return Trial(recipe, found, error, watch.seconds, by_chance, versions_of(recipe.target))

    def _built(self, recipe: Recipe, watch: Stopwatch) -> Artifact:
        """Its artifact: from disk where it lies there whole, else made anew."""
        if (there := self._there(recipe)) is not None:
            return there
        place = self._place(recipe)
        shutil.rmtree(place, ignore_errors=True)
        with kept_in(place.with_suffix(CHECKPOINTS)):
            return build(recipe, self.workload, place, self.settings.seed, progress=watch)

    def _there(self, recipe: Recipe) -> Artifact | None:
        """Its artifact, where it lies on disk whole and would be made the same now."""
        wanted = {"recipe_digest": recipe.digest, "seed": self.settings.seed, "versions": versions_of(recipe.target)}
        for folder in (self._place(recipe), self.folder / BEST):
            with contextlib.suppress(ArtifactError):
                there = open_artifact(folder)
                if all(there.manifest[name] == value for name, value in wanted.items()):
                    return there
        return None

    def _place(self, recipe: Recipe) -> Path:
        return self.folder / TRIALS / self.settings.digest(recipe)

    def _measured(self, artifact: Artifact, quick: bool, runtime: Artifact | None = None) -> Measurement:
        assert self.original is not None
        return measure(
            artifact,
            self.workload,
            self.original,
            threads=self.settings.threads,
            batch=self.settings.batch,
            runtime=runtime,
            test=not quick,
            quick=quick,
            seed=self.settings.seed,
        )

    def _seconds_of_final(self) -> float:
        return 2 * max((trial.seconds.get("measure", 0.0) for trial in self.trials), default=0.0)

    def _told(self, trial: Trial) -> str:
        passes_, target = in_words(trial.recipe), trial.recipe.target
        if trial.measurement is None:
            failed = "failed, to be tried again with --resume" if trial.by_chance else "failed"
            return f"{passes_} on {target}: {failed}: {trial.error}"
        objection = self.budget.objection(trial.measurement)
        took = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in trial.seconds.items())
        return (
            f"{passes_} on {target}: {figures(trial.measurement)}: "
            f"{f'rejected ({objection})' if objection else 'accepted'} [seconds: {took}]"
        )

    # ---- ending

    def candidate(self) -> Trial | None:
        """The best so far, or the nearest to the budget where none is accepted."""
        return best_of(self.trials, self.budget) or nearest(self.trials, self.budget)

    def available(self) -> Trial | None:
        """The candidate among those whose artifact is at hand, for there is no time to make one again."""
        at_hand = [trial for trial in self.trials if trial.measurement and self._there(trial.recipe)]
        return best_of(at_hand, self.budget) or nearest(at_hand, self.budget)

    def final(self) -> Trial | None:
        """The candidate, measured fully; one that no longer keeps to the budget makes way for the next."""
        while (chosen := self.candidate()) is not None:
            self.watch("final measurement")
            artifact = self._built(chosen.recipe, Stopwatch(self.progress))
            try:
                found = self._measured(artifact, quick=False, runtime=self._best_runtime())
            except FeatherweightError as error:
                return self._with_doubt(chosen, f"It could not be measured fully, nor on the test data: {error}")
            self.watch("")
            certain = self._with_test_doubt(dataclasses.replace(chosen, measurement=found))
            self.trials[self.trials.index(chosen)] = certain
            if certain.accepted(self.budget) or not chosen.accepted(self.budget):
                return certain
        return None

    def _with_test_doubt(self, trial: Trial) -> Trial:
        """With a remark where the test data leave it open whether the drop is within the budget."""
        assert trial.measurement is not None
        upper, allowed = trial.measurement.test_drop_upper, self.budget.allowed(trial.measurement.original_score)
        if upper is None or upper <= allowed:
            return trial
        return self._with_doubt(
            trial, f"On the test data the drop may be {upper:.4g}, above the {allowed:.4g} that it was accepted for."
        )

    def _with_doubt(self, trial: Trial, doubt: str) -> Trial:
        assert trial.measurement is not None
        doubts = [*trial.measurement.doubts, " ".join(doubt.split())]
        return dataclasses.replace(trial, measurement=dataclasses.replace(trial.measurement, doubts=doubts))

    def _best_runtime(self) -> Artifact | None:
        """The fastest artifact that is not compressed."""
        plain = [
            t for t in self.trials if t.measurement and all(step.name() == "fold_batchnorm" for step in t.recipe.steps)
        ]
        if not plain:
            return None
        fastest = min(plain, key=lambda t: t.measurement.latency_ms if t.measurement else math.inf)
        return self._built(fastest.recipe, Stopwatch(self.progress))

    def save(self, best: Trial | None, interrupted: bool) -> Result:
        """Writes what was found; of the artifacts only the best one's stays.

        Where nothing is at hand, what an earlier run wrote stays as it is; before the original is measured there is
        no result, and the folder stays free for another search.
        """
        self.watch("")
        accepted = best is not None and best.accepted(self.budget)
        found = measurements(self.trials)
        result = Result(
            verdict="accepted" if accepted else "infeasible",
            budget=self.budget,
            baseline=self.original.measurement if self.original else None,
            best=best.measurement if best else None,
            frontier=frontier(found, self.budget),
            rejected=[self._rejection(trial) for trial in self.trials if not trial.accepted(self.budget)],
            binding="" if accepted else self._binding(best, interrupted),
            interrupted=interrupted,
            late=self.late,
            seconds=self.watch.seconds,
            folder=self.folder,
        )
        if best is not None:
            self._keep(best.recipe)
        if best is not None or (self.original is not None and not (self.folder / RESULT).exists()):
            write_text_atomic(self.folder / RESULT, result.to_json())
        for leftover in (self.folder / TRIALS).glob("*"):
            needed = interrupted and leftover.suffix == CHECKPOINTS
            if leftover.is_dir() and re.fullmatch(DIGEST, leftover.stem) and not needed:
                shutil.rmtree(leftover, ignore_errors=True)
        return result

    def _rejection(self, trial: Trial) -> dict[str, Any]:
        measured = {} if trial.measurement is None else dataclasses.asdict(trial.measurement)
        objection = "" if trial.measurement is None else self.budget.objection(trial.measurement)
        recipe = {"digest": trial.recipe.digest, "recipe": trial.recipe.to_yaml(), "target": trial.recipe.target}
        return {**recipe, **measured, "reason": trial.error or objection}

    def _binding(self, best: Trial | None, interrupted: bool) -> str:
        if best is None or best.measurement is None:
            return "interrupted" if interrupted else "time_limit"
        over = self.budget.excess(best.measurement)
        return max(over, key=lambda name: over[name])

    def _keep(self, recipe: Recipe) -> None:
        """Its artifact becomes `best`, and its text `recipe.yaml`."""
        source, best = self._place(recipe), self.folder / BEST
        if source.is_dir():
            replace_artifact(source, best)
        write_text_atomic(self.folder / RECIPE, recipe.to_yaml())


def _versions_now(target: str) -> dict[str, str]:
    """As `versions_of` says; without those of the target's runtime where it is no longer installed."""
    return versions_of(target if target in targets.installed() else "eager")


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two sets of versions, in words.

    >>> _changes({"torch": "2.12.0", "numpy": "2.3"}, {"torch": "2.13.0", "numpy": "2.3", "onnx": "1.19"})
    ['torch 2.12.0, now 2.13.0', 'onnx unknown, now 1.19']
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} {before.get(name, 'unknown')}, now {now.get(name, 'not there')}" for name in names]


def figures(found: Measurement) -> str:
    """The most important of a measurement on one line."""
    drop = "" if found.digest == "original" else f" (drop at most {found.drop_upper:.4f})"
    return f"score {found.score:.4f}{drop}, {found.bytes / 1e6:.2f} MB, {found.latency_ms:.3g} ms"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside the block SIGTERM does what Ctrl-C does, where signals can be caught at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
