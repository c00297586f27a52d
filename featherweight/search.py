"""The search: the loop that tries recipes until there is none left to try.

Which recipes are tried next, `strategy` says: a pure function of what is known of the workload, the budget and the
trials so far. The trials, which lie on disk (see `trials`), are all the state there is. So a search that was killed
goes on where it stopped, within a long training from its last checkpoint, and the same scores lead to the same result.
Whether a trial is accepted is decided on the search's own data; `test_score` is computed for the best alone, and only
reported.

Recipes that can be tried together are built and judged side by side where there is a pool of processes (`pools`), and
timed one after the other, in the order in which the strategy names them, when nothing else is at work. So trials, and
their order, do not depend on the pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from featherweight import knobs, targets
from featherweight.artifact import Artifact, build, replace_artifact, versions_of, write_artifact, write_text_atomic
from featherweight.errors import (
    BudgetError,
    ExportError,
    FeatherweightError,
    ProcessError,
    TargetError,
    WorkloadError,
)
from featherweight.facts import facts_of, fingerprint
from featherweight.feasibility import out_of_reach, predicted_ram
from featherweight.machine import physical_cores
from featherweight.making import Made, Order, built, changes, for_others, known_artifact, made_elsewhere, make, reason
from featherweight.measure import Baseline, Judgement, Measurement, baseline, measure, soonest
from featherweight.pools import Pool, check_pool, open_pool
from featherweight.processes import processes
from featherweight.progress import Progress, Stopwatch
from featherweight.recipe import Recipe
from featherweight.result import Result, figures
from featherweight.strategy import expected, next_recipes, seconds_of
from featherweight.tables import Tables
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
from featherweight.workload import Workload
from featherweight.workload import check as check_workload

UNFINISHED = "unfinished"  # the verdict while a search goes on
POOL = "pool"  # the stage in which a pool is at work
RETIMED = 3  # at most, accepted trials of which the final one is chosen
PREDICTING = 120  # seconds of a time limit that must be left, for a cost table to be measured


def compress(
    workload: Workload,
    budget: Budget,
    folder: Path | str,
    *,
    targets: Sequence[str] = ("auto",),
    threads: int | None = None,
    batch: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    resume: bool = False,
    pool: str = "serial",
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
        batch: of the inputs when they are timed; None for one, or for throughput as many as suit the network as it is.
        time_limit: seconds after which nothing new is begun; None for none.
        seed: of all chance.
        resume: whether trials that lie in `folder` are taken over.
        pool: where networks are built and judged: "serial" is this process, "processes:N" are N on this machine, "ray"
            is a cluster on this machine, "ray:ADDRESS" one that runs.
        progress: told what goes on.

    Raises:
        BudgetError, TargetError, WorkloadError, ArtifactError: what is given does not fit; nothing was spent.
        ProcessError: the pool cannot be reached; nothing was spent.
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
    _check_pool_can_load(workload, pool)
    with claimed(Path(folder), resume):
        check_workload(workload)
        threads = physical_cores() if threads is None else threads
        batch = batch or _batch(workload, budget, Path(folder), names, threads)
        settings = Settings(seed, threads, batch, fingerprint(workload))
        search = _Search(workload, budget, Path(folder), settings, progress or Progress())
        return _brought_to_an_end(search, names, pool, math.inf if time_limit is None else begin + time_limit)


def _batch(workload: Workload, budget: Budget, folder: Path, names: Sequence[str], threads: int) -> int:
    """As many inputs at once as the search goes by where it is not told; as many as before where it is resumed."""
    if budget.objective != "throughput":
        return 1
    if (folder / BASELINE).exists():
        return int(read_json(folder / BASELINE).get("batch", 1))
    with tempfile.TemporaryDirectory(prefix="featherweight-") as place:
        for name in names:
            with contextlib.suppress(ExportError):
                plain = build(Recipe((), name), workload, Path(place) / name)
                ways = list(knobs.settings("throughput", threads, 1))
                return knobs.best(knobs.timed(plain, workload, ways), "throughput").batch
    return 1


def _check_pool_can_load(workload: Workload, pool: str) -> None:
    kind, _ = check_pool(pool)
    if workload.source is None and kind != "serial":
        raise WorkloadError(
            f"This workload has no file, so other processes cannot load it, as pool={pool!r} needs. Put it into a "
            "function workload() of a file and pass featherweight.load('file.py'), or use the pool serial."
        )


def _brought_to_an_end(search: _Search, names: Sequence[str], pool: str, deadline: float) -> Result:
    """The result of a search that ends by itself or is interrupted."""
    interrupted = False
    with _interruptible(), keeping_originals():
        try:
            with open_pool(pool) as workers:
                search.run(names, workers, deadline)
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
        self.name = secrets.token_hex(16)  # nobody else's, on whatever machine
        self.progress, self.watch = progress, Stopwatch(progress)
        self.original: Baseline | None = None
        self.trials = self._stored_trials()
        self.late = self.judged_early = False
        self.knobs: list[knobs.Knob] = []

    # ---- what lies on disk

    def _stored_trials(self) -> list[Trial]:
        """Those of earlier runs with the same settings and the same versions of everything, oldest first."""
        self._sweep()
        known = []
        changed: dict[str, None] = {}  # in order, once each
        for settings, trial in read_trials(self.folder):
            self._check_fingerprint(settings.fingerprint)
            if settings == self.settings:
                differ = changes(trial.versions, _versions_now(trial.recipe.target))
                changed |= dict.fromkeys(differ)
                known += [] if differ else [trial]
        if changed:
            self.progress.line(f"trials made with other versions are not reused: {', '.join(changed)}")
        return known

    def _sweep(self) -> None:
        """What processes that were killed left half written goes."""
        for stale in (self.folder / TRIALS).glob(".*.partial"):
            if re.fullmatch(rf"\.{DIGEST}\..*", stale.name):
                shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()

    def _check_fingerprint(self, of_old: str) -> None:
        if of_old != self.settings.fingerprint:
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
        fresh = baseline(self.workload, threads=self.settings.threads, batch=self.settings.batch, seed=seed)
        write_text_atomic(path, json.dumps({**key, "baseline": json.loads(fresh.to_json())}, indent=1) + "\n")
        return fresh

    # ---- trying

    def run(self, names: Sequence[str], pool: Pool, deadline: float) -> None:
        """Tries recipes, until there is none left or no time for the next."""
        self.original = self._measured_original()
        self.progress.line(f"the original: {figures(self.original.measurement)}")
        self.watch("facts")
        facts = facts_of(self.workload, names)
        with contextlib.suppress(RuntimeError):  # of a network through which no gradient flows: the trials will say
            each = "" if pool.here else " in each process of the pool"
            most = f"{predicted_ram(self.workload) / 1e9:.2g} GB of memory"
            self.progress.line(f"compressing is expected to take {most}{each}")
        self.watch("")
        tables = Tables(self.workload, self.budget, self.folder, self.settings, self.progress, self.watch)
        facts = tables.with_few_bits(facts, pool)
        self._say_what_is_out_of_reach()
        while not self.late:
            facts = tables.with_fragile_layers(facts, self.trials)
            if deadline - time.monotonic() > PREDICTING:
                facts = tables.with_paces(facts, self.trials)
            if not (recipes := next_recipes(facts, self.budget, self.trials)):
                break
            for batch in [[recipe] for recipe in recipes] if pool.here else [recipes]:
                self.progress.count(len(self.trials), expected(facts, len(self.trials)))
                if time.monotonic() + self._seconds_of(batch, pool.workers) + self._seconds_of_final() > deadline:
                    self.late = True
                    self.progress.line("the time limit leaves no room for another trial")
                    return
                self._try(batch, pool)
                tables.compare(facts, self.trials)
            self._say_what_is_out_of_reach()
        if not measurements(self.trials):
            raise ExportError(
                f"The network can be put on none of {', '.join(names)}, even uncompressed. The first said: "
                f"{self.trials[0].error}"
            )
        self.progress.count(len(self.trials), len(self.trials))

    def _say_what_is_out_of_reach(self) -> None:
        """Once, as soon as it is known what the network takes as it is."""
        plain = measurements(self._plain())
        if self.original is not None and plain and not self.judged_early:
            self.judged_early = True
            for said in out_of_reach(self.budget, self.original, plain):
                self.progress.line(f"out of reach: {said}")

    def _try(self, recipes: Sequence[Recipe], pool: Pool) -> None:
        """Builds and judges them side by side; then times one after the other, when nothing else is at work."""
        for recipe, made in zip(recipes, self._made(recipes, pool), strict=True):
            trial = self._timed(recipe, made)
            if not trial.by_chance:
                write_trial(self.folder, self.settings, trial)
            self.trials.append(trial)
            self.progress.line(self._told(trial))
            self.show()

    def _made(self, recipes: Sequence[Recipe], pool: Pool) -> list[Made]:
        """What came of each, when all are done."""
        if pool.here:
            return [pool.submit(self._made_here, recipe).result() for recipe in recipes]
        self.watch(POOL)
        going = [pool.submit(made_elsewhere, self._order_for(pool, recipe)) for recipe in recipes]
        made = [self._fetched(recipe, future) for recipe, future in zip(recipes, going, strict=True)]
        self.watch("")
        return made

    def _made_here(self, recipe: Recipe) -> Made:
        assert self.original is not None
        made = make(self._order(recipe), self.workload, self.original.outputs, Stopwatch(self.progress))
        self._count_in(made.seconds)
        return made

    def _fetched(self, recipe: Recipe, future: Future[Made]) -> Made:
        try:
            made = future.result()
        except ProcessError as error:  # lost again and again
            return Made(error=str(error), by_chance=True)
        if made.files:  # of a machine whose files are not seen here
            return dataclasses.replace(made, artifact=write_artifact(made.files, self._place(recipe)), files={})
        return made

    def _timed(self, recipe: Recipe, made: Made) -> Trial:
        watch, measured = Stopwatch(self.progress), None
        error, by_chance = made.error, made.by_chance
        if made.artifact is not None:
            watch("measure")
            try:
                measured = self._measured(made.artifact, quick=True, judgement=made.judgement)
            except Exception as problem:
                error, by_chance = reason(problem), isinstance(problem, ProcessError)
            finally:
                watch("")
        self._count_in(watch.seconds)
        seconds = {**made.seconds, **watch.seconds}
        return Trial(recipe, measured, error, seconds, by_chance, versions_of(recipe.target))

    def _count_in(self, seconds: Mapping[str, float]) -> None:
        for stage, spent in seconds.items():
            self.watch.seconds[stage] = round(self.watch.seconds.get(stage, 0.0) + spent, 3)

    def _order(self, recipe: Recipe) -> Order:
        place, best = self._place(recipe).absolute(), (self.folder / BEST).absolute()
        return Order(recipe.to_yaml(), place, (best,), self.settings.seed)

    def _order_for(self, pool: Pool, recipe: Recipe) -> Order:
        """The same for a process that knows nothing of the search and, in a cluster, sees no file of it."""
        there = self._there(recipe) if pool.far else None
        return dataclasses.replace(
            for_others(self._order(recipe), self.workload, self.settings.fingerprint, pool.threads),
            far=self.name if pool.far else "",
            files={path.name: path.read_bytes() for path in there.folder.iterdir()} if there else {},
        )

    def _built(self, recipe: Recipe) -> Artifact:
        """Its artifact: from disk where it lies there whole, else made anew."""
        return built(self._order(recipe), self.workload, Stopwatch(self.progress))

    def _there(self, recipe: Recipe) -> Artifact | None:
        """Its artifact, where it lies on disk whole and would be made the same now."""
        return known_artifact(recipe, self.settings.seed, (self._place(recipe), self.folder / BEST))

    def _place(self, recipe: Recipe) -> Path:
        return self.folder / TRIALS / self.settings.digest(recipe)

    def _measured(
        self, artifact: Artifact, quick: bool, runtime: Artifact | None = None, judgement: Judgement | None = None
    ) -> Measurement:
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
            judgement=judgement,
        )

    def _seconds_of(self, recipes: Sequence[Recipe], workers: int) -> float:
        """How long trying them takes, by what each stage took at most before: side by side, but for the timing."""
        timing = self._longest("measure")
        making = max(seconds_of(recipe, self.trials) for recipe in recipes) - timing
        return making * math.ceil(len(recipes) / workers) + timing * len(recipes)

    def _seconds_of_final(self) -> float:
        """Of judging and timing the candidate again, on twice the data; what is broken takes longer to judge."""
        candidate = self.candidate()
        return 2 * sum(candidate.seconds.get(stage, 0.0) for stage in ("judge", "measure")) if candidate else 0.0

    def _longest(self, stage: str) -> float:
        return max((trial.seconds.get(stage, 0.0) for trial in self.trials), default=0.0)

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
        while (candidate := self.candidate()) is not None:
            self.watch("final measurement")
            chosen = self._soonest(candidate)
            artifact = self._built(chosen.recipe)
            try:
                fully = self._measured(artifact, quick=False, runtime=self._best_runtime())
            except FeatherweightError as error:
                return self._with_doubt(chosen, f"It could not be measured fully, nor on the test data: {error}")
            self.watch("")
            certain = self._with_test_doubt(dataclasses.replace(chosen, measurement=fully))
            self.trials[self.trials.index(chosen)] = certain
            if certain.accepted(self.budget) or not chosen.accepted(self.budget):
                self._turn_knobs(artifact)
                return certain
        return None

    def _soonest(self, candidate: Trial) -> Trial:
        """Of the accepted trials that cost least the one that is done first: the others were timed at other times."""
        accepted = [
            (self.budget.cost(t.measurement), t) for t in self.trials if t.measurement and t.accepted(self.budget)
        ]
        rivals = [trial for _, trial in sorted(accepted, key=lambda item: item[0])[:RETIMED]]
        there = [artifact for trial in rivals if (artifact := self._there(trial.recipe))]
        if self.budget.objective == "bytes" or len(there) < max(2, len(rivals)):
            return candidate
        try:
            first = soonest(there, self.workload, threads=self.settings.threads, batch=self.settings.batch)
        except FeatherweightError:  # whatever keeps one from running is said when it is measured
            return candidate
        return rivals[there.index(first)]

    def _turn_knobs(self, artifact: Artifact) -> None:
        """How the best runs with other threads or other batches: what it was chosen by need not be best for it."""
        self.watch("knobs")
        ways = knobs.settings(self.budget.objective, self.settings.threads, self.settings.batch)
        with contextlib.suppress(FeatherweightError):  # a batch may take more memory than there is
            self.knobs = knobs.timed(artifact, self.workload, list(ways))
        self.watch("")
        if self.knobs:
            best = knobs.best(self.knobs, self.budget.objective)
            self.progress.line(
                f"it runs best on {best.threads} threads with batches of {best.batch}: {best.latency_ms:.3g} ms, "
                f"{best.examples_per_s:.3g} inputs a second"
            )

    def _with_test_doubt(self, trial: Trial) -> Trial:
        """With a remark where the test data leave it open whether the drop is within the budget."""
        assert trial.measurement is not None
        upper, allowed = trial.measurement.test_drop_upper, self.budget.allowed(trial.measurement.original_score)
        if upper is None or upper <= allowed:
            return trial
        return self._with_doubt(
            trial, f"On the test data the drop may be {upper:.4g}, above the {allowed:.4g} that is allowed."
        )

    def _with_doubt(self, trial: Trial, doubt: str) -> Trial:
        assert trial.measurement is not None
        doubts = [*trial.measurement.doubts, " ".join(doubt.split())]
        return dataclasses.replace(trial, measurement=dataclasses.replace(trial.measurement, doubts=doubts))

    def _best_runtime(self) -> Artifact | None:
        """The fastest artifact that is not compressed."""
        plain = [trial for trial in self._plain() if trial.measurement]
        if not plain:
            return None
        fastest = min(plain, key=lambda t: t.measurement.latency_ms if t.measurement else math.inf)
        return self._built(fastest.recipe)

    def _plain(self) -> list[Trial]:
        return [t for t in self.trials if all(step.name() == "fold_batchnorm" for step in t.recipe.steps)]

    def show(self) -> None:
        """Writes what is known so far, so that a user can watch, and stop."""
        write_text_atomic(self.folder / RESULT, self._result(self.candidate(), UNFINISHED, interrupted=False).to_json())
        self.progress.saved(self.folder)

    def save(self, best: Trial | None, interrupted: bool) -> Result:
        """Writes what was found; of the artifacts only the best one's stays.

        Where nothing is at hand, what an earlier run found stays as it is; before the original is measured there is
        no result, and the folder stays free for another search.
        """
        self.watch("")
        accepted = best is not None and best.accepted(self.budget)
        result = self._result(best, "accepted" if accepted else "infeasible", interrupted)
        if best is not None:
            self._keep(best.recipe)
        path = self.folder / RESULT
        found_before = path.exists() and read_json(path).get("verdict") != UNFINISHED
        if best is not None or (self.original is not None and not found_before):
            write_text_atomic(path, result.to_json())
        self._sweep()
        for leftover in (self.folder / TRIALS).glob("*"):
            needed = interrupted and not leftover.with_suffix(".json").exists()  # checkpoints, and what is not timed
            if leftover.is_dir() and re.fullmatch(DIGEST, leftover.stem) and not needed:
                shutil.rmtree(leftover, ignore_errors=True)
        return result

    def _result(self, best: Trial | None, verdict: str, interrupted: bool) -> Result:
        return Result(
            verdict=verdict,
            budget=self.budget,
            baseline=self.original.measurement if self.original else None,
            best=best.measurement if best else None,
            frontier=frontier(measurements(self.trials), self.budget),
            rejected=[self._rejection(trial) for trial in self.trials if not trial.accepted(self.budget)],
            binding="" if best is not None and best.accepted(self.budget) else self._binding(best, interrupted),
            interrupted=interrupted,
            late=self.late,
            seconds=self.watch.seconds,
            folder=self.folder,
            knobs=self.knobs,
        )

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
