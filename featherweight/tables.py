"""What a search measures of a network beside its trials: each once, kept in its folder, a part of the strategy's facts.

Three tables: which bits do what harm to which layer, where bytes count; which layers int8 harms most, once int8 as a
whole loses too much; and what shapes would cost, once it is settled on which target and with which numbers they are
tried. A network of which one of them cannot be made is searched without it, and that is said. What is made of them is
`strategy`'s affair.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from featherweight import passes, shape_costs
from featherweight.allocation import Option, predicted_frontier
from featherweight.artifact import versions_of, write_text_atomic
from featherweight.candidates import Facts, Shape, shape_of
from featherweight.cost_table import Predicted, cost_table, write_predictions
from featherweight.damage_table import Entry, damage_table, damages, steps_of, suffers_most_from_factors
from featherweight.errors import FeatherweightError, LayerError, ProcessError
from featherweight.fragile import worst_first
from featherweight.making import Order, for_others, workload_of
from featherweight.pools import Pool
from featherweight.progress import Progress, Stopwatch
from featherweight.recipe import Recipe, compress_model
from featherweight.strategy import settled, struggling
from featherweight.trials import COSTS, DAMAGES, FRAGILE, SHAPES, Budget, Settings, Trial, read_json
from featherweight.workload import Workload

PARTS = 2  # of the table of damages, for each worker: what a lost one measured is measured again
Damages = Callable[[Sequence[Entry]], Iterable[Option]]
MOST_REVERTED = 0.5  # of the layers in int8 may be left in floats after all


class Tables:
    """Those of one search.

    Args:
        workload: of the search, as are all the others.
        budget: what may be lost, and what is made small.
        folder: where tables are kept, and read from where they were made for the same.
        settings: of the trials.
        progress: told where a table cannot be made.
        watch: of the time they take.
    """

    def __init__(
        self,
        workload: Workload,
        budget: Budget,
        folder: Path,
        settings: Settings,
        progress: Progress,
        watch: Stopwatch,
    ) -> None:
        self.workload, self.budget, self.folder, self.settings = workload, budget, folder, settings
        self.progress, self.watch = progress, watch
        self.whole: Trial | None = None  # of the whole network, with the numbers that shapes are tried with

    def with_few_bits(self, facts: Facts, pool: Pool) -> Facts:
        """With steps that store weights in few bits, from the least harmful to the smallest, where bytes count.

        What they do is measured by the workers of the pool.
        """
        if self.budget.objective != "bytes":
            return facts
        self.watch("damage")
        try:
            recipe = Recipe(facts.steps(), facts.targets[0])
            model, _ = compress_model(recipe, self.workload)
            here = functools.partial(damages, model, self.workload)
            measured = here if pool.here else functools.partial(self._shared_out, recipe, pool, here)
            table = damage_table(model, self.folder / DAMAGES, self._key(), measured)
        except LayerError as error:
            self.progress.line(f"no damage table: {error}")
            return facts
        finally:
            self.watch("")
        ways = [(steps, choices) for choices in predicted_frontier(table) if (steps := steps_of(choices))]
        thinned = tuple(steps for steps, choices in ways if suffers_most_from_factors(choices))
        return dataclasses.replace(facts, stored=tuple(steps for steps, _ in ways), thinned=thinned)

    def with_fragile_layers(self, facts: Facts, trials: Sequence[Trial]) -> Facts:
        """With the layers that int8 suffers from most, once it is known that int8 as a whole loses too much."""
        if facts.fragile or (target := struggling(facts, self.budget, trials)) is None:
            return facts
        self.watch("fragile")
        path, key = self.folder / FRAGILE, self._key()
        stored = read_json(path) if path.exists() else {}
        if stored.get("key") != key:
            stored = {"key": key, "layers": self._worst_first(facts, target)}
            write_text_atomic(path, json.dumps(stored, indent=1) + "\n")
        self.watch("")
        worst = tuple(map(str, stored["layers"]))
        return dataclasses.replace(facts, fragile=worst[: int(MOST_REVERTED * len(worst))])

    def with_paces(self, facts: Facts, trials: Sequence[Trial]) -> Facts:
        """With what shapes would cost, once it is settled for which target and with which numbers they are tried."""
        found = None if self.whole or self.budget.objective == "bytes" else settled(facts, self.budget, trials)
        if found is None:
            return facts
        target, numbers = found
        recipe = Recipe(facts.steps(*numbers), target)
        self.whole = next((trial for trial in trials if trial.recipe == recipe), None)
        if self.whole is None or self.whole.measurement is None:
            return facts
        latency = self.whole.measurement.latency_ms
        precision = "int8" if any(step.name() == "quantize_static" for step in numbers) else "fp32"
        costs = self._shape_costs(facts, target, precision, latency)
        return dataclasses.replace(facts, paces={shape: cost / latency for shape, cost in costs.items()})

    def compare(self, facts: Facts, trials: Sequence[Trial]) -> None:
        """Writes what shapes were predicted to take beside what they take."""
        if not facts.paces or self.whole is None or self.whole.measurement is None:
            return
        latency = self.whole.measurement.latency_ms
        found = [
            Predicted(trial.recipe.digest, facts.pace(shape) * latency, trial.measurement.latency_ms)
            for trial in trials
            if trial.measurement is not None and (shape := shape_of(facts, trial.recipe)) is not None
        ]
        write_predictions(self.folder / COSTS, found)

    def _shared_out(self, recipe: Recipe, pool: Pool, here: Damages, entries: Sequence[Entry]) -> Iterator[Option]:
        """What entries do, by parts that workers measure, each of the workload as it loads it; else this process."""
        fingerprint = self.settings.fingerprint
        order = for_others(Order(recipe.to_yaml(), self.folder), self.workload, fingerprint, pool.threads)
        count = min(len(entries), PARTS * pool.workers)
        by_way = sorted(entries, key=lambda entry: entry[1])  # some take far longer: each part gets as many of them
        parts = [by_way[index::count] for index in range(count)]
        going = [pool.submit(_damages_elsewhere, order, part) for part in parts]
        for part, future in zip(parts, going, strict=True):
            try:
                yield from future.result()
            except ProcessError:  # lost again and again
                yield from here(part)

    def _key(self) -> dict[str, object]:
        return {"fingerprint": self.settings.fingerprint, "versions": versions_of("eager")}

    def _worst_first(self, facts: Facts, target: str) -> list[str]:
        widest = passes.build("quantize_static", {"range": "minmax"}, "the search")
        try:
            rounded, exact = (
                compress_model(Recipe(facts.steps(*steps), target), self.workload)[0] for steps in ((widest,), ())
            )
            return worst_first(rounded, exact, self.workload)
        except FeatherweightError as error:
            self.progress.line(f"layers are not told apart: {error}")
            return []

    def _shape_costs(self, facts: Facts, target: str, precision: str, latency_ms: float) -> dict[Shape, float]:
        """Milliseconds by shape: from the folder where they lie there, or as the cost table of the machine says."""
        key = {"precision": precision, "latency_ms": latency_ms, "target": target, "versions": versions_of(target)}
        if known := shape_costs.stored(self.folder / SHAPES, key):
            return known
        threads, batch = self.settings.threads, self.settings.batch
        self.watch("costs")
        try:
            table = cost_table(self.workload, target, threads=threads, batch=batch, precisions=(precision,))
            found = shape_costs.predicted(self.workload, facts, table, precision, latency_ms)
        except FeatherweightError as error:
            self.progress.line(f"no predictions: {error}")
            return {}
        finally:
            self.watch("")
        shape_costs.store(self.folder / SHAPES, key, found)
        return found


def _damages_elsewhere(order: Order, entries: Sequence[Entry]) -> list[Option]:
    """`damages` in a process that knows nothing of the search.

    Raises:
        WorkloadError, TargetError: another workload is found here, or other versions.
        LayerError: as `damages` says.
    """
    workload, _ = workload_of(order)
    model, _ = compress_model(Recipe.from_yaml(order.recipe), workload)
    return list(damages(model, workload, entries))
