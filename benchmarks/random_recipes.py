"""Recipes drawn at random from the space that the search knows: does any beat what the search found?

    python benchmarks/random_recipes.py out/search/image-latency-0.01 examples/image.py [--count 50] [--seed 0]
        [--folder out/random_recipes] [--json out/random_recipes.json]

Each recipe removes a random share of the channels, a random number of blocks, and where sequences are read positions,
or computes blocks for groups of them (one in four does nothing of all that), is distilled for as long as shapes or as
finalists of the search are, in one of its three ways, and turned to numbers in one of its ways; all on the target of
the search's best. Each is measured as a trial is. It beats the search where it keeps to the budget and costs less than
the best by more than noise, and beats the frontier where no point of it is as cheap and as good, noise granted: for
latency two interval widths of the ratio, for the drop what its bound lies above it. Rows are written one by one, and
not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from featherweight import passes
from featherweight.artifact import build
from featherweight.candidates import DOUBLINGS, LARGEST_SHARE, LONG, SHORT, SHORTEST, TEACHINGS, Facts, Shape
from featherweight.errors import FeatherweightError
from featherweight.facts import facts_of
from featherweight.measure import Baseline, Measurement, measure
from featherweight.recipe import Recipe
from featherweight.strategy import rungs_of
from featherweight.trials import Budget
from featherweight.workload import Workload, load


@dataclass(frozen=True)
class Row:
    """One random recipe, or why there is no artifact of it."""

    recipe: str
    drop: float = 0.0
    drop_upper: float = 0.0
    cost: float = 0.0
    accepted: bool = False
    beats_best: bool = False
    beats_frontier: bool = False
    error: str = ""


def drawn(facts: Facts, target: str, count: int, seed: int) -> Iterator[Recipe]:
    """Different recipes, the same ones for a seed."""
    rng, seen = random.Random(seed), set()
    ways = [(), *rungs_of(facts), *facts.stored]
    if target in facts.bfloat16:
        ways += [(*way, passes.build("compute_bfloat16", {}, "this benchmark")) for way in ways]
    while len(seen) < count:
        numbers, teaching = rng.choice(ways), rng.choice(TEACHINGS)
        share = round(rng.uniform(0.05, LARGEST_SHARE), 2)
        shape = Shape(
            share * (rng.random() < 0.75 or not (facts.truncates or facts.merges)),
            rng.randrange(facts.blocks) if facts.blocks > 1 and rng.random() < 0.5 else 0,
            round(rng.uniform(0.05, SHORTEST), 2) if facts.truncates and rng.random() < 0.5 else 0.0,
            rng.randint(0, DOUBLINGS * facts.merges) if rng.random() < 0.5 else 0,
        )
        length = rng.choice((SHORT, LONG))
        plain = Recipe(facts.steps(*numbers), target)
        recipe = plain if rng.random() < 0.25 else facts.candidate(target, numbers, shape, length, teaching)
        if recipe.digest not in seen:
            seen.add(recipe.digest)
            yield recipe


class Searched:
    """What the search left in its folder."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        result = json.loads((folder / "result.json").read_text())
        stored = json.loads((folder / "baseline.json").read_text())["baseline"]
        self.budget = Budget(**result["budget"])
        self.best = Measurement.from_json(json.dumps(result["best"]))
        self.frontier = [Measurement.from_json(json.dumps(found)) for found in result["frontier"]]
        self.original = Baseline.from_json(json.dumps(stored), workload)

    def noise(self, found: Measurement) -> tuple[float, float]:
        """Of the cost as a share of it, and of the drop."""
        if self.budget.objective != "latency":
            return 0.0, found.drop_upper - found.drop
        width = (found.latency_ratio_high - found.latency_ratio_low) / found.latency_ratio
        return 2 * width, found.drop_upper - found.drop

    def row(self, recipe: Recipe, found: Measurement) -> Row:
        cost, (cost_noise, drop_noise) = self.budget.cost(found), self.noise(found)
        accepted = not self.budget.objection(found)
        as_good = [
            point
            for point in self.frontier
            if self.budget.cost(point) * (1 - cost_noise) <= cost and point.drop <= found.drop + drop_noise
        ]
        cheaper = cost < self.budget.cost(self.best) * (1 - cost_noise)
        return Row(recipe.to_yaml(), found.drop, found.drop_upper, cost, accepted, accepted and cheaper, not as_good)


def tried(recipe: Recipe, workload: Workload, searched: Searched, folder: Path) -> Row:
    place = folder / recipe.digest
    shutil.rmtree(place, ignore_errors=True)
    try:
        artifact = build(recipe, workload, place)
        timing = {"threads": searched.original.threads, "batch": searched.original.batch}
        return searched.row(recipe, measure(artifact, workload, searched.original, quick=True, **timing))
    except FeatherweightError as error:
        return Row(recipe.to_yaml(), error=str(error))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", type=Path, help="the folder of a finished search")
    parser.add_argument("workload", help="that it searched for")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("out/random_recipes"))
    parser.add_argument("--json", type=Path, default=Path("out/random_recipes.json"))
    chosen = parser.parse_args()
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    workload = load(chosen.workload)
    searched = Searched(chosen.search, workload)
    target = searched.best.target
    rows = [Row(**row) for row in json.loads(chosen.json.read_text())] if chosen.json.exists() else []
    known = {row.recipe for row in rows}
    for recipe in drawn(facts_of(workload, (target,)), target, chosen.count, chosen.seed):
        if recipe.to_yaml() not in known:
            rows.append(tried(recipe, workload, searched, chosen.folder))
            chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
            print(json.dumps(asdict(rows[-1])), flush=True)
    kept, better, beyond = (
        sum(getattr(row, name) for row in rows) for name in ("accepted", "beats_best", "beats_frontier")
    )
    print(
        f"of {len(rows)} recipes {kept} keep to the budget, {better} of them beat the best; {beyond} beat the frontier"
    )


if __name__ == "__main__":
    main()
